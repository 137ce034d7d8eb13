"""The row of each item hash, for one look-up or for thousands."""

from collections.abc import Iterable

import numpy as np

_MIN_SORTED = 64
_FEW = 32  # look-ups for which a dictionary is faster


class HashRows:
    """Rows by item hash. One thread adds; any thread reads. A hash never gets another row."""

    def __init__(self) -> None:
        self._row_of: dict[int, int] = {}
        self._sorted = np.empty(0, np.int64), np.empty(0, np.int64)

    def get(self, item_hash: int) -> int | None:
        """The row of a hash, None for an unknown one."""
        return self._row_of.get(item_hash)

    def add(self, item_hash: int, row: int) -> None:
        """Add a hash."""
        self._row_of[item_hash] = row

    def items(self) -> list[tuple[int, int]]:
        """Every hash and its row."""
        return list(self._row_of.items())

    def rows(self, item_hashes: Iterable[int] | np.ndarray) -> np.ndarray:
        """The row of each hash, int64; -1 for an unknown one."""
        if not isinstance(item_hashes, np.ndarray):
            item_hashes = np.fromiter(item_hashes, np.int64)
        hashes, rows = self._sorted
        if len(item_hashes) < _FEW or not len(hashes):
            return self._looked_up(item_hashes)
        positions = np.minimum(np.searchsorted(hashes, item_hashes), len(hashes) - 1)
        result = np.where(hashes[positions] == item_hashes, rows[positions], -1)
        if len(hashes) < len(self._row_of) and (missing := np.flatnonzero(result < 0)).size:
            result[missing] = self._looked_up(item_hashes[missing])
        return result

    def sort(self) -> None:
        """Prepare for look-ups of many hashes; only the thread that adds may call this."""
        count = len(self._row_of)
        if count < len(self._sorted[0]) * 65 // 64 + _MIN_SORTED:
            return
        hashes = np.fromiter(self._row_of, np.int64, count)
        rows = np.fromiter(self._row_of.values(), np.int64, count)
        order = np.argsort(hashes)
        self._sorted = hashes[order], rows[order]

    def _looked_up(self, item_hashes: np.ndarray) -> np.ndarray:
        get = self._row_of.get
        return np.fromiter((get(value, -1) for value in item_hashes.tolist()), np.int64, len(item_hashes))
