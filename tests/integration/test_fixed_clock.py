"""A fixed clock without a time zone causes no internal error."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from vitrine.embedding.v1 import embedding_service_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2

from tests.support.shop_server import NOW, Shop, ids, purchase

_FILES = embedding_service_pb2, ranking_service_pb2, pb
_BUGS = grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN
METHODS: list[MethodDescriptor] = [
    method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


async def code_of(channel: grpc.aio.Channel, method: MethodDescriptor, request: Any) -> grpc.StatusCode:
    """The status of a call with one message, and of a stream's first answer."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    codec = {
        "request_serializer": type(request).SerializeToString,
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }

    async def once() -> AsyncIterator[Any]:
        yield request

    try:
        if method.client_streaming:
            async for _ in channel.stream_stream(path, **codec)(once(), timeout=30):
                break
        elif method.server_streaming:
            async for _ in channel.unary_stream(path, **codec)(request, timeout=30):
                break
        else:
            await channel.unary_unary(path, **codec)(request, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_every_call_works_with_a_clock_without_a_zone(bundle: Path, tmp_path: Path) -> None:
    async with (
        Shop(bundle, tmp_path / "state", "one", clock=NOW.replace(tzinfo=None)).serve() as stub,
        grpc.aio.insecure_channel(stub.target) as channel,
    ):
        for method in METHODS:
            code = await code_of(channel, method, GetMessageClass(method.input_type)())
            assert code not in _BUGS, method.full_name
        response = await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("e", "ann", "garden-01")]))
        assert response.outcomes[0].sequence == 1
        assert len(ids(await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=5)))) == 5
        profile = await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))
        assert list(profile.profile.user_ids) == ["ann"]
        [record] = (await stub.ExportUser(pb.ExportUserRequest(user_id="ann"))).events
        assert record.recorded_at.ToDatetime() == NOW.replace(tzinfo=None)
        assert (await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann"))).events == 1
