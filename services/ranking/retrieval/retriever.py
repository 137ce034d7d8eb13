"""Retrieval: the history of a user, and candidates by source under the conditions of a request."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np

from services.catalog import filters
from services.catalog.item_table import ItemTable
from services.ranking.events.exploration_counts import ExplorationCounts
from services.ranking.retrieval.candidate_sources import CandidateSources, ScoredRows
from services.ranking.retrieval.exploration import (
    ExplorationCandidates,
    ExplorationQuery,
    exploration_candidates,
)
from services.ranking.state.event_columns import EventColumns, EventState
from services.ranking.state.item_stats import DAY, ItemStats
from services.ranking.state.query_builder import User
from services.ranking.state.user_query import MAX_HISTORY, UserQuery, recency

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS_A_DAY = 86_400
_IMPRESSION_DAYS = 30
_NEAREST = "co_occurrence"  # by behavior; by text and image for an item without events


@dataclass(frozen=True)
class RetrievalOptions:
    """The conditions of a request: at most `limit` candidates per source, of `sources`, all if empty.

    Items must match `condition`; those of the session and `excluded` (item hashes) are left out, and with
    `exclude_purchased` those that the user purchased.
    """

    limit: int
    condition: filters.Filter | None = None
    excluded: Collection[int] = ()
    exclude_purchased: bool = False
    sources: Collection[str] = ()
    include_impressions: bool = False
    exploration_query: ExplorationQuery | None = None


@dataclass(frozen=True)
class UserState:
    """A user as of `as_of`: `past` are the stored events that `query` is made from.

    `cutoff` is in microseconds since 1970: earlier events count. `sequence` is that of the last event.
    """

    user: User
    as_of: datetime
    cutoff: int
    query: UserQuery
    past: EventColumns
    sequence: int


@dataclass(frozen=True)
class SourceCandidates:
    """The candidates of one source: `item_hashes` int64 (C,) and `scores` float32 (C,), best first."""

    item_hashes: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class RetrieveResult:
    """The history of a user, and candidates.

    The history has the items of the session, then those of stored events, newest first: `item_hashes` int64
    (H,), `kinds` int64, `ages` float64 in seconds, `weights` float32. `purchased` int64 (B,) item hashes.
    """

    item_hashes: np.ndarray
    kinds: np.ndarray
    ages: np.ndarray
    weights: np.ndarray
    purchased: np.ndarray
    candidates: Mapping[str, SourceCandidates]
    sequence: int
    ignored: tuple[np.ndarray, np.ndarray] | None = None
    """Recent impressions without an interaction, if the request includes them: see `EventState.ignored`."""
    exploration_candidates: ExplorationCandidates | None = None


class Retriever:
    """Retrieval over the events and items of a ranking service; `targets` are the kinds of purchases."""

    def __init__(
        self,
        state: EventState,
        table: ItemTable,
        sources: CandidateSources,
        counts: ExplorationCounts,
        targets: np.ndarray,
    ) -> None:
        self._state, self._table, self._sources, self._counts = state, table, sources, counts
        self._targets = targets

    def retrieve(self, of: UserState, stats: ItemStats, options: RetrievalOptions) -> RetrieveResult:
        """The history of a user and their candidates."""
        allowed = self._allowed(of, stats, options)
        candidates, nearest = dict[str, SourceCandidates](), None
        for name in options.sources or self._sources.by_name:
            scored = self._sources.by_name[name](of.query, stats, allowed, options.limit)
            best = self._sources.best(scored, allowed, options.limit)
            candidates[name] = SourceCandidates(self._table.item_hashes[best.rows], best.scores)
            if name == _NEAREST:
                nearest = scored
        item_hashes, kinds, ages, weights = self._history(of)
        return RetrieveResult(
            item_hashes,
            kinds,
            ages,
            weights,
            np.unique(of.past.item_hash[np.isin(of.past.kind, self._targets)]),
            candidates,
            of.sequence,
            self._ignored(of) if options.include_impressions else None,
            self._exploration(of, stats, options.exploration_query, allowed, nearest)
            if options.exploration_query is not None
            else None,
        )

    def _allowed(self, of: UserState, stats: ItemStats, options: RetrievalOptions) -> np.ndarray:
        """Which rows may be candidates, bool (N,)."""
        table = self._table
        available = table.available(of.as_of)[: len(stats.age)]
        if options.condition is None:
            allowed = available.copy()
        else:
            allowed = filters.both(available, filters.evaluate(options.condition, table))
        session = table.rows(item_hash for item_hash, _ in of.user.session)
        excluded = np.concatenate([table.rows(options.excluded), session])
        excluded = excluded[(excluded >= 0) & (excluded < len(allowed))]
        if options.exclude_purchased:
            excluded = np.concatenate([excluded, of.query.history[of.query.purchased]])
        allowed[excluded] = False
        return allowed

    def _ignored(self, of: UserState) -> tuple[np.ndarray, np.ndarray]:
        since = of.cutoff - _IMPRESSION_DAYS * DAY
        return self._state.ignored(of.user.user_id, of.user.visitor_id, since, of.cutoff, of.sequence)

    def _exploration(
        self,
        of: UserState,
        stats: ItemStats,
        query: ExplorationQuery,
        allowed: np.ndarray,
        scored: ScoredRows | None,
    ) -> ExplorationCandidates:
        """Candidates to explore; `scored` are the rows of the source `_NEAREST`, if computed."""
        if scored is None:
            scored = self._sources.by_name[_NEAREST](of.query, stats, allowed, query.limit)
        before = (of.as_of - _EPOCH) // timedelta(microseconds=1)
        nearest = partial(self._nearest, scored)
        return exploration_candidates(query, allowed, stats, self._table, self._counts, before, nearest)

    def _nearest(self, scored: ScoredRows, allowed: np.ndarray, limit: int) -> np.ndarray:
        return self._sources.best(scored, allowed, limit).rows

    def _history(self, of: UserState) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        session, past, state = of.user.session[::-1], of.past, self._state
        item_hashes = np.concatenate([np.array([h for h, _ in session], np.int64), past.item_hash])
        kinds = np.concatenate([np.array([state.kinds[t] for _, t in session], np.int64), past.kind])
        ages = np.concatenate([np.zeros(len(session)), np.maximum((of.cutoff - past.occurred) / 1e6, 0)])
        weights = state.weights[kinds] * recency(ages / _SECONDS_A_DAY)
        # The catalog may lack an item, and an impression has no weight: neither is of use to a search.
        useful = (self._table.rows(item_hashes) >= 0) & (state.weights[kinds] > 0)
        rows = np.flatnonzero(useful)[:MAX_HISTORY]
        return item_hashes[rows], kinds[rows], ages[rows], weights[rows].astype(np.float32)
