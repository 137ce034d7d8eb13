"""The candidates of a request, in columns: which sources propose each item, and with which scores."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from services.catalog import candidate_sources
from services.core.accumulator import first_occurrences
from services.core.kernels import array, kernel

SOURCES = frozenset(candidate_sources.NAMES)
"""The names of the sources."""
MAX_LEADING_SOURCES = 3
"""How many of `SOURCES` a page names for an item."""
_PLACE_OF = {name: place for place, name in enumerate(candidate_sources.NAMES)}
_UNRANKED = np.iinfo(np.int64).max

SourceList = tuple[str, Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]
"""A source, the hashes of its items and their scores."""


@dataclass(frozen=True)
class CandidateSet:
    """C candidates from S sources.

    `item_hashes` int64 (C,), all different; `names` of the sources; `scores` float32 (C, S), NaN where a
    source does not propose the item.
    """

    item_hashes: np.ndarray
    names: tuple[str, ...]
    scores: np.ndarray

    @classmethod
    def of(cls, lists: Iterable[SourceList]) -> "CandidateSet":
        """The items of all lists, in the order of their first appearance.

        If an item comes twice from one source, the higher score counts.
        """
        parts = [
            (name, np.asarray(items, np.int64), np.asarray(scores, np.float32))
            for name, items, scores in lists
        ]
        if wrong := [name for name, items, scores in parts if len(items) != len(scores)]:
            raise ValueError(f"the source {wrong[0]} has another number of scores than of items")
        names = tuple(dict.fromkeys(name for name, _, _ in parts))
        every = np.concatenate([np.empty(0, np.int64), *(items for _, items, _ in parts)])
        every_score = np.concatenate([np.empty(0, np.float32), *(scores for *_, scores in parts)])
        column = np.repeat([names.index(name) for name, *_ in parts], [len(items) for _, items, _ in parts])
        distinct, index = first_occurrences(every)
        scores = np.full((len(distinct), len(names)), np.nan, np.float32)
        _fill(scores, index, column.astype(np.int64), every_score)
        return cls(distinct, names, scores)

    def with_source(self, source: str, items: Sequence[int], scores: Sequence[float]) -> "CandidateSet":
        """These candidates, and those of another source."""
        if not len(items):
            return self
        return CandidateSet.of([*self._lists(), (source, items, scores)])

    def with_lists(self, other: "CandidateSet") -> "CandidateSet":
        """These candidates and those of another set, each with its sources in both."""
        return CandidateSet.of([*self._lists(), *other._lists()])

    def merged(self, other: "CandidateSet") -> "CandidateSet":
        """These candidates, and those of `other` that are not among them."""
        more = other.take(np.flatnonzero(~np.isin(other.item_hashes, self.item_hashes)))
        return CandidateSet.of([*self._lists(), *more._lists()])

    def take(self, indices: np.ndarray) -> "CandidateSet":
        """Some of the candidates, `indices` int64 (K,), in that order."""
        return CandidateSet(self.item_hashes[indices], self.names, self.scores[indices])

    def __len__(self) -> int:
        return len(self.item_hashes)

    def proposed_by(self, source: str) -> np.ndarray:
        """Which candidates a source proposes, bool (C,)."""
        if source not in self.names:
            return np.zeros(len(self), bool)
        return np.asarray(~np.isnan(self.scores[:, self.names.index(source)]))

    def only_by(self, source: str) -> np.ndarray:
        """Which candidates a source alone proposes, bool (C,)."""
        proposed = self.proposed_by(source)
        if source in self.names:
            proposed &= np.count_nonzero(~np.isnan(self.scores), axis=1) == 1
        return proposed

    def sources_of(self, item: int) -> dict[str, float]:
        """The sources of an item by hash, with their scores; none for an unknown item."""
        known = self._known.get(item)
        if known is None:
            row = self._found[item] if item in self._found else self._row_of.get(item)
            scores = [] if row is None else self.scores[row].tolist()
            known = {name: s for name, s in zip(self.names, scores, strict=False) if not math.isnan(s)}
            self._known[item] = known
        return known

    def leading_sources(self, item_hashes: Iterable[int]) -> dict[int, list[str]]:
        """The sources to name for each item.

        First come at most `MAX_LEADING_SOURCES` of `SOURCES`, those where the item has the best rank; the
        registry's order decides between equal ranks. The rank is the number of the source's candidates that
        score at least as high. Names outside `SOURCES`, such as "quota", always follow.
        """
        items = list(item_hashes)
        self._find(items)
        rows = np.array([self._found[item] for item in items], np.int64)
        scores, own = self.scores[rows], [name in SOURCES for name in self.names]
        ranks = _ranks(np.ascontiguousarray(self.scores), np.ascontiguousarray(scores.T)).T
        places = np.array([_PLACE_OF.get(name, 0) for name in self.names], np.int64)
        ranks = np.where(own, ranks.astype(np.int64) * len(_PLACE_OF) + places, _UNRANKED)
        ranks[np.isnan(scores)] = _UNRANKED
        best = np.argsort(ranks, axis=1)[:, :MAX_LEADING_SOURCES]
        others = [column for column, name in enumerate(self.names) if name not in SOURCES]
        leading = {}
        for item, row, columns in zip(items, range(len(items)), best.tolist(), strict=True):
            names = [self.names[column] for column in columns if ranks[row, column] < _UNRANKED]
            more = sorted(self.names[column] for column in others if not np.isnan(scores[row, column]))
            leading[item] = [*names, *more]
        return leading

    def columns(self) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
        """Each source with the indices of its candidates, int64 (K,), and their scores, float32 (K,)."""
        rows, scores, ends = _by_column(np.ascontiguousarray(self.scores))
        start = 0
        for name, end in zip(self.names, ends.tolist(), strict=True):
            yield name, rows[start:end], scores[start:end]
            start = end

    def _lists(self) -> Iterable[SourceList]:
        for name, used, scores in self.columns():
            yield name, self.item_hashes[used], scores

    def _find(self, items: list[int]) -> None:
        """Look up the rows of a page's items, without a dictionary of all."""
        rows = np.flatnonzero(np.isin(self.item_hashes, np.array(items, np.int64)))
        self._found.update(zip(self.item_hashes[rows].tolist(), rows.tolist(), strict=True))

    @cached_property
    def _found(self) -> dict[int, int]:
        """The rows that were looked up for a page."""
        return {}

    @cached_property
    def _row_of(self) -> dict[int, int]:
        return {item: row for row, item in enumerate(self.item_hashes.tolist())}

    @cached_property
    def _known(self) -> dict[int, dict[str, float]]:
        """The sources of the items that were looked up."""
        return {}


@kernel(array(np.float32, 2, writable=True), array(np.int64), array(np.int64), array(np.float32))
def _fill(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, scores: np.ndarray) -> None:
    """Set elements of a matrix of NaN; of several scores for an element the highest counts."""
    for entry in range(len(rows)):
        row, column = rows[entry], columns[entry]
        if np.isnan(matrix[row, column]) or scores[entry] > matrix[row, column]:
            matrix[row, column] = scores[entry]


@kernel(array(np.float32, 2), array(np.float32, 2))
def _ranks(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many scores of a source, (C, S), are at least as high as each of `own`, (S, R): int32 (S, R)."""
    ranks = np.zeros(own.shape, np.int32)
    for candidate in range(scores.shape[0]):
        for source in range(scores.shape[1]):
            score = scores[candidate, source]
            if not np.isnan(score):
                for index in range(own.shape[1]):
                    ranks[source, index] += score >= own[source, index]
    return ranks


@kernel(array(np.float32, 2))
def _by_column(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and values of the elements that are not NaN, by column, and the end of each column in these."""
    ends = np.zeros(scores.shape[1], np.int64)
    for row in range(scores.shape[0]):
        for column in range(scores.shape[1]):
            if not np.isnan(scores[row, column]):
                ends[column] += 1
    ends = np.cumsum(ends)
    size = ends[-1] if len(ends) else 0
    rows, values = np.empty(size, np.int64), np.empty(size, np.float32)
    place = np.zeros(len(ends), np.int64)
    place[1:] = ends[:-1]
    for row in range(scores.shape[0]):
        for column in range(scores.shape[1]):
            if not np.isnan(scores[row, column]):
                rows[place[column]], values[place[column]] = row, scores[row, column]
                place[column] += 1
    return rows, values, ends
