"""The similarity of items by their texts: values of attributes, words of titles.

Cosine of TF-IDF vectors (Salton and Buckley, 1988) over the catalog.
"""

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.accumulator import Accumulator
from services.core.growing_array import appended
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.tick_cache import TickCache

_MIN_LENGTH = 1e-6

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


class TfidfSimilarity:
    """Similarity over the rows of one item table; any thread may use it."""

    def __init__(self, read: ReadColumns) -> None:
        self._cache = TickCache(
            lambda stats: Terms(read(np.arange(stats.length)), stats.length),
            lambda terms, stats: terms.append(read(np.arange(terms.count, stats.length)), stats.length),
        )
        self._accumulator, self._local = Accumulator(), threading.local()

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
        terms = self.terms(stats)
        if not len(seeds) or not terms.codes.shape[1]:
            return np.full(len(rows), np.nan, np.float32)
        codes, code_weights = self.query(seeds, weights, stats)
        shared = self._weights_of(codes, code_weights, terms)[terms.codes[rows]].sum(1)
        self._local.weights[codes] = 0
        length = terms.length[rows]
        cosine = shared / length / max(float(weights.sum()), 1e-9)
        return np.asarray(np.where(length > _MIN_LENGTH, cosine, np.nan), np.float32)

    def query(
        self, seeds: np.ndarray, weights: np.ndarray, stats: ItemStats
    ) -> tuple[np.ndarray, np.ndarray]:
        """The terms of weighted seeds (S,): codes int64 (K,), and their weights times squared IDF.

        The sum of these weights over the terms of a row, divided by its length and by the sum of `weights`,
        is its similarity to the seeds.
        """
        terms = self.terms(stats)
        seed_codes = terms.codes[seeds]
        seed_weights = np.repeat(weights / terms.length[seeds], seed_codes.shape[1])
        codes, code_weights = self._accumulator.sums(seed_codes.ravel(), seed_weights, terms.missing + 1)
        return codes, code_weights * terms.squared_idf[codes]

    def each(self, seeds: np.ndarray, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """The cosine of each of rows (C,) and each of seeds (S,): float32 (C, S), NaN as in `to`."""
        terms = self.terms(stats)
        if not terms.codes.shape[1] or not len(seeds):
            return np.full((len(rows), len(seeds)), np.nan, np.float32)
        seed_codes = terms.codes[seeds]
        codes, index = self._accumulator.distinct(seed_codes.ravel(), terms.missing + 1)
        by_code = np.zeros((len(codes), len(seeds)), np.float32)
        seed = np.repeat(np.arange(len(seeds)), seed_codes.shape[1])
        by_code[index, seed] = terms.squared_idf[seed_codes.ravel()] / terms.length[seeds][seed]
        # Codes that no seed has find the last row, of zeros.
        position = self._weights_of(codes, np.arange(len(codes)) - len(codes), terms)[terms.codes[rows]]
        self._local.weights[codes] = 0
        row, column = np.nonzero(position < 0)
        shared = np.zeros((len(rows), len(seeds)), np.float32)
        if len(row):
            first = np.flatnonzero(np.diff(row, prepend=-1))
            terms_of_rows = by_code[position[row, column].astype(np.int64)]
            shared[row[first]] = np.add.reduceat(terms_of_rows, first)
        length = terms.length[rows][:, None]
        return np.asarray(np.where(length > _MIN_LENGTH, shared / length, np.nan), np.float32)

    def terms(self, stats: ItemStats) -> Terms:
        """The terms as of `stats`, computed once: later changes of the catalog do not count."""
        return self._cache.get(stats)

    def _weights_of(self, codes: np.ndarray, weights: np.ndarray, terms: Terms) -> np.ndarray:
        """Weights by code, float64 (V + 1,), 0 for others: memory of this thread, to be cleared after use."""
        memory: np.ndarray | None = getattr(self._local, "weights", None)
        if memory is None or len(memory) <= terms.missing:
            memory = self._local.weights = np.zeros(terms.missing + 1)
        memory[codes] = weights
        return memory
