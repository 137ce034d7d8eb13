"""The gateway's backends, in this process or in another: the same calls, the same errors.

A call takes and returns the contract's messages. It ends with the caller's deadline. Every failure is a
domain error.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as embedding_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services.core import deadline
from services.core.errors import VitrineError
from services.rpc import status

_HEALTH_SECONDS = 1.0
SERVICES = {
    "embedding": "vitrine.embedding.v1.EmbeddingService",
    "ranking": "vitrine.ranking.v1.RankingService",
}


class EmbeddingBackend(Protocol):
    """The calls that the gateway makes to the embedding service."""

    async def search(self, request: embedding_pb.SearchRequest) -> embedding_pb.SearchResponse:
        """Find the nearest items."""

    async def upsert(self, request: embedding_pb.UpsertItemsRequest) -> embedding_pb.UpsertItemsResponse:
        """Write one chunk of items."""

    async def delete(self, request: embedding_pb.DeleteItemsRequest) -> embedding_pb.DeleteItemsResponse:
        """Delete items."""

    async def get(self, request: embedding_pb.GetItemsRequest) -> embedding_pb.GetItemsResponse:
        """Read items."""


class RankingBackend(Protocol):
    """The calls that the gateway makes to the ranking service."""

    async def write(self, request: ranking_pb.WriteEventsRequest) -> ranking_pb.WriteEventsResponse:
        """Commit events."""

    async def delete_user(self, request: ranking_pb.DeleteUserRequest) -> ranking_pb.DeleteUserResponse:
        """Delete a user."""

    async def export_user(self, request: ranking_pb.ExportUserRequest) -> ranking_pb.ExportUserResponse:
        """Export the data about a user."""

    async def user_profile(
        self, request: ranking_pb.GetUserProfileRequest
    ) -> ranking_pb.GetUserProfileResponse:
        """Read the profile of a user."""

    async def log(self, request: ranking_pb.LogPagesRequest) -> ranking_pb.LogPagesResponse:
        """Store pages in the impression log."""

    async def retrieve(self, request: ranking_pb.RetrieveRequest) -> ranking_pb.RetrieveResponse:
        """Read a user's state and candidates."""

    async def rank(self, request: ranking_pb.RankRequest) -> ranking_pb.RankResponse:
        """Score candidates."""

    async def explain(self, request: ranking_pb.ExplainRequest) -> ranking_pb.ExplainResponse:
        """Explain scores."""

    async def predict(self, request: ranking_pb.PredictRequest) -> ranking_pb.PredictResponse:
        """Predict events of users."""


class LocalEmbedding:
    """The embedding servicer of this process."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    async def search(self, request: embedding_pb.SearchRequest) -> embedding_pb.SearchResponse:
        """See `EmbeddingBackend`."""
        return await _bounded(self._servicer.Search(request, None))

    async def upsert(self, request: embedding_pb.UpsertItemsRequest) -> embedding_pb.UpsertItemsResponse:
        """See `EmbeddingBackend`."""
        return await _bounded(self._servicer.upsert_chunk(request))

    async def delete(self, request: embedding_pb.DeleteItemsRequest) -> embedding_pb.DeleteItemsResponse:
        """See `EmbeddingBackend`."""
        return await _bounded(self._servicer.DeleteItems(request, None))

    async def get(self, request: embedding_pb.GetItemsRequest) -> embedding_pb.GetItemsResponse:
        """See `EmbeddingBackend`."""
        return await _bounded(self._servicer.GetItems(request, None))


class LocalRanking:
    """The ranking servicer of this process."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    async def write(self, request: ranking_pb.WriteEventsRequest) -> ranking_pb.WriteEventsResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.WriteEvents(request, None))

    async def delete_user(self, request: ranking_pb.DeleteUserRequest) -> ranking_pb.DeleteUserResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.DeleteUser(request, None))

    async def export_user(self, request: ranking_pb.ExportUserRequest) -> ranking_pb.ExportUserResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.ExportUser(request, None))

    async def user_profile(
        self, request: ranking_pb.GetUserProfileRequest
    ) -> ranking_pb.GetUserProfileResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.GetUserProfile(request, None))

    async def log(self, request: ranking_pb.LogPagesRequest) -> ranking_pb.LogPagesResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.LogPages(request, None))

    async def retrieve(self, request: ranking_pb.RetrieveRequest) -> ranking_pb.RetrieveResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.Retrieve(request, None))

    async def rank(self, request: ranking_pb.RankRequest) -> ranking_pb.RankResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.Rank(request, None))

    async def explain(self, request: ranking_pb.ExplainRequest) -> ranking_pb.ExplainResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.Explain(request, None))

    async def predict(self, request: ranking_pb.PredictRequest) -> ranking_pb.PredictResponse:
        """See `RankingBackend`."""
        return await _bounded(self._servicer.Predict(request, None))


class RemoteEmbedding:
    """An embedding service at the other end of a connection."""

    def __init__(self, connection: grpc.aio.Channel) -> None:
        self._stub = embedding_grpc.EmbeddingServiceStub(connection)

    async def search(self, request: embedding_pb.SearchRequest) -> embedding_pb.SearchResponse:
        """See `EmbeddingBackend`."""
        return await _sent("embedding", self._stub.Search, request)

    async def upsert(self, request: embedding_pb.UpsertItemsRequest) -> embedding_pb.UpsertItemsResponse:
        """See `EmbeddingBackend`."""

        async def one() -> AsyncIterator[embedding_pb.UpsertItemsRequest]:
            yield request

        try:
            async for response in self._stub.UpsertItems(one(), timeout=deadline.remaining()):
                return response
        except grpc.aio.AioRpcError as error:
            raise status.from_call(error, "embedding") from None
        raise AssertionError("the service answers each chunk or refuses it")

    async def delete(self, request: embedding_pb.DeleteItemsRequest) -> embedding_pb.DeleteItemsResponse:
        """See `EmbeddingBackend`."""
        return await _sent("embedding", self._stub.DeleteItems, request)

    async def get(self, request: embedding_pb.GetItemsRequest) -> embedding_pb.GetItemsResponse:
        """See `EmbeddingBackend`."""
        return await _sent("embedding", self._stub.GetItems, request)


class RemoteRanking:
    """A ranking service at the other end of a connection."""

    def __init__(self, connection: grpc.aio.Channel) -> None:
        self._stub = ranking_grpc.RankingServiceStub(connection)

    async def write(self, request: ranking_pb.WriteEventsRequest) -> ranking_pb.WriteEventsResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.WriteEvents, request)

    async def delete_user(self, request: ranking_pb.DeleteUserRequest) -> ranking_pb.DeleteUserResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.DeleteUser, request)

    async def export_user(self, request: ranking_pb.ExportUserRequest) -> ranking_pb.ExportUserResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.ExportUser, request)

    async def user_profile(
        self, request: ranking_pb.GetUserProfileRequest
    ) -> ranking_pb.GetUserProfileResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.GetUserProfile, request)

    async def log(self, request: ranking_pb.LogPagesRequest) -> ranking_pb.LogPagesResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.LogPages, request)

    async def retrieve(self, request: ranking_pb.RetrieveRequest) -> ranking_pb.RetrieveResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.Retrieve, request)

    async def rank(self, request: ranking_pb.RankRequest) -> ranking_pb.RankResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.Rank, request)

    async def explain(self, request: ranking_pb.ExplainRequest) -> ranking_pb.ExplainResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.Explain, request)

    async def predict(self, request: ranking_pb.PredictRequest) -> ranking_pb.PredictResponse:
        """See `RankingBackend`."""
        return await _sent("ranking", self._stub.Predict, request)


def health(connection: grpc.aio.Channel, service: str) -> Callable[[], Awaitable[bool]]:
    """A health check: whether the service at the other end of a connection is serving."""
    stub = health_pb2_grpc.HealthStub(connection)

    async def serves() -> bool:
        try:
            response = await stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=_HEALTH_SECONDS
            )
        except grpc.aio.AioRpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    return serves


def watch(connection: grpc.aio.Channel) -> Any:
    """The change feed of an embedding service, with domain errors."""
    stub = embedding_grpc.EmbeddingServiceStub(connection)

    async def follow(
        request: embedding_pb.WatchItemsRequest,
    ) -> AsyncIterator[embedding_pb.WatchItemsResponse]:
        try:
            async for message in stub.WatchItems(request):
                yield message
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                raise VitrineError("the feed was cancelled") from None
            raise status.from_call(error, "embedding") from None

    return follow


async def _bounded(call: Any) -> Any:
    return await deadline.wait(call)


async def _sent(service: str, method: Any, request: Any) -> Any:
    try:
        return await method(request, timeout=deadline.remaining())
    except grpc.aio.AioRpcError as error:
        raise status.from_call(error, service) from None
