"""`RecommendationService`: what other teams call. Validates, asks the pipeline, writes the answer."""

import hashlib
import math
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
from vitrine.catalog.v1 import event_pb2, filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import filters, wire
from services.catalog import identifier_problem, item_number
from services.errors import InvalidArgument, NotFound
from services.gateway import offering, prediction
from services.gateway.clients import Embedding, Ranking
from services.gateway.pipeline import Pipeline, person_of
from services.gateway.rules import Rules
from services.gateway.scenarios import HOME, SIMILAR, Scenario, Scenarios, rules_from
from services.gateway.sentences import LANGUAGES, sentence
from services.gateway.tokens import Tokens
from services.gateway.wish import DEEPEST, Ordered, Wish

MAX_PAGE = 500
DEFAULT_PAGE = 20
MAX_SESSION = 200
MAX_EXCLUDED = 10_000
MAX_CONTEXT = 50
MAX_ITEMS = 2000
_SEARCH_DEPTH = 2000
_RRF = 60
_CROSS_MODAL_WEIGHT = 0.3


class GatewayServicer(pb_grpc.RecommendationServiceServicer):
    """The service over a pipeline; `clock` is read once per request."""

    def __init__(
        self,
        pipeline: Pipeline,
        embedding: Embedding,
        ranking: Ranking,
        tokens: Tokens,
        clock: Callable[[], datetime],
        wait_for: Callable[[int], Awaitable[None]],
        scenarios: Scenarios,
    ) -> None:
        self.pipeline, self._embedding, self._ranking = pipeline, embedding, ranking
        self._scenarios = scenarios
        self._tokens, self._clock, self._wait_for = tokens, clock, wait_for

    async def Recommend(self, request: pb.RecommendRequest, context: Any) -> pb.RecommendResponse:
        """A page for a person."""
        now = self._clock()
        size = wire.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        start, as_of = self._page(request, now)
        page = slice(start, start + size)
        wish = self._wish(request, as_of, page.stop + 1)
        request_id = request.request_id or uuid.uuid4().hex
        if request.validate_only:
            return pb.RecommendResponse(versions=self._versions(as_of, 0), request_id=request_id)
        await self._wait_for(request.min_sequence)
        ordered = await self.pipeline.run(wish)
        degraded, left_out = list(ordered.degraded), set(ordered.left_out)
        items = self._items(ordered, page)
        if request.include_reasons:
            await self._explain(wish, ordered, items, request.language or LANGUAGES[0], degraded)
        response = pb.RecommendResponse(
            items=items,
            attribution_token=self._attribution(request_id, request.scenario or HOME, now),
            versions=self._versions(as_of, ordered.state_sequence),
            degraded=degraded,
            request_id=request_id,
            stages=_stages(ordered) if request.debug else (),
            left_out_item_ids=[i for i in request.item_ids if item_number(i) in left_out],
        )
        if page.stop < len(ordered.numbers):
            content = {"o": page.stop, "a": as_of.isoformat(), "h": _digest(request)}
            response.next_page_token = self._tokens.sign("page", content, now)
        return response

    async def ExplainItem(self, request: pb.ExplainItemRequest, context: Any) -> pb.ExplainItemResponse:
        """What became of one item in a Recommend."""
        if problem := identifier_problem(request.item_id):
            raise InvalidArgument.of("item_id", problem)
        asked, now = request.request, self._clock()
        try:
            size = wire.check_limit(asked.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
            start, as_of = self._page(asked, now)
            wish = self._wish(asked, as_of, start + size)
        except InvalidArgument as error:
            raise error.under("request") from None
        await self._wait_for(asked.min_sequence)
        number = item_number(request.item_id)
        answer, ordered = await self.pipeline.why(wish, number)
        response = pb.ExplainItemResponse(
            standing=answer.standing,
            message=answer.message,
            place=answer.place,
            ranked_place=answer.ranked,
            candidates=len(ordered.ranked),
            rules=answer.rules,
            degraded=ordered.degraded,
            stages=_stages(ordered),
        )
        if answer.ranked:
            at = ordered.ranked.index(number)
            response.item.CopyFrom(self._item(ordered, number, request.item_id, ordered.ranked_scores[at]))
        if shown := ordered.scores[: start + size]:
            response.last_score = shown[-1]
        return response

    async def SimilarItems(self, request: pb.SimilarItemsRequest, context: Any) -> pb.SimilarItemsResponse:
        """Items like one item."""
        now = self._clock()
        size = wire.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        if problem := identifier_problem(request.item_id):
            raise InvalidArgument.of("item_id", problem)
        await self._wait_for(request.min_sequence)
        if not self._exists(request.item_id, now):
            raise NotFound("item", request.item_id)
        scenario = self._scenarios.find(SIMILAR)
        sent, condition = _both(scenario, request.filter if request.HasField("filter") else None)
        wish = Wish(
            person=person_of("", "", [event_pb2.SessionItem(item_id=request.item_id)]),
            as_of=now,
            excluded=_numbers(request.exclude_item_ids, "exclude_item_ids"),
            filter=sent,
            condition=condition,
            min_sequence=request.min_sequence,
            sources=scenario.sources,
            by_source=scenario.by_source,
            rules=scenario.rules,
            depth=size,
            loose=scenario.condition,
        )
        ordered = await self.pipeline.run(wish)
        return pb.SimilarItemsResponse(
            items=self._items(ordered, slice(0, size)),
            attribution_token=self._attribution(uuid.uuid4().hex, SIMILAR, now),
            versions=self._versions(now, ordered.state_sequence),
            degraded=ordered.degraded,
        )

    async def SearchItems(self, request: pb.SearchItemsRequest, context: Any) -> pb.SearchItemsResponse:
        """Items that match a text, a photograph, or both, by reciprocal rank fusion of the spaces."""
        now = self._clock()
        size = wire.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        if not (request.text.strip() or request.image):
            raise InvalidArgument.of("text", "or image is required")
        share = request.image_weight if request.HasField("image_weight") else 0.5
        if not 0 <= share <= 1:
            raise InvalidArgument.of("image_weight", "must be between 0 and 1")
        both = bool(request.text.strip() and request.image)
        found = await self._embedding.search(
            embedding_pb.SearchRequest(
                text=request.text,
                image=request.image,
                limit=_SEARCH_DEPTH,
                filter=request.filter if request.HasField("filter") else None,
                min_sequence=request.min_sequence,
                bundle=self.pipeline.bundle,
                as_of=wire.time_to(now),
            )
        )
        scores: dict[int, float] = {}
        sources: dict[int, dict[str, float]] = {}
        for result in found.results:
            of_image = bool(request.image) and (result.query == 1 or not request.text)
            name = "image" if result.space == item_pb2.SPACE_IMAGE else "text"
            weight = (share if of_image else 1 - share) if both else 1.0
            if name == "image" and not of_image:
                weight *= _CROSS_MODAL_WEIGHT
            for place, (number, score) in enumerate(zip(result.item_numbers, result.scores, strict=True), 1):
                scores[number] = scores.get(number, 0.0) + weight / (_RRF + place)
                sources.setdefault(number, {})[name] = score
        table = self.pipeline.table
        available = table.available(now)
        order = sorted(scores, key=lambda n: (-scores[n], n))
        rows = table.rows(order)
        live = (rows >= 0) & (rows < len(available)) & available[np.minimum(rows, len(available) - 1)]
        shown = [(order[at], int(rows[at])) for at in np.flatnonzero(live)[:size]]
        return pb.SearchItemsResponse(
            items=[
                pb.Recommendation(item_id=item_id, score=scores[number], sources=_sources(sources[number]))
                for (number, _), item_id in zip(shown, table.ids(row for _, row in shown), strict=True)
            ],
            attribution_token=self._attribution(uuid.uuid4().hex, "search", now),
            versions=self._versions(now, 0),
        )

    async def WriteEvents(self, request: pb.WriteEventsRequest, context: Any) -> pb.WriteEventsResponse:
        """Record events."""
        written = await self._ranking.write(ranking_pb.WriteEventsRequest(events=request.events))
        return pb.WriteEventsResponse(outcomes=written.outcomes)

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserResponse:
        """Forget a person."""
        asked = ranking_pb.DeleteUserRequest(user_id=request.user_id, visitor_id=request.visitor_id)
        deleted = await self._ranking.delete_user(asked)
        return pb.DeleteUserResponse(events=deleted.events, ids=deleted.ids)

    async def GetUserProfile(
        self, request: pb.GetUserProfileRequest, context: Any
    ) -> pb.GetUserProfileResponse:
        """What a person's behaviour says of them."""
        asked = ranking_pb.GetUserProfileRequest(
            user_id=request.user_id, visitor_id=request.visitor_id, as_of=wire.time_to(self._clock())
        )
        return pb.GetUserProfileResponse(profile=(await self._ranking.user_profile(asked)).profile)

    async def PredictEvents(self, request: pb.PredictEventsRequest, context: Any) -> pb.PredictEventsResponse:
        """What people are likely to do."""
        now = self._clock()
        answer = await prediction.predict(request, now, self._ranking, self.pipeline, self._wait_for)
        answer.versions.CopyFrom(self._versions(now, answer.versions.event_sequence))
        return answer

    async def RecommendOffers(
        self, request: pb.RecommendOffersRequest, context: Any
    ) -> pb.RecommendOffersResponse:
        """Which offers to make to a person."""
        now = self._clock()
        answer = await offering.recommend(request, now, self.pipeline, self._wait_for)
        answer.versions.CopyFrom(self._versions(now, answer.versions.event_sequence))
        return answer

    async def ExportUser(self, request: pb.ExportUserRequest, context: Any) -> pb.ExportUserResponse:
        """A page of what is known of a person."""
        page = await self._ranking.export_user(
            ranking_pb.ExportUserRequest(
                user_id=request.user_id,
                visitor_id=request.visitor_id,
                page_size=request.page_size,
                page_token=request.page_token,
            )
        )
        return pb.ExportUserResponse(
            user_ids=page.user_ids,
            visitor_ids=page.visitor_ids,
            events=page.events,
            next_page_token=page.next_page_token,
        )

    async def BatchUpsertItems(
        self, request: pb.BatchUpsertItemsRequest, context: Any
    ) -> pb.BatchUpsertItemsResponse:
        """Write items."""
        chunk = embedding_pb.UpsertItemsRequest(items=request.items, update_mask=request.update_mask)
        return pb.BatchUpsertItemsResponse(outcomes=(await self._embedding.upsert(chunk)).outcomes)

    async def GetItem(self, request: pb.GetItemRequest, context: Any) -> pb.GetItemResponse:
        """Read one item."""
        if problem := identifier_problem(request.item_id):
            raise InvalidArgument.of("item_id", problem)
        found = await self._embedding.get(embedding_pb.GetItemsRequest(item_ids=[request.item_id]))
        if not found.items:
            raise NotFound("item", request.item_id)
        return pb.GetItemResponse(item=found.items[0])

    async def ListItems(self, request: pb.ListItemsRequest, context: Any) -> pb.ListItemsResponse:
        """Read a page of the catalogue."""
        page = await self._embedding.get(
            embedding_pb.GetItemsRequest(page_size=request.page_size, page_token=request.page_token)
        )
        return pb.ListItemsResponse(items=page.items, next_page_token=page.next_page_token)

    async def DeleteItems(self, request: pb.DeleteItemsRequest, context: Any) -> pb.DeleteItemsResponse:
        """Delete items."""
        deleted = await self._embedding.delete(embedding_pb.DeleteItemsRequest(item_ids=request.item_ids))
        return pb.DeleteItemsResponse(outcomes=deleted.outcomes)

    def _page(self, request: pb.RecommendRequest, now: datetime) -> tuple[int, datetime]:
        """Where the page begins and the moment that all pages of an answer share."""
        if not request.page_token:
            return 0, now
        content = self._tokens.read("page", request.page_token, now, "page_token")
        if content["h"] != _digest(request):
            raise InvalidArgument.of("page_token", "belongs to another request; only page_size may change")
        return content["o"], datetime.fromisoformat(content["a"])

    def _wish(self, request: pb.RecommendRequest, as_of: datetime, depth: int) -> Wish:
        scenario = self._scenarios.find(request.scenario)
        _check(request)
        sent, condition = _both(scenario, request.filter if request.HasField("filter") else None)
        context = [event_pb2.SessionItem(item_id=item_id) for item_id in request.context_item_ids]
        policy, named = request.bought_policy, bool(request.item_ids)
        return Wish(
            person=person_of(
                request.user_id, request.visitor_id, [*request.session, *context][-MAX_SESSION:]
            ),
            as_of=as_of,
            excluded=_numbers(request.exclude_item_ids, "exclude_item_ids"),
            exclude_bought=(
                policy == pb.BOUGHT_POLICY_EXCLUDE if policy or named else scenario.exclude_bought
            ),
            filter=sent,
            condition=condition,
            min_sequence=request.min_sequence,
            sources=scenario.sources,
            by_source=scenario.by_source,
            items=tuple(dict.fromkeys(map(item_number, request.item_ids))) if named else None,
            rules=_rules(request, scenario),
            depth=min(depth, DEEPEST),
            fill=not named,
            loose=scenario.condition,
        )

    def _items(self, ordered: Ordered, page: slice) -> list[pb.Recommendation]:
        numbers = ordered.numbers[page]
        table = self.pipeline.table
        ids = table.ids(table.rows(numbers))
        told = zip(numbers, ids, ordered.scores[page], strict=True)
        return [self._item(ordered, number, item_id, score) for number, item_id, score in told]

    @staticmethod
    def _item(ordered: Ordered, number: int, item_id: str, score: float) -> pb.Recommendation:
        item = pb.Recommendation(
            item_id=item_id, score=score, sources=_sources(ordered.candidates.sources[number])
        )
        for name, scores in ordered.components.items():
            if number in scores:
                item.components.add(component=name, score=scores[number])
        for name, probabilities in ordered.probabilities.items():
            if not math.isnan(probabilities.get(number, math.nan)):
                item.probabilities.add(type=name, probability=probabilities[number])
        item.rules.extend(ordered.moved.get(number, ()))
        return item

    async def _explain(
        self,
        wish: Wish,
        ordered: Ordered,
        items: Sequence[pb.Recommendation],
        language: str,
        degraded: list[pb.Degradation],
    ) -> None:
        numbers = [item_number(item.item_id) for item in items]
        reasons, titles = await self.pipeline.reasons(wish, ordered, numbers, degraded)
        known = any(reason.item_id for mine in reasons.values() for reason in mine)
        for item, number in zip(items, numbers, strict=True):
            mine = reasons.get(number, ())
            for reason in mine:
                item.reasons.add(
                    kind=reason.kind,
                    share=reason.share,
                    history_item_id=reason.item_id,
                    history_bought=reason.bought,
                )
            if mine:
                first = mine[0]
                title = titles.get(first.item_id, "")
                kind = first.kind if known or first.kind == "popularity" else "nobody"
                item.explanation = sentence(kind, language, title, bought=first.bought)

    def _exists(self, item_id: str, now: datetime) -> bool:
        table = self.pipeline.table
        row = int(table.rows([item_number(item_id)])[0])
        return row >= 0 and bool(table.available(now)[row])

    def _attribution(self, request_id: str, scenario: str, now: datetime) -> str:
        return self._tokens.sign("shown", {"r": request_id, "s": scenario, "b": self.pipeline.bundle}, now)

    def _versions(self, as_of: datetime, event_sequence: int) -> pb.Versions:
        return pb.Versions(
            bundle=self.pipeline.bundle,
            catalog_sequence=self.pipeline.table.sequence,
            event_sequence=event_sequence,
            as_of=wire.time_to(as_of),
        )


def _check(request: pb.RecommendRequest) -> None:
    """InvalidArgument names the first field that is wrong by itself."""
    for name in ("user_id", "visitor_id", "session_id", "request_id"):
        value = getattr(request, name)
        if value and (problem := identifier_problem(value)):
            raise InvalidArgument.of(name, problem)
    if len(request.session) > MAX_SESSION:
        raise InvalidArgument.of("session", f"has {len(request.session)}, at most {MAX_SESSION} are allowed")
    for at, item in enumerate(request.session):
        if problem := identifier_problem(item.item_id):
            raise InvalidArgument.of(f"session[{at}].item_id", problem)
    for name, most in (("context_item_ids", MAX_CONTEXT), ("item_ids", MAX_ITEMS)):
        for at, item_id in enumerate(ids := getattr(request, name)):
            if problem := identifier_problem(item_id):
                raise InvalidArgument.of(f"{name}[{at}]", problem)
        if len(ids) > most:
            raise InvalidArgument.of(name, f"has {len(ids)}, at most {most} are allowed")
    if not 0 <= request.diversity <= 1:
        raise InvalidArgument.of("diversity", "must be between 0 and 1")
    if request.language and request.language not in LANGUAGES:
        raise InvalidArgument.of("language", f"is none of {', '.join(LANGUAGES)}")
    if request.exploration:
        raise InvalidArgument.of("exploration", "must be 0: this server does not explore yet")


def _rules(request: pb.RecommendRequest, scenario: Scenario) -> Rules:
    """The rules of a scenario with those of a request in their place; InvalidArgument where it is locked."""
    own: tuple[Literal["rules", "diversity", "rotation"], ...] = ("rules", "diversity", "rotation")
    for part in own:
        if scenario.locked and request.HasField(part):
            raise InvalidArgument.of(part, f"is not for a request: scenario {request.scenario!r} is locked")
    rules = rules_from(request.rules, scenario.rules)
    if request.HasField("diversity"):
        rules = replace(rules, diversity=request.diversity)
    if request.HasField("rotation"):
        rules = replace(rules, rotation=request.rotation)
    return rules


def _stages(ordered: Ordered) -> list[pb.Stage]:
    return [pb.Stage(name=s.name, items=s.items, milliseconds=1000 * s.seconds) for s in ordered.stages]


def _sources(scores: dict[str, float]) -> list[pb.SourceScore]:
    return [pb.SourceScore(source=name, score=score) for name, score in sorted(scores.items())]


def _numbers(ids: Sequence[str], field: str) -> frozenset[int]:
    if len(ids) > MAX_EXCLUDED:
        raise InvalidArgument.of(field, f"has {len(ids)}, at most {MAX_EXCLUDED} are allowed")
    return frozenset(item_number(item_id) for item_id in ids)


def _both(
    scenario: Scenario, sent: filter_pb2.Filter | None
) -> tuple[filter_pb2.Filter | None, filters.Filter | None]:
    """What both a scenario and a request ask of items, as a message and decoded."""
    if sent is None:
        return scenario.filter, scenario.condition
    mine = wire.filter_from(sent)
    if scenario.filter is None or scenario.condition is None:
        return sent, mine
    both = filter_pb2.Filter(all_of=filter_pb2.AllOf(filters=[scenario.filter, sent]))
    try:
        return both, wire.filter_from(both)
    except InvalidArgument as error:
        raise InvalidArgument.of("filter", f"with the scenario's own filter: {error}") from None


def _digest(request: pb.RecommendRequest) -> str:
    same = pb.RecommendRequest()
    same.CopyFrom(request)
    for name in ("page_token", "page_size", "request_id", "min_sequence"):
        same.ClearField(name)
    return hashlib.blake2b(same.SerializeToString(deterministic=True), digest_size=8).hexdigest()
