"""Every list of a request has a limit, and a longer one is refused cheaply by name."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.core import slices
from services.core.errors import InvalidArgument
from services.embedding import servicer as embedding
from services.gateway.conversation.language import dialogue_state
from services.gateway.offers import handler, prediction_handler
from services.gateway.recommend import request_parser
from services.ranking import proto_conversions
from services.ranking import servicer as ranking
from services.ranking.events import events
from services.rpc import request_limits
from services.serving.app import App
from services.serving.loaded_bundle import ALL, EMBEDDING, RANKING
from tests.support.contracts import (
    METHODS,
    FieldPath,
    field_paths,
    message_class,
    method_name,
    repeated_field,
    scalar_field,
)
from tests.support.cpu_reference import reference_seconds
from tests.support.processes import free_port, running_process
from tests.support.shop_server import Shop, Stub

_MIB = 1 << 20
_PARSINGS = 8
_TRIES = 20
_TWO_63 = 1 << 63
_C, _G = "vitrine.catalog.v1", "vitrine.gateway.v1"
_E, _R = "vitrine.embedding.v1", "vitrine.ranking.v1"
_DOMAIN = {
    f"{_C}.Event.items": events.MAX_EVENT_ITEMS,
    f"{_C}.Exploring.item_hashes": proto_conversions.MAX_EXPLORED,
    f"{_G}.RecommendRequest.session": request_parser.MAX_SESSION,
    f"{_G}.RecommendRequest.exclude_item_ids": request_parser.MAX_EXCLUDED,
    f"{_G}.RecommendRequest.item_ids": request_parser.MAX_ITEMS,
    f"{_G}.RecommendRequest.context_item_ids": request_parser.MAX_CONTEXT,
    f"{_G}.ConverseRequest.liked_item_ids": dialogue_state.MAX_LIKED,
    f"{_G}.PredictEventsRequest.item_ids": prediction_handler.MAX_ITEMS,
    f"{_G}.PredictEventsRequest.users": prediction_handler.MAX_USERS,
    f"{_G}.RecommendOffersRequest.offers": handler.MAX_OFFERS,
    f"{_G}.Offer.segments": handler.MAX_SEGMENTS,
    f"{_E}.EmbedTextsRequest.texts": embedding.MAX_TEXTS,
    f"{_E}.EmbedImagesRequest.images": embedding.MAX_IMAGES,
    f"{_E}.UpsertItemsRequest.items": embedding.MAX_ITEMS,
    f"{_E}.SearchRequest.groups": embedding.MAX_GROUPS,
    f"{_E}.SearchRequest.exclude_item_hashes": embedding.MAX_EXCLUDED,
    f"{_R}.WriteEventsRequest.events": ranking.MAX_EVENTS,
    f"{_R}.LogPagesRequest.pages": ranking.MAX_PAGES,
    f"{_R}.RetrieveRequest.exclude_item_hashes": ranking.MAX_EXCLUDED,
    f"{_R}.RankRequest.item_hashes": ranking.MAX_CANDIDATES,
    f"{_R}.ExplainRequest.item_hashes": ranking.MAX_EXPLAINED,
    f"{_R}.User.session": ranking.MAX_SESSION,
    f"{_R}.PredictRequest.users": ranking.MAX_USERS,
}


def _lists() -> Iterator[tuple[MethodDescriptor, FieldPath]]:
    for method in METHODS:
        for place in field_paths(method.input_type):
            if place.leaf.is_repeated:
                yield method, place


def _numbers() -> Iterator[tuple[MethodDescriptor, FieldPath]]:
    for method in METHODS:
        for place in field_paths(method.input_type):
            of_items = place.leaf.type == FieldDescriptor.TYPE_FIXED64 and "item_hashes" in place.leaf.name
            if of_items or place.leaf.type == FieldDescriptor.TYPE_UINT64:
                yield method, place


def test_every_list_of_every_request_has_a_limit_and_no_limit_is_of_another_field() -> None:
    assert {place.leaf.full_name for _, place in _lists()} == set(request_limits.MAX_ELEMENTS)


def test_limits_equal_those_of_the_domain() -> None:
    assert {name: request_limits.MAX_ELEMENTS[name] for name in _DOMAIN} == _DOMAIN
    assert {f"{_C}.Event.items": events.MAX_CALL_ITEMS} == request_limits.MAX_TOTAL_ELEMENTS


def test_the_reference_lists_every_limit() -> None:
    reference = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name, most in request_limits.MAX_ELEMENTS.items():
        message, _, field = name.rpartition(".")
        if message.startswith("google."):
            continue  # told where it is used
        section = reference.partition(f'<a id="{message}"></a>')[2].partition("<a id=")[0]
        [row] = [line for line in section.splitlines() if line.startswith(f"| `{field}` |")]
        assert str(most) in row.replace(",", ""), f"{name}: {most}"


def test_a_list_of_maximum_length_is_accepted() -> None:
    for method, place in _lists():
        most = request_limits.MAX_ELEMENTS[place.leaf.full_name]
        if place.leaf.message_type is not None and place.leaf.message_type.name == "Filter":
            most -= 1  # the one that has the list counts
        request = message_class(method.input_type).FromString(place.message(repeated_field(place.leaf, most)))
        request_limits.check(request)


async def test_a_list_that_is_too_long_is_refused_cheaply_by_name(bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    async with running_process(bundle, tmp_path / "state", port) as process:
        await _over_long(f"127.0.0.1:{port}", process.pid)


async def _over_long(target: str, server: int) -> None:
    async with _calls(target) as call:
        for method, place in _lists():
            most = request_limits.MAX_ELEMENTS[place.leaf.full_name]
            one_more = repeated_field(place.leaf, most + 1)
            of_a_mib = repeated_field(place.leaf, _MIB * (most + 1) // len(one_more))
            data = _required(method) + place.message(max(one_more, of_a_mib, key=len))
            bound, spent, tries = 0.0, math.inf, 0
            while spent > bound and (tries := tries + 1) <= _TRIES:
                await asyncio.sleep(0.1 * (tries - 1))  # the server may be at work in the background
                parsing = _PARSINGS * _seconds_to_parse(method, data)
                bound = max(reference_seconds() * max(1, len(data) / _MIB), parsing)
                before = _cpu_seconds(server)
                fields = await call(method, data)
                spent = _cpu_seconds(server) - before
                where = f"{method_name(method)} {place.path}"
                assert any(field and place.path.startswith(field) for field in fields), f"{where}: {fields}"
            assert spent <= bound, f"{where}: {spent:.3f} s"


def _seconds_to_parse(method: MethodDescriptor, data: bytes) -> float:
    before = time.thread_time()
    message_class(method.input_type).FromString(data)
    return time.thread_time() - before


def _cpu_seconds(process: int) -> float:
    """What a process has used of the processors until now, by its own clock (clock_getcpuclockid)."""
    return time.clock_gettime(~process << 3 | 2)


async def test_an_in_process_servicer_refuses_the_same(bundle: Path, tmp_path: Path) -> None:
    app = App(Shop(bundle, tmp_path, "one").settings(), ALL)
    await app.start()
    servicers: dict[str, Any] = dict(app.current.servicers)
    with pytest.raises(InvalidArgument, match="item_hashes: has 10001, at most 10000"):
        await servicers[RANKING].Rank(ranking_pb.RankRequest(item_hashes=range(10_001)), None)
    with pytest.raises(InvalidArgument, match="items: has 1001, at most 1000"):
        await servicers[EMBEDDING].upsert_chunk(
            embedding_pb.UpsertItemsRequest(items=[item_pb2.Item()] * 1001)
        )
    with pytest.raises(InvalidArgument, match="after_sequence: is 9223372036854775808"):
        await anext(
            servicers[EMBEDDING].WatchItems(embedding_pb.WatchItemsRequest(after_sequence=_TWO_63), None)
        )
    await app.stop()


async def test_long_conversions_yield_to_other_calls() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(others())
    numbers = await slices.convert(lambda n: time.sleep(0.001) or -n, range(50))  # type: ignore[func-returns-value]
    task.cancel()
    assert numbers == [-n for n in range(50)]
    assert turns > 3  # of some ten slices


async def test_a_hash_above_63_bits_is_refused_by_name(all_in_one_stub: Stub) -> None:
    async with _calls(all_in_one_stub.target) as call:
        for method, place in _numbers():
            data = _required(method) + place.message(scalar_field(place.leaf, _TWO_63))
            expected = f"{place.path}[0]" if place.leaf.is_repeated else place.path
            assert await call(method, data) == [expected], method_name(method)


def _required(method: MethodDescriptor) -> bytes:
    """What a request needs for its people to be looked at."""
    if method.full_name != f"{_R}.RankingService.Predict":
        return b""
    request = message_class(method.input_type)()
    request.as_of.GetCurrentTime()
    data: bytes = request.SerializeToString()
    return data


class _calls:  # noqa: N801 - a context manager
    """Sends bytes to any method; gives the fields that are said to be wrong, of the call or of an outcome."""

    def __init__(self, target: str) -> None:
        self._channel: Any = grpc.aio.insecure_channel(target)

    async def __aenter__(self) -> Callable[[MethodDescriptor, bytes], Awaitable[list[str]]]:
        return self._call

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def _call(self, method: MethodDescriptor, data: bytes) -> list[str]:
        try:
            answer = await self._answer(method, data)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, f"{method_name(method)}: {error}"
            return _fields(rpc_status.from_call(error))
        return [field for status in _statuses(answer) for field in _fields(status)]

    async def _answer(self, method: MethodDescriptor, data: bytes) -> Message:
        path, parse = f"/{method_name(method)}", message_class(method.output_type).FromString
        if method.client_streaming:

            async def chunks() -> AsyncIterator[bytes]:
                yield data

            async for response in self._channel.stream_stream(path, response_deserializer=parse)(chunks()):
                return response  # type: ignore[no-any-return]
        if method.server_streaming:
            async for response in self._channel.unary_stream(path, response_deserializer=parse)(data):
                return response  # type: ignore[no-any-return]
        answer: Message = await self._channel.unary_unary(path, response_deserializer=parse)(data)
        return answer


def _statuses(message: Message) -> Iterator[status_pb2.Status]:
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in value if field.is_repeated else [value]:
            if isinstance(inner, status_pb2.Status):
                yield inner
            else:
                yield from _statuses(inner)


def _fields(status: status_pb2.Status | None) -> list[str]:
    bad = error_details_pb2.BadRequest()
    details = status.details if status is not None else ()
    return [v.field for detail in details if detail.Unpack(bad) for v in bad.field_violations]
