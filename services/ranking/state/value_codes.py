"""The first value of a text attribute of each item, and how popular each value is."""

from collections.abc import Mapping

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.accumulator import Scratch
from services.core.growing_array import appended
from services.core.kernels import array, kernel
from services.core.ranges import concatenated
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.tick_cache import TickCache

_CODES, _ROWS = array(np.int32), array(np.int64)


class ValueCodes:
    """An attribute as of one tick.

    `codes` int32 (N,), -1 for none. `total` float64 (V,) is the weight of last week's interactions with the
    items of each value, `share` float64 (V,) its part of all. `rows_of` gives the rows of a value.
    """

    def __init__(self, codes: np.ndarray, vocabulary: Mapping[str, int], popularity: np.ndarray) -> None:
        self._codes, self.vocabulary, self.count = codes.astype(np.int32), vocabulary, len(codes)
        valid = codes >= 0
        total = np.bincount(codes[valid], popularity[valid], int(codes.max(initial=-1)) + 1)
        self.total = total.astype(np.float64)  # of no codes, NumPy counts in integers
        self.share = self.total / max(float(self.total.sum()), 1.0)
        self._first_count, self._scratch = len(codes), Scratch()
        order = np.argsort(codes, kind="stable")
        self._rows = order[np.count_nonzero(~valid) :]
        self._starts = np.searchsorted(codes[self._rows], np.arange(len(self.total) + 1))

    @property
    def codes(self) -> np.ndarray:
        """See the class."""
        return self._codes[: self.count]

    def rows_of(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of some values, distinct codes int64 (K,), and the index of each row's value in them."""
        known = np.flatnonzero((values >= 0) & (values < len(self._starts) - 1))
        starts, ends = self._starts[values[known]], self._starts[values[known] + 1]
        sizes = ends - starts
        index = np.repeat(known, sizes)
        rows = self._rows[concatenated(starts, sizes)]
        new = self.codes[self._first_count :]
        if len(new):
            new_row, new_index = np.nonzero(new[:, None] == values[None, :])
            rows = np.concatenate([rows, new_row + self._first_count])
            index = np.concatenate([index, new_index])
        return rows, index

    def share_in(self, reference: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The share of the value of each of rows (C,) among the rows `reference`, int64 (R,): float32 (C,).

        NaN without a reference, and for a row without a value.
        """
        reference, rows = np.ascontiguousarray(reference), np.ascontiguousarray(rows)
        return _share_in(self.codes, reference, rows, self._scratch.of(len(self.total)))

    def of_values(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The element of `values`, float64 (V,), for the value of each of rows (C,); NaN for none."""
        return _of_values(self.codes, values, np.ascontiguousarray(rows))

    def append(self, codes: np.ndarray) -> None:
        """Add rows, which nobody has interacted with."""
        more = int(codes.max(initial=-1)) + 1 - len(self.total)
        if more > 0:
            self.total = np.append(self.total, np.zeros(more))
            self.share = np.append(self.share, np.zeros(more))
        self._codes = appended(self._codes, self.count, codes.astype(np.int32))
        self.count += len(codes)  # last: a reader sees complete rows


@kernel(_CODES, _ROWS, _ROWS, array(np.int32, writable=True))
def _share_in(codes: np.ndarray, reference: np.ndarray, rows: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    result = np.full(len(rows), np.nan, np.float32)
    if not len(reference):
        return result
    distinct, counts, count = np.empty(len(reference), np.int64), np.zeros(len(reference)), 0
    for row in reference:
        code = codes[row]
        if code < 0:
            continue
        place = scratch[code]
        if place < 0 or place >= count or distinct[place] != code:
            place = count
            scratch[code], distinct[place] = place, code
            count += 1
        counts[place] += 1
    for index in range(len(rows)):
        code = codes[rows[index]]
        if code >= 0:
            place = scratch[code]
            is_known = 0 <= place < count and distinct[place] == code
            result[index] = counts[place] / len(reference) if is_known else 0
    return result


@kernel(_CODES, array(np.float64), _ROWS)
def _of_values(codes: np.ndarray, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    result = np.empty(len(rows), np.float32)
    for index in range(len(rows)):
        code = codes[rows[index]]
        result[index] = values[code] if code >= 0 else np.nan
    return result


class AttributeValues:
    """The value codes of the text attributes of one item table, as of the latest tick."""

    def __init__(self, table: ItemTable) -> None:
        self._table = table
        self._by_name: dict[str, TickCache[ValueCodes]] = {}

    def get(self, attribute: str, stats: ItemStats) -> ValueCodes | None:
        """The values of an attribute, None if no item has it; it may have more rows than `stats`.

        As of the time when they are first used or prepared: the change feed may write other values later.
        """
        if attribute not in self._table.text_attributes:
            return None
        cache = self._by_name.get(attribute)
        if cache is None:
            cache = self._by_name[attribute] = TickCache(
                lambda stats: self._compute(attribute, stats),
                lambda values, stats: self._extend(attribute, values, stats),
            )
        return cache.get(stats)

    def _compute(self, attribute: str, stats: ItemStats) -> ValueCodes:
        codes, vocabulary = self._codes(attribute, np.arange(stats.length))
        return ValueCodes(codes, vocabulary, stats.popular[:, 2])

    def _extend(self, attribute: str, values: ValueCodes, stats: ItemStats) -> bool:
        codes, vocabulary = self._codes(attribute, np.arange(values.count, stats.length))
        if vocabulary is not values.vocabulary:  # codes have changed
            return False
        values.append(codes)
        return True

    def _codes(self, attribute: str, rows: np.ndarray) -> tuple[np.ndarray, Mapping[str, int]]:
        column = self._table.texts_of_rows(attribute, rows)
        if column is None:  # its last item was changed meanwhile
            return np.full(len(rows), -1, np.int32), {}
        return column[0][:, 0], column[1]
