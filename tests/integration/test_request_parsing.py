"""Requests that cannot be parsed are the caller's error and are counted."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb

from services.rpc import reflection
from services.rpc.request_parsing import max_bytes
from services.rpc.server import CHANNEL_OPTIONS
from services.serving.app import App
from services.serving.loaded_bundle import ALL
from tests.support.contracts import METHODS, method_name
from tests.support.shop_server import Shop, Stub

_BAD = b"\x0a\xff\xff"  # a text that is longer than the message
_NOT_UTF_8 = b"\x0a\x01\xff"
_GRPC = (
    *health_pb2.DESCRIPTOR.services_by_name["Health"].methods,
    *(reflection.POOL.FindServiceByName(name).methods[0] for name in reflection.NAMES),
)


async def _send(channel: Any, method: MethodDescriptor, *messages: bytes) -> list[bytes]:
    """What is answered to raw messages."""
    path = f"/{method_name(method)}"
    if method.client_streaming:

        async def stream() -> AsyncIterator[bytes]:
            for message in messages:
                yield message

        return [answer async for answer in channel.stream_stream(path)(stream())]
    if method.server_streaming:
        return [answer async for answer in channel.unary_stream(path)(messages[0])]
    return [await channel.unary_unary(path)(messages[0])]


async def _refusal(channel: grpc.aio.Channel, method: MethodDescriptor, *messages: bytes) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _send(channel, method, *messages)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, f"{method_name(method)}: {caught.value}"
    return caught.value.details() or ""


async def test_unparsable_bytes_are_an_invalid_argument_in_every_method(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[str, str]] = []

    with caplog.at_level(logging.WARNING):
        app = App(Shop(bundle, tmp_path, "one").settings(), ALL)
        app.telemetry.observe_call = lambda method, code, seconds: calls.append((method, code))  # type: ignore[method-assign]
        await app.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}", options=CHANNEL_OPTIONS) as channel:
            for method in (*METHODS, *_GRPC):
                assert method_name(method) in await _refusal(channel, method, _BAD)
        await app.stop()
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []
    assert calls == [(method_name(method), "INVALID_ARGUMENT") for method in METHODS]


async def test_text_that_is_not_utf_8_is_refused(all_in_one_stub: Stub) -> None:
    async with grpc.aio.insecure_channel(all_in_one_stub.target) as channel:
        assert "cannot be parsed" in await _refusal(channel, METHODS[0], _NOT_UTF_8)


async def test_a_message_above_the_size_limit_is_refused_with_the_limit(all_in_one_stub: Stub) -> None:
    async with grpc.aio.insecure_channel(all_in_one_stub.target, options=CHANNEL_OPTIONS) as channel:
        for method in (*METHODS, *_GRPC):
            most = max_bytes(method_name(method))
            if most < 1 << 26:  # gRPC's own limit
                problem = await _refusal(channel, method, bytes(most + 1))
                assert f"has {most + 1} bytes, at most {most} are allowed" in problem


async def test_an_unreadable_chunk_ends_the_stream_after_earlier_answers(all_in_one_stub: Stub) -> None:
    good = embedding_pb.UpsertItemsRequest(items=[item_pb2.Item(id="new", title="new")])

    async def chunks() -> AsyncIterator[bytes]:
        yield good.SerializeToString()
        yield _BAD
        yield good.SerializeToString()

    async with grpc.aio.insecure_channel(all_in_one_stub.target) as channel:
        path = "/vitrine.embedding.v1.EmbeddingService/UpsertItems"
        raw: Any = channel
        call = raw.stream_stream(path, response_deserializer=embedding_pb.UpsertItemsResponse.FromString)(
            chunks()
        )
        answers = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for answer in call:
                answers.append([outcome.code for outcome in answer.outcomes])
        assert answers == [[item_pb2.ITEM_OUTCOME_CODE_CREATED]]
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
