"""Vitrine as an operator runs it: processes of its own, waited for until they serve."""

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.generation import GATEWAY
from services.wiring import NAMES


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def serving(port: int, service: str) -> None:
    # Left to itself, a channel waits longer and longer to look for a server that starts slowly.
    often = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=often) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=NAMES[service])
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                if (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)
    raise AssertionError(f"{service} never served")


def start_process(bundle: Path, state: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "services.cli", "serve", "--bundle", str(bundle)]
    process = subprocess.Popen([*command, "--state", str(state), "--address", f"127.0.0.1:{port}"])
    try:
        asyncio.run(serving(port, GATEWAY))
    except BaseException:
        process.kill()
        raise
    return process
