"""Admission control keeps one client from blocking the others."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as embedding_grpc
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.core.errors import ResourceExhausted
from services.rpc.admission import CONNECTION_STREAMS, AdmissionLimits, FairLimit
from services.rpc.server import CHANNEL_OPTIONS, Server, Service
from services.serving.app import App
from tests.support.shop_server import Shop, Stub, ids, session

FLOOD = 512
DEFAULTS = AdmissionLimits()
LIMITS = {
    "watch": DEFAULTS.watches,
    "reflection": DEFAULTS.watches,
    "upload": DEFAULTS.uploads,
    "feed": DEFAULTS.feeds,
}


@asynccontextmanager
async def connections(target: str, count: int, *more: Any) -> AsyncIterator[list[Any]]:
    """Channels that share no connection, as channels of equal options would; untyped, as their bytes are."""
    async with AsyncExitStack() as stack:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1), *more]
        yield [
            await stack.enter_async_context(grpc.aio.insecure_channel(target, options=options))
            for _ in range(count)
        ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@given(st.integers(2, 40), st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=300))
def test_a_new_connection_gets_a_slot_until_half_the_limit(most: int, moves: list[tuple[int, bool]]) -> None:
    limit, slots = FairLimit("calls", most), dict[int, list[ExitStack]]()
    for peer, enters in moves:
        own_slots = slots.setdefault(peer, [])
        if not enters:
            if own_slots:
                own_slots.pop().close()
            continue
        connections = sum(map(bool, slots.values()))
        stack = ExitStack()
        try:
            stack.enter_context(limit.slot(str(peer)))
        except ResourceExhausted as error:
            assert "calls open" in str(error)
            assert own_slots or connections >= most // 2
        else:
            own_slots.append(stack)
        assert limit.total == sum(map(len, slots.values())) <= most
        assert len(own_slots) <= share(most)


def share(most: int) -> int:
    """What a connection gets of a limit at most, which is what it gets alone."""
    return most // 4 + 1


@pytest.mark.parametrize("most", [2, 7, 64, 100])
def test_a_single_connection_gets_its_share(most: int) -> None:
    limit = FairLimit("calls", most)
    with ExitStack() as stack, pytest.raises(ResourceExhausted, match="this connection has"):
        for _ in range(most):
            stack.enter_context(limit.slot("a"))
            highest = limit.total
    assert highest == share(most)


def test_a_connection_can_open_fewer_streams_than_http2_permits() -> None:
    limits = AdmissionLimits()
    total = sum(map(share, (limits.calls, limits.uploads, limits.feeds, limits.watches)))
    assert total < CONNECTION_STREAMS


def open_stream(kind: str, channel: grpc.aio.Channel) -> Any:
    """A stream that its client leaves open without a word, of each kind that there is."""
    health: Any = health_pb2_grpc.HealthStub(channel)
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    embedding: Any = embedding_grpc.EmbeddingServiceStub(channel)
    match kind:
        case "watch":
            return health.Watch(health_pb2.HealthCheckRequest())
        case "reflection":
            return reflection.ServerReflectionInfo()
        case "upload":
            return embedding.UpsertItems()
        case _:
            return embedding.WatchItems(embedding_pb.WatchItemsRequest())


async def answers(channel: grpc.aio.Channel) -> None:
    """Health and a recommendation, as on any day."""
    health: Any = health_pb2_grpc.HealthStub(channel)
    state = await health.Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert state.status == health_pb2.HealthCheckResponse.SERVING
    stub: Any = pb_grpc.RecommendationServiceStub(channel)
    request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
    page = await stub.Recommend(request, timeout=60)
    assert len(ids(page)) == 10
    assert not page.degraded


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("count", [1, 8])
async def test_a_flood_of_streams_leaves_room_for_others(
    all_in_one_stub: Stub, kind: str, count: int
) -> None:
    async with (
        connections(all_in_one_stub.target, count) as hostile,
        connections(all_in_one_stub.target, 1) as [other],
    ):
        calls = [open_stream(kind, hostile[at % count]) for at in range(FLOOD)]
        least = FLOOD - share(LIMITS[kind]) if count == 1 else max(0, FLOOD - LIMITS[kind])
        await until(lambda: sum(call.done() for call in calls) >= least)
        for channel in (other, *hostile) * 2:
            await answers(channel)
        refusals = [call for call in calls if call.done()]
        assert {await call.code() for call in refusals} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all("open" in text for text in [await call.details() for call in refusals])
        if count == 1:
            assert len(refusals) == least
        late = open_stream(kind, other)  # there is room for whoever holds nothing
        await answers(other)
        assert not late.done()
        for call in (*calls, late):
            call.cancel()
        more = LIMITS[kind] // 4
        async with asyncio.timeout(60):  # the server has yet to hear of each that was left
            while True:
                again = [open_stream(kind, hostile[0]) for _ in range(more)]
                await answers(hostile[0])
                failure_count = sum(call.done() for call in again)
                for call in again:
                    call.cancel()
                if not failure_count:
                    break


class Generic(grpc.GenericRpcHandler):
    """Three methods: a call that waits, an answer to each message, and a feed of large messages."""

    def __init__(self) -> None:
        self.release, self.sent_count, self.closed = asyncio.Event(), 0, asyncio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        match details.method:
            case "/test/Wait":
                return grpc.unary_unary_rpc_method_handler(self._wait)
            case "/test/Echo":
                return grpc.stream_stream_rpc_method_handler(self._echo)
            case "/test/Feed":
                return grpc.unary_stream_rpc_method_handler(self._feed)
        return None

    async def _wait(self, request: bytes, context: Any) -> bytes:
        await self.release.wait()
        return request

    async def _echo(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            await asyncio.sleep(0.5)  # more than a stream may be silent here
            yield request

    async def _feed(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                self.sent_count += 1
                yield bytes(1 << 20)
        finally:
            self.closed.set()


@asynccontextmanager
async def serving(limits: AdmissionLimits) -> AsyncIterator[tuple[Server, Generic, list[tuple[str, str]]]]:
    generic, call_codes = Generic(), list[tuple[str, str]]()
    service = Service("test", generic, lambda handler, server: server.add_generic_rpc_handlers([handler]))
    server = Server(
        [service], "127.0.0.1:0", limits, lambda method, code, _: call_codes.append((method, code))
    )
    await server.start()
    await server.set_ready("test")
    try:
        yield server, generic, call_codes
    finally:
        await server.stop(0)


async def test_calls_beyond_the_share_of_a_connection_are_refused() -> None:
    async with (
        serving(AdmissionLimits(calls=16)) as (server, generic, call_codes),
        connections(f"127.0.0.1:{server.port}", 3) as channels,
    ):
        calls = [[channel.unary_unary("/test/Wait")(b"x") for _ in range(8)] for channel in channels[:2]]
        await until(lambda: sum(call.done() for of in calls for call in of) >= 8)
        last = channels[2].unary_unary("/test/Wait")(b"x")
        await until(lambda: server.admission.open["call"] >= 6)
        health: Any = health_pb2_grpc.HealthStub(channels[0])
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
        generic.release.set()
        assert await last == b"x"
        codes = [Counter([(await call.code()).name for call in of]) for of in calls]
        assert sum(count["RESOURCE_EXHAUSTED"] for count in codes) >= 8
        assert all(count["OK"] for count in codes)
        assert Counter(call_codes)["test/Wait", "RESOURCE_EXHAUSTED"] >= 8
        await until(lambda: not server.admission.open["call"])


async def test_an_idle_client_is_disconnected_unless_it_awaits_an_answer() -> None:
    async with (
        serving(AdmissionLimits(idle_seconds=0.2)) as (server, _, call_codes),
        connections(f"127.0.0.1:{server.port}", 1) as [channel],
    ):
        talk = channel.stream_stream("/test/Echo")()
        for text in (b"a", b"b"):
            await talk.write(text)
            assert await talk.read() == text
        await until(talk.done)
        assert await talk.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await talk.details() == (
            "no message came for 0.2 seconds, so the stream was closed; open another when there is "
            "something to send"
        )
        reflection = open_stream("reflection", channel)
        await until(reflection.done)
        assert await reflection.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        watch = open_stream("watch", channel)  # which has nothing to send
        assert (await watch.read()).status == 1
        await asyncio.sleep(0.5)
        assert not watch.done()
        await until(lambda: server.admission.open["upload"] == 0)
        assert call_codes == [("test/Echo", "DEADLINE_EXCEEDED")]


async def test_an_unread_feed_is_bounded_and_closed() -> None:
    limits = AdmissionLimits(idle_seconds=0.5, feeds=8)
    # gRPC's probes may widen the window of a client that reads nothing, and so take the last message.
    fixed_window = ("grpc.http2.bdp_probe", 0)
    async with (
        serving(limits) as (server, generic, call_codes),
        connections(f"127.0.0.1:{server.port}", 2, fixed_window) as [channel, other],
    ):
        feed = channel.unary_stream("/test/Feed")(b"x")
        async with asyncio.timeout(60):
            await generic.closed.wait()
        sent_count = generic.sent_count
        assert sent_count < 64  # what HTTP/2 lets a client have unread, not all that there is
        assert call_codes == [("test/Feed", "DEADLINE_EXCEEDED")]
        assert server.admission.open["feed"] == 0
        # It stays the connection's until that reads or leaves: its last message is in memory.
        more = [channel.unary_stream("/test/Feed")(b"x") for _ in range(5)]
        await until(lambda: len(call_codes) >= 6)
        assert sorted(Counter(code for _, code in call_codes).items()) == [
            ("DEADLINE_EXCEEDED", 3),
            ("RESOURCE_EXHAUSTED", 3),
        ]
        other_feed = other.unary_stream("/test/Feed")(b"x")
        assert len(await other_feed.read()) == 1 << 20
        for _ in range(sent_count):
            assert len(await feed.read()) == 1 << 20
        await until(feed.done)
        assert await feed.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "nothing was read for 0.5 seconds" in await feed.details()
        for call in (*more, other_feed):
            call.cancel()


async def test_an_unread_health_watch_delays_no_change() -> None:
    async with serving(AdmissionLimits()) as (server, _, _):
        # With windows of a few bytes not even the first state can be sent.
        narrow = ("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0)
        async with connections(f"127.0.0.1:{server.port}", 1, *narrow) as [channel]:
            watches = [open_stream("watch", channel) for _ in range(20)]
            await until(lambda: server.admission.open["watch"] == 20)
            async with asyncio.timeout(60):
                for at in range(1000):
                    await server.set_ready("test", at % 2 == 0)
                    await asyncio.sleep(0)
                async with connections(f"127.0.0.1:{server.port}", 1) as [other]:
                    follower = open_stream("watch", other)
                    states = [(await follower.read()).status]
                    await server.set_ready("test")
                    states.append((await follower.read()).status)
                    assert states == [2, 1]
                await server.stop(0)
            for watch in watches:
                watch.cancel()


async def test_a_stop_does_not_wait_for_feeds_and_watchers(all_in_one: Shop) -> None:
    app = App(all_in_one.settings(grace=600))
    await app.start()
    async with connections(f"127.0.0.1:{app.port}", 1) as [channel]:
        feed, watch = open_stream("feed", channel), open_stream("watch", channel)
        while not (await feed.read()).caught_up:
            pass
        assert (await watch.read()).status == 1
        async with asyncio.timeout(60):
            await app.stop()
        assert await feed.code() is grpc.StatusCode.UNAVAILABLE
        assert "follow again" in await feed.details()
        assert (await watch.read()).status == 2
        assert await watch.code() is grpc.StatusCode.OK
