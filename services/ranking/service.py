"""The ranking service: records events, and retrieves, ranks and explains items for a user.

Joins the event store with the state in memory, the item table and the models of a bundle.
Knows domain values only, no messages. An answer depends only on the events recorded before `as_of`,
on the request and on the bundle.
"""

import asyncio
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from services.catalog.bundle import ShopSchema
from services.catalog.candidate_sources import NAMES
from services.catalog.item_table import ItemTable
from services.core.errors import Unavailable, VitrineError
from services.core.executors import finish_queued, run_in
from services.ranking.events.event_followers import EventFollower, EventFollowers
from services.ranking.events.event_store import EventStore, in_batches
from services.ranking.events.events import Event, RecordResult
from services.ranking.events.exploration_counts import ExplorationCounts
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.models.co_occurrence import GraphView, ItemGraph
from services.ranking.models.first_phase import SourceColumn
from services.ranking.models.propensity import Propensity
from services.ranking.models.sequence import SequenceView
from services.ranking.models.taste import read_taste
from services.ranking.retrieval.candidate_sources import CandidateSources
from services.ranking.retrieval.retriever import RetrievalOptions, Retriever, RetrieveResult, UserState
from services.ranking.scoring.explanations import Explainer
from services.ranking.scoring.scorer import Scorer
from services.ranking.state.event_columns import EventColumns, EventState
from services.ranking.state.item_stats import DAY, TICKS, ItemStats
from services.ranking.state.query_builder import User
from services.ranking.state.query_cache import QueryCache
from services.ranking.state.stats_by_tick import StatsByTick
from services.ranking.state.user_query import UserQuery
from services.ranking.users.data_retention import DataRetention
from services.ranking.users.profiles import RfmReference, UserProfile, profile

T = TypeVar("T")
Outcome = RecordResult | VitrineError
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BATCH, _LARGE_BATCH = 20_000, 200_000
_THREADS = 2
_MAX_PROFILE_EVENTS = 5000


class ItemView(Protocol):
    """Where the items are: the catalog of this process, or a follower of another process's catalog."""

    table: ItemTable

    async def wait_for(self, sequence: int) -> None:
        """Wait until the table has a change."""


@dataclass(frozen=True)
class RankResult:
    """Scores float32 (C,) in the order of the request, NaN for unknown items; `components` likewise.

    `probabilities` maps an event type to P(event | shown), float64 (C,). If the first phase left out
    candidates, components and probabilities are of the others, whose indices are `selected`, int64 (K,).
    """

    scores: np.ndarray
    components: Mapping[str, np.ndarray]
    probabilities: Mapping[str, np.ndarray]
    selected: np.ndarray | None = None


@dataclass(frozen=True)
class PredictResult:
    """The ranked items, None for a request without items; `propensity` maps days to P(purchase)."""

    ranked: RankResult | None
    propensity: Mapping[int, float]


@dataclass(frozen=True)
class ExplainResult:
    """C candidates by kind of evidence, in the order of `explanations.KINDS`, NaN for unknown items.

    `shares` float32 (C, K); `item_hashes` int64 (C, K), the item of the user's history that a kind rests on,
    0 for none; `purchased` bool (C, K), whether the user purchased that item.
    """

    shares: np.ndarray
    item_hashes: np.ndarray
    purchased: np.ndarray


class RankingService:
    """The domain of the service over one bundle; `ctr` to `propensity` are the directories of its models.

    `followers` are the services of this process over the same store.
    """

    def __init__(
        self,
        store: EventStore,
        followers: EventFollowers,
        compute: ThreadPoolExecutor,
        view: ItemView,
        graph: ItemGraph,
        profile: ShopSchema,
        ctr: Path | None = None,
        reranker: Path | None = None,
        sequence: Path | None = None,
        taste: Path | None = None,
        propensity: Path | None = None,
    ) -> None:
        self.store, self.view, self.profile = store, view, profile
        self.state, self._followers = EventState(profile.event_types), followers
        self._stats = StatsByTick(self.state, view.table, TICKS[profile.granularity])
        self._targets = np.array([self.state.kinds[t] for t in profile.targets], np.int16)
        sequence_view = SequenceView.load(sequence, view.table) if sequence else None
        context = RankingContext(
            view.table,
            GraphView(graph, view.table),
            profile.attributes,
            profile.numbers,
            sequence_view,
            read_taste(taste) if taste else None,
        )
        self.features = Features(context)
        self._scorer = Scorer(self.features, view.table, ctr, reranker)
        self._explainer = Explainer(self._scorer, self.features, context)
        self._exploration_counts = ExplorationCounts(store.served)
        self._retriever = Retriever(
            self.state,
            view.table,
            CandidateSources(context),
            self._exploration_counts,
            self._targets,
        )
        self._propensity = Propensity(propensity, list(profile.event_types)) if propensity else None
        self._queries = QueryCache(self.state, view.table, self._targets)
        self._rfm_reference: tuple[int, RfmReference] | None = None
        self._advance_lock = threading.Lock()
        self._rfm_lock = threading.Lock()
        self._compute = compute
        self._pool, self._closed = ThreadPoolExecutor(_THREADS, "ranking"), False
        self.retention = DataRetention(store, self._on)
        store.readers.add(self)
        self.advance()

    def close(self) -> None:
        """Finish the accepted calls and stop."""
        self._closed = True
        finish_queued(self._compute)
        self._pool.shutdown()
        self._stats.close()

    async def write(self, events: Sequence[Event | VitrineError]) -> list[Outcome]:
        """Commit events in their order; one that is an error already stays one.

        The error of an outcome is relative to its event: InvalidArgument, AlreadyExists or
        ResourceExhausted; StorageFull or Unavailable for each event of a batch that was not committed. The
        next request sees the recorded events.
        """
        caller, batches = object(), list(in_batches(events))
        futures = [await self._on(partial(self._submit, batch, caller)) for batch in batches]
        outcomes: list[Outcome] = []
        for batch, future in zip(batches, futures, strict=True):
            try:
                batch_outcomes = await asyncio.wrap_future(future)
            except VitrineError as error:  # of this batch: others may be committed
                batch_outcomes = _refused(batch, error)
            outcomes += batch_outcomes
            # After each batch, so that no other call has to read all of a large write. The first call of a
            # duplicate may have ended before the state followed it.
            last = max((o.sequence for o in batch_outcomes if isinstance(o, RecordResult)), default=0)
            await self._follow_all(last)
        return outcomes

    async def _follow_all(self, sequence: int) -> None:
        """Let each service that answers calls reflect a change; a swap may register one meanwhile."""
        followed = list[EventFollower]()
        while True:
            services: tuple[EventFollower, ...] = (self, *self._followers.followers)
            lagging = [s for s in services if s.event_sequence < sequence and s not in followed]
            if not lagging:
                return
            followed.append(lagging[0])  # one that is closed meanwhile stays behind
            await lagging[0].follow()

    @property
    def event_sequence(self) -> int:
        """The sequence number of the last event in the state."""
        return self.state.sequence

    async def follow(self) -> None:
        """Advance, unless this closes meanwhile: calls of another bundle do not depend on it."""
        try:
            await self._on(self.advance)
        except Unavailable:
            if not self._closed:
                raise

    def delete(self, from_state: Callable[[EventState], None]) -> None:
        """Delete from the state what the store has deleted; statistics are computed anew."""
        # `advance` may have read events before their deletion: the lock waits until it has added them.
        with self._advance_lock, self._rfm_lock:
            from_state(self.state)
            self._stats.clear()
            self._rfm_reference = None
            self._queries.clear()

    async def retrieve(
        self, user: User, as_of: datetime, options: RetrievalOptions, *, min_sequence: int = 0
    ) -> RetrieveResult:
        """The history of a user and candidates, from items of change `min_sequence` or later."""
        await self.view.wait_for(min_sequence)
        options = await self._with_log_position(options)

        def retrieve() -> RetrieveResult:
            sequence = self.state.sequence
            query, past = self.query(user, as_of, sequence)
            state = UserState(user, as_of, self.cutoff(as_of), query, past, sequence)
            return self._retriever.retrieve(state, self.stats(as_of), options)

        return await run_in(self._compute, retrieve)

    async def _with_log_position(self, options: RetrievalOptions) -> RetrievalOptions:
        """The same options with the position in the impression log up to which exploration counts."""
        exploration = options.exploration_query
        if exploration is None:
            return options
        follow = partial(self._exploration_counts.follow, exploration.log_position or 0)
        position = await self._on(follow)
        if exploration.log_position is None:
            exploration = replace(exploration, log_position=position)
        return replace(options, exploration_query=exploration)

    async def rank(
        self,
        user: User,
        as_of: datetime,
        item_hashes: np.ndarray,
        until_sequence: int | None = None,
        sources: Sequence[SourceColumn] = (),
    ) -> RankResult:
        """Score candidates, int64 (C,) item hashes; `until_sequence` is the sequence of Retrieve.

        With the `sources` of the candidates the models score only those that the first phase selects.
        """
        return await run_in(
            self._compute, lambda: self._rank(user, as_of, item_hashes, until_sequence, sources)
        )

    async def user_profile(
        self, user_id: str, visitor_id: str, as_of: datetime
    ) -> tuple[dict[str, list[str]], UserProfile]:
        """Every id of a user, and the profile of their events."""
        return await self._on(
            lambda: (self.store.user_ids(user_id, visitor_id), self._profile(user_id, visitor_id, as_of))
        )

    async def explain(
        self, user: User, as_of: datetime, item_hashes: np.ndarray, until_sequence: int | None = None
    ) -> ExplainResult:
        """Why candidates, int64 (C,) item hashes, have the scores that `rank` gives them."""
        return await run_in(self._compute, lambda: self._explain(user, as_of, item_hashes, until_sequence))

    async def predict(
        self, user: User, as_of: datetime, item_hashes: np.ndarray, until_sequence: int | None = None
    ) -> PredictResult:
        """The scores of items, int64 (C,) item hashes, and the probability that the user purchases soon."""

        def predict() -> PredictResult:
            ranked = self._rank(user, as_of, item_hashes, until_sequence) if len(item_hashes) else None
            return PredictResult(ranked, self._purchase_propensity(user.user_id, user.visitor_id, as_of))

        return await run_in(self._compute, predict)

    def advance(self) -> None:
        """Read the committed events into the state."""
        with self._advance_lock:
            last = self.store.sequence
            if last - self.state.sequence > _LARGE_BATCH:
                self._read_many(last)
            while self.state.sequence < last:
                rows, identities = self.store.changes(self.state.sequence, _BATCH)
                self.state.extend(rows, identities)
                if not len(rows.sequence):  # all events up to the last were deleted
                    self.state.sequence = last

    def _read_many(self, last: int) -> None:
        """Read most of the events up to `last`, and the ids of all users in one query."""
        self.state.identify(self.store.identities())
        while True:
            rows = self.store.rows(self.state.sequence, _LARGE_BATCH)
            # Users of events after `last` are newer than the ids, and need not be among them.
            if not len(rows.sequence) or rows.sequence[-1] > last:
                return
            self.state.extend(rows, {})

    def query(
        self, user: User, as_of: datetime, until_sequence: int | None = None
    ) -> tuple[UserQuery, EventColumns]:
        """The user in rows of the item table, and the stored events that this is made from."""
        return self._queries.query(user, self.cutoff(as_of), until_sequence)

    def cutoff(self, as_of: datetime) -> int:
        """Microseconds since 1970: only events recorded before it count."""
        time = (as_of - _EPOCH) // timedelta(microseconds=1)
        return time - time % DAY if self.profile.granularity == "day" else time

    def stats(self, as_of: datetime) -> ItemStats:
        """The statistics of the items that hold at `as_of`."""
        return self._stats.at((as_of - _EPOCH) // timedelta(microseconds=1))

    def _submit(self, batch: Sequence[Event | VitrineError], caller: object) -> Future[list[Outcome]]:
        """Queue a batch; if the store refuses it, a future with the refusal for each event."""
        try:
            return self.store.write_batch(batch, caller)
        except VitrineError as error:
            refused: Future[list[Outcome]] = Future()
            refused.set_result(_refused(batch, error))
            return refused

    def _rank(
        self,
        user: User,
        as_of: datetime,
        item_hashes: np.ndarray,
        until_sequence: int | None,
        sources: Sequence[SourceColumn] = (),
    ) -> RankResult:
        query, _ = self.query(user, as_of, until_sequence)
        stats = self.stats(as_of)
        rows = self.view.table.rows(item_hashes)
        in_table = np.flatnonzero((rows >= 0) & (rows < stats.length))
        required = None
        if sources:
            required = np.zeros(len(item_hashes), bool)
            for name, indices, _ in sources:
                required[indices] |= name not in NAMES  # such as "quota": no score of the first phase
            required = required[in_table]
            sources = _of_candidates(sources, in_table, len(item_hashes))
        scores = self._scorer.score(query, rows[in_table], stats, sources, required)

        def spread(values: np.ndarray) -> np.ndarray:
            if len(values) == len(item_hashes):
                return values
            every = np.full(len(item_hashes), np.nan, values.dtype)
            every[in_table] = values
            return every

        if scores.selected is not None:
            selected = in_table[scores.selected]
            return RankResult(spread(scores.values), scores.components, scores.probabilities, selected)
        return RankResult(
            spread(scores.values),
            {name: spread(values) for name, values in scores.components.items()},
            {name: spread(values) for name, values in scores.probabilities.items()},
        )

    def _profile(self, user_id: str, visitor_id: str, as_of: datetime) -> UserProfile:
        stats, cutoff = self.stats(as_of), self.cutoff(as_of)
        with self._rfm_lock:  # a deletion meanwhile must not be undone
            cached = self._rfm_reference
            if cached is None or cached[0] != stats.tick:
                cached = stats.tick, RfmReference.of(self.state.all(), self._targets, stats.tick)
                self._rfm_reference = cached
        past = self.state.everything(user_id, visitor_id, cutoff, _MAX_PROFILE_EVENTS)
        user = profile(
            past,
            self.state,
            self.view.table,
            stats,
            cutoff,
            self.profile.attributes,
            self._targets,
            cached[1],
        )
        return replace(user, propensity=self._purchase_propensity(user_id, visitor_id, as_of))

    def _purchase_propensity(self, user_id: str, visitor_id: str, as_of: datetime) -> dict[int, float]:
        """Days to P(purchase within them); empty without a model, and for a user without events."""
        if self._propensity is None:
            return {}
        cutoff = self.cutoff(as_of)
        past = self.state.everything(user_id, visitor_id, cutoff, sys.maxsize)
        return self._propensity.of(past, self._targets, cutoff)

    def _explain(
        self, user: User, as_of: datetime, item_hashes: np.ndarray, until_sequence: int | None
    ) -> ExplainResult:
        query, _ = self.query(user, as_of, until_sequence)
        stats, table, state = self.stats(as_of), self.view.table, self.state
        rows = table.rows(item_hashes)
        in_table = np.flatnonzero((rows >= 0) & (rows < len(stats.age)))
        explanations = self._explainer.explain(query, rows[in_table], stats)
        # The last entry is for no seed, -1.
        seed_hashes = np.append(table.item_hashes[np.concatenate([query.session, query.history])], 0)
        kinds = np.array([state.kinds[t] for _, t in reversed(user.session)], np.int64)
        # The events of the session that `query.session` has.
        in_query = state.weights[kinds] > 0
        in_query &= table.rows(h for h, _ in reversed(user.session)) >= 0
        seed_purchased = np.concatenate([np.isin(kinds[in_query], self._targets), query.purchased, [False]])
        shares = np.full((len(item_hashes), explanations.shares.shape[1]), np.nan, np.float32)
        seeds, purchased = np.zeros(shares.shape, np.int64), np.zeros(shares.shape, bool)
        shares[in_table], seeds[in_table] = explanations.shares, seed_hashes[explanations.seeds]
        purchased[in_table] = seed_purchased[explanations.seeds]
        return ExplainResult(shares, seeds, purchased)

    async def _on(self, function: Callable[[], T]) -> T:
        """Run a function that waits for the store on a thread of this service."""
        return await run_in(self._pool, function)


def _of_candidates(
    sources: Sequence[SourceColumn], candidates: np.ndarray, count: int
) -> Sequence[SourceColumn]:
    """The sources over some of `count` candidates only: `candidates` int64 (K,) are their indices."""
    if len(candidates) == count:
        return sources
    place = np.full(count, -1, np.int64)
    place[candidates] = np.arange(len(candidates))
    parts = ((name, place[indices], scores) for name, indices, scores in sources)
    return [(name, places[places >= 0], scores[places >= 0]) for name, places, scores in parts]


def _refused(batch: Sequence[Event | VitrineError], error: VitrineError) -> list[Outcome]:
    """The outcomes of a batch that was not written: `error`, or an event's own error."""
    return [event if isinstance(event, VitrineError) else error for event in batch]
