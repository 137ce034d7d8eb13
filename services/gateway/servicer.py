"""`RecommendationService`: what other teams call. Validates, asks the pipeline, writes the answer."""

import asyncio
import math
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from vitrine.catalog.v1 import event_pb2, item_pb2, served_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import wire
from services.catalog import identifier_problem, item_number
from services.errors import InvalidArgument, NotFound
from services.gateway import offering, prediction, turns
from services.gateway.asking import both_filters, digest, numbers_of, person_key, seed_of, wish_of
from services.gateway.clients import Embedding, Ranking
from services.gateway.conversing import Conversing
from services.gateway.dialogue import Dialogue
from services.gateway.experiments import Arm, Assigned, interleaved
from services.gateway.fusion import CROSS_MODAL_WEIGHT, fused
from services.gateway.masks import keep, tree_of
from services.gateway.pipeline import Pipeline, person_of
from services.gateway.readers import Reader
from services.gateway.scenarios import HOME, SIMILAR, Scenarios
from services.gateway.sentences import LANGUAGES, sentence
from services.gateway.served_log import ServedLog, page_of
from services.gateway.telling import tell
from services.gateway.tokens import Tokens
from services.gateway.wish import Ordered, Wish

MAX_PAGE = 500
DEFAULT_PAGE = 20
_SEARCH_DEPTH = 2000


@dataclass(frozen=True)
class _Place:
    """Where a page begins in its answer, when and by whom that was first asked for, and who serves it."""

    start: int
    as_of: datetime
    person: str
    assigned: Assigned
    degraded: Sequence[pb.Degradation]


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
        reader: Reader,
        served: ServedLog | None = None,
    ) -> None:
        self.pipeline, self._embedding, self._ranking = pipeline, embedding, ranking
        self.pipelines: dict[str, Pipeline] = {}
        """Those of bundles that are served beside, by version."""
        self._conversing = Conversing(pipeline, tokens, reader)
        self._scenarios, self._served = scenarios, served
        self._tokens, self._clock, self._wait_for = tokens, clock, wait_for

    async def Recommend(self, request: pb.RecommendRequest, context: Any) -> pb.RecommendResponse:
        """A page for a person."""
        now = self._clock()
        size = wire.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        request_id = request.request_id or uuid.uuid4().hex
        place = self._page(request, request_id, now)
        as_of, chosen = place.as_of, place.assigned
        page = slice(place.start, place.start + size)
        mask = tree_of(request.read_mask.paths, pb.RecommendResponse.DESCRIPTOR)
        wish = wish_of(request, self._scenarios.find(chosen.scenario), as_of, page.stop + 1)
        pipeline = self._by(chosen.arm)
        if request.validate_only:
            return pb.RecommendResponse(versions=_versions(pipeline, as_of, 0), request_id=request_id)
        await self._wait_for(request.min_sequence)
        ordered = await self._run(request, chosen, wish)
        degraded, left_out = [*place.degraded, *ordered.degraded], set(ordered.left_out)
        items = self._items(ordered, page, pipeline)
        if request.include_reasons:
            language = request.language or LANGUAGES[0]
            await self._explain(pipeline, wish, ordered, items, language, degraded)
        response = pb.RecommendResponse(
            items=items,
            attribution_token=self._attribution(request_id, request.scenario or HOME, now, chosen),
            versions=_versions(pipeline, as_of, ordered.state_sequence),
            degraded=degraded,
            request_id=request_id,
            assignment=_assignment(chosen),
            stages=_stages(ordered) if request.debug else (),
            left_out_item_ids=[i for i in request.item_ids if item_number(i) in left_out],
        )
        if page.stop < len(ordered.numbers):
            content = {
                "o": page.stop,
                "a": as_of.isoformat(),
                "h": digest(request),
                "x": _mark(chosen),
                "b": pipeline.bundle,
            }
            if not person_key(request, ""):
                content["u"] = place.person
            response.next_page_token = self._tokens.sign("page", content, now)
        self._log(request, ordered, page, request_id, place, now, items)
        keep(response, mask)
        return response

    async def ExplainItem(self, request: pb.ExplainItemRequest, context: Any) -> pb.ExplainItemResponse:
        """What became of one item in a Recommend."""
        if problem := identifier_problem(request.item_id):
            raise InvalidArgument.of("item_id", problem)
        asked, now = request.request, self._clock()
        try:
            size = wire.check_limit(asked.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
            place = self._page(asked, asked.request_id or uuid.uuid4().hex, now)
            depth = place.start + size
            wish = wish_of(asked, self._scenarios.find(place.assigned.scenario), place.as_of, depth)
        except InvalidArgument as error:
            raise error.under("request") from None
        await self._wait_for(asked.min_sequence)
        number = item_number(request.item_id)
        answer, ordered = await self._by(place.assigned.arm).why(wish, number)
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
        if shown := ordered.scores[:depth]:
            response.last_score = shown[-1]
        return response

    async def Converse(self, request: pb.ConverseRequest, context: Any) -> pb.ConverseResponse:
        """A turn of a dialogue."""
        now = self._clock()
        size, wish, begun = self._turn(request, now)
        await self._wait_for(request.min_sequence)
        turn = await self._conversing.turn(request, wish, begun)
        language, request_id = request.language or LANGUAGES[0], request.request_id or uuid.uuid4().hex
        items = self._items(turn.ordered, slice(0, size))
        if request.include_reasons:
            await self._explain(self.pipeline, turn.wish, turn.ordered, items, language, turn.degraded)
        response = pb.ConverseResponse(
            items=items,
            conversation_token=self._conversing.token(request, turn.dialogue, now),
            not_understood=turn.not_understood,
            attribution_token=self._attribution(request_id, request.scenario or HOME, now),
            versions=_versions(self.pipeline, now, turn.ordered.state_sequence),
            request_id=request_id,
        )
        place = _Place(0, now, "", Assigned(request.scenario or HOME), ())
        asked = turns.recommend_of(request)
        self._log(asked, turn.ordered, slice(0, size), request_id, place, now, items)
        titles = await self._conversing.titles(turn)
        tell(response, turn, language, titles, said=bool(request.message.strip()))
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
        sent, condition = both_filters(scenario, request.filter if request.HasField("filter") else None)
        wish = Wish(
            person=person_of("", "", [event_pb2.SessionItem(item_id=request.item_id)]),
            as_of=now,
            excluded=numbers_of(request.exclude_item_ids, "exclude_item_ids"),
            filter=sent,
            condition=condition,
            min_sequence=request.min_sequence,
            sources=scenario.sources,
            by_source=scenario.by_source,
            rules=scenario.rules,
            depth=size,
            loose=scenario.condition,
            scenario=SIMILAR,
            seed=seed_of(pb.RecommendRequest(context_item_ids=[request.item_id]), now),
        )
        ordered = await self.pipeline.run(wish)
        items, request_id = self._items(ordered, slice(0, size)), uuid.uuid4().hex
        asked = pb.RecommendRequest(scenario=SIMILAR)
        place = _Place(0, now, "", Assigned(SIMILAR), ())
        self._log(asked, ordered, slice(0, size), request_id, place, now, items)
        return pb.SimilarItemsResponse(
            items=items,
            attribution_token=self._attribution(request_id, SIMILAR, now),
            versions=_versions(self.pipeline, now, ordered.state_sequence),
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
        orders: list[tuple[float, Sequence[int]]] = []
        sources: dict[int, dict[str, float]] = {}
        for result in found.results:
            of_image = bool(request.image) and (result.query == 1 or not request.text)
            name = "image" if result.space == item_pb2.SPACE_IMAGE else "text"
            weight = (share if of_image else 1 - share) if both else 1.0
            if name == "image" and not of_image:
                weight *= CROSS_MODAL_WEIGHT
            orders.append((weight, result.item_numbers))
            for number, score in zip(result.item_numbers, result.scores, strict=True):
                sources.setdefault(number, {})[name] = score
        scores = fused(orders)
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
            versions=_versions(self.pipeline, now, 0),
        )

    async def WriteEvents(self, request: pb.WriteEventsRequest, context: Any) -> pb.WriteEventsResponse:
        """Record events."""
        written = await self._ranking.write(ranking_pb.WriteEventsRequest(events=request.events))
        return pb.WriteEventsResponse(outcomes=written.outcomes)

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserResponse:
        """Forget a person."""
        if self._served is not None:
            await self._served.flush()
        asked = ranking_pb.DeleteUserRequest(user_id=request.user_id, visitor_id=request.visitor_id)
        deleted = await self._ranking.delete_user(asked)
        return pb.DeleteUserResponse(events=deleted.events, ids=deleted.ids, pages=deleted.pages)

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
        answer.versions.CopyFrom(_versions(self.pipeline, now, answer.versions.event_sequence))
        return answer

    async def RecommendOffers(
        self, request: pb.RecommendOffersRequest, context: Any
    ) -> pb.RecommendOffersResponse:
        """Which offers to make to a person."""
        now = self._clock()
        answer = await offering.recommend(request, now, self.pipeline, self._wait_for)
        answer.versions.CopyFrom(_versions(self.pipeline, now, answer.versions.event_sequence))
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
            pages=page.pages,
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

    def _page(self, request: pb.RecommendRequest, request_id: str, now: datetime) -> _Place:
        """Where the page begins, with the moment and the arm that all pages of an answer share."""
        start, as_of, person = 0, now, person_key(request, request_id)
        content, degraded = None, []
        if request.page_token:
            content = self._tokens.read("page", request.page_token, now, "page_token")
            if content["h"] != digest(request):
                why = "belongs to another request; only page_size may change"
                raise InvalidArgument.of("page_token", why)
            start, as_of = content["o"], datetime.fromisoformat(content["a"])
            person = content.get("u", person)
        chosen = self._scenarios.assigned(request.scenario, person)
        pipeline = self._by(chosen.arm)
        if chosen.arm and chosen.arm.bundle not in ("", pipeline.bundle):
            degraded.append(_not_served(chosen.arm.bundle))
        if content is not None and content["x"] != _mark(chosen):
            raise InvalidArgument.of("page_token", "is of an experiment that has changed; begin again")
        if content is not None and content["b"] != pipeline.bundle:
            degraded.append(_bundle_changed(content["b"]))
        return _Place(start, as_of, person, chosen, degraded)

    def _by(self, arm: Arm | None) -> Pipeline:
        """The pipeline of an arm's bundle, or of the newest."""
        return self.pipelines.get(arm.bundle, self.pipeline) if arm else self.pipeline

    async def _run(self, request: pb.RecommendRequest, chosen: Assigned, wish: Wish) -> Ordered:
        """What is shown of a request, by the arm or arms that serve it."""
        pipeline = self._by(chosen.arm)
        if chosen.rival is None or chosen.arm is None:
            return await pipeline.run(wish)
        other = wish_of(request, self._scenarios.find(chosen.rival.scenario), wish.as_of, wish.depth)
        both = await asyncio.gather(pipeline.run(wish), self._by(chosen.rival).run(other))
        return interleaved(both, (chosen.arm.name, chosen.rival.name), wish.depth, wish.seed)

    def _log(
        self,
        request: pb.RecommendRequest,
        ordered: Ordered,
        page: slice,
        request_id: str,
        place: _Place,
        now: datetime,
        items: Sequence[pb.Recommendation],
    ) -> None:
        """Let a page be kept, and those of shadows be made."""
        if self._served is None:
            return
        chosen = place.assigned
        logged = page_of(
            request,
            ordered,
            page,
            items=[item.item_id for item in items],
            request_id=request_id,
            scenario=request.scenario or HOME,
            bundle=self._by(chosen.arm).bundle,
            at=now,
        )
        logged.experiment, logged.arm = chosen.experiment, "" if chosen.rival else _arm(chosen)
        self._served.add(logged)
        for arm in chosen.shadows:
            self._served.beside(self._shadow(request, page, logged, arm, place.as_of))

    async def _shadow(
        self,
        request: pb.RecommendRequest,
        page: slice,
        shown: served_pb2.ServedPage,
        arm: Arm,
        as_of: datetime,
    ) -> served_pb2.ServedPage:
        """The page that another arm would have shown."""
        wish = wish_of(request, self._scenarios.find(arm.scenario), as_of, page.stop + 1)
        pipeline = self._by(arm)
        ordered = await pipeline.run(wish)
        return page_of(
            request,
            ordered,
            page,
            items=[item.item_id for item in self._items(ordered, page, pipeline)],
            request_id=shown.request_id,
            scenario=shown.scenario,
            bundle=pipeline.bundle,
            at=as_of,
            shadow_of=(shown.experiment, arm.name),
        )

    def _turn(self, request: pb.ConverseRequest, now: datetime) -> tuple[int, Wish, Dialogue]:
        """The length of the page, what the request itself asks for, and what was said; all that is wrong."""
        wrong = turns.violations(request)
        size, wish, begun = DEFAULT_PAGE, None, None
        try:
            size = wire.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        except InvalidArgument as error:
            wrong += error.violations
        try:
            asked = turns.recommend_of(request)
            wish = wish_of(asked, self._scenarios.find(asked.scenario), now, size)
            if wish.condition is not None:
                turns.check_room(wish.condition)
        except InvalidArgument as error:
            wrong += error.violations
        try:
            begun = self._conversing.begun(request, now)
        except InvalidArgument as error:
            wrong += error.violations
        if wrong or wish is None or begun is None:
            raise InvalidArgument(wrong)
        return size, wish, begun

    def _items(
        self, ordered: Ordered, page: slice, pipeline: Pipeline | None = None
    ) -> list[pb.Recommendation]:
        numbers, ids = ordered.numbers[page], dict[int, str]()
        # Tables of two bundles follow one after the other: an item may be known to one alone for a moment.
        for table in (self.pipeline.table, (pipeline or self.pipeline).table):
            missing = [number for number in numbers if number not in ids]
            rows = table.rows(missing)
            known = [number for number, row in zip(missing, rows, strict=True) if row >= 0]
            ids.update(zip(known, table.ids(rows[rows >= 0]), strict=True))
        told = zip(numbers, ordered.scores[page], strict=True)
        return [self._item(ordered, number, ids[number], score) for number, score in told if number in ids]

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
        item.propensity = ordered.propensities.get(number, 1.0)
        return item

    @staticmethod
    async def _explain(
        pipeline: Pipeline,
        wish: Wish,
        ordered: Ordered,
        items: Sequence[pb.Recommendation],
        language: str,
        degraded: list[pb.Degradation],
    ) -> None:
        numbers = [item_number(item.item_id) for item in items]
        reasons, titles = await pipeline.reasons(wish, ordered, numbers, degraded)
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

    def _attribution(
        self, request_id: str, scenario: str, now: datetime, chosen: Assigned | None = None
    ) -> str:
        content = {"r": request_id, "s": scenario, "b": self.pipeline.bundle}
        if chosen is not None and chosen.experiment:
            content["x"] = _mark(chosen)
        return self._tokens.sign("shown", content, now)


def _versions(pipeline: Pipeline, as_of: datetime, event_sequence: int) -> pb.Versions:
    return pb.Versions(
        bundle=pipeline.bundle,
        catalog_sequence=pipeline.table.sequence,
        event_sequence=event_sequence,
        as_of=wire.time_to(as_of),
    )


def _arm(chosen: Assigned) -> str:
    return chosen.arm.name if chosen.arm else ""


def _mark(chosen: Assigned) -> str:
    """The experiment and arm of an answer, as tokens hold them."""
    return f"{chosen.experiment}/{'' if chosen.rival else _arm(chosen)}" if chosen.experiment else ""


def _assignment(chosen: Assigned) -> pb.Assignment | None:
    if not chosen.experiment:
        return None
    return pb.Assignment(experiment=chosen.experiment, arm="" if chosen.rival else _arm(chosen))


def _bundle_changed(before: str) -> pb.Degradation:
    return pb.Degradation(
        stage="pages",
        code=pb.DEGRADATION_CODE_BUNDLE_CHANGED,
        message=f"the pages before are of bundle {before}: items may come twice, or not at all",
    )


def _not_served(bundle: str) -> pb.Degradation:
    return pb.Degradation(
        stage="bundle",
        code=pb.DEGRADATION_CODE_NOT_READY,
        message=f"bundle {bundle!r} of the experiment's arm is not served; the newest stands in",
    )


def _stages(ordered: Ordered) -> list[pb.Stage]:
    return [pb.Stage(name=s.name, items=s.items, milliseconds=1000 * s.seconds) for s in ordered.stages]


def _sources(scores: dict[str, float]) -> list[pb.SourceScore]:
    return [pb.SourceScore(source=name, score=score) for name, score in sorted(scores.items())]
