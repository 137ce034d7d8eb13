"""`RecommendationService`, the public API: decodes requests, calls the handlers, encodes responses."""

import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.catalog.items import identifier_problem
from services.core.errors import InvalidArgument, NotFound
from services.gateway.clients.backends import EmbeddingBackend, RankingBackend
from services.gateway.conversation.handler import ConverseHandler
from services.gateway.conversation.language.interpreter_runner import InterpreterRunner
from services.gateway.experiments.assignment import Assignment
from services.gateway.experiments.scenarios import Scenarios
from services.gateway.offers import handler, prediction_handler
from services.gateway.recommend.handler import RecommendHandler
from services.gateway.recommend.impression_log import ImpressionLog
from services.gateway.recommend.pipeline import Pipeline
from services.gateway.recommend.response_builder import build_versions
from services.gateway.recommend.search_handler import SearchHandler
from services.gateway.recommend.signed_tokens import SignedTokens
from services.rpc import proto_conversions
from services.rpc.request_limits import checked

SEARCH = "search"


@checked(pb.DESCRIPTOR.services_by_name["RecommendationService"])
class GatewayServicer(pb_grpc.RecommendationServiceServicer):
    """The service over a pipeline; `clock` is read once per request."""

    def __init__(
        self,
        pipeline: Pipeline,
        embedding: EmbeddingBackend,
        ranking: RankingBackend,
        tokens: SignedTokens,
        clock: Callable[[], datetime],
        wait_for: Callable[[int], Awaitable[None]],
        scenarios: Scenarios,
        interpreter: InterpreterRunner,
        impression_log: ImpressionLog | None = None,
    ) -> None:
        self._embedding, self._ranking, self._impression_log = embedding, ranking, impression_log
        self._recommend = RecommendHandler(pipeline, tokens, wait_for, scenarios, impression_log)
        self._converse = ConverseHandler(self._recommend, tokens, wait_for, scenarios, interpreter)
        self._search = SearchHandler(pipeline, embedding)
        self._clock, self._wait_for = clock, wait_for

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline of the newest bundle."""
        return self._recommend.pipeline

    def add_pipeline(self, pipeline: Pipeline) -> None:
        """Serve a candidate bundle's pipeline to the arms of experiments that name its bundle."""
        self._recommend.add_pipeline(pipeline)

    async def Recommend(self, request: pb.RecommendRequest, context: Any) -> pb.RecommendResponse:
        """A page for a user."""
        return await self._recommend.recommend(request, self._clock())

    async def ExplainItem(self, request: pb.ExplainItemRequest, context: Any) -> pb.ExplainItemResponse:
        """The outcome for one item in a Recommend."""
        return await self._recommend.explain_item(request, self._clock())

    async def Converse(self, request: pb.ConverseRequest, context: Any) -> pb.ConverseResponse:
        """A turn of a dialogue."""
        return await self._converse.converse(request, self._clock())

    async def SimilarItems(self, request: pb.SimilarItemsRequest, context: Any) -> pb.SimilarItemsResponse:
        """Items similar to one item."""
        return await self._recommend.similar(request, self._clock())

    async def SearchItems(self, request: pb.SearchItemsRequest, context: Any) -> pb.SearchItemsResponse:
        """Items that match a text, an image, or both."""
        now = self._clock()
        items = await self._search.search(request, now)
        request_id = uuid.uuid4().hex
        return pb.SearchItemsResponse(
            items=items,
            attribution_token=self._recommend.attribution(request_id, SEARCH, now, Assignment(SEARCH)),
            versions=build_versions(self.pipeline, now, 0),
        )

    async def WriteEvents(self, request: pb.WriteEventsRequest, context: Any) -> pb.WriteEventsResponse:
        """Record events."""
        response = await self._ranking.write(ranking_pb.WriteEventsRequest(events=request.events))
        return pb.WriteEventsResponse(outcomes=response.outcomes)

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserResponse:
        """Delete a user's data."""
        if self._impression_log is not None:
            await self._impression_log.flush()
        delete = ranking_pb.DeleteUserRequest(user_id=request.user_id, visitor_id=request.visitor_id)
        response = await self._ranking.delete_user(delete)
        return pb.DeleteUserResponse(events=response.events, ids=response.ids, pages=response.pages)

    async def GetUserProfile(
        self, request: pb.GetUserProfileRequest, context: Any
    ) -> pb.GetUserProfileResponse:
        """The profile of a user."""
        profile_request = ranking_pb.GetUserProfileRequest(
            user_id=request.user_id,
            visitor_id=request.visitor_id,
            as_of=proto_conversions.time_to(self._clock()),
        )
        response = await self._ranking.user_profile(profile_request)
        return pb.GetUserProfileResponse(profile=response.profile)

    async def PredictEvents(self, request: pb.PredictEventsRequest, context: Any) -> pb.PredictEventsResponse:
        """Predict what users do."""
        now = self._clock()
        response = await prediction_handler.predict(
            request, now, self._ranking, self.pipeline, self._wait_for
        )
        sequence = response.versions.event_sequence
        response.versions.CopyFrom(build_versions(self.pipeline, now, sequence))
        return response

    async def RecommendOffers(
        self, request: pb.RecommendOffersRequest, context: Any
    ) -> pb.RecommendOffersResponse:
        """Offers to make to a user."""
        now = self._clock()
        response = await handler.recommend(request, now, self.pipeline, self._wait_for)
        sequence = response.versions.event_sequence
        response.versions.CopyFrom(build_versions(self.pipeline, now, sequence))
        return response

    async def ExportUser(self, request: pb.ExportUserRequest, context: Any) -> pb.ExportUserResponse:
        """A page of the data about a user."""
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
        response = await self._embedding.get(embedding_pb.GetItemsRequest(item_ids=[request.item_id]))
        if not response.items:
            raise NotFound("item", request.item_id)
        return pb.GetItemResponse(item=response.items[0])

    async def ListItems(self, request: pb.ListItemsRequest, context: Any) -> pb.ListItemsResponse:
        """Read a page of the catalog."""
        page = await self._embedding.get(
            embedding_pb.GetItemsRequest(page_size=request.page_size, page_token=request.page_token)
        )
        return pb.ListItemsResponse(items=page.items, next_page_token=page.next_page_token)

    async def DeleteItems(self, request: pb.DeleteItemsRequest, context: Any) -> pb.DeleteItemsResponse:
        """Delete items."""
        delete = embedding_pb.DeleteItemsRequest(item_ids=request.item_ids)
        return pb.DeleteItemsResponse(outcomes=(await self._embedding.delete(delete)).outcomes)
