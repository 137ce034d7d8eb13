"""Sums of values by key, in time that depends on the number of values and not on the range of the keys."""

import threading

import numpy as np

from services.core.kernels import array, kernel

_INTEGERS, _SCRATCH = array(np.int64), array(np.int32, writable=True)


class Scratch:
    """Memory of a thread for kernels, one integer by key; what it holds at first is arbitrary.

    A kernel writes positions in a list of keys there, and takes an entry for valid if that list has its key.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def of(self, size: int) -> np.ndarray:
        """Memory for keys below `size`, int32."""
        memory: np.ndarray | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < size:
            memory = self._local.memory = np.zeros(max(size, 1024) * 5 // 4, np.int32)
        return memory


class Accumulator:
    """Sums by key, where keys are indices below some size; any thread may use it.

    Each thread has scratch memory of the size of the largest range that it saw.
    """

    def __init__(self) -> None:
        self._scratch = Scratch()

    def sums(self, keys: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct keys, int64 (K,), in their first order, and the sum of the values of each, float64.

        `keys` int (N,) are from 0 to `size` - 1, `values` float (N,).
        """
        distinct, index = self.distinct(keys, size)
        return distinct, np.bincount(index, values, len(distinct))

    def distinct(self, keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct keys, int64 (K,), in their first order, and the index of each key, int64 (N,)."""
        return _distinct(_integers(keys), self._scratch.of(size))


def first_occurrences(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys, in their first order, and the index of each key in these, both int64.

    `keys` int64 (N,) may be any numbers whose low bits differ, such as hashes.
    """
    return _first_occurrences(np.ascontiguousarray(keys, np.int64))


def _integers(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.int64)


@kernel(_INTEGERS, _SCRATCH)
def _distinct(keys: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, places, count = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64), 0
    for index in range(len(keys)):
        key = keys[index]
        place = scratch[key]
        if place < 0 or place >= count or distinct[place] != key:
            place = count
            scratch[key], distinct[place] = place, key
            count += 1
        places[index] = place
    return distinct[:count].copy(), places


@kernel(_INTEGERS)
def _first_occurrences(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slots = 16
    while slots < 2 * len(keys):
        slots *= 2
    places = np.full(slots, -1, np.int64)  # an open addressing table of the distinct keys
    distinct, index, count = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64), 0
    for position in range(len(keys)):
        slot = keys[position] & (slots - 1)
        while places[slot] >= 0 and distinct[places[slot]] != keys[position]:
            slot = (slot + 1) & (slots - 1)
        if places[slot] < 0:
            places[slot], distinct[count] = count, keys[position]
            count += 1
        index[position] = places[slot]
    return distinct[:count].copy(), index
