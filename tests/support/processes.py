"""Starts Vitrine as an operator does, in a process, and waits until it serves."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.serving.app import NAMES
from services.serving.loaded_bundle import GATEWAY


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def wait_until_serving(port: int, service: str) -> None:
    # The default reconnect backoff of a channel grows too long for a server that starts slowly.
    backoff = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=backoff) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=NAMES[service])
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)
    raise AssertionError(f"{service} never served")


@asynccontextmanager
async def running_process(
    bundle: Path, state: Path, port: int, *more: str, log: IO[bytes] | None = None
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A server process that serves; the end of the block kills it if the block has not.

    `more` are further options of the command, and `log` receives the log of the process.
    """
    command = [sys.executable, "-m", "cli.main", "serve", "--bundle", str(bundle)]
    command += ["--state", str(state), "--address", f"127.0.0.1:{port}", *more]
    process = subprocess.Popen(command, stderr=log)
    try:
        await wait_until_serving(port, GATEWAY)
        yield process
    finally:
        process.kill()
        process.wait()
