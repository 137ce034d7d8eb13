"""Inner loops compiled by Numba.

A kernel is compiled for one signature when its module is imported, and the result is kept on disk, so no
request waits for a compiler. It does not check bounds: its caller does. It keeps Python's lock, because it
takes microseconds, and a thread that gives the lock up may wait milliseconds for it (decision 0053).
"""

import logging
from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np
from numba import types

F = TypeVar("F", bound=Callable[..., object])
_log = logging.getLogger(__name__)
_not_kept: list[str] = []
"""Why compiled loops cannot be kept, if they cannot: said once."""


def array(of: type, dimensions: int = 1, *, writable: bool = False) -> types.Type:
    """The type of a contiguous array of a scalar type of NumPy, read-only by default."""
    return types.Array(numba.from_dtype(np.dtype(of)), dimensions, "C", readonly=not writable)


def kernel(*signature: types.Type | type, reorder: bool = False) -> Callable[[F], F]:
    """Compile a function of arguments of these types, each from `array` or a scalar type of NumPy.

    With `reorder` it may add numbers in any order, as fast sums need.
    """
    parameters = tuple(
        one if isinstance(one, types.Type) else numba.from_dtype(np.dtype(one)) for one in signature
    )

    def compiled(function: F) -> F:
        def build(*, cache: bool) -> F:
            fast = {"reassoc", "contract"} if reorder else False
            decorate = numba.njit([parameters], cache=cache, error_model="numpy", fastmath=fast)
            return cast(F, decorate(function))

        if not _not_kept:
            try:
                return build(cache=True)
            except RuntimeError as error:  # neither the package nor the user's cache folder can be written
                _not_kept.append(str(error))
                _log.warning(
                    "compiled loops are not kept, so each start takes longer: set NUMBA_CACHE_DIR to a "
                    "folder that this process can write (%s)",
                    error,
                )
        return build(cache=False)

    return compiled
