"""One gRPC server for any of the services: errors, deadlines, health, reflection, draining.

Knows nothing of what the services do. A servicer's method raises the domain's errors;
here, and only here, they become statuses.
"""

import asyncio
import inspect
import logging
import math
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services import deadline, status

MAX_MESSAGE_BYTES = 64 << 20
_PING_INTERVAL_MS = 10_000
_log = logging.getLogger(__name__)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A neighbour that came back is used again within seconds; gRPC's own longest pause is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
"""What both sides of a connection are opened with."""

_SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_INTERVAL_MS),
    ("grpc.so_reuseport", 0),
)

_STATES = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
}


@dataclass(frozen=True)
class Service:
    """A service to host: its full name, its servicer, the generated function that adds it."""

    name: str
    servicer: Any
    add: Callable[[Any, grpc.aio.Server], None]


@dataclass(eq=False)
class _Answering:
    """A servicer, the calls that are on it, and when one named its bundle last, by `time.monotonic`."""

    servicer: Any
    calls: set["asyncio.Task[Any]"] = field(default_factory=set)
    named: float = -math.inf


class Current:
    """Stands for the servicers of a service, one of each bundle: a call ends on the one it began on.

    A call goes to the bundle that its request names, if that is here, else to the current one.
    """

    def __init__(self, bundle: str, servicer: Any) -> None:
        self._current = _Answering(servicer)
        self._of = {bundle: self._current}

    def exchange(self, bundle: str, servicer: Any) -> None:
        """Let calls that name no other bundle go to another servicer from now on."""
        self._current = self._of[bundle] = _Answering(servicer)

    def named(self, bundle: str) -> float:
        """When a call named a bundle last, by `time.monotonic`; minus infinity for never."""
        return self._of[bundle].named

    def release(self, bundle: str) -> Awaitable[None]:
        """Let no further call go to a bundle that is not the current one; what waits for those that did."""
        calls = self._of.pop(bundle).calls

        async def drained() -> None:
            while calls:
                await asyncio.wait(calls)

        return drained()

    def __getattr__(self, name: str) -> Callable[[Any, Any], Any]:
        """The method of that name, of whichever servicer it is for when it is called."""
        if inspect.isasyncgenfunction(getattr(self._current.servicer, name)):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                with self._one_more(request) as servicer:
                    async for response in getattr(servicer, name)(request, context):
                        yield response

            return stream

        async def call(request: Any, context: Any) -> Any:
            with self._one_more(request) as servicer:
                return await getattr(servicer, name)(request, context)

        return call

    @contextmanager
    def _one_more(self, request: Any) -> Iterator[Any]:
        bundle, task = getattr(request, "bundle", ""), asyncio.current_task()
        assert task is not None  # noqa: S101 - a call is one
        answering = self._of.get(bundle, self._current)
        if bundle in self._of:
            answering.named = time.monotonic()
        answering.calls.add(task)
        try:
            yield answering.servicer
        finally:
            answering.calls.discard(task)


class Server:
    """A grpc.aio server of `services`; serving is announced per service by `set_ready`.

    A call beyond `most_calls` at once is refused with RESOURCE_EXHAUSTED. `called` is told of each that
    has ended: its method, the name of its status code, and how long it took.
    """

    def __init__(
        self,
        services: Sequence[Service],
        address: str,
        most_calls: int = 512,
        called: Callable[[str, str, float], None] = lambda method, code, seconds: None,
    ) -> None:
        self._names = [service.name for service in services]
        self._ready: set[str] = set()
        self._server = grpc.aio.server(
            interceptors=[_Boundary(called)], options=_SERVER_OPTIONS, maximum_concurrent_rpcs=most_calls
        )
        self._health = health.aio.HealthServicer()
        for service in services:
            service.add(service.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        shown = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(shown, self._server)
        self.port = self._server.add_insecure_port(address)

    async def start(self) -> None:
        """Accept calls; every service is NOT_SERVING until `set_ready`."""
        for name in self._names:
            await self.set_ready(name, False)
        await self._server.start()

    async def set_ready(self, name: str, ready: bool = True) -> None:
        """Say whether a service serves; the server as a whole serves when all do."""
        (self._ready.add if ready else self._ready.discard)(name)
        await self._health.set(name, _STATES[ready])
        await self._health.set(health.OVERALL_HEALTH, _STATES[self._ready == set(self._names)])

    async def say(self, name: str, serving: bool) -> None:
        """Tell of something that is no service: it has a health of its own, the whole does not ask for it."""
        await self._health.set(name, _STATES[serving])

    async def stop(self, grace: float) -> None:
        """Say NOT_SERVING, take no new call, and give those running `grace` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


async def until_told_to_stop() -> None:
    """Wait for SIGTERM or SIGINT."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await told.wait()


class _Boundary(grpc.aio.ServerInterceptor):
    """Sets the caller's deadline, turns what a servicer raises into a status, says what came of a call."""

    def __init__(self, called: Callable[[str, str, float], None]) -> None:
        self._called = called

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc."):
            return handler
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        within = partial(self._within, details.method.lstrip("/"))
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_call(handler.unary_unary, within), **codec)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, within), **codec)
        return grpc.stream_stream_rpc_method_handler(_stream(handler.stream_stream, within), **codec)

    @asynccontextmanager
    async def _within(
        self, method: str, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[None]:
        began, code = time.perf_counter(), "OK"
        try:
            with deadline.within(context.time_remaining()):
                try:
                    yield
                except BaseException as error:
                    code = status.name_of(error)
                    if not isinstance(error, Exception):
                        raise
                    await status.abort(context, error)  # the boundary: every error becomes a status
        finally:
            self._called(method, code, time.perf_counter() - began)


_Within = Callable[["grpc.aio.ServicerContext[Any, Any]"], AbstractAsyncContextManager[None]]


def _call(
    method: Callable[[Any, Any], Awaitable[Any]], within: _Within
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        async with within(context):
            return await method(request, context)

    return guarded


def _stream(
    method: Callable[[Any, Any], AsyncIterator[Any]], within: _Within
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[Any]:
        async with within(context):
            async for response in method(request, context):
                yield response

    return guarded
