"""Sends concurrent requests to every method of a server and counts the outcomes."""

import asyncio
import base64
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from vitrine.catalog.v1 import event_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services.rpc.server import CHANNEL_OPTIONS
from tests.fuzz.messages import Fuzzer
from tests.support.contracts import METHODS, message_class, method_name

BUGS = frozenset({"INTERNAL", "UNKNOWN"})
_DEADLINES = (0.05, 2.0, 5.0)
_MOST_ANSWERS = 50
_SHOWN = 300
# gRPC's client says so in place of the status, where a stream was refused while it was still sending.
_OF_THE_CLIENT = "Internal error from Core"
_TRIES = 4


@dataclass(frozen=True)
class Bug:
    """A call that ended in a forbidden status; its number reproduces it."""

    number: int
    method: str
    code: str
    message: str
    request: str


@dataclass
class Tally:
    """The number of calls by method and status, and the bugs."""

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    bugs: list[Bug] = field(default_factory=list)


async def tokens(target: str) -> dict[str, list[str]]:
    """Tokens that a server issues, by the request field that takes them."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub, ranking = pb_grpc.RecommendationServiceStub(channel), ranking_grpc.RankingServiceStub(channel)
        events = [
            event_pb2.Event(
                event_id=f"first-{n}",
                type="purchase",
                user_id="user-1",
                items=[event_pb2.EventItem(item_id=f"garden-{n:02}")],
            )
            for n in range(4)
        ]
        await stub.WriteEvents(pb.WriteEventsRequest(events=events))
        page = await stub.Recommend(pb.RecommendRequest(user_id="user-1", page_size=3))
        talk = await stub.Converse(pb.ConverseRequest(user_id="user-1", message="something red"))
        items = await stub.ListItems(pb.ListItemsRequest(page_size=3))
        export = await ranking.ExportUser(ranking_pb.ExportUserRequest(user_id="user-1", page_size=2))
    return {
        "page_token": [page.next_page_token, items.next_page_token, export.next_page_token],
        "conversation_token": [talk.conversation_token],
        "attribution_token": [page.attribution_token, talk.attribution_token],
    }


async def send(target: str, fuzzer: Fuzzer, numbers: Sequence[int], at_once: int) -> Tally:
    """Send the requests with these numbers, with the methods in turn."""
    tally, waiting = Tally(), iter(numbers)
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:

        async def work() -> None:
            for number in waiting:
                method = METHODS[number % len(METHODS)]
                messages = fuzzer.request(method, number)
                for _ in range(_TRIES):
                    code, problem = await _outcome_of(channel, method, messages, random.Random(number))
                    if problem != _OF_THE_CLIENT:
                        break
                tally.codes[method_name(method), code] += 1
                if code in BUGS:
                    request = base64.b64encode(b"|".join(messages)[:_SHOWN]).decode()
                    tally.bugs.append(Bug(number, method_name(method), code, problem, request))

        await asyncio.gather(*(work() for _ in range(at_once)))
    return tally


async def _outcome_of(
    channel: Any, method: MethodDescriptor, messages: Sequence[bytes], dice: random.Random
) -> tuple[str, str]:
    """The status code of a call, or of an outcome in its response if that is a bug."""
    parse = message_class(method.output_type).FromString
    path, timeout = f"/{method_name(method)}", dice.choice(_DEADLINES)
    answers: list[Message] = []
    call: Any
    try:
        if method.client_streaming:
            call = channel.stream_stream(path, response_deserializer=parse)(
                _stream(messages), timeout=timeout
            )
        elif method.server_streaming:
            call = channel.unary_stream(path, response_deserializer=parse)(messages[0], timeout=timeout)
        else:
            call = channel.unary_unary(path, response_deserializer=parse)(messages[0], timeout=timeout)
            return _within([await call])
        async for answer in call:
            answers.append(answer)
            if len(answers) == _MOST_ANSWERS:
                call.cancel()
                break
        return _within(answers)
    except grpc.aio.AioRpcError as error:
        if answers and not method.client_streaming and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return _within(answers)  # only its deadline ends a feed that follows new changes
        return error.code().name, error.details() or ""
    except asyncio.CancelledError:  # so gRPC's client tells of a stream whose sending it gave up itself
        return "CANCELLED", ""


async def _stream(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


def _within(answers: Sequence[Message]) -> tuple[str, str]:
    for answer in answers:
        for status in _statuses(answer):
            code = code_pb2.Code.Name(status.code)
            if code in BUGS:
                return code, status.message
    return "OK", ""


def _statuses(message: Message) -> Iterator[status_pb2.Status]:
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or isinstance(message, item_pb2.Item):
            continue
        for inner in value if descriptor.is_repeated else [value]:
            if isinstance(inner, status_pb2.Status):
                yield inner
            else:
                yield from _statuses(inner)
