"""The services as processes, started by the commands that a shop uses: all in one, or three.

Measures them from outside: /proc, the health service and the metrics page.
"""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.serving import procfs
from bench.serving.client import RECOMMEND

LAYOUTS = ONE, THREE = "one", "three"
_START_SECONDS, _STOP_SECONDS, _POLL_SECONDS = 3600.0, 60.0, 0.02
_BACKOFF = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200))
_GATEWAY = RECOMMEND.split("/")[1]
_SERVICES = {
    "embedding": "vitrine.embedding.v1.EmbeddingService",
    "ranking": "vitrine.ranking.v1.RankingService",
    "gateway": _GATEWAY,
}
_STAGE_METRIC = re.compile(
    r'^vitrine_stage_cpu_seconds(?:_total|_sum)?\{.*?stage="([^"]+)".*?\} (\S+)$', re.M
)


@dataclass
class Services:
    """Running services: the gateway's address, the processes by service, and their metrics ports.

    `start_seconds` is the time from the start of the first process until the gateway was SERVING, and
    `start_cpu_seconds` the CPU time of all processes until then.
    """

    address: str
    process_ids: dict[str, int]
    start_seconds: float = 0.0
    start_cpu_seconds: float = 0.0
    metrics_ports: list[int] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        """CPU time of all processes so far."""
        return procfs.cpu_seconds(self.process_ids.values())

    def runnable_threads(self) -> int:
        """How many threads of all processes could run now."""
        return procfs.runnable_threads(self.process_ids.values())

    def memory(self) -> Mapping[str, procfs.Memory]:
        """The memory of each process."""
        return {name: procfs.memory([process]) for name, process in self.process_ids.items()}

    def stage_cpu_seconds(self) -> dict[str, float]:
        """CPU time by stage so far; empty if the services have no metric of it."""
        stages: dict[str, float] = {}
        for port in self.metrics_ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                for stage, seconds in stage_seconds(page.read().decode()).items():
                    stages[stage] = stages.get(stage, 0.0) + seconds
        return stages


def stage_seconds(metrics: str) -> dict[str, float]:
    """CPU time by stage on a page of metrics.

    Read from vitrine_stage_cpu_seconds with a label `stage`, a counter or the sum of a histogram.
    """
    return {stage: float(value) for stage, value in _STAGE_METRIC.findall(metrics)}


@contextmanager
def running(
    bundle: Path, state: Path, log: Path, layout: str = ONE, options: Sequence[str] = (), *, port: int = 0
) -> Iterator[Services]:
    """Services over a bundle and a state, until the end of the block; `options` are flags of `vitrine serve`.

    Raises:
        RuntimeError: a process ended before it served; its output is in the file `log`.
    """
    names: tuple[str, ...] = ("",) if layout == ONE else tuple(_SERVICES)
    addresses = {name: f"127.0.0.1:{port or free_port()}" for name in names}
    services = Services(addresses[names[-1]], {})
    with ExitStack() as stack:
        output = stack.enter_context(log.open("ab"))
        start = time.perf_counter()
        for name in names:
            peers = [f"--{peer}={addresses[peer]}" for peer in names[: names.index(name)]]
            metrics_port = free_port()
            command = [sys.executable, "-m", "cli.main", "serve", *([name] if name else [])]
            command += [f"--bundle={bundle}", f"--state={state}", f"--address={addresses[name]}"]
            command += [f"--metrics=127.0.0.1:{metrics_port}", *peers, *options]
            process = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603 - our own command
            stack.callback(_stop, process)
            services.process_ids[name or "all"] = process.pid
            services.metrics_ports.append(metrics_port)
            if name != names[-1]:  # those that call it need it
                _wait_until_serving(addresses[name], _SERVICES[name], process, log)
        _wait_until_serving(services.address, _GATEWAY, process, log)
        services.start_seconds = time.perf_counter() - start
        services.start_cpu_seconds = services.cpu_seconds()
        yield services


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_serving(address: str, service: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end, request = time.monotonic() + _START_SECONDS, health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(address, options=_BACKOFF) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < end and process.poll() is None:
            try:
                if stub.Check(request, timeout=5).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"{service} does not serve; the end of {log}:\n{log.read_text()[-2000:]}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
