"""Masks over all rows of an item table, kept until the table or the time makes them wrong."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np

_CAPACITY = 32
_EARLIEST, _LATEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


class _Availability(NamedTuple):
    """A mask that holds for one version of the table, from a time until another, excluded."""

    version: int
    since: int
    until: int
    mask: np.ndarray


class MaskCache:
    """Read-only masks, bool (N,), of one table; any thread may use it."""

    def __init__(self) -> None:
        self._available: _Availability | None = None
        self._by_key: OrderedDict[Hashable, tuple[int, np.ndarray]] = OrderedDict()

    def available(
        self, version: int, time: int, columns: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """Which rows are available at a time, in microseconds since 1970.

        `columns` gives which rows are live, bool (N,), and their windows, int64 (N, 2).
        """
        cached = self._available
        if cached is None or cached.version != version or not cached.since <= time < cached.until:
            live, window = columns()
            mask = live & (window[:, 0] <= time) & (time < window[:, 1])
            mask.flags.writeable = False
            bounds = window.ravel()
            since = int(bounds[bounds <= time].max(initial=_EARLIEST))
            until = int(bounds[bounds > time].min(initial=_LATEST))
            self._available = cached = _Availability(version, since, until, mask)
        return cached.mask

    def get(self, version: int, key: Hashable, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The mask of a key, as of a version of the table."""
        cached = self._by_key.get(key)
        if cached is None or cached[0] != version:
            mask = compute()
            mask.flags.writeable = False
            self._by_key[key] = cached = version, mask
            while len(self._by_key) > _CAPACITY:
                try:
                    self._by_key.popitem(last=False)
                except KeyError:  # another thread was faster
                    break
        return cached[1]
