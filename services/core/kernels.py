"""Inner loops compiled by Numba.

A kernel is compiled for one signature when its module is imported, and the result is kept on disk, so no
request waits for a compiler. It does not check bounds: its caller does. It keeps Python's lock: it takes
microseconds, and giving the lock up made no difference (decision 0053).

A kernel uses constants and kernels of its own module only: what is kept depends on the text of that file.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types

from services.core.kernel_cache import cache_of

F = TypeVar("F", bound=Callable[..., object])


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

    def decorate(function: F) -> F:
        fast = {"reassoc", "contract"} if reorder else False
        dispatcher: Any = numba.njit(error_model="numpy", fastmath=fast)(function)
        if dispatcher is function:  # with NUMBA_DISABLE_JIT
            return function
        dispatcher._cache = cache_of(function)
        dispatcher.compile(parameters)
        dispatcher.disable_compile()
        return cast(F, dispatcher)

    return decorate
