"""The similarity of items by their texts: values of attributes, words of titles.

Cosine of TF-IDF vectors (Salton and Buckley, 1988) over the catalog.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.accumulator import Scratch
from services.core.growing_array import appended
from services.core.kernels import array, kernel
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.tick_cache import TickCache

_MIN_LENGTH = 1e-6
_CODES, _ROWS, _NUMBERS = array(np.int32, 2), array(np.int64), array(np.float64)
_SCRATCH = array(np.int32, writable=True)

Column = tuple[np.ndarray, Mapping[str, int]]
"""The codes of an attribute, int (R, W), -1 for no term, and the code of each term."""
ReadColumns = Callable[[np.ndarray], Sequence[Column]]
"""Gives the attributes of rows, int64 (R,)."""


class Terms:
    """The terms of the items of a catalog as of one time.

    `codes` int32 (N, W) are the terms of each row, all attributes in one range of codes; the last code,
    `missing`, stands for no term. `squared_idf` float64 (V + 1,) has the squared inverse document frequency
    of each code, 0 for `missing`. `length` float64 (N,) are the lengths of the vectors.
    """

    def __init__(self, columns: Sequence[Column], count: int) -> None:
        self._starts, start, parts = list[tuple[int, int]](), 0, list[np.ndarray]()
        self._vocabularies = [vocabulary for _, vocabulary in columns]
        for codes, _ in columns:
            used, frequency = np.unique(codes[codes >= 0], return_counts=True)
            squared_idf = np.zeros(int(used.max(initial=-1)) + 1)
            squared_idf[used] = np.log(max(len(codes), 1) / frequency) ** 2
            self._starts.append((start, len(squared_idf)))
            start += len(squared_idf)
            parts.append(squared_idf)
        self.missing = start
        self.squared_idf = np.concatenate([*parts, np.zeros(1)])
        self._widths = [codes.shape[1] for codes, _ in columns]
        self.count = count
        self._codes = self._flat(columns, self.count)
        self._lengths = self._length_of(self._codes)

    @property
    def codes(self) -> np.ndarray:
        """See the class."""
        return self._codes[: self.count]

    @property
    def length(self) -> np.ndarray:
        """See the class."""
        return self._lengths[: self.count]

    def append(self, columns: Sequence[Column], until: int) -> bool:
        """Add rows up to `until`; terms that no earlier row has, or past the width, count as none.

        False, and no change, if the codes of terms have changed since.
        """
        vocabularies = [vocabulary for _, vocabulary in columns]
        if list(map(id, vocabularies)) != list(map(id, self._vocabularies)):
            return False
        codes = self._flat(columns, until - self.count)
        lengths = appended(self._lengths, self.count, self._length_of(codes))
        self._codes = appended(self._codes, self.count, codes)
        self._lengths = lengths
        self.count = until  # last: a reader sees complete rows
        return True

    def _flat(self, columns: Sequence[Column], count: int) -> np.ndarray:
        flat = np.full((count, sum(self._widths)), self.missing, np.int32)
        at = 0
        for (codes, _), width, (start, size) in zip(columns, self._widths, self._starts, strict=True):
            used = codes[:, :width]
            known = (used >= 0) & (used < size)
            flat[:, at : at + used.shape[1]] = np.where(known, used + start, self.missing)
            at += width
        return flat

    def _length_of(self, codes: np.ndarray) -> np.ndarray:
        total = self.squared_idf[codes].sum(1) if codes.size else np.zeros(len(codes))
        return np.maximum(np.sqrt(total), _MIN_LENGTH)


@dataclass(frozen=True)
class TermQuery:
    """The terms of weighted items: `codes` int64 (K,), and `weights` float64 (K,), times the squared IDF.

    The sum of these weights over the terms of a row, divided by the row's length and by `total`, is its
    similarity to the items.
    """

    codes: np.ndarray
    weights: np.ndarray
    total: float


class TfidfSimilarity:
    """Similarity over the rows of one item table; any thread may use it."""

    def __init__(self, read: ReadColumns) -> None:
        self._cache = TickCache(
            lambda stats: Terms(read(np.arange(stats.length)), stats.length),
            lambda terms, stats: terms.append(read(np.arange(terms.count, stats.length)), stats.length),
        )
        self._scratch = Scratch()

    @classmethod
    def of_attributes(cls, table: ItemTable, names: Sequence[str]) -> "TfidfSimilarity":
        """By the values of text attributes; one may have several."""

        def read(rows: np.ndarray) -> list[Column]:
            columns = (table.texts_of_rows(name, rows) for name in names)
            return [column for column in columns if column is not None]

        return cls(read)

    @classmethod
    def of_titles(cls, table: ItemTable) -> "TfidfSimilarity":
        """By the words of titles: names of ranges and models, which text vectors represent poorly."""
        return cls(lambda rows: [table.words_of_rows(rows)])

    def to(self, seeds: np.ndarray, weights: np.ndarray, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """The similarity of rows (C,) to weighted seeds (S,): the weighted mean of cosines, float32 (C,).

        NaN without seeds, and for a row without terms.
        """
        return self.to_query(self.query(seeds, weights, stats), rows, stats)

    def query(self, seeds: np.ndarray, weights: np.ndarray, stats: ItemStats) -> TermQuery:
        """The terms of weighted seeds (S,)."""
        terms = self.terms(stats)
        weights = np.ascontiguousarray(weights, np.float64)
        scratch = self._scratch.of(terms.missing + 1)
        codes, code_weights = _query(
            terms.codes, terms.squared_idf, terms.length, np.ascontiguousarray(seeds), weights, scratch
        )
        return TermQuery(codes, code_weights, float(weights.sum()))

    def to_query(self, query: TermQuery, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """The similarity of rows (C,) to the items of a query; see `to`."""
        terms = self.terms(stats)
        scratch = self._scratch.of(terms.missing + 1)
        rows = np.ascontiguousarray(rows)
        return _similarity(
            terms.codes, terms.length, query.codes, query.weights, max(query.total, 1e-9), rows, scratch
        )

    def each(self, seeds: np.ndarray, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """The cosine of each of rows (C,) and each of seeds (S,): float32 (C, S), NaN as in `to`."""
        terms = self.terms(stats)
        scratch = self._scratch.of(terms.missing + 1)
        seeds, rows = np.ascontiguousarray(seeds), np.ascontiguousarray(rows)
        return _each(terms.codes, terms.squared_idf, terms.length, terms.missing, seeds, rows, scratch)

    def terms(self, stats: ItemStats) -> Terms:
        """The terms as of `stats`, computed once: later changes of the catalog do not count."""
        return self._cache.get(stats)


@kernel(_CODES, _NUMBERS, _NUMBERS, _ROWS, _NUMBERS, _SCRATCH)
def _query(
    codes: np.ndarray,
    squared_idf: np.ndarray,
    lengths: np.ndarray,
    seeds: np.ndarray,
    weights: np.ndarray,
    scratch: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct codes of seeds, int64 (K,), and their weights, float64 (K,)."""
    width = codes.shape[1]
    distinct, totals, count = np.empty(len(seeds) * width, np.int64), np.zeros(len(seeds) * width), 0
    for seed in range(len(seeds)):
        weight = weights[seed] / lengths[seeds[seed]]
        for column in range(width):
            code = codes[seeds[seed], column]
            place = scratch[code]
            if place < 0 or place >= count or distinct[place] != code:
                place = count
                scratch[code], distinct[place] = place, code
                count += 1
            totals[place] += weight * squared_idf[code]
    return distinct[:count].copy(), totals[:count].copy()


@kernel(_CODES, _NUMBERS, _ROWS, _NUMBERS, np.float64, _ROWS, _SCRATCH)
def _similarity(
    codes: np.ndarray,
    lengths: np.ndarray,
    query_codes: np.ndarray,
    query_weights: np.ndarray,
    total: float,
    rows: np.ndarray,
    scratch: np.ndarray,
) -> np.ndarray:
    """The similarity of rows to the codes of a query, float32 (C,), NaN for a row without terms."""
    result, count = np.full(len(rows), np.nan, np.float32), len(query_codes)
    for place in range(count):
        scratch[query_codes[place]] = place
    for index in range(len(rows) if count else 0):
        row = rows[index]
        if lengths[row] > _MIN_LENGTH:
            shared = 0.0
            for column in range(codes.shape[1]):
                code = codes[row, column]
                place = scratch[code]
                if 0 <= place < count and query_codes[place] == code:
                    shared += query_weights[place]
            result[index] = shared / lengths[row] / total
    return result


@kernel(_CODES, _NUMBERS, _NUMBERS, np.int64, _ROWS, _ROWS, _SCRATCH)
def _each(
    codes: np.ndarray,
    squared_idf: np.ndarray,
    lengths: np.ndarray,
    missing: int,
    seeds: np.ndarray,
    rows: np.ndarray,
    scratch: np.ndarray,
) -> np.ndarray:
    """The cosine of rows and seeds, float32 (C, S), NaN for a row without terms."""
    width, size = codes.shape[1], len(seeds) * codes.shape[1]
    # The terms of seeds; those of one code are chained, and `scratch` has the last of the chain.
    entry_code, entry_seed, before = (
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
    )
    count = 0
    for seed in range(len(seeds)):
        for column in range(width):
            code = codes[seeds[seed], column]
            last = scratch[code]
            is_known = 0 <= last < count and entry_code[last] == code
            if code == missing or (is_known and entry_seed[last] == seed):
                continue
            entry_code[count], entry_seed[count], before[count] = code, seed, last if is_known else -1
            scratch[code] = count
            count += 1
    result = np.full((len(rows), len(seeds)), np.nan, np.float32)
    shared = np.zeros(len(seeds))
    for index in range(len(rows) if width else 0):
        row = rows[index]
        if lengths[row] <= _MIN_LENGTH:
            continue
        shared[:] = 0
        for column in range(width):
            code = codes[row, column]
            entry = scratch[code]
            if 0 <= entry < count and entry_code[entry] == code:
                while entry >= 0:
                    shared[entry_seed[entry]] += squared_idf[code]
                    entry = before[entry]
        for seed in range(len(seeds)):
            result[index, seed] = shared[seed] / lengths[seeds[seed]] / lengths[row]
    return result
