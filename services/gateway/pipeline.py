"""A Recommend, step by step: retrieve and search side by side, hard rules, rank, page.

Each stage takes and gives `Page`-building values and knows no other stage. One that is
down, slow or unready never fails the call: retrieval order stands in for ranking, the
bundle's popularity for retrieval, and `degraded` says so.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

import numpy as np
from vitrine.catalog.v1 import event_pb2, filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import deadline, filters, wire
from services.catalog import item_number
from services.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
    VitrineError,
)
from services.gateway.clients import Embedding, Ranking
from services.interests import PER_INTEREST, PER_SOURCE, interests
from services.item_table import ItemTable

T = TypeVar("T")
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


@dataclass(frozen=True)
class Wish:
    """What is asked for, validated. `excluded` are item numbers; `condition` is `filter` decoded."""

    person: ranking_pb.Person
    as_of: datetime
    excluded: frozenset[int] = frozenset()
    exclude_bought: bool = True
    filter: filter_pb2.Filter | None = None
    condition: filters.Filter | None = None
    min_sequence: int = 0
    diversity: float = 0.0


@dataclass
class Candidates:
    """Candidate numbers to the score that each of their sources gave."""

    sources: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, source: str, numbers: Sequence[int], scores: Sequence[float]) -> None:
        """Take a list of a source; of an item that comes twice the better score stays."""
        for number, score in zip(numbers, scores, strict=True):
            known = self.sources.setdefault(number, {})
            known[source] = max(score, known.get(source, score))


@dataclass(frozen=True)
class Ordered:
    """Every candidate that may be shown, best first, with what its place rests on."""

    numbers: list[int]
    scores: list[float]
    components: Mapping[str, Mapping[int, float]]
    probabilities: Mapping[str, Mapping[int, float]]
    candidates: Candidates
    degraded: Sequence[pb.Degradation]
    state_sequence: int


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

    async def run(self, wish: Wish) -> Ordered:
        """All candidates in the order they should be shown."""
        left = deadline.remaining()
        budget = self._limits.budget if left is None else left
        degraded: list[pb.Degradation] = []
        first = budget * self._limits.retrieval_share
        retrieved = await _attempt("retrieve", self._retrieve(wish), first, degraded)
        candidates = Candidates()
        for found in retrieved.candidates if retrieved else ():
            candidates.add(_SOURCES[found.source], found.item_numbers, found.scores)
        groups = self._groups(wish, retrieved)
        if groups:
            searched = await _attempt("search", self._search(wish, retrieved, groups), first, degraded)
            for result in searched.results if searched else ():
                candidates.add(_SPACES[result.space], result.item_numbers, result.scores)
        kept = self._allowed(wish, retrieved, list(candidates.sources))
        if not kept:
            kept = self._allowed(wish, retrieved, self._popular.tolist())
            candidates.add("popular", kept, [1.0 / place for place in range(1, len(kept) + 1)])
        if not kept:
            return Ordered([], [], {}, {}, candidates, degraded, 0)
        return await self._order(wish, retrieved, kept, candidates, degraded, budget)

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
        if retrieved is not None:  # a ranking service that could not retrieve is not asked again
            request = ranking_pb.RankRequest(
                person=wish.person,
                as_of=wire.time_to(wish.as_of),
                item_numbers=kept,
                state_sequence=sequence,
                bundle=self.bundle,
            )
            ranked = await _attempt("rank", self._ranking.rank(request), budget, degraded)
        components: dict[str, dict[int, float]] = {}
        probabilities: dict[str, dict[int, float]] = {}
        if ranked is not None:
            scores = np.nan_to_num(np.array(ranked.scores, np.float32), nan=-np.inf)
            for component in ranked.components:
                components[component.component] = dict(zip(kept, component.scores, strict=True))
            for of_type in ranked.probabilities:
                probabilities[of_type.type] = dict(zip(kept, of_type.probabilities, strict=True))
        else:
            scores = _by_rank(kept, candidates)
        order = np.lexsort((np.array(kept), -scores))
        numbers, ordered = [kept[i] for i in order], scores[order].tolist()
        if wish.diversity > 0:
            numbers, ordered = self._diversified(numbers, ordered, wish.diversity)
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
        )
        return self._ranking.retrieve(request)

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
            exclude_item_numbers=sorted(self._excluded(wish, retrieved))[:_MAX_EXCLUDED],
            min_sequence=wish.min_sequence,
            bundle=self.bundle,
            as_of=wire.time_to(wish.as_of),
        )
        return self._embedding.search(request)

    def _allowed(
        self, wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, numbers: Sequence[int]
    ) -> list[int]:
        """The hard rules, on every path: live, available, under the filter, not excluded."""
        mask = self.table.available(wish.as_of)
        if wish.condition is not None:
            condition = filters.evaluate(wish.condition, self.table)
            mask = mask[: len(condition)] & condition[: len(mask)]
        rows = self.table.rows(numbers)
        held = (rows >= 0) & (rows < len(mask)) & np.append(mask, False)[np.minimum(rows, len(mask))]
        out = self._excluded(wish, retrieved)
        return [n for n, ok in zip(numbers, held.tolist(), strict=True) if ok and n not in out]

    @staticmethod
    def _excluded(wish: Wish, retrieved: ranking_pb.RetrieveResponse | None) -> set[int]:
        out = {*wish.excluded, *(item_number(item.item_id) for item in wish.person.session)}
        if retrieved is not None and wish.exclude_bought:
            out.update(retrieved.bought_item_numbers)
        return out

    def _diversified(
        self, numbers: list[int], scores: list[float], diversity: float, depth: int = 200
    ) -> tuple[list[int], list[float]]:
        """Maximal marginal relevance (Carbonell and Goldstein, 1998) over the first `depth`."""
        column = self.table.vectors("text") or self.table.vectors("image")
        head = numbers[:depth]
        if column is None or len(head) < 2:  # noqa: PLR2004 - one item is as different as can be
            return numbers, scores
        vectors = column[0][self.table.rows(head)].astype(np.float32)
        relevance = np.array(scores[:depth])
        span = float(np.ptp(relevance)) or 1.0
        relevance = (relevance - relevance.min()) / span
        near = np.zeros(len(head))
        order: list[int] = []
        left = np.ones(len(head), bool)
        for _ in head:
            value = np.where(left, (1 - diversity) * relevance - diversity * near, -np.inf)
            chosen = int(value.argmax())
            order.append(chosen)
            left[chosen] = False
            near = np.maximum(near, vectors @ vectors[chosen])
        return (
            [head[i] for i in order] + numbers[depth:],
            [scores[i] for i in order] + scores[depth:],
        )


def _by_rank(kept: Sequence[int], candidates: Candidates) -> np.ndarray:
    """Reciprocal rank fusion of the sources (Cormack et al., 2009), float32 (C,)."""
    total = np.zeros(len(kept), np.float32)
    names = sorted({source for number in kept for source in candidates.sources[number]})
    for name in names:
        scores = np.array([candidates.sources[n].get(name, -np.inf) for n in kept])
        order = np.lexsort((np.array(kept), -scores))
        place = np.empty(len(kept))
        place[order] = np.arange(1, len(kept) + 1)
        total += np.where(np.isfinite(scores), 1 / (60 + place), 0).astype(np.float32)
    return total


async def _attempt(
    stage: str, call: Awaitable[T], seconds: float, degraded: list[pb.Degradation]
) -> T | None:
    """The answer of a stage, or None and a line in `degraded`; a wrong request stays an error."""
    codes: dict[type[VitrineError], pb.DegradationCode.ValueType] = {
        DeadlineExceeded: pb.DEGRADATION_CODE_TIMEOUT,
        FailedPrecondition: pb.DEGRADATION_CODE_NOT_READY,
        Unavailable: pb.DEGRADATION_CODE_UNAVAILABLE,
    }
    try:
        with deadline.within(seconds):
            return await deadline.wait(call)
    except InvalidArgument:
        raise
    except VitrineError as error:
        code = codes.get(type(error), pb.DEGRADATION_CODE_FAILED)
        degraded.append(pb.Degradation(stage=stage, code=code, message=str(error)))
        return None


def person_of(user_id: str, visitor_id: str, session: Sequence[event_pb2.SessionItem]) -> ranking_pb.Person:
    """The person of a public request."""
    return ranking_pb.Person(user_id=user_id, visitor_id=visitor_id, session=session)
