"""Where compiled loops are kept on disk, by Numba's own cache with three changes.

Numba's key is the text of the module that has a kernel. Here it covers the options of `kernels.py` as well,
and other code never shares a file with this code, so that an interrupted upgrade leaves nothing wrong behind.
A file that cannot be read or written costs time, and is no error. A folder that has compiled loops may be
read-only.
"""

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from numba.core import caching
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache

_DIGEST_DIGITS = 12
_OPTIONS = Path(__file__).with_name("kernels.py")
_log = logging.getLogger(__name__)


def cache_of(function: Callable[..., object]) -> FunctionCache | NullCache:
    """The cache of one kernel; one that keeps nothing if no folder can be written."""
    try:
        return _Cache(function)
    except RuntimeError:  # of Numba, for each kernel
        _warn_once("no folder can be written")
        return NullCache()


class _Locator(caching._CacheLocator):
    """A folder that has compiled loops need not be writable."""

    def ensure_cache_path(self) -> None:
        path = self.get_cache_path()
        if not any(Path(path).glob("*.nbi")):
            super().ensure_cache_path()


class _SettingFolder(_Locator, caching.UserProvidedCacheLocator):
    """The folder `NUMBA_CACHE_DIR`."""


class _ModuleFolder(_Locator, caching.InTreeCacheLocator):
    """The folder `__pycache__` of the module."""


class _UserFolder(_Locator, caching.UserWideCacheLocator):
    """The cache folder of the user."""


class _Files(CompileResultCacheImpl):
    """File names with a digest of the code: other code never shares a file."""

    _locator_classes = [_SettingFolder, _ModuleFolder, _UserFolder]  # noqa: RUF012 - as in the class above

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)
        code = Path(function.__code__.co_filename).read_bytes() + _OPTIONS.read_bytes()
        self._filename_base += f"-{hashlib.sha256(code).hexdigest()[:_DIGEST_DIGITS]}"


class _Cache(FunctionCache):
    """What is kept of one kernel; a file that cannot be read or written only costs time."""

    _impl_class = _Files

    def load_overload(self, sig: object, target_context: object) -> object:
        try:
            overload = super().load_overload(sig, target_context)
        except Exception as error:  # an interrupted write leaves anything
            _log.warning("a compiled loop cannot be read and is compiled again (%r)", error)
            overload = None
            self._empty()
        if overload is None:
            _announce()
        return overload

    def save_overload(self, sig: object, data: object) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(str(error.strerror))

    def _empty(self) -> None:
        """Replace an index that may be broken; if that cannot be written, keep nothing."""
        try:
            self.flush()
        except OSError as error:
            self.disable()
            _warn_once(str(error.strerror))


@functools.cache
def _announce() -> None:
    _log.info("compiling inner loops, once for this installation: some seconds")


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning(
        "compiled loops are not kept, so each start takes longer: set NUMBA_CACHE_DIR to a folder that this "
        "process can write (%s)",
        reason,
    )
