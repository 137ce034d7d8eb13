"""The candidate sources of ranking: items by events, attributes, title words or the sequence model.

No source reads every item of the catalog: they use precomputed orders, inverted indexes and neighbor lists.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from services.core.accumulator import Accumulator
from services.core.ordering import best_allowed, best_first
from services.ranking.features.context import RankingContext
from services.ranking.retrieval.impact_index import ImpactIndex
from services.ranking.retrieval.sequence_index import SequenceIndex
from services.ranking.state.item_stats import DAY, ItemStats
from services.ranking.state.tick_cache import TickCache
from services.ranking.state.user_query import UserQuery

_NEW_DAYS = 30
# The weight of a neighbor by content, relative to a neighbor by behavior.
_RELATION_WEIGHTS = {"text": 0.1, "image": 0.1}


class ScoredRows(NamedTuple):
    """Rows of the item table, int64 (K,), all different, and their scores, float (K,); 0 is no candidate."""

    rows: np.ndarray
    scores: np.ndarray


INDEXED = ("attribute_affinity", "title_keywords", "sequence")
"""The sources that read an approximate index of a large catalog."""
Source = Callable[[UserQuery, ItemStats, np.ndarray, int], ScoredRows]
"""Gives rows in no order; those of the mask `allowed`, bool (N,), contain the best `limit` allowed ones."""
_NONE = ScoredRows(np.empty(0, np.int64), np.empty(0, np.float32))


class CandidateSources:
    """One function per source, over the rows of an item table."""

    def __init__(self, context: RankingContext) -> None:
        self._table, self._graph, self._sequence = context.table, context.graph, context.sequence
        self._values, self._accumulator = context.values, Accumulator()
        self._attributes = ImpactIndex(context.attribute_similarity, context.table, 0.0)
        self._titles = ImpactIndex(context.title_similarity, context.table, 1.0)
        self._sequence_index = SequenceIndex(context.sequence) if context.sequence else None
        self._orders = {name: self._order(scores) for name, scores in _ITEM_SCORES.items()}
        self._new_order = self._order(self._novelty)
        self.by_name: Mapping[str, Source] = {
            "co_occurrence": self._co_occurrence,
            "popular": self._popular,
            "trending": self._trending,
            "new_arrivals": self._new_arrivals,
            "variants": self._variants,
            "attribute_affinity": self._attribute_affinity,
            "sequence": self._sequence_next,
            "title_keywords": self._title_keywords,
        }

    def candidates(
        self, source: str, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int
    ) -> ScoredRows:
        """Rows and scores float32 (C,), best first, ties by item hash; `allowed` is bool (N,).

        Ties do not go by row: processes differ in the rows of items.
        """
        return self.best(self.by_name[source](query, stats, allowed, limit), allowed, limit)

    def exact(
        self, source: str, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int
    ) -> ScoredRows:
        """The same of a source of `INDEXED`, by the scores of all allowed rows."""
        rows = np.flatnonzero(allowed)
        if source == "sequence":
            user = self._sequence.user(query) if self._sequence else None
            if self._sequence is None or user is None:
                return _NONE
            return self.best(_odds(rows, self._sequence.log_odds(user, rows)), allowed, limit)
        index = self._attributes if source == "attribute_affinity" else self._titles
        seeds, weights = query.seeds()
        if not len(seeds):
            return _NONE
        return self.best(ScoredRows(rows, index.scores(seeds, weights, rows, stats)), allowed, limit)

    def best(self, scored: ScoredRows, allowed: np.ndarray, limit: int) -> ScoredRows:
        """The best allowed rows, in the same order."""
        if not limit:
            return _NONE
        rows, scores = best_allowed(scored.rows, scored.scores, allowed, self._table.item_hashes, limit)
        return ScoredRows(rows, scores.astype(np.float32))

    def related(self, query: UserQuery) -> dict[str, np.ndarray]:
        """The rows that each relation of the graph connects to the user's items, int64."""
        rows, weights = query.seeds()
        return {
            relation: self._graph.rows(np.unique(self._graph.edges(relation, rows, weights)[0]))
            for relation in self._graph.names
        }

    def _co_occurrence(
        self, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int
    ) -> ScoredRows:
        seeds, weights = query.seeds()
        if not len(seeds) or not self._graph.names:
            return _NONE
        nodes, edge_weights = [], []
        for relation in self._graph.names:
            targets, of_edges, _ = self._graph.edges(relation, seeds, weights)
            nodes.append(targets)
            edge_weights.append(_RELATION_WEIGHTS.get(relation, 1.0) * of_edges)
        distinct, totals = self._accumulator.sums(
            np.concatenate(nodes), np.concatenate(edge_weights), self._graph.size
        )
        rows = self._graph.rows(distinct)
        present = np.flatnonzero(rows >= 0)
        return ScoredRows(rows[present], totals[present])

    def _popular(self, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int) -> ScoredRows:
        return self._orders["popular"].get(stats).first(allowed, limit)

    def _trending(self, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int) -> ScoredRows:
        return self._orders["trending"].get(stats).first(allowed, limit)

    def _new_arrivals(
        self, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int
    ) -> ScoredRows:
        order = self._new_order.get(stats)
        first = order.first(allowed, limit)
        new = np.arange(order.counted, len(allowed))
        if not len(new):
            return first
        scores = self._novelty_of(new, stats)
        return ScoredRows(np.concatenate([first.rows, new]), np.concatenate([first.scores, scores]))

    def _variants(self, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int) -> ScoredRows:
        values = self._values.get("family_id", stats)
        seeds, weights = query.seeds()
        if values is None or not len(seeds):
            return _NONE
        codes = values.codes[seeds]
        valid = codes >= 0
        families, family_weights = self._accumulator.sums(codes[valid], weights[valid], len(values.total))
        rows, index = values.rows_of(families)
        known = np.flatnonzero(rows < stats.length)
        rows, index = rows[known], index[known]
        return ScoredRows(rows, family_weights[index] * (1 + np.log1p(stats.popular[rows, 2])))

    def _attribute_affinity(
        self, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int
    ) -> ScoredRows:
        """Popular items with attributes like those of the user's items."""
        return ScoredRows(*self._attributes.search(*query.seeds(), stats, allowed, limit))

    def _title_keywords(
        self, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int
    ) -> ScoredRows:
        """Items that share rare title words with the user's items, weighted by popularity."""
        return ScoredRows(*self._titles.search(*query.seeds(), stats, allowed, limit))

    def _sequence_next(
        self, query: UserQuery, stats: ItemStats, allowed: np.ndarray, limit: int
    ) -> ScoredRows:
        """The next items by the sequence model; a score is the odds, relative to the best of the items."""
        user = self._sequence.user(query) if self._sequence else None
        if self._sequence_index is None or user is None:
            return _NONE
        return _odds(*self._sequence_index.search(user, allowed, limit))

    def _novelty(self, stats: ItemStats) -> np.ndarray:
        return self._novelty_of(np.arange(stats.length), stats)

    def _novelty_of(self, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """How new rows are, float64 (C,): the days that are left of the first 30, 0 for older ones."""
        age = (stats.tick - self._table.arrivals_of(rows)) / DAY
        return np.where(age < _NEW_DAYS, _NEW_DAYS - np.maximum(age, 0), 0)

    def _order(self, scores: Callable[[ItemStats], np.ndarray]) -> "TickCache[_Order]":
        return TickCache(
            lambda stats: _Order(scores(stats), self._table.item_hashes),
            lambda order, stats: order.extend(stats),
        )


class _Order:
    """The rows of a score that no user changes, best first, ties by item hash; rows of score 0 are left out.

    `counted` rows have a place in it; later ones are new.
    """

    def __init__(self, scores: np.ndarray, item_hashes: np.ndarray) -> None:
        self.count = self.counted = len(scores)
        rows = np.flatnonzero(scores > 0)
        self._rows = rows[best_first(scores[rows], item_hashes[rows])]
        self._scores = scores[self._rows]

    def extend(self, stats: ItemStats) -> bool:
        """Note that there are new rows; they have no place in the order."""
        self.count = stats.length
        return True

    def first(self, allowed: np.ndarray, limit: int) -> ScoredRows:
        """The first `limit` allowed rows."""
        if len(allowed) < self.counted:  # the caller has earlier statistics, of fewer rows
            allowed = np.pad(allowed, (0, self.counted - len(allowed)))
        size = 2 * limit
        while True:
            places = np.flatnonzero(allowed[self._rows[:size]])[:limit]
            if len(places) == limit or size >= len(self._rows):
                return ScoredRows(self._rows[places], self._scores[places])
            size *= 4


_ITEM_SCORES: Mapping[str, Callable[[ItemStats], np.ndarray]] = {
    "popular": lambda stats: stats.popular[:, 2] + 1e-3 * stats.popular[:, -1],
    "trending": lambda stats: np.where(
        stats.popular[:, 0] > 0, stats.popular[:, 0] / np.sqrt(stats.popular[:, 2] + 1), 0
    ),
}


def _odds(rows: np.ndarray, log_odds: np.ndarray) -> ScoredRows:
    return ScoredRows(rows, np.exp(log_odds - log_odds.max(initial=-np.inf)))
