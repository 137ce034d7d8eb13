"""Arrays with a row for each row of an item table, computed again when the item changes."""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.growing_array import with_length

_ROWS_AT_ONCE = 4096


class RowArrays:
    """Arrays over the rows of a table, which may grow and change; any thread may read them.

    `compute` gives, for rows int64 (R,), one float32 (R, W) for each of the `widths`. Changed rows are
    written in place.
    """

    def __init__(
        self,
        table: ItemTable,
        widths: Sequence[int],
        compute: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    ) -> None:
        self._table, self._compute, self._lock = table, compute, threading.Lock()
        self._version, self._length = -1, 0
        self._arrays = tuple(np.empty((0, width), np.float32) for width in widths)

    def current(self) -> tuple[np.ndarray, ...]:
        """The arrays, of at least all rows of the table."""
        if self._version != self._table.version or self._length < self._table.length:
            with self._lock:
                self._refresh()
        return self._arrays

    def _refresh(self) -> None:
        length = self._table.length
        rows, version = self._table.changed_since(self._version)
        capacity = max(length, int(rows.max(initial=-1)) + 1)
        arrays = tuple(with_length(values, capacity) for values in self._arrays)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            batch = rows[start : start + _ROWS_AT_ONCE]
            for values, of_batch in zip(arrays, self._compute(batch), strict=True):
                values[batch] = of_batch
        self._arrays, self._version, self._length = arrays, version, length
