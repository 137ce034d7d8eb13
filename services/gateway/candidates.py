"""The candidates of a request, in columns: which sources propose each item, and with which scores."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from services.catalog import candidate_sources

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
        names = tuple(dict.fromkeys(name for name, _, _ in parts))
        every = np.concatenate([np.empty(0, np.int64), *(items for _, items, _ in parts)])
        # Equal hashes are next to each other in the order, the first appearance first.
        order = np.argsort(every, kind="stable")
        is_first = np.ones(len(every), bool)
        is_first[1:] = every[order[1:]] != every[order[:-1]]
        first = order[is_first]
        by_appearance = np.argsort(first)
        place = np.empty(len(first), np.int64)
        place[by_appearance] = np.arange(len(first))
        index = np.empty(len(every), np.int64)
        index[order] = place[np.cumsum(is_first) - 1]
        matrix, end = np.full((len(first), len(names)), np.nan, np.float32), 0
        for name, items, scores in parts:
            start, end = end, end + len(items)
            np.fmax.at(matrix[:, names.index(name)], index[start:end], scores)
        return cls(every[first[by_appearance]], names, matrix)

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
        return np.asarray(self.proposed_by(source) & (np.count_nonzero(~np.isnan(self.scores), axis=1) == 1))

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
        scores = self.scores[[self._found[item] for item in items]]
        ranks = np.full(scores.shape, _UNRANKED)
        for column, name in enumerate(self.names):
            if name in SOURCES:
                ascending = self._ascending(column)
                position = len(ascending) - np.searchsorted(ascending, scores[:, column])
                ranks[:, column] = position * len(_PLACE_OF) + _PLACE_OF[name]
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
        for column, name in enumerate(self.names):
            used = np.flatnonzero(~np.isnan(self.scores[:, column]))
            yield name, used, self.scores[used, column]

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

    def _ascending(self, column: int) -> np.ndarray:
        """The scores of a source, ascending."""
        scores = self.scores[:, column]
        return np.sort(scores[~np.isnan(scores)])
