"""Candidates that behaviour and labels propose, each source in a way of its own."""

from collections.abc import Callable

import numpy as np

from services.ranking.basis import Basis
from services.ranking.moment import DAY, Moment
from services.ranking.query import Query

_NEW_DAYS = 30
# What a neighbour by content counts beside one by behaviour.
_RELATION_WEIGHTS = {"text": 0.1, "image": 0.1}


class Sources:
    """Scores over all rows of an item table, one function per source; 0 and below is no candidate."""

    def __init__(self, basis: Basis) -> None:
        self._table, self._graph, self._sequence = basis.table, basis.graph, basis.sequence
        self._likeness, self._titles = basis.alike, basis.titles
        self.by_name: dict[str, Callable[[Query, Moment], np.ndarray]] = {
            "graph": self._near,
            "popular": self._popular,
            "rising": self._rising,
            "new": self._new,
            "family": self._family,
            "affinity": self._affinity,
            "sequence": self._next,
            "words": self._named,
        }

    def candidates(
        self, source: str, query: Query, moment: Moment, allowed: np.ndarray, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 and scores float32, best first, ties by item number; `allowed` is bool (N,).

        Not by row: an item's row differs from one process to the next.
        """
        return self.best(self.by_name[source](query, moment), allowed, limit)

    def best(self, scores: np.ndarray, allowed: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The same of scores over all rows, float (N,)."""
        scores = np.where(allowed, scores[: len(allowed)], 0)
        rows = np.flatnonzero(scores > 0)[: None if limit else 0]
        if len(rows) > limit:
            cut = np.partition(scores[rows], len(rows) - limit)[len(rows) - limit]
            rows = rows[scores[rows] >= cut]
        rows = rows[np.lexsort((self._table.item_numbers[rows], -scores[rows]))][:limit]
        return rows, scores[rows].astype(np.float32)

    def related(self, query: Query) -> dict[str, np.ndarray]:
        """How near every row is to a person's items by each relation of the graph, float32 (N,)."""
        rows, weights = query.interests()
        return {
            relation: self._graph.to_rows(self._graph.spread(relation, rows, weights))
            for relation in self._graph.names
        }

    def _near(self, query: Query, moment: Moment) -> np.ndarray:
        rows, weights = query.interests()
        # Added up over nodes: of rows there may be one more with every relation.
        total = np.zeros(self._graph.size, np.float32)
        for relation in self._graph.names:
            total += _RELATION_WEIGHTS.get(relation, 1.0) * self._graph.spread(relation, rows, weights)
        return self._graph.to_rows(total)

    @staticmethod
    def _popular(query: Query, moment: Moment) -> np.ndarray:
        return np.asarray(moment.popular[:, 2] + 1e-3 * moment.popular[:, -1])

    @staticmethod
    def _rising(query: Query, moment: Moment) -> np.ndarray:
        last_day, last_week = moment.popular[:, 0], moment.popular[:, 2]
        return np.where(last_day > 0, last_day / np.sqrt(last_week + 1), 0)

    def _new(self, query: Query, moment: Moment) -> np.ndarray:
        age = (moment.tick - self._table.came) / DAY
        return np.where(age < _NEW_DAYS, _NEW_DAYS - np.maximum(age, 0), 0)

    def _family(self, query: Query, moment: Moment) -> np.ndarray:
        column = self._table.texts("family_id")
        if column is None:
            return np.zeros(self._table.length)
        codes = column[0][: len(moment.age), 0].copy()  # the feed may write new ones meanwhile
        seeds, weights = query.interests()
        weight = np.zeros(int(codes.max(initial=-1)) + 2)
        known = codes[seeds] >= 0
        np.add.at(weight, codes[seeds[known]], weights[known])
        weight[-1] = 0
        return np.asarray(weight[codes] * (1 + np.log1p(moment.popular[:, 2])))

    def _affinity(self, query: Query, moment: Moment) -> np.ndarray:
        """What is popular among items alike to the person's."""
        scores = np.zeros(len(moment.age))
        sold = np.flatnonzero(moment.popular[:, 2] > 0)
        alike = self._likeness.to(*query.interests(), sold, moment)
        scores[sold] = np.nan_to_num(alike) * np.log1p(moment.popular[sold, 2])
        return scores

    def _named(self, query: Query, moment: Moment) -> np.ndarray:
        """What shares rare words of its title with the person's items, and of that what is popular."""
        alike = self._titles.to(*query.interests(), np.arange(len(moment.age)), moment)
        return np.asarray(np.nan_to_num(alike) * (1 + np.log1p(moment.popular[:, 2])))

    def _next(self, query: Query, moment: Moment) -> np.ndarray:
        """What the sequence model holds to come next."""
        person = self._sequence.person(query) if self._sequence else None
        if self._sequence is None or person is None:
            return np.zeros(self._table.length)
        return self._sequence.chances(person)
