"""Point-in-time features: candidates and feature rows of the services as of any past time.

Does the work of gateway and ranking for a request, in process.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from services.catalog.bundle import creation_time
from services.catalog.candidate_sources import NAMES
from services.catalog.item_table import ItemTable
from services.catalog.query_vectors import CANDIDATES_PER_SOURCE, HITS_PER_GROUP, query_groups
from services.embedding.index.vector_index import weighted_centroid
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.models.co_occurrence import GraphView, ItemGraph
from services.ranking.models.sequence import SequenceView
from services.ranking.models.taste import read_taste
from services.ranking.retrieval.candidate_sources import INDEXED, CandidateSources, ScoredRows
from services.ranking.state.item_stats import TICKS, ItemStats, item_stats
from services.ranking.state.query_builder import MAX_IMPRESSIONS, User, make_query
from services.ranking.state.user_query import MAX_HISTORY, UserQuery, recency
from training.data.shop import ShopData
from training.examples.queries import DAY, EvalQuery
from training.examples.shop_state import state_of

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_GRAPHS_IN_MEMORY = 2


class _Ranking(NamedTuple):
    """What ranks by one graph."""

    features: Features
    sources: CandidateSources


class PointInTime:
    """A shop's items and events, with graphs and vectors, as of any time.

    `graphs` maps a day since 1970 to the graph for queries from that day on, fitted on earlier days.
    `vectors` and `present` are by space, (M, D) and bool (M,), in the order of the shop's items. `sequence`
    is the directory of a sequence model fitted on earlier days, `taste` that of a taste model.

    Queries in the order of time are the fastest: of the graphs, those of the last two are in memory.
    """

    def __init__(
        self,
        shop: ShopData,
        graphs: Mapping[int, ItemGraph],
        vectors: Mapping[str, np.ndarray],
        present: Mapping[str, np.ndarray],
        sequence: Path | None = None,
        taste: Path | None = None,
    ) -> None:
        settings = shop.settings
        self.table = ItemTable.of(shop.items, vectors, present, [creation_time(item) for item in shop.items])
        self.state = state_of(shop)
        self._graphs, self._graph_days = graphs, np.array(sorted(graphs), np.int64)
        self._context = RankingContext(
            self.table,
            GraphView(ItemGraph.empty(), self.table),
            settings.items.text_attributes,
            settings.items.number_attributes,
            SequenceView.load(sequence, self.table) if sequence else None,
            read_taste(taste) if taste else None,
        )
        self._rankings = lru_cache(_GRAPHS_IN_MEMORY)(self._ranking_from)
        self.names = self._rankings(int(self._graph_days[0])).features.names
        self._vectors = {space: values.astype(np.float32) for space, values in vectors.items()}
        self._present = present
        self._day = settings.time.granularity == "day"
        self._exclude_purchased = settings.task.exclude_purchased
        self._ticks = TICKS[settings.time.granularity]
        self._targets = np.array([self.state.kinds[t] for t in settings.targets], np.int16)
        self._stats: ItemStats | None = None
        self._pools: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}

    def stats_at(self, as_of: int) -> ItemStats:
        """The item statistics that hold at `as_of`, microseconds since 1970."""
        tick = self._ticks.at(as_of)
        if self._stats is None or self._stats.tick != tick:
            self._stats = item_stats(self.state, self.table, tick)
        return self._stats

    def query(self, eval_query: EvalQuery) -> UserQuery:
        """The user of a query, in rows of the table."""
        cut = eval_query.as_of - eval_query.as_of % DAY if self._day else eval_query.as_of
        past = self.state.history(eval_query.user_id, "", cut, MAX_HISTORY)
        user = User(eval_query.user_id, session=eval_query.session)
        shown = None
        if self.state.has_impressions:
            shown = self.state.impressions(eval_query.user_id, "", cut, MAX_IMPRESSIONS)
        return make_query(self.state, self.table, user, past, cut, self._targets, shown)

    def features(self, as_of: int) -> Features:
        """The feature function of the day of `as_of`."""
        return self._ranking_at(as_of).features

    def live(self, as_of: int) -> np.ndarray:
        """Which rows are available at `as_of`, bool (M,)."""
        return self.table.available(_EPOCH + timedelta(microseconds=as_of))

    @property
    def source_names(self) -> list[str]:
        """The sources, in the order of the bits that `source_bits` returns."""
        return [*self._rankings(int(self._graph_days[0])).sources.by_name, *self._vectors]

    def candidates(self, query: UserQuery, as_of: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The candidates of all sources at `as_of`: rising rows int64 (C,), and their scores float32 (C, S).

        The scores are in the order of `NAMES`, NaN where a source does not propose a row. `allowed` is bool
        (M,). The session is excluded, and so are purchases if the task says so.
        """
        proposals = list(self.proposals(query, as_of, allowed))
        rows, place = np.unique(np.concatenate([s.rows for _, s in proposals]), return_inverse=True)
        scores, end = np.full((len(rows), len(NAMES)), np.nan, np.float32), 0
        for name, scored in proposals:
            start, end = end, end + len(scored.rows)
            scores[place[start:end], NAMES.index(name)] = scored.scores
        return rows, scores

    def source_bits(self, scores: np.ndarray) -> np.ndarray:
        """The sources of rows as bits, int64 (C,), in the order of `source_names`."""
        bits = np.zeros(len(scores), np.int64)
        for bit, name in enumerate(self.source_names):
            bits |= (~np.isnan(scores[:, NAMES.index(name)])).astype(np.int64) << bit
        return bits

    def proposals(
        self, query: UserQuery, as_of: int, allowed: np.ndarray
    ) -> Iterator[tuple[str, ScoredRows]]:
        """The rows of each source and their scores, in the order of `source_names`, computed lazily."""
        excluded, eligible = self._eligible(query, allowed)
        sources, stats = self._ranking_at(as_of).sources, self.stats_at(as_of)
        for name in sources.by_name:
            yield name, sources.candidates(name, query, stats, eligible, CANDIDATES_PER_SOURCE)
        for space in self._vectors:
            yield space, self._near(space, query, allowed, excluded)

    def index_recalls(self, query: UserQuery, as_of: int, allowed: np.ndarray) -> dict[str, float]:
        """By source with an index: the share of the best items that it finds; none without any such item."""
        _, eligible = self._eligible(query, allowed)
        sources, stats, recalls = self._ranking_at(as_of).sources, self.stats_at(as_of), {}
        for name in INDEXED:
            best = sources.exact(name, query, stats, eligible, CANDIDATES_PER_SOURCE).rows
            if len(best):
                found = sources.candidates(name, query, stats, eligible, CANDIDATES_PER_SOURCE).rows
                recalls[name] = float(np.isin(best, found).mean())
        return recalls

    def _ranking_at(self, as_of: int) -> "_Ranking":
        index = int(np.searchsorted(self._graph_days, as_of // DAY, side="right")) - 1
        if index < 0:
            raise ValueError("no graph holds before the first day of the graphs")
        return self._rankings(int(self._graph_days[index]))

    def _ranking_from(self, day: int) -> "_Ranking":
        context = self._context.with_graph(GraphView(self._graphs[day], self.table))
        return _Ranking(Features(context), CandidateSources(context))

    def _eligible(self, query: UserQuery, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows that are not candidates of a user, int64 (E,), and those that may be, bool (M,)."""
        excluded = query.session
        if self._exclude_purchased:
            excluded = np.concatenate([excluded, query.history[query.purchased]])
        eligible = allowed.copy()
        eligible[excluded] = False
        return excluded, eligible

    def related(self, query: UserQuery, as_of: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Which of `rows`, int64 (C,), each graph relation connects to the user: bool (C,)."""
        by_relation = self._ranking_at(as_of).sources.related(query)
        return {relation: np.isin(rows, related) for relation, related in by_relation.items()}

    def _near(self, space: str, query: UserQuery, allowed: np.ndarray, excluded: np.ndarray) -> ScoredRows:
        rows = np.concatenate([query.session, query.history])[:MAX_HISTORY]
        weights = np.concatenate([query.session_weights, query.weights * recency(query.ages)])[:MAX_HISTORY]
        values, present = self._vectors[space], self._present[space]
        centroids = []
        for group in query_groups(rows.tolist(), weights.tolist()):
            members = np.array(group.item_hashes)
            share = np.array(group.weights or np.ones(len(members)), np.float32)
            has_vector = present[members]
            if has_vector.any():
                centroids.append(weighted_centroid(values[members[has_vector]], share[has_vector]))
        pool, pool_vectors = self._pool(space, allowed)
        if not centroids or not len(pool):
            return ScoredRows(np.empty(0, np.int64), np.empty(0, np.float32))
        scores = np.stack(centroids) @ pool_vectors.T
        scores[:, np.isin(pool, excluded)] = -np.inf
        count = min(HITS_PER_GROUP, len(pool))
        hits = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        best = np.full(len(pool), -np.inf, np.float32)  # the best of the groups that find a row
        np.maximum.at(best, hits, np.take_along_axis(scores, hits, 1))
        nearest = np.flatnonzero(np.isfinite(best))
        return ScoredRows(pool[nearest], best[nearest])

    def _pool(self, space: str, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The searchable rows of a space and their vectors, cached from query to query."""
        key = hash(allowed.tobytes())
        if self._pools.get(space, (None,))[0] != key:
            pool = np.flatnonzero(allowed & self._present[space])
            self._pools[space] = (key, pool, self._vectors[space][pool])
        return self._pools[space][1:]
