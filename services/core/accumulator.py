"""Sums of values by key, in time that depends on the number of values and not on the range of the keys."""

import threading

import numpy as np


class Accumulator:
    """Sums by key, where keys are indices below some size; any thread may use it.

    Each thread has scratch memory of the size of the largest range that it saw.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def sums(self, keys: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct keys, int64 (K,), in no order, and the sum of the values of each, float64 (K,).

        `keys` int (N,) are from 0 to `size` - 1, `values` float (N,).
        """
        first, group = self._groups(keys, size)
        return keys[first].astype(np.int64), np.bincount(group, values, len(first))

    def distinct(self, keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct keys, int64 (K,), in no order, and the index of each key among them, int64 (N,)."""
        first, group = self._groups(keys, size)
        return keys[first].astype(np.int64), group

    def indices(self, keys: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
        """The index in `keys`, distinct int (K,), -1 for none, of each of `values`, int (N,): int64, or -1.

        Keys and values are below `size`; keys below 0 equal no value.
        """
        scratch = self._scratch(size + 1)
        used = np.flatnonzero(keys >= 0)
        scratch[keys[used]] = used
        position = scratch[values].astype(np.int64)
        # The memory of other values is arbitrary.
        valid = (position >= 0) & (position < len(keys))
        valid[valid] = keys[position[valid]] == values[valid]
        return np.where(valid, position, -1)

    def _groups(self, keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """One position of each distinct key, int64 (K,), and the index of each key in it, int64 (N,)."""
        scratch = self._scratch(size)
        positions = np.arange(len(keys), dtype=np.int32)
        # Of equal keys one position stays, whatever the memory held before: it need not be cleared.
        scratch[keys] = positions
        owner = scratch[keys]
        first = np.flatnonzero(owner == positions)
        scratch[keys[first]] = np.arange(len(first), dtype=np.int32)
        return first, scratch[keys].astype(np.int64)

    def _scratch(self, size: int) -> np.ndarray:
        scratch: np.ndarray | None = getattr(self._local, "scratch", None)
        if scratch is None or len(scratch) < size:
            scratch = self._local.scratch = np.zeros(max(size, 1024) * 5 // 4, np.int32)
        return scratch
