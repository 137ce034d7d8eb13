"""The gateway's neighbours, in this process or in another: the same calls, the same errors.

A call takes and gives the contract's messages. It ends with the caller's deadline, and what
goes wrong is a domain error either way.
"""

from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as embedding_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services import deadline, status
from services.errors import VitrineError


class Embedding(Protocol):
    """What the gateway asks of the embedding service."""

    async def search(self, request: embedding_pb.SearchRequest) -> embedding_pb.SearchResponse:
        """Find the nearest items."""

    async def upsert(self, request: embedding_pb.UpsertItemsRequest) -> embedding_pb.UpsertItemsResponse:
        """Write one chunk of items."""

    async def delete(self, request: embedding_pb.DeleteItemsRequest) -> embedding_pb.DeleteItemsResponse:
        """Delete items."""

    async def get(self, request: embedding_pb.GetItemsRequest) -> embedding_pb.GetItemsResponse:
        """Read items."""


class Ranking(Protocol):
    """What the gateway asks of the ranking service."""

    async def write(self, request: ranking_pb.WriteEventsRequest) -> ranking_pb.WriteEventsResponse:
        """Commit events."""

    async def delete_user(self, request: ranking_pb.DeleteUserRequest) -> ranking_pb.DeleteUserResponse:
        """Forget a person."""

    async def export_user(self, request: ranking_pb.ExportUserRequest) -> ranking_pb.ExportUserResponse:
        """What is known of a person."""

    async def user_profile(
        self, request: ranking_pb.GetUserProfileRequest
    ) -> ranking_pb.GetUserProfileResponse:
        """What a person's behaviour says of them."""

    async def log(self, request: ranking_pb.LogPagesRequest) -> ranking_pb.LogPagesResponse:
        """Keep pages that were answered."""

    async def retrieve(self, request: ranking_pb.RetrieveRequest) -> ranking_pb.RetrieveResponse:
        """A person's state and candidates."""

    async def rank(self, request: ranking_pb.RankRequest) -> ranking_pb.RankResponse:
        """Score candidates."""

    async def explain(self, request: ranking_pb.ExplainRequest) -> ranking_pb.ExplainResponse:
        """Tell what scores rest on."""

    async def predict(self, request: ranking_pb.PredictRequest) -> ranking_pb.PredictResponse:
        """What people are likely to do."""


class LocalEmbedding:
    """The embedding servicer of this process."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    async def search(self, request: embedding_pb.SearchRequest) -> embedding_pb.SearchResponse:
        """See `Embedding`."""
        return await _bounded(self._servicer.Search(request, None))

    async def upsert(self, request: embedding_pb.UpsertItemsRequest) -> embedding_pb.UpsertItemsResponse:
        """See `Embedding`."""
        return await _bounded(self._servicer.upsert_chunk(request))

    async def delete(self, request: embedding_pb.DeleteItemsRequest) -> embedding_pb.DeleteItemsResponse:
        """See `Embedding`."""
        return await _bounded(self._servicer.DeleteItems(request, None))

    async def get(self, request: embedding_pb.GetItemsRequest) -> embedding_pb.GetItemsResponse:
        """See `Embedding`."""
        return await _bounded(self._servicer.GetItems(request, None))


class LocalRanking:
    """The ranking servicer of this process."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    async def write(self, request: ranking_pb.WriteEventsRequest) -> ranking_pb.WriteEventsResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.WriteEvents(request, None))

    async def delete_user(self, request: ranking_pb.DeleteUserRequest) -> ranking_pb.DeleteUserResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.DeleteUser(request, None))

    async def export_user(self, request: ranking_pb.ExportUserRequest) -> ranking_pb.ExportUserResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.ExportUser(request, None))

    async def user_profile(
        self, request: ranking_pb.GetUserProfileRequest
    ) -> ranking_pb.GetUserProfileResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.GetUserProfile(request, None))

    async def log(self, request: ranking_pb.LogPagesRequest) -> ranking_pb.LogPagesResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.LogPages(request, None))

    async def retrieve(self, request: ranking_pb.RetrieveRequest) -> ranking_pb.RetrieveResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.Retrieve(request, None))

    async def rank(self, request: ranking_pb.RankRequest) -> ranking_pb.RankResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.Rank(request, None))

    async def explain(self, request: ranking_pb.ExplainRequest) -> ranking_pb.ExplainResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.Explain(request, None))

    async def predict(self, request: ranking_pb.PredictRequest) -> ranking_pb.PredictResponse:
        """See `Ranking`."""
        return await _bounded(self._servicer.Predict(request, None))


class RemoteEmbedding:
    """An embedding service at the other end of a connection."""

    def __init__(self, connection: grpc.aio.Channel) -> None:
        self._stub = embedding_grpc.EmbeddingServiceStub(connection)

    async def search(self, request: embedding_pb.SearchRequest) -> embedding_pb.SearchResponse:
        """See `Embedding`."""
        return await _sent(self._stub.Search, request)

    async def upsert(self, request: embedding_pb.UpsertItemsRequest) -> embedding_pb.UpsertItemsResponse:
        """See `Embedding`."""

        async def one() -> AsyncIterator[embedding_pb.UpsertItemsRequest]:
            yield request

        try:
            async for response in self._stub.UpsertItems(one(), timeout=deadline.remaining()):
                return response
        except grpc.aio.AioRpcError as error:
            raise status.from_call(error) from None
        raise AssertionError("a chunk is answered or refused")

    async def delete(self, request: embedding_pb.DeleteItemsRequest) -> embedding_pb.DeleteItemsResponse:
        """See `Embedding`."""
        return await _sent(self._stub.DeleteItems, request)

    async def get(self, request: embedding_pb.GetItemsRequest) -> embedding_pb.GetItemsResponse:
        """See `Embedding`."""
        return await _sent(self._stub.GetItems, request)


class RemoteRanking:
    """A ranking service at the other end of a connection."""

    def __init__(self, connection: grpc.aio.Channel) -> None:
        self._stub = ranking_grpc.RankingServiceStub(connection)

    async def write(self, request: ranking_pb.WriteEventsRequest) -> ranking_pb.WriteEventsResponse:
        """See `Ranking`."""
        return await _sent(self._stub.WriteEvents, request)

    async def delete_user(self, request: ranking_pb.DeleteUserRequest) -> ranking_pb.DeleteUserResponse:
        """See `Ranking`."""
        return await _sent(self._stub.DeleteUser, request)

    async def export_user(self, request: ranking_pb.ExportUserRequest) -> ranking_pb.ExportUserResponse:
        """See `Ranking`."""
        return await _sent(self._stub.ExportUser, request)

    async def user_profile(
        self, request: ranking_pb.GetUserProfileRequest
    ) -> ranking_pb.GetUserProfileResponse:
        """See `Ranking`."""
        return await _sent(self._stub.GetUserProfile, request)

    async def log(self, request: ranking_pb.LogPagesRequest) -> ranking_pb.LogPagesResponse:
        """See `Ranking`."""
        return await _sent(self._stub.LogPages, request)

    async def retrieve(self, request: ranking_pb.RetrieveRequest) -> ranking_pb.RetrieveResponse:
        """See `Ranking`."""
        return await _sent(self._stub.Retrieve, request)

    async def rank(self, request: ranking_pb.RankRequest) -> ranking_pb.RankResponse:
        """See `Ranking`."""
        return await _sent(self._stub.Rank, request)

    async def explain(self, request: ranking_pb.ExplainRequest) -> ranking_pb.ExplainResponse:
        """See `Ranking`."""
        return await _sent(self._stub.Explain, request)

    async def predict(self, request: ranking_pb.PredictRequest) -> ranking_pb.PredictResponse:
        """See `Ranking`."""
        return await _sent(self._stub.Predict, request)


def watch(connection: grpc.aio.Channel) -> Any:
    """The change feed of an embedding service; its errors are the domain's."""
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
            raise status.from_call(error) from None

    return follow


async def _bounded(call: Any) -> Any:
    return await deadline.wait(call)


async def _sent(method: Any, request: Any) -> Any:
    try:
        return await method(request, timeout=deadline.remaining())
    except grpc.aio.AioRpcError as error:
        raise status.from_call(error) from None
