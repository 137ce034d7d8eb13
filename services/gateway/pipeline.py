"""A Recommend, step by step: retrieve and search side by side, hard rules, rank, the shop's rules.

Each stage takes and gives `Page`-building values and knows no other stage. One that is
down, slow or unready never fails the call: retrieval order stands in for ranking, the
bundle's popularity for retrieval, and `degraded` says so.
"""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeVar

import numpy as np
from vitrine.catalog.v1 import event_pb2, item_pb2
from vitrine.catalog.v1.profile_pb2 import UserProfile
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import deadline, wire
from services.catalog import item_number
from services.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
    VitrineError,
)
from services.gateway import why_not
from services.gateway.assortment import Assortment
from services.gateway.breaker import Breaker
from services.gateway.clients import Embedding, Ranking
from services.gateway.fusion import fused
from services.gateway.wish import BLENDED, SOURCES, Candidates, Ordered, Reason, Stage, Wish
from services.interests import PER_INTEREST, PER_SOURCE, interests
from services.item_table import ItemTable

T = TypeVar("T")
_CODES: dict[type[VitrineError], pb.DegradationCode.ValueType] = {
    DeadlineExceeded: pb.DEGRADATION_CODE_TIMEOUT,
    FailedPrecondition: pb.DEGRADATION_CODE_NOT_READY,
    Unavailable: pb.DEGRADATION_CODE_UNAVAILABLE,
}
_SOURCES = {
    ranking_pb.SOURCE_GRAPH: "graph",
    ranking_pb.SOURCE_POPULAR: "popular",
    ranking_pb.SOURCE_RISING: "rising",
    ranking_pb.SOURCE_NEW: "new",
    ranking_pb.SOURCE_FAMILY: "family",
    ranking_pb.SOURCE_AFFINITY: "affinity",
    ranking_pb.SOURCE_SEQUENCE: "sequence",
    ranking_pb.SOURCE_WORDS: "words",
}
_SPACES = {item_pb2.SPACE_TEXT: "text", item_pb2.SPACE_IMAGE: "image"}
_OF_BEHAVIOUR = {name: source for source, name in _SOURCES.items()}
_PER_QUOTA = 200
_EXPLORED = 100
_MAX_EXCLUDED = 100_000


@dataclass(frozen=True)
class Limits:
    """How far a Recommend goes.

    `per_source` candidates of each source of behaviour, `per_interest` items around each
    interest; `budget` seconds when the caller set no deadline, of which
    `retrieval_share` is for the first step.
    """

    per_source: int = PER_SOURCE
    per_interest: int = PER_INTEREST
    budget: float = 2.0
    retrieval_share: float = 0.6


class Pipeline:
    """Recommend over two neighbours, an item table and, for bad days, the bundle's popularity.

    `popular` is int64 (P,) item numbers, best first.
    """

    def __init__(
        self,
        embedding: Embedding,
        ranking: Ranking,
        table: ItemTable,
        popular: np.ndarray,
        bundle: str,
        limits: Limits | None = None,
    ) -> None:
        self._embedding, self._ranking, self.table = embedding, ranking, table
        self._popular, self.bundle, self._limits = popular, bundle, limits or Limits()
        self._assortment = Assortment(table, popular)
        self._breakers = defaultdict[str, Breaker](Breaker)

    async def run(self, wish: Wish) -> Ordered:
        """All candidates in the order they should be shown."""
        retrieved, ranked = await self._ranked(wish)
        return await self._arranged(wish, retrieved, ranked)

    async def why(self, wish: Wish, number: int) -> tuple[why_not.Answer, Ordered]:
        """What becomes of an item, by its number, in such a run, and the run."""
        retrieved, ranked = await self._ranked(wish)
        ordered = await self._arranged(wish, retrieved, ranked)
        known = wish, retrieved, ranked, ordered, self._assortment, self.table
        return await deadline.wait(asyncio.to_thread(why_not.why, number, *known)), ordered

    async def _ranked(self, wish: Wish) -> tuple[ranking_pb.RetrieveResponse | None, Ordered]:
        budget = self._seconds()
        degraded: list[pb.Degradation] = []
        stages: list[Stage] = []
        first = budget * self._limits.retrieval_share
        with _timed("retrieve", stages) as told:
            retrieved = await self._attempt("retrieve", self._retrieve(wish), first, degraded)
            told(sum(len(found.item_numbers) for found in retrieved.candidates) if retrieved else 0)
        with _timed("search", stages) as told:
            candidates = await self._candidates(wish, retrieved, first, degraded)
            told(len(candidates.sources))
        with _timed("allow", stages) as told:
            kept = self._assortment.allowed(wish, retrieved, list(candidates.sources))
            if wish.items is None and all(candidates.sources[n].keys() == {"explore"} for n in kept):
                popular = self._assortment.allowed(wish, retrieved, self._popular.tolist())
                candidates.add("popular", popular, [1.0 / place for place in range(1, len(popular) + 1)])
                kept = list(dict.fromkeys([*popular, *kept]))
            told(len(kept))
        with _timed("rank", stages) as told:
            ranked = await self._order(wish, retrieved, kept, candidates, degraded, budget)
            told(len(ranked.numbers))
        shown = set(kept)
        left_out = [n for n in wish.items or () if n not in shown]
        return retrieved, replace(
            ranked, left_out=left_out, stages=stages, ranked=ranked.numbers, ranked_scores=ranked.scores
        )

    async def _arranged(
        self, wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, ranked: Ordered
    ) -> Ordered:
        stages = list(ranked.stages)
        with _timed("rules", stages) as told:
            # Rules are loops over slots: of many, or over a whole catalogue, too long for the event loop.
            if not wish.rules.reorder and len(ranked.numbers) >= wish.depth:
                ordered = self._assortment.arranged(wish, retrieved, ranked)
            else:
                arranging = asyncio.to_thread(self._assortment.arranged, wish, retrieved, ranked)
                ordered = await deadline.wait(arranging)
            told(len(ordered.numbers))
        return replace(ordered, stages=stages)

    async def profile(
        self, person: ranking_pb.Person, as_of: datetime, degraded: list[pb.Degradation]
    ) -> UserProfile | None:
        """What behaviour says of who has an id; None and a line in `degraded` where nobody tells."""
        request = ranking_pb.GetUserProfileRequest(
            user_id=person.user_id,
            visitor_id=person.visitor_id,
            as_of=wire.time_to(as_of),
            bundle=self.bundle,
        )
        told = await self._attempt("profile", self._ranking.user_profile(request), self._seconds(), degraded)
        return told.profile if told else None

    async def reasons(
        self, wish: Wish, ordered: Ordered, numbers: Sequence[int], degraded: list[pb.Degradation]
    ) -> tuple[dict[int, list[Reason]], dict[str, str]]:
        """Why items of a page are there, the strongest first, and the titles of the items these rest on."""
        if not numbers:
            return {}, {}
        budget = self._seconds()
        request = ranking_pb.ExplainRequest(
            person=wish.person,
            as_of=wire.time_to(wish.as_of),
            item_numbers=numbers,
            state_sequence=ordered.state_sequence,
            bundle=self.bundle,
        )
        explained = await self._attempt("explain", self._ranking.explain(request), budget, degraded)
        found: dict[int, list[Reason]] = {}
        # Told without a type, it was looked at for all that is known.
        seen = {item_number(item.item_id) for item in wish.person.session if not item.type}
        for evidence in explained.evidence if explained else ():
            rows = self.table.rows(evidence.history_item_numbers)
            ids = iter(self.table.ids(rows[rows >= 0]))
            named = [next(ids) if row >= 0 else "" for row in rows]
            own = evidence.history_item_numbers
            bought = [had and n not in seen for had, n in zip(evidence.bought, own, strict=True)]
            told = zip(numbers, evidence.shares, named, bought, strict=True)
            for number, share, item_id, had in told:
                if share > 0:
                    found.setdefault(number, []).append(Reason(evidence.kind, share, item_id, had))
        for mine in found.values():
            mine.sort(key=lambda reason: -reason.share)
        named = sorted({mine[0].item_id for mine in found.values()} - {""})
        if not named:
            return found, {}
        return found, await self.titles(named, "explain", degraded)

    async def titles(
        self, item_ids: Sequence[str], stage: str, degraded: list[pb.Degradation]
    ) -> dict[str, str]:
        """The titles of at most 1000 items, by their ids; of those that cannot be had none."""
        get = self._embedding.get(embedding_pb.GetItemsRequest(item_ids=item_ids))
        items = await self._attempt(stage, get, self._seconds(), degraded, asked="titles")
        return {record.item.id: record.item.title for record in (items.items if items else ())}

    async def search(
        self, request: embedding_pb.SearchRequest, degraded: list[pb.Degradation]
    ) -> embedding_pb.SearchResponse | None:
        """A search of a caller's own, or None and a line in `degraded`."""
        seconds = self._seconds() * self._limits.retrieval_share
        found = self._embedding.search(request)
        return await self._attempt("search", found, seconds, degraded)

    def some_may_be_shown(self, wish: Wish) -> bool:
        """Whether anything may be, for all that is known before the person's purchases are; blocks."""
        return self._assortment.any_allowed(wish)

    def _seconds(self) -> float:
        """How long there is for what is left of a request."""
        left = deadline.remaining()
        return self._limits.budget if left is None else left

    async def _attempt(
        self,
        stage: str,
        call: Awaitable[T],
        seconds: float,
        degraded: list[pb.Degradation],
        *,
        asked: str = "",
    ) -> T | None:
        """The answer of a stage, or None and a line in `degraded`; a wrong request stays an error.

        What keeps failing is left alone by the name of what is `asked`, the stage's where it asks one thing.
        """
        breaker, left = self._breakers[asked or stage], deadline.remaining()
        seconds = seconds if left is None else min(seconds, left)
        if pause := breaker.wait():
            _drop(call)
            why = f"it failed so often that it is not asked for another {pause:.1f} s"
            code = pb.DEGRADATION_CODE_UNAVAILABLE
            degraded.append(pb.Degradation(stage=stage, code=code, message=why))
            return None
        try:
            with deadline.within(seconds):
                answer = await deadline.wait(call)
        except InvalidArgument as error:
            breaker.succeeded()
            raise error.without("person") from None
        except VitrineError as error:
            code = _CODES.get(type(error), pb.DEGRADATION_CODE_FAILED)
            if isinstance(error, DeadlineExceeded):
                breaker.failed(seconds)
            elif isinstance(error, Unavailable):
                breaker.failed(math.inf)
            else:
                breaker.succeeded()
            degraded.append(pb.Degradation(stage=stage, code=code, message=str(error)))
            return None
        breaker.succeeded()
        return answer

    async def _candidates(
        self,
        wish: Wish,
        retrieved: ranking_pb.RetrieveResponse | None,
        seconds: float,
        degraded: list[pb.Degradation],
    ) -> Candidates:
        candidates = Candidates()
        if wish.items is not None:
            candidates.add("request", wish.items, [1.0 / place for place in range(1, len(wish.items) + 1)])
            return candidates
        wanted = set(wish.sources) or SOURCES
        for found in retrieved.candidates if retrieved else ():
            if _SOURCES[found.source] in wanted:
                candidates.add(_SOURCES[found.source], found.item_numbers, found.scores)
        groups = self._groups(wish, retrieved) if wanted.intersection(_SPACES.values()) else []
        if groups:
            search = self._search(wish, retrieved, groups)
            searched = await self._attempt("search", search, seconds, degraded)
            for result in searched.results if searched else ():
                if _SPACES[result.space] in wanted:
                    candidates.add(_SPACES[result.space], result.item_numbers, result.scores)
        if retrieved is not None:
            trial = retrieved.explorable
            candidates.add("explore", trial.item_numbers, [1.0 / (1 + n) for n in trial.showings])
        for quota in wish.rules.quotas:
            if quota.condition is not None:
                numbers = self._assortment.of_quota(wish, retrieved, quota.condition, _PER_QUOTA)
                candidates.add("quota", numbers, [quota.share] * len(numbers))
        return candidates

    async def _order(
        self,
        wish: Wish,
        retrieved: ranking_pb.RetrieveResponse | None,
        kept: list[int],
        candidates: Candidates,
        degraded: list[pb.Degradation],
        budget: float,
    ) -> Ordered:
        sequence = retrieved.state_sequence if retrieved else 0
        ranked = None
        # A ranking service that could not retrieve is not asked again.
        if retrieved is not None and kept and not wish.by_source:
            request = ranking_pb.RankRequest(
                person=wish.person,
                as_of=wire.time_to(wish.as_of),
                item_numbers=kept,
                state_sequence=sequence,
                bundle=self.bundle,
            )
            ranked = await self._attempt("rank", self._ranking.rank(request), budget, degraded)
        components: dict[str, dict[int, float]] = {}
        probabilities: dict[str, dict[int, float]] = {}
        if ranked is not None:
            scores = np.nan_to_num(np.array(ranked.scores, np.float32), nan=-np.inf)
            if wish.blend:
                order = np.lexsort((np.array(kept, np.int64), -scores))
                both = fused([(1.0, [kept[i] for i in order]), (BLENDED, kept)])
                scores = np.array([both[n] for n in kept], np.float32)
            for component in ranked.components:
                components[component.component] = dict(zip(kept, component.scores, strict=True))
            for of_type in ranked.probabilities:
                probabilities[of_type.type] = dict(zip(kept, of_type.probabilities, strict=True))
        else:
            scores = _by_rank(kept, candidates)
        order = np.lexsort((np.array(kept, np.int64), -scores))
        numbers, ordered = [kept[i] for i in order], scores[order].tolist()
        return Ordered(numbers, ordered, components, probabilities, candidates, degraded, sequence)

    def _retrieve(self, wish: Wish) -> Awaitable[ranking_pb.RetrieveResponse]:
        request = ranking_pb.RetrieveRequest(
            person=wish.person,
            as_of=wire.time_to(wish.as_of),
            limit=self._limits.per_source,
            filter=wish.filter,
            exclude_item_numbers=sorted(wish.excluded),
            exclude_bought=wish.exclude_bought,
            min_sequence=wish.min_sequence,
            bundle=self.bundle,
            sources=self._asked(wish),
            include_shown=wish.rules.rotation,
        )
        if wish.rules.exploration.share and wish.items is None:
            request.explore.CopyFrom(_explore(wish))
        return self._ranking.retrieve(request)

    @staticmethod
    def _asked(wish: Wish) -> list[ranking_pb.Source.ValueType]:
        """Behaviour's sources to ask; empty for all. Where none is wanted, the person's state still is."""
        if not wish.sources and wish.items is None:
            return []
        wanted = [] if wish.items is not None else wish.sources
        return [_OF_BEHAVIOUR[s] for s in wanted if s in _OF_BEHAVIOUR] or [ranking_pb.SOURCE_POPULAR]

    def _groups(
        self, wish: Wish, retrieved: ranking_pb.RetrieveResponse | None
    ) -> list[embedding_pb.InterestGroup]:
        """What to search by: the history, or the session when there is no other."""
        if retrieved is not None:
            found = interests(retrieved.history.item_numbers, retrieved.history.weights)
        else:
            session = [item_number(item.item_id) for item in reversed(wish.person.session)]
            found = interests(session, [1.0] * len(session))
        return [embedding_pb.InterestGroup(item_numbers=i.numbers, weights=i.weights) for i in found]

    def _search(
        self,
        wish: Wish,
        retrieved: ranking_pb.RetrieveResponse | None,
        groups: Sequence[embedding_pb.InterestGroup],
    ) -> Awaitable[embedding_pb.SearchResponse]:
        request = embedding_pb.SearchRequest(
            groups=groups,
            limit=self._limits.per_interest,
            filter=wish.filter,
            exclude_item_numbers=sorted(self._assortment.excluded(wish, retrieved))[:_MAX_EXCLUDED],
            min_sequence=wish.min_sequence,
            bundle=self.bundle,
            as_of=wire.time_to(wish.as_of),
        )
        return self._embedding.search(request)


def _by_rank(kept: Sequence[int], candidates: Candidates) -> np.ndarray:
    """Reciprocal rank fusion of the sources (Cormack et al., 2009), float32 (C,)."""
    total = np.zeros(len(kept), np.float32)
    # A quota or a trial brings items without saying which is better.
    names = {source for number in kept for source in candidates.sources[number]} - {"quota", "explore"}
    for name in sorted(names):
        scores = np.array([candidates.sources[n].get(name, -np.inf) for n in kept])
        order = np.lexsort((np.array(kept), -scores))
        place = np.empty(len(kept))
        place[order] = np.arange(1, len(kept) + 1)
        total += np.where(np.isfinite(scores), 1 / (60 + place), 0).astype(np.float32)
    return total


def _explore(wish: Wish) -> ranking_pb.Explore:
    explored = wish.rules.exploration
    return ranking_pb.Explore(
        scenario=wish.scenario,
        limit=_EXPLORED,
        seed=wish.seed,
        max_age_days=explored.max_age_days,
        showings=explored.showings,
        per_day=explored.per_day,
        max_engagements=explored.max_engagements,
        upto=wish.explored_upto,
    )


@contextmanager
def _timed(name: str, stages: list[Stage]) -> Iterator[Callable[[int], None]]:
    """Adds a stage with the count it is told and the time it took."""
    began, counts = time.perf_counter(), [0]
    yield counts.append
    stages.append(Stage(name, counts[-1], time.perf_counter() - began))


def _drop(call: Awaitable[T]) -> None:
    """Let go of a call that was not begun."""
    if isinstance(call, Coroutine):
        call.close()


def person_of(user_id: str, visitor_id: str, session: Sequence[event_pb2.SessionItem]) -> ranking_pb.Person:
    """The person of a public request."""
    return ranking_pb.Person(user_id=user_id, visitor_id=visitor_id, session=session)
