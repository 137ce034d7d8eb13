"""The load client: a process of its own that sends serialized requests when they are due.

    python -m bench.serving.client --address HOST:PORT [--core N]

Each line of input is a `Load` as JSON, and each line of output the path of an .npz with its `Calls`. Requests
are bytes in a file, and responses are read only after the last call has ended: while calls are due the client
spends about a third of a millisecond of CPU on each. gRPC's own client is used instead of ghz because ghz
takes a latency from the time at which it sent a call, so that a call that waits in ghz looks fast.
"""

import argparse
import asyncio
import json
import os
import resource
import struct
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from vitrine.catalog.v1 import event_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from bench.serving.arrivals import Calls, arrivals

_OK = 0
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
)
RECOMMEND = "/vitrine.gateway.v1.RecommendationService/Recommend"
WRITE_EVENTS = "/vitrine.gateway.v1.RecommendationService/WriteEvents"
CHECK = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True)
class Load:
    """Calls of one method with the requests of a file, in turn from the one with index `first` on.

    With a `rate`, calls are due at that rate for some `seconds`, at random or evenly. With a rate of 0,
    `count` calls are sent by `callers` that each wait for their answer, for at most some `seconds`; a call is
    then due when it is sent. A call ends with an error after `timeout` seconds. Results go to the file `out`.
    """

    method: str
    requests: str
    out: str
    rate: float = 0.0
    seconds: float = 60.0
    count: int = 0
    callers: int = 1
    first: int = 0
    poisson: bool = True
    seed: int = 0
    timeout: float = 2.0


def write_requests(path: Path, requests: Iterable[bytes]) -> None:
    """Write serialized requests, each after its length."""
    with path.open("wb") as file:
        for request in requests:
            file.write(struct.pack("<I", len(request)) + request)


def read_requests(path: Path) -> list[bytes]:
    """Read what `write_requests` wrote."""
    data, start, requests = path.read_bytes(), 0, []
    while start < len(data):
        (size,) = struct.unpack_from("<I", data, start)
        requests.append(data[start + 4 : start + 4 + size])
        start += 4 + size
    return requests


class LoadClient:
    """Sends loads over one channel; create it within an event loop."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._files: dict[str, list[bytes]] = {}

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def run(self, load: Load) -> tuple[Calls, list[bytes]]:
        """The outcomes of a load's calls in the order in which they were due, and their responses."""
        if load.requests not in self._files:
            self._files[load.requests] = read_requests(Path(load.requests))
        requests = self._files[load.requests]
        # Without serializers, requests and responses are bytes.
        method: Any = self._channel.unary_unary(load.method)
        loop = asyncio.get_running_loop()
        due = arrivals(load.rate, load.seconds, poisson=load.poisson, seed=load.seed) if load.rate else None
        count = load.count if due is None else len(due)
        sent, done = np.zeros(count), np.zeros(count)
        code, responses = np.full(count, -1), [b""] * count
        cpu, start = _cpu_seconds(), loop.time()

        async def call(index: int) -> None:
            sent[index] = loop.time() - start
            try:
                request = requests[(load.first + index) % len(requests)]
                responses[index] = await method(request, timeout=load.timeout)
                code[index] = _OK
            except grpc.aio.AioRpcError as error:
                code[index] = error.code().value[0]
            done[index] = loop.time() - start

        if due is None:
            used = await _in_turn(call, count, load.callers, start + load.seconds)
            due, sent, done, code = sent[:used], sent[:used], done[:used], code[:used]
        else:
            await _when_due(call, due + start)
        cpu_seconds = _cpu_seconds() - cpu
        del responses[len(due) :]
        outcomes = np.array([_outcome(load.method, response) for response in responses], int).reshape(-1, 2)
        return Calls(due, sent, done, code, outcomes[:, 0] > 0, outcomes[:, 1], cpu_seconds), responses


async def _in_turn(call: Any, count: int, callers: int, end: float) -> int:
    """Make calls one after the other with each of some callers; returns how many were made."""
    loop, indices, used = asyncio.get_running_loop(), iter(range(count)), 0

    async def caller() -> None:
        nonlocal used
        while loop.time() < end and (index := next(indices, None)) is not None:
            used += 1
            await call(index)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return used


async def _when_due(call: Any, due: np.ndarray) -> None:
    """Make calls at times of the loop's clock, without waiting for their answers."""
    loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()
    for index, when in enumerate(due.tolist()):
        if (pause := when - loop.time()) > 0:
            await asyncio.sleep(pause)
        tasks.append(loop.create_task(call(index)))
    await asyncio.gather(*tasks)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _outcome(method: str, response: bytes) -> tuple[bool, int]:
    """Whether a response lacks something, and its items or recorded events."""
    if not response or method not in {RECOMMEND, WRITE_EVENTS}:
        return False, 0
    if method == RECOMMEND:
        page = pb.RecommendResponse.FromString(response)
        return bool(page.degraded) or not page.items, len(page.items)
    outcomes = pb.WriteEventsResponse.FromString(response).outcomes
    recorded = sum(outcome.code == event_pb2.EVENT_OUTCOME_CODE_RECORDED for outcome in outcomes)
    return recorded < len(outcomes), recorded


def save(path: Path, calls: Calls) -> None:
    """Write calls into an .npz."""
    np.savez(path, **asdict(calls))


def load_calls(path: Path) -> Calls:
    """Read what `save` wrote."""
    with np.load(path) as file:
        columns = {name: file[name] for name in file.files}
    return Calls(**columns | {"cpu_seconds": float(columns["cpu_seconds"])})


async def _serve(address: str) -> None:
    client = LoadClient(address)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            load = Load(**json.loads(line))
            calls, _ = await client.run(load)
            save(Path(load.out), calls)
            print(load.out, flush=True)  # noqa: T201 - the answer
    finally:
        await client.close()


def main() -> None:
    """Run the loads of the input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", required=True)
    parser.add_argument("--core", type=int, help="the only processor core that the client may use")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    asyncio.run(_serve(options.address))


if __name__ == "__main__":
    main()
