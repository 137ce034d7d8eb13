"""The gRPC server of any service: errors, deadlines, health, reflection, draining.

The methods of a servicer raise domain errors. Only this module turns them into statuses.
"""

import asyncio
import inspect
import logging
import math
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from services.core import deadline
from services.core.addresses import listen_problem
from services.core.errors import DeadlineExceeded, FailedPrecondition
from services.rpc import status
from services.rpc.admission import CONNECTION_STREAMS, Admission, AdmissionLimits, FairLimit
from services.rpc.health import HealthServicer
from services.rpc.reflection import add_reflection
from services.rpc.request_parsing import with_parsing
from services.rpc.stream_guard import ClientNotReading, GuardedStream

MAX_MESSAGE_BYTES = 64 << 20
_PING_INTERVAL_MS = 10_000
_log = logging.getLogger(__name__)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A backend that restarted is used again within a second; gRPC's default pause grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Vitrine's processes connect to each other without a proxy, even if http_proxy is set.
    ("grpc.enable_http_proxy", 0),
)
"""Options of servers and channels."""
AddServicer = Callable[[Any, grpc.aio.Server], None]
"""The type of a generated function that adds a servicer to a server."""

_SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_INTERVAL_MS),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", CONNECTION_STREAMS),
    # An idle connection is closed; clients reconnect with their next call.
    ("grpc.max_connection_idle_ms", 15 * 60_000),
    ("grpc.server_handshake_timeout_ms", 20_000),
)

_GRPC_LOG = logging.getLogger("grpc._cython.cygrpc")


@dataclass(frozen=True)
class Service:
    """A service to host: its full name, its servicer, and the generated function that adds it."""

    name: str
    servicer: Any
    add: AddServicer


@dataclass(eq=False)
class _VersionCalls:
    """A servicer, its running calls, and when a call named its bundle last, by `time.monotonic`."""

    servicer: Any
    calls: set["asyncio.Task[Any]"] = field(default_factory=set)
    last_use: float = -math.inf


class VersionRouter:
    """Routes calls to the servicers of a service, one for each bundle.

    A call goes to the bundle that its request names, if that is loaded, else to the current one. It ends on
    the servicer that it started on.
    """

    def __init__(self, version: str, servicer: Any) -> None:
        self._current = _VersionCalls(servicer)
        self._by_version = {version: self._current}

    def swap(self, version: str, servicer: Any) -> None:
        """Make another bundle's servicer the current one."""
        self._current = self._by_version[version] = _VersionCalls(servicer)

    def last_use(self, version: str) -> float:
        """When a call named a bundle last, by `time.monotonic`; minus infinity for never."""
        return self._by_version[version].last_use

    def release(self, version: str) -> Awaitable[None]:
        """Stop routing calls to a bundle that is not the current one; the result waits for running calls."""
        calls = self._by_version.pop(version).calls

        async def drained() -> None:
            while calls:
                await asyncio.wait(calls)

        return drained()

    def __getattr__(self, name: str) -> Callable[[Any, Any], Any]:
        """A method that routes each call to the servicer's method of that name."""
        if inspect.isasyncgenfunction(getattr(self._current.servicer, name)):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                with self._route(request) as servicer:
                    async for response in getattr(servicer, name)(request, context):
                        yield response

            return stream

        async def call(request: Any, context: Any) -> Any:
            with self._route(request) as servicer:
                return await getattr(servicer, name)(request, context)

        return call

    @contextmanager
    def _route(self, request: Any) -> Iterator[Any]:
        version, task = getattr(request, "bundle", ""), asyncio.current_task()
        assert task is not None  # noqa: S101 - a call runs in a task
        target = self._by_version.get(version, self._current)
        if version in self._by_version:
            target.last_use = time.monotonic()
        target.calls.add(task)
        try:
            yield target.servicer
        finally:
            target.calls.discard(task)


class Server:
    """A grpc.aio server of `services`; `set_ready` reports each service as serving.

    A call beyond `limits` ends with RESOURCE_EXHAUSTED. `on_call_end` receives the method, the name of the
    status code and the seconds of each call that has ended.

    Raises:
        FailedPrecondition: the server cannot listen on `address`.
    """

    def __init__(
        self,
        services: Sequence[Service],
        address: str,
        limits: AdmissionLimits = AdmissionLimits(),  # noqa: B008 - frozen
        on_call_end: Callable[[str, str, float], None] = lambda method, code, seconds: None,
    ) -> None:
        _GRPC_LOG.addFilter(_is_worth_logging)
        self._names = [service.name for service in services]
        self._ready: set[str] = set()
        self.admission = Admission(limits)
        boundary = _Boundary(self.admission, on_call_end)
        self._server = grpc.aio.server(interceptors=[boundary], options=_SERVER_OPTIONS)
        self._health = HealthServicer()
        for service in services:
            service.add(service.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_reflection((*self._names, health.SERVICE_NAME), self._server)
        self.port = _listen(self._server, address)

    async def start(self) -> None:
        """Accept calls; every service is NOT_SERVING until `set_ready`."""
        for name in self._names:
            await self.set_ready(name, False)
        await self._server.start()

    async def set_ready(self, name: str, ready: bool = True) -> None:
        """Set whether a service serves; the server as a whole serves when all services do."""
        (self._ready.add if ready else self._ready.discard)(name)
        self._health.set(name, ready)
        self._health.set(health.OVERALL_HEALTH, self._ready == set(self._names))

    async def set_health(self, name: str, serving: bool) -> None:
        """Set a health entry that is not a service; the health of the whole server does not depend on it."""
        self._health.set(name, serving)

    async def stop(self, grace: float) -> None:
        """Report NOT_SERVING, refuse new calls, and give running calls `grace` seconds."""
        self._health.stop()
        await self._server.stop(grace)


def _listen(server: grpc.aio.Server, address: str) -> int:
    """Listen on an address; returns the port."""
    try:
        port: int = server.add_insecure_port(address)
    except RuntimeError:  # gRPC cannot listen on the address
        port = 0
    if not port:
        raise FailedPrecondition(listen_problem(address, "--address"))
    return port


async def wait_for_stop_signal() -> None:
    """Wait for SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether a record of gRPC's log is not about a response that came after the end of its call.

    gRPC logs each late response with a traceback, although it is not an error.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError))


class _Boundary(grpc.aio.ServerInterceptor):
    """Admits calls within limits, sets the caller's deadline, and turns exceptions into statuses.

    Reports the end of each call.
    """

    def __init__(self, admission: Admission, on_call_end: Callable[[str, str, float], None]) -> None:
        self._admission, self._on_call_end = admission, on_call_end

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler, method = await continuation(details), details.method.lstrip("/")
        if handler is None:
            return None
        requests, responses = handler.request_streaming, handler.response_streaming
        handler = with_parsing(handler, method)
        limit = self._admission.limit_of(method, requests=requests, responses=responses)
        if limit is None:
            return handler
        codec = {"response_serializer": handler.response_serializer}
        guard, seconds = partial(self._guard, method, limit), self._admission.idle_seconds
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_call(handler.unary_unary, guard), **codec)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream, guard, seconds), **codec
            )
        stream = _stream(handler.stream_stream, guard, seconds, many_requests=True)
        return grpc.stream_stream_rpc_method_handler(stream, **codec)

    @asynccontextmanager
    async def _guard(
        self, method: str, limit: FairLimit, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[None]:
        start = time.perf_counter()

        def report(code: str) -> None:
            if not method.startswith("grpc."):
                self._on_call_end(method, code, time.perf_counter() - start)

        with ExitStack() as slot_stack:
            try:
                slot = slot_stack.enter_context(limit.slot(context.peer()))
                with deadline.within(context.time_remaining()):
                    yield
            except ClientNotReading as not_reading:
                # The status can only follow the unread message: grpc.aio does not let a server cancel a call.
                slot.yield_to_others()
                error = DeadlineExceeded(str(not_reading))
                report(status.name_of(error))
                await asyncio.wait({not_reading.write})
                await status.abort(context, error)
            except grpc.aio.AbortError:  # it has its status
                report("INVALID_ARGUMENT")
                raise
            except BaseException as error:
                report(status.name_of(error))
                if not isinstance(error, Exception):
                    raise
                await status.abort(context, error)  # the boundary: every error becomes a status
            else:
                report("OK")


_Guard = Callable[["grpc.aio.ServicerContext[Any, Any]"], AbstractAsyncContextManager[None]]


def _call(
    method: Callable[[Any, Any], Awaitable[Any]], guard: _Guard
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def run_guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        async with guard(context):
            return await method(request, context)

    return run_guarded


def _stream(
    method: Callable[[Any, Any], AsyncGenerator[Any]],
    guard: _Guard,
    seconds: float,
    *,
    many_requests: bool = False,
) -> Callable[[Any, Any], Awaitable[None]]:
    """A handler that writes to its context: a generator could not measure how long a write waits."""

    async def run_guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        async with guard(context):
            stream = GuardedStream(context, seconds)
            requests = stream.requests(request) if many_requests else request
            async with aclosing(method(requests, context)) as responses:
                async for response in responses:
                    await stream.write(response)

    return run_guarded
