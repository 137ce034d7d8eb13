"""`RecommendationService`: what other teams call. Validates, asks the pipeline, writes the answer."""

import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import wire
from services.catalog import identifier_problem
from services.errors import InvalidArgument, NotFound
from services.gateway import offering, prediction, turns
from services.gateway.answers import explain, sources_of, versions_of
from services.gateway.asking import wish_of
from services.gateway.clients import Embedding, Ranking
from services.gateway.conversing import Conversing
from services.gateway.dialogue import Dialogue
from services.gateway.experiments import Assigned
from services.gateway.fusion import CROSS_MODAL_WEIGHT, fused
from services.gateway.pipeline import Pipeline
from services.gateway.readers import Reader
from services.gateway.recommending import DEFAULT_PAGE, MAX_PAGE, Recommending
from services.gateway.scenarios import HOME, Scenarios
from services.gateway.sentences import LANGUAGES
from services.gateway.served_log import ServedLog
from services.gateway.telling import tell
from services.gateway.tokens import Tokens
from services.gateway.wish import Wish

SEARCH = "search"
_SEARCH_DEPTH = 2000


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
        self._embedding, self._ranking, self._served = embedding, ranking, served
        self.recommending = Recommending(pipeline, tokens, wait_for, scenarios, served)
        self._conversing = Conversing(pipeline, tokens, reader)
        self._scenarios, self._clock, self._wait_for = scenarios, clock, wait_for

    @property
    def pipeline(self) -> Pipeline:
        """That of the newest bundle."""
        return self.recommending.pipeline

    async def Recommend(self, request: pb.RecommendRequest, context: Any) -> pb.RecommendResponse:
        """A page for a person."""
        return await self.recommending.recommend(request, self._clock())

    async def ExplainItem(self, request: pb.ExplainItemRequest, context: Any) -> pb.ExplainItemResponse:
        """What became of one item in a Recommend."""
        return await self.recommending.explain_item(request, self._clock())

    async def Converse(self, request: pb.ConverseRequest, context: Any) -> pb.ConverseResponse:
        """A turn of a dialogue."""
        now = self._clock()
        size, wish, begun = self._turn(request, now)
        await self._wait_for(request.min_sequence)
        turn = await self._conversing.turn(request, wish, begun)
        language, request_id = request.language or LANGUAGES[0], request.request_id or uuid.uuid4().hex
        items = self.recommending.items(turn.ordered, slice(0, size), self.pipeline)
        if request.include_reasons:
            await explain(self.pipeline, turn.wish, turn.ordered, items, language, turn.degraded)
        place = self.recommending.place(request.scenario or HOME, now)
        token = self.recommending.attribution(request_id, request.scenario or HOME, now, place.assigned)
        response = pb.ConverseResponse(
            items=items,
            conversation_token=self._conversing.token(request, turn.dialogue, now),
            not_understood=turn.not_understood,
            attribution_token=token,
            versions=versions_of(self.pipeline, now, turn.ordered.state_sequence),
            request_id=request_id,
        )
        self.recommending.log(turns.recommend_of(request), turn.ordered, items, request_id, place, now)
        titles = await self._conversing.titles(turn)
        tell(response, turn, language, titles, said=bool(request.message.strip()))
        return response

    async def SimilarItems(self, request: pb.SimilarItemsRequest, context: Any) -> pb.SimilarItemsResponse:
        """Items like one item."""
        return await self.recommending.similar(request, self._clock())

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
                pb.Recommendation(
                    item_id=item_id, score=scores[number], sources=sources_of(sources[number]), propensity=1.0
                )
                for (number, _), item_id in zip(shown, table.ids(row for _, row in shown), strict=True)
            ],
            attribution_token=self.recommending.attribution(uuid.uuid4().hex, SEARCH, now, Assigned(SEARCH)),
            versions=versions_of(self.pipeline, now, 0),
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
        answer.versions.CopyFrom(versions_of(self.pipeline, now, answer.versions.event_sequence))
        return answer

    async def RecommendOffers(
        self, request: pb.RecommendOffersRequest, context: Any
    ) -> pb.RecommendOffersResponse:
        """Which offers to make to a person."""
        now = self._clock()
        answer = await offering.recommend(request, now, self.pipeline, self._wait_for)
        answer.versions.CopyFrom(versions_of(self.pipeline, now, answer.versions.event_sequence))
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
