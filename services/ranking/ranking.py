"""Behaviour at work: events in, a person's state, candidates and their order out.

Joins the event store with the state in memory, the item table and the bundle's models.
Knows domain values alone, no messages. An answer depends on nothing but what was recorded
before `as_of`, the request and the bundle.
"""

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from services import filters
from services.bundle import Profile
from services.errors import Unavailable, VitrineError
from services.item_table import ItemTable
from services.ranking.basis import Basis
from services.ranking.behaviour import BehaviourStore, Event, Outcome, Recorded
from services.ranking.exploring import Explorable, Explore, explorable
from services.ranking.features import Features
from services.ranking.graph import GraphView, ItemGraph
from services.ranking.keeping import Keeping
from services.ranking.moment import DAY, TICKS, Moment, moment
from services.ranking.people import Buyers, UserProfile, profile
from services.ranking.propensity import Propensity
from services.ranking.query import MAX_HISTORY, Query, recency
from services.ranking.reasons import Reasoner
from services.ranking.scoring import Scorer
from services.ranking.sequence import SequenceView
from services.ranking.showings import Showings
from services.ranking.sources import Sources
from services.ranking.state import BehaviourState, Columns

T = TypeVar("T")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BATCH = 20_000
_THREADS = 2
_SECONDS_A_DAY = 86_400
_SHOWN_DAYS = 30
_NEAREST = "graph"  # by behaviour, and of what has none by text and photograph
_MOST_OF_A_PERSON = 5000
_log = logging.getLogger(__name__)


class CatalogueView(Protocol):
    """Where the items are: the catalogue in this process, or a follower of it in another."""

    table: ItemTable

    async def wait_for(self, sequence: int) -> None:
        """Wait until the table has a change."""


@dataclass(frozen=True)
class Person:
    """Who asks: ids, either may be empty, and the session as (item number, event type), oldest first."""

    user_id: str = ""
    visitor_id: str = ""
    session: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Candidates:
    """One source's items: `numbers` int64 (C,) and `scores` float32 (C,), best first."""

    numbers: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Retrieved:
    """A person's state and candidates.

    `history`, newest first, session before the past: `numbers` int64 (H,), `kinds` int64,
    `ages` float64 in seconds, `weights` float32. `bought` int64 (B,) item numbers.
    """

    numbers: np.ndarray
    kinds: np.ndarray
    ages: np.ndarray
    weights: np.ndarray
    bought: np.ndarray
    candidates: Mapping[str, Candidates]
    sequence: int
    shown: tuple[np.ndarray, np.ndarray] | None = None
    """What was shown of late and not followed up, when asked for: see `BehaviourState.ignored`."""
    explorable: Explorable | None = None


@dataclass(frozen=True)
class Ranked:
    """Scores float32 (C,) in the order asked for, NaN for unknown items, and those of each component.

    `probabilities` maps an event type to P(event | shown), float64 (C,).
    """

    scores: np.ndarray
    components: Mapping[str, np.ndarray]
    probabilities: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Predicted:
    """What a person is likely to do: with items, None where none were asked about, and days to P(buys)."""

    ranked: Ranked | None
    propensity: Mapping[int, float]


@dataclass(frozen=True)
class Explained:
    """Of C candidates by kind of evidence, in the order of `reasons.KINDS`, NaN for unknown items.

    `shares` float32 (C, K); `items` int64 (C, K), the number of the person's own item that a kind rests on, 0
    for none; `bought` bool (C, K), whether that one was bought.
    """

    shares: np.ndarray
    items: np.ndarray
    bought: np.ndarray


class Ranking:
    """The service's domain over one bundle; `ctr` to `propensity` are its models' directories."""

    def __init__(
        self,
        store: BehaviourStore,
        view: CatalogueView,
        graph: ItemGraph,
        profile: Profile,
        ctr: Path | None = None,
        reranker: Path | None = None,
        sequence: Path | None = None,
        propensity: Path | None = None,
    ) -> None:
        self.store, self.view, self.profile = store, view, profile
        self.state = BehaviourState(profile.event_types)
        self._showings = Showings(store.served)
        self._graph = GraphView(graph, view.table)
        walks = SequenceView.load(sequence, view.table) if sequence else None
        basis = Basis(view.table, self._graph, profile.attributes, profile.numbers, walks)
        self.features = Features(basis)
        self._scorer = Scorer(self.features, view.table, ctr, reranker)
        self._reasoner = Reasoner(self._scorer, self.features, basis)
        self._sources = Sources(basis)
        self._propensity = Propensity(propensity, list(profile.event_types)) if propensity else None
        self._tick = TICKS[profile.granularity]
        self._targets = np.array([self.state.kinds[t] for t in profile.targets], np.int16)
        self._moment: Moment | None = None
        self._buyers: tuple[int, Buyers] | None = None
        self._advancing = threading.Lock()
        self._taking = threading.Lock()
        self.heirs: list[Ranking] = []
        """Who answers other calls by now: what is recorded here is seen there at once."""
        self._pool = ThreadPoolExecutor(_THREADS, "ranking")
        self.keeping = Keeping(store, self._on)
        store.readers.add(self)
        self.advance()

    @property
    def sources(self) -> list[str]:
        """The names of the sources."""
        return list(self._sources.by_name)

    def close(self) -> None:
        """Finish what was accepted and stop."""
        self._pool.shutdown()

    async def write(self, events: Sequence[Event | VitrineError]) -> list[Recorded | VitrineError]:
        """Commit events in their order; one that is an error already stays one.

        An outcome's error is relative to the event: InvalidArgument, AlreadyExists or
        ResourceExhausted. What was recorded is seen by the next request.
        """
        outcomes = [self._submit(event) for event in events]
        done: list[Recorded | VitrineError] = []
        for outcome in outcomes:
            if isinstance(outcome, VitrineError):
                done.append(outcome)
                continue
            try:
                recorded: Recorded = await asyncio.wrap_future(outcome)
                done.append(recorded)
            except VitrineError as error:
                done.append(error)
        if any(isinstance(o, Recorded) and o.outcome is Outcome.RECORDED for o in done):
            await self._on(self.advance)
            for heir in self.heirs:
                await heir._on(heir.advance)
        return done

    def lose(self, from_state: Callable[[BehaviourState], None]) -> None:
        """Let the state lose what the store has lost; what rests on it is taken anew."""
        # What it read before that was deleted it has added when it lets go of the lock.
        with self._advancing, self._taking:
            from_state(self.state)
            self._moment = self._buyers = None

    async def retrieve(
        self,
        person: Person,
        as_of: datetime,
        limit: int,
        *,
        condition: filters.Filter | None = None,
        excluded: Collection[int] = (),
        exclude_bought: bool = False,
        sources: Collection[str] = (),
        min_sequence: int = 0,
        include_shown: bool = False,
        explore: Explore | None = None,
    ) -> Retrieved:
        """A person's state and at most `limit` candidates per source, under the filter."""
        await self.view.wait_for(min_sequence)

        def retrieve() -> Retrieved:
            asked = condition, excluded, exclude_bought, sources, explore
            found = self._retrieve(person, as_of, limit, *asked)
            if not include_shown:
                return found
            cut, ids = self.cut(as_of), (person.user_id, person.visitor_id)
            shown = self.state.ignored(*ids, cut - _SHOWN_DAYS * DAY, cut, found.sequence)
            return replace(found, shown=shown)

        return await self._on(retrieve)

    async def rank(
        self, person: Person, as_of: datetime, numbers: np.ndarray, upto: int | None = None
    ) -> Ranked:
        """Score candidates, int64 (C,) item numbers; `upto` is the sequence of Retrieve."""
        return await self._on(lambda: self._rank(person, as_of, numbers, upto))

    async def user_profile(
        self, user_id: str, visitor_id: str, as_of: datetime
    ) -> tuple[dict[str, list[str]], UserProfile]:
        """Every id of a person, and what their behaviour says of them."""
        return await self._on(
            lambda: (self.store.known_ids(user_id, visitor_id), self._profile(user_id, visitor_id, as_of))
        )

    async def explain(
        self, person: Person, as_of: datetime, numbers: np.ndarray, upto: int | None = None
    ) -> Explained:
        """Why candidates, int64 (C,) item numbers, stand where `rank` puts them."""
        return await self._on(lambda: self._explain(person, as_of, numbers, upto))

    async def predict(
        self, person: Person, as_of: datetime, numbers: np.ndarray, upto: int | None = None
    ) -> Predicted:
        """What a person is likely to do with items, int64 (C,) item numbers, and whether they buy soon."""

        def predict() -> Predicted:
            ranked = self._rank(person, as_of, numbers, upto) if len(numbers) else None
            return Predicted(ranked, self._chances(person.user_id, person.visitor_id, as_of))

        return await self._on(predict)

    def advance(self) -> None:
        """Let the state follow what was committed."""
        with self._advancing:
            last = self.store.sequence
            while self.state.sequence < last:
                start = self.state.sequence
                self.state.extend(*self.store.changes(start, _BATCH))
                # What was deleted leaves gaps.
                self.state.sequence = max(self.state.sequence, min(start + _BATCH, last))

    def query(self, person: Person, as_of: datetime, upto: int | None = None) -> tuple[Query, Columns]:
        """The person in rows of the item table, and the past it was made of."""
        cut = self.cut(as_of)
        past = self.state.history(person.user_id, person.visitor_id, cut, MAX_HISTORY, upto)
        return make_query(self.state, self.view.table, person, past, cut, self._targets), past

    def cut(self, as_of: datetime) -> int:
        """The moment, microseconds since 1970, before which events are seen."""
        at = (as_of - _EPOCH) // timedelta(microseconds=1)
        return at - at % DAY if self.profile.granularity == "day" else at

    def moment(self, as_of: datetime) -> Moment:
        """The shop at the last tick before `as_of`."""
        at = (as_of - _EPOCH) // timedelta(microseconds=1)
        tick = at - at % self._tick
        with self._taking:
            known = self._moment
            if known is None or known.tick != tick:
                known = moment(self.state, self.view.table, tick)
            self._moment = known = _extended(known, self.view.table)
            return known

    def _submit(self, event: Event | VitrineError) -> VitrineError | Future[Recorded]:
        if isinstance(event, VitrineError):
            return event
        try:
            return self.store.write(event)
        except VitrineError as error:
            return error

    def _retrieve(
        self,
        person: Person,
        as_of: datetime,
        limit: int,
        condition: filters.Filter | None,
        excluded: Collection[int],
        exclude_bought: bool,
        sources: Collection[str],
        explore: Explore | None,
    ) -> Retrieved:
        sequence = self.state.sequence
        query, past = self.query(person, as_of, sequence)
        now, table = self.moment(as_of), self.view.table
        allowed = table.available(as_of)[: len(now.age)]
        if condition is not None:
            allowed = allowed & filters.evaluate(condition, table)[: len(allowed)]
        out = table.rows(excluded)
        shown = table.rows(number for number, _ in person.session)
        out = np.concatenate([out, shown])
        out = out[(out >= 0) & (out < len(allowed))]
        if exclude_bought:
            out = np.concatenate([out, query.history[query.bought]])
        allowed[out] = False
        candidates, near = dict[str, Candidates](), None
        for source in sources or self.sources:
            scores = self._sources.by_name[source](query, now)
            rows, best = self._sources.best(scores, allowed, limit)
            candidates[source] = Candidates(table.item_numbers[rows], best)
            if source == _NEAREST:
                near = scores
        numbers, kinds, ages, weights = self._history(person, past, self.cut(as_of))
        bought = np.unique(past.number[np.isin(past.kind, self._targets)])
        trial = None
        if explore is not None:
            before = (as_of - _EPOCH) // timedelta(microseconds=1)
            if near is None:
                near = self._sources.by_name[_NEAREST](query, now)
            nearest = partial(self._nearest, near)
            trial = explorable(explore, allowed, now, table, self._showings, before, nearest)
        return Retrieved(numbers, kinds, ages, weights, bought, candidates, sequence, explorable=trial)

    def _nearest(self, scores: np.ndarray, allowed: np.ndarray, limit: int) -> np.ndarray:
        return self._sources.best(scores, allowed, limit)[0]

    def _history(
        self, person: Person, past: Columns, cut: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        session = person.session[::-1]
        numbers = np.concatenate([np.array([n for n, _ in session], np.int64), past.number])
        kinds = np.concatenate([np.array([self.state.kinds[t] for _, t in session], np.int64), past.kind])
        ages = np.concatenate([np.zeros(len(session)), np.maximum((cut - past.occurred) / 1e6, 0)])
        weights = self.state.weights[kinds] * recency(ages / _SECONDS_A_DAY)
        # What the catalogue does not know, or was only shown, is nothing to search by.
        known = (self.view.table.rows(numbers) >= 0) & (self.state.weights[kinds] > 0)
        kept = np.flatnonzero(known)[:MAX_HISTORY]
        return numbers[kept], kinds[kept], ages[kept], weights[kept].astype(np.float32)

    def _rank(self, person: Person, as_of: datetime, numbers: np.ndarray, upto: int | None) -> Ranked:
        query, _ = self.query(person, as_of, upto)
        now = self.moment(as_of)
        rows = self.view.table.rows(numbers)
        known = np.flatnonzero((rows >= 0) & (rows < len(now.age)))
        scores = self._scorer.score(query, rows[known], now)

        def spread(values: np.ndarray) -> np.ndarray:
            every = np.full(len(numbers), np.nan, values.dtype)
            every[known] = values
            return every

        return Ranked(
            spread(scores.values),
            {name: spread(values) for name, values in scores.components.items()},
            {name: spread(values) for name, values in scores.probabilities.items()},
        )

    def _profile(self, user_id: str, visitor_id: str, as_of: datetime) -> UserProfile:
        now, cut = self.moment(as_of), self.cut(as_of)
        with self._taking:  # so that nobody is put back who was forgotten meanwhile
            kept = self._buyers
            if kept is None or kept[0] != now.tick:
                self._buyers = kept = now.tick, Buyers.of(self.state.all(), self._targets, now.tick)
        past = self.state.everything(user_id, visitor_id, cut, _MOST_OF_A_PERSON)
        known = self.state, self.view.table, now, cut, self.profile.attributes, self._targets
        found = profile(past, *known, kept[1])
        return replace(found, propensity=self._chances(user_id, visitor_id, as_of))

    def _chances(self, user_id: str, visitor_id: str, as_of: datetime) -> dict[int, float]:
        """Days to the chance of buying within them; empty where that was not trained, and for a stranger."""
        if self._propensity is None:
            return {}
        cut = self.cut(as_of)
        past = self.state.everything(user_id, visitor_id, cut, sys.maxsize)
        return self._propensity.of(past, self._targets, cut)

    def _explain(self, person: Person, as_of: datetime, numbers: np.ndarray, upto: int | None) -> Explained:
        query, _ = self.query(person, as_of, upto)
        now, table = self.moment(as_of), self.view.table
        rows = table.rows(numbers)
        known = np.flatnonzero((rows >= 0) & (rows < len(now.age)))
        found = self._reasoner.reasons(query, rows[known], now)
        past = np.append(table.item_numbers[np.concatenate([query.session, query.history])], 0)
        done = np.array([self.state.kinds[t] for n, t in reversed(person.session)], np.int64)
        counted = self.state.weights[done] > 0
        counted &= table.rows(n for n, _ in reversed(person.session)) >= 0
        bought = np.concatenate([np.isin(done[counted], self._targets), query.bought, [False]])
        shares = np.full((len(numbers), found.shares.shape[1]), np.nan, np.float32)
        items, had = np.zeros(shares.shape, np.int64), np.zeros(shares.shape, bool)
        shares[known], items[known], had[known] = found.shares, past[found.seeds], bought[found.seeds]
        return Explained(shares, items, had)

    async def _on(self, function: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        except RuntimeError as error:
            if "shutdown" in str(error):
                raise Unavailable("the service is shutting down") from None
            raise


def make_query(
    state: BehaviourState,
    table: ItemTable,
    person: Person,
    past: Columns,
    cut: int,
    targets: np.ndarray,
) -> Query:
    """The person in rows of the table; what the table does not know or weighs nothing is left out."""
    session = [(n, w) for n, t in reversed(person.session) if (w := state.weights[state.kinds[t]]) > 0]
    session_rows = table.rows(n for n, _ in session)
    known_session = session_rows >= 0
    rows = table.rows(past.number)
    known = rows >= 0
    kinds = past.kind[known]
    return Query(
        session=session_rows[known_session],
        session_weights=np.array([w for _, w in session], np.float32)[known_session],
        history=rows[known],
        ages=((cut - past.occurred[known]) / DAY).astype(np.float32),
        weights=state.weights[kinds],
        bought=np.isin(kinds, targets),
        channels=past.channel[known],
    )


def _extended(known: Moment, table: ItemTable) -> Moment:
    """The moment with rows for the items that came since it was taken."""
    more = table.length - len(known.age)
    if more <= 0:
        return known
    stated = table.numbers("price")
    price = np.full(more, np.nan) if stated is None else stated[len(known.age) : len(known.age) + more, 0]
    unknown = np.full(more, np.nan, np.float32)
    return replace(
        known,
        popular=np.concatenate([known.popular, np.zeros((more, known.popular.shape[1]), np.float32)]),
        age=np.concatenate([known.age, unknown]),
        idle=np.concatenate([known.idle, unknown]),
        price=np.concatenate([known.price, price.astype(np.float32)]),
        highest=np.concatenate([known.highest, unknown]),
        channels=np.concatenate([known.channels, np.zeros((more, known.channels.shape[1]), np.float32)]),
    )
