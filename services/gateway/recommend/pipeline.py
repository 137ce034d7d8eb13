"""A Recommend, step by step: retrieve, search, filter, rank, apply the shop's rules.

A stage that is down, slow or not ready never fails the call. Without ranking, items follow the fused order of
their sources; without candidates, the bundle's popular items follow; `degraded` names the stage.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

import numpy as np
from vitrine.catalog.v1 import filter_pb2
from vitrine.catalog.v1.profile_pb2 import UserProfile
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.catalog.candidate_sources import EMBEDDING_SOURCES, EXPLORE, QUOTA, REQUEST
from services.catalog.item_table import ItemTable
from services.catalog.markup import plain_text
from services.catalog.query_vectors import CANDIDATES_PER_SOURCE, HITS_PER_GROUP
from services.core import deadline
from services.core.errors import DeadlineExceeded
from services.core.executors import BoundedPool
from services.core.ordering import best_first
from services.gateway.candidates import SOURCES, CandidateSet, SourceList
from services.gateway.clients.backends import EmbeddingBackend, RankingBackend
from services.gateway.clients.circuit_breaker import CircuitBreaker
from services.gateway.query import (
    BLEND_WEIGHT,
    Degradation,
    DegradationCode,
    Evidence,
    RankedPage,
    RecommendQuery,
    RequestContext,
    StageReport,
    User,
    UserState,
)
from services.gateway.recommend import backend_messages, diagnosis
from services.gateway.recommend.eligibility import EligibilityFilter, excluded_items
from services.gateway.recommend.slate_builder import SlateBuilder
from services.gateway.recommend.stage_calls import StageBudgets, StageCalls, timed
from services.gateway.rules.rank_fusion import fuse, fuse_sources

_EMBEDDING_CALLS = {"search", "titles"}
_PER_QUOTA = 200
_RULES_LATE = Degradation(
    "rules",
    DegradationCode.TIMEOUT,
    "there was no time left for the rules of the page: items come in the order of their ranking",
)


@dataclass(frozen=True)
class PipelineLimits:
    """The size and time of a Recommend.

    The ranking service proposes `per_source` candidates of each source, the embedding service `per_interest`
    items near to each interest. `budget` are the seconds of a call without a deadline. Each other share of
    the time says when a stage must end; `answer_share` of the caller's deadline is for writing
    the response.
    """

    per_source: int = CANDIDATES_PER_SOURCE
    per_interest: int = HITS_PER_GROUP
    budget: float = 2.0
    retrieval_share: float = 0.5
    search_share: float = 0.7
    rank_share: float = 0.85
    answer_share: float = 0.05


class Pipeline:
    """Recommend over two backends, an item table and, as the last fallback, the bundle's popular items.

    `popular` is int64 (P,) item hashes, best first; `pool` runs whatever would block the event loop.
    """

    def __init__(
        self,
        embedding: EmbeddingBackend,
        ranking: RankingBackend,
        table: ItemTable,
        popular: np.ndarray,
        bundle: str,
        pool: BoundedPool,
        limits: PipelineLimits | None = None,
    ) -> None:
        self._embedding, self._ranking, self.table = embedding, ranking, table
        self._popular, self.bundle, self._limits = popular, bundle, limits or PipelineLimits()
        self._eligibility = EligibilityFilter(table, popular)
        self._builder = SlateBuilder(table, self._eligibility)
        self._calls = StageCalls()
        self._observers: list[Callable[[RankedPage], None]] = []
        self.pool = pool

    def observe(self, observer: Callable[[RankedPage], None]) -> None:
        """Call `observer` with the page of every later run."""
        self._observers.append(observer)

    def breakers(self, backend: str) -> list[CircuitBreaker]:
        """The circuit breakers of the calls to the backend "embedding" or "ranking"."""
        return [
            breaker
            for name, breaker in self._calls.breakers.items()
            if (name in _EMBEDDING_CALLS) == (backend == "embedding")
        ]

    async def run(self, query: RecommendQuery) -> RankedPage:
        """All candidates in the order of the page."""
        budgets = self._budgets()
        context, ranked = await self._ranked(query, budgets)
        page = await self._arranged(context, ranked, budgets)
        for observer in self._observers:
            observer(page)
        return page

    async def explain_item(self, query: RecommendQuery, item: int) -> tuple[diagnosis.Diagnosis, RankedPage]:
        """The outcome for an item hash in such a run, and the run's page."""
        budgets = self._budgets()
        context, ranked = await self._ranked(query, budgets)
        page = await self._arranged(context, ranked, budgets)
        diagnose = partial(
            diagnosis.diagnose,
            item=item,
            context=context,
            ranked=ranked,
            page=page,
            builder=self._builder,
            table=self.table,
        )
        return await deadline.wait(self.pool.run(diagnose)), page

    async def _ranked(
        self, query: RecommendQuery, budgets: StageBudgets
    ) -> tuple[RequestContext, RankedPage]:
        """The eligible candidates by score, before the rules."""
        degraded: list[Degradation] = []
        stages: list[StageReport] = []
        condition = backend_messages.filter_to(query)
        with timed("retrieve", stages) as count:
            retrieved = await self._retrieve(query, condition, budgets, degraded)
            count(sum(len(part.item_hashes) for part in retrieved.candidates) if retrieved else 0)
        user_state = backend_messages.user_state_from(retrieved) if retrieved else None
        with timed("search", stages) as count:
            excluded = excluded_items(query, user_state)
            hits = await self._search(query, condition, user_state, excluded, budgets, degraded)
            mask = self._eligibility.mask(query, excluded)
            candidates = self._collect(query, user_state, mask, retrieved, hits)
            count(len(candidates))
        with timed("allow", stages) as count:
            candidates = self._eligible(query, mask, candidates)
            count(len(candidates))
        context = RequestContext(query, user_state, excluded, mask, candidates)
        with timed("rank", stages) as count:
            ranked = await self._score(context, budgets.remaining(self._limits.rank_share), degraded)
            count(len(ranked.item_hashes))
        remaining = set() if query.items is None else set(ranked.item_hashes)
        ranked = replace(
            ranked,
            ineligible=[item for item in query.items or () if item not in remaining],
            stages=stages,
            ranked=ranked.item_hashes,
            ranked_scores=ranked.scores,
        )
        return context, ranked

    async def _arranged(
        self, context: RequestContext, ranked: RankedPage, budgets: StageBudgets
    ) -> RankedPage:
        """The candidates in the order of the rules, or as ranked if there is no time for rules."""
        query, stages = context.query, list(ranked.stages)
        with timed("rules", stages) as count:
            # Rules loop over slots: many slots, or a whole catalog, take too long for the event loop.
            if not query.rules.reorder and len(ranked.item_hashes) >= query.depth:
                page = self._builder.arrange(context, ranked)
            else:
                arranging = self.pool.run(partial(self._builder.arrange, context, ranked))
                seconds = None if deadline.remaining() is None else budgets.remaining(1.0)
                try:
                    page = await deadline.wait(arranging, seconds)
                except DeadlineExceeded:
                    page = replace(ranked, degraded=[*ranked.degraded, _RULES_LATE])
            count(len(page.item_hashes))
        return replace(page, stages=stages)

    async def profile(self, user: User, as_of: datetime, degraded: list[Degradation]) -> UserProfile | None:
        """The profile of a user with an id; None and a line in `degraded` if the ranking service fails."""
        call = self._ranking.user_profile(backend_messages.profile_request(user, as_of, self.bundle))
        response = await self._calls.attempt("profile", call, self._seconds(), degraded)
        return response.profile if response else None

    async def reasons(
        self,
        query: RecommendQuery,
        page: RankedPage,
        item_hashes: Sequence[int],
        degraded: list[Degradation],
    ) -> tuple[dict[int, list[Evidence]], dict[str, str]]:
        """The evidence for items of a page, the strongest first, and the titles of the user's items in it."""
        if not item_hashes:
            return {}, {}
        seconds = self._seconds()
        request = backend_messages.explain_request(query, item_hashes, page.state_sequence, self.bundle)
        response = await self._calls.attempt("explain", self._ranking.explain(request), seconds, degraded)
        if response is None:
            return {}, {}
        own = list(dict.fromkeys(item for one in response.evidence for item in one.history_item_hashes))
        rows = self.table.rows(own)
        present = [item for item, row in zip(own, rows, strict=True) if row >= 0]
        ids_of = dict(zip(present, self.table.ids(rows[rows >= 0]), strict=True))
        reasons = backend_messages.evidence_from(response, item_hashes, query.user, ids_of)
        item_ids = sorted({of_item[0].item_id for of_item in reasons.values()} - {""})
        if not item_ids:
            return reasons, {}
        return reasons, await self.titles(item_ids, "explain", degraded)

    async def titles(
        self, item_ids: Sequence[str], stage: str, degraded: list[Degradation]
    ) -> dict[str, str]:
        """The titles of at most 1000 items by id, without HTML; items that cannot be read are absent."""
        call = self._embedding.get(embedding_pb.GetItemsRequest(item_ids=item_ids))
        response = await self._calls.attempt(stage, call, self._seconds(), degraded, breaker_name="titles")
        records = response.items if response else ()
        return {record.item.id: plain_text(record.item.title) for record in records}

    async def search(
        self, request: embedding_pb.SearchRequest, degraded: list[Degradation]
    ) -> embedding_pb.SearchResponse | None:
        """The caller's own search before a run; None and a line in `degraded` if it fails."""
        seconds = self._seconds() * self._limits.retrieval_share  # the run needs time as well
        return await self._calls.attempt("search", self._embedding.search(request), seconds, degraded)

    def any_eligible(self, query: RecommendQuery) -> bool:
        """Whether any item is eligible, before the user's purchases are known; blocks."""
        return self._eligibility.any_eligible(query)

    def _budgets(self) -> StageBudgets:
        return StageBudgets(time.monotonic(), self._seconds())

    def _seconds(self) -> float:
        """The seconds that a request has left."""
        remaining = deadline.remaining()
        return self._limits.budget if remaining is None else remaining * (1 - self._limits.answer_share)

    async def _retrieve(
        self,
        query: RecommendQuery,
        condition: filter_pb2.Filter | None,
        budgets: StageBudgets,
        degraded: list[Degradation],
    ) -> ranking_pb.RetrieveResponse | None:
        request = backend_messages.retrieve_request(query, condition, self.bundle, self._limits.per_source)
        seconds = budgets.remaining(self._limits.retrieval_share)
        return await self._calls.attempt("retrieve", self._ranking.retrieve(request), seconds, degraded)

    async def _search(
        self,
        query: RecommendQuery,
        condition: filter_pb2.Filter | None,
        user_state: UserState | None,
        excluded: frozenset[int],
        budgets: StageBudgets,
        degraded: list[Degradation],
    ) -> embedding_pb.SearchResponse | None:
        """The hits near to the user's items; None if the search fails, or has nothing to search by."""
        names = set(query.sources) or SOURCES
        if query.items is not None or not names.intersection(EMBEDDING_SOURCES):
            return None
        groups = backend_messages.query_groups(query.user, user_state)
        if not groups:
            return None
        # If Retrieve failed there is no ranking, and the search may use its time.
        share = self._limits.search_share if user_state else self._limits.rank_share
        request = backend_messages.search_request(
            query, groups, condition, excluded, self.bundle, self._limits.per_interest
        )
        call = self._embedding.search(request)
        return await self._calls.attempt("search", call, budgets.remaining(share), degraded)

    def _collect(
        self,
        query: RecommendQuery,
        state: UserState | None,
        mask: np.ndarray,
        retrieved: ranking_pb.RetrieveResponse | None,
        hits: embedding_pb.SearchResponse | None,
    ) -> CandidateSet:
        """The candidates of all sources."""
        if query.items is not None:
            return CandidateSet.of([(REQUEST, query.items, _reciprocal_ranks(len(query.items)))])
        names = set(query.sources) or SOURCES
        lists: list[SourceList] = [
            part
            for part in (
                *(backend_messages.candidates_from(retrieved) if retrieved else ()),
                *(backend_messages.hits_from(hits) if hits else ()),
            )
            if part[0] in names
        ]
        if state is not None and state.exploration.item_hashes:
            scores = [1.0 / (1 + impressions) for impressions in state.exploration.impressions]
            lists.append((EXPLORE, state.exploration.item_hashes, scores))
        for quota in query.rules.quotas:
            if quota.condition is not None:
                items = self._eligibility.most_popular(mask, quota.condition, _PER_QUOTA)
                lists.append((QUOTA, items, [quota.share] * len(items)))
        return CandidateSet.of(lists)

    def _eligible(self, query: RecommendQuery, mask: np.ndarray, candidates: CandidateSet) -> CandidateSet:
        """The eligible candidates. If there are none but for exploration, popular items become candidates."""
        eligible = candidates.take(self._eligibility.eligible(mask, candidates.item_hashes))
        if query.items is None and eligible.only_by(EXPLORE).all():
            popular = self._eligibility.popular(mask)
            listed = CandidateSet.of([("popular", popular, _reciprocal_ranks(len(popular)))])
            eligible = listed.with_lists(eligible)
        return eligible

    async def _score(
        self, context: RequestContext, seconds: float, degraded: list[Degradation]
    ) -> RankedPage:
        """Score the candidates: by the ranking service, or else by their sources."""
        query, state, candidates = context.query, context.user_state, context.candidates
        hashes, sequence, response = candidates.item_hashes, state.sequence if state else 0, None
        # Without an answer to Retrieve the ranking service is not called again.
        if state is not None and len(candidates) and not query.by_source:
            request = backend_messages.rank_request(query, candidates, sequence, self.bundle)
            response = await self._calls.attempt("rank", self._ranking.rank(request), seconds, degraded)
        components: dict[str, dict[int, float]] = {}
        probabilities: dict[str, dict[int, float]] = {}
        if response is not None:
            scores = np.nan_to_num(np.array(response.scores, np.float32), nan=-np.inf)
            if query.blend:
                by_score = hashes[best_first(scores, hashes)].tolist()
                fused = fuse([(1.0, by_score), (BLEND_WEIGHT, hashes.tolist())])
                scores = np.array([fused[item] for item in hashes.tolist()], np.float32)
            modeled = hashes[np.array(response.second_phase, np.int64)] if response.second_phase else hashes
            items = modeled.tolist()
            for component in response.components:
                values = np.asarray(component.scores).tolist()
                components[component.component] = dict(zip(items, values, strict=True))
            for of_type in response.probabilities:
                values = np.asarray(of_type.probabilities).tolist()
                probabilities[of_type.type] = dict(zip(items, values, strict=True))
        else:
            scores = fuse_sources(hashes, candidates.names, candidates.scores)
        order = best_first(scores, hashes)
        return RankedPage(
            item_hashes=hashes[order].tolist(),
            scores=scores[order].tolist(),
            components=components,
            probabilities=probabilities,
            candidates=candidates.take(order),
            degraded=degraded,
            state_sequence=sequence,
        )


def _reciprocal_ranks(count: int) -> list[float]:
    return [1.0 / rank for rank in range(1, count + 1)]
