"""`grpc.health.v1.Health`: whether each service serves.

The servicer of grpcio-health-checking holds a lock while it writes to a watcher, so a watcher that does not
read blocks every change of state and the stop of the server. This one never waits for a watcher.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

_STATES = {True: pb.HealthCheckResponse.SERVING, False: pb.HealthCheckResponse.NOT_SERVING}


class HealthServicer(pb_grpc.HealthServicer):  # type: ignore[misc]  # its package has no types
    """The states of services by name."""

    def __init__(self) -> None:
        self._states: dict[str, pb.HealthCheckResponse.ServingStatus.ValueType] = {}
        self._changed, self._stopping = asyncio.Event(), False

    def set(self, name: str, serving: bool) -> None:
        """Set whether a service serves; does nothing once the server stops."""
        if not self._stopping:
            self._states[name] = _STATES[serving]
            self._notify()

    def stop(self) -> None:
        """Set all to NOT_SERVING, and end the watches."""
        self._states = dict.fromkeys(self._states, pb.HealthCheckResponse.NOT_SERVING)
        self._stopping = True
        self._notify()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        """The state of a service; NOT_FOUND for an unknown one."""
        if (state := self._states.get(request.service)) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service; grpc.reflection lists them")
        return pb.HealthCheckResponse(status=state)

    async def Watch(
        self, request: pb.HealthCheckRequest, context: Any
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """The state of a service, and every change of it; SERVICE_UNKNOWN for an unknown one."""
        last = None
        while True:
            changed = self._changed
            state = self._states.get(request.service, pb.HealthCheckResponse.SERVICE_UNKNOWN)
            if state != last:
                yield pb.HealthCheckResponse(status=state)
                last = state
                continue  # it may have changed while the watcher read
            if self._stopping:
                return
            await changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
