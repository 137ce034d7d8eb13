"""The row of each item hash, for one look-up or for thousands."""

from collections.abc import Iterable
from itertools import repeat

import numpy as np

from services.core.kernels import array, kernel

_MIN_SLOTS = 256
_SPARE = 3  # slots for each hash when the table is made; it is made again when half are taken
_EMPTY = -1


class HashRows:
    """Rows by item hash. One thread adds; any thread reads. A hash never gets another row.

    Look-ups of many hashes use a table with open addressing and linear probing (Knuth, The Art of Computer
    Programming, volume 3, 6.4): for 2,000 of 105,000 hashes that takes 5 µs, a binary search 240.
    """

    def __init__(self) -> None:
        self._row_of: dict[int, int] = {}
        self._added: list[int] = []  # not in the table yet
        self._table = _Table(_MIN_SLOTS)

    @classmethod
    def of(cls, item_hashes: np.ndarray) -> "HashRows":
        """Rows 0, 1, … of different hashes, int64 (N,)."""
        rows = cls()
        rows._row_of = dict(zip(item_hashes.tolist(), range(len(item_hashes)), strict=True))
        rows._table = _Table(max(_SPARE * len(item_hashes), _MIN_SLOTS))
        rows._table.put(item_hashes, np.arange(len(item_hashes)))
        return rows

    def get(self, item_hash: int) -> int | None:
        """The row of a hash, None for an unknown one."""
        return self._row_of.get(item_hash)

    def add(self, item_hash: int, row: int) -> None:
        """Add a hash."""
        self._row_of[item_hash] = row
        self._added.append(item_hash)

    def items(self) -> list[tuple[int, int]]:
        """Every hash and its row."""
        return list(self._row_of.items())

    def rows(self, item_hashes: Iterable[int] | np.ndarray) -> np.ndarray:
        """The row of each hash, int64; -1 for an unknown one."""
        if not isinstance(item_hashes, np.ndarray):
            item_hashes = np.fromiter(item_hashes, np.int64)
        table = self._table
        count = table.count  # before the look-up: hashes that are added meanwhile may be missed
        result = table.rows_of(item_hashes)
        if count < len(self._row_of) and (missing := np.flatnonzero(result < 0)).size:
            result[missing] = self._looked_up(item_hashes[missing])
        return result

    def index(self) -> None:
        """Prepare for look-ups of many hashes; only the thread that adds may call this."""
        if not self._added:
            return
        count = len(self._row_of)
        if 2 * count > self._table.slots:
            table = _Table(_SPARE * count)
            table.put(
                np.fromiter(self._row_of, np.int64, count), np.fromiter(self._row_of.values(), np.int64)
            )
            self._table = table
        else:
            added = np.array(self._added, np.int64)
            self._table.put(added, self._looked_up(added))
        self._added = []

    def _looked_up(self, item_hashes: np.ndarray) -> np.ndarray:
        rows = map(self._row_of.get, item_hashes.tolist(), repeat(-1))
        return np.fromiter(rows, np.int64, len(item_hashes))


class _Table:
    """The low bits of a hash give its first slot.

    A look-up goes from there to the next slots until it finds the hash or an empty slot.
    """

    def __init__(self, min_slots: int) -> None:
        self.slots, self.count = 1 << max(min_slots - 1, 1).bit_length(), 0
        self._hashes = np.zeros(self.slots, np.int64)
        self._rows = np.full(self.slots, _EMPTY, np.int32)

    def put(self, hashes: np.ndarray, rows: np.ndarray) -> None:
        """Add hashes that are not in the table."""
        slots = hashes & (self.slots - 1)
        pending = np.arange(len(hashes))
        while len(pending):
            free = np.flatnonzero(self._rows[slots[pending]] == _EMPTY)
            taken, first = np.unique(slots[pending[free]], return_index=True)
            placed = pending[free[first]]
            self._hashes[taken] = hashes[placed]
            self._rows[taken] = rows[placed]  # last: a reader takes a slot with a row for complete
            waiting = np.ones(len(pending), bool)
            waiting[free[first]] = False
            pending = pending[waiting]
            slots[pending] = (slots[pending] + 1) & (self.slots - 1)
        self.count += len(hashes)

    def rows_of(self, hashes: np.ndarray) -> np.ndarray:
        """The row of each hash, int64; -1 for one that is not in the table."""
        return _rows_of(np.ascontiguousarray(hashes, np.int64), self._hashes, self._rows)


@kernel(array(np.int64), array(np.int64), array(np.int32))
def _rows_of(hashes: np.ndarray, slot_hashes: np.ndarray, slot_rows: np.ndarray) -> np.ndarray:
    """The row of each hash, int64; -1 for none."""
    result = np.empty(len(hashes), np.int64)
    mask = len(slot_hashes) - 1
    for index in range(len(hashes)):
        slot = hashes[index] & mask
        row = slot_rows[slot]
        while row != _EMPTY and slot_hashes[slot] != hashes[index]:
            slot = (slot + 1) & mask
            row = slot_rows[slot]
        result[index] = row
    return result
