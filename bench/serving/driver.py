"""Measures running services with a load client: one caller, rising rates, a part of the peak."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.serving import procfs
from bench.serving.arrivals import Latencies, summarize
from bench.serving.client import CHECK, RECOMMEND, Load, load_calls, write_requests
from bench.serving.servers import Services

FLOOR, ONE_CALLER = "floor", "one caller"
"""The names of phases."""
_WARM_UP = 60
_CHECKS = 400
_SUSTAINED = 0.9
_IDLE_SAMPLES, _IDLE_PAUSE, _MAX_BUSY_SAMPLES, _MAX_IDLE_WAIT = 30, 0.05, 3, 3600.0


@dataclass(frozen=True)
class LoadPlan:
    """How long and how hard to load.

    `count` requests of one caller; rates rise by `step` from `first_share` of what the processor could do by
    the CPU time of one caller's requests, each for `seconds`, while goodput rises; then `part` of the
    peak for `part_seconds`. A page counts as good within `limit` seconds.
    """

    count: int = 200
    seconds: float = 10.0
    part_seconds: float = 20.0
    first_share: float = 0.3
    step: float = 1.3
    max_steps: int = 12
    part: float = 0.7
    limit: float = 0.25
    poisson: bool = True


@dataclass(frozen=True)
class Phase:
    """One load: its calls, and the CPU time of the services for each call in ms, also by stage.

    `others` is the share of the processor that neither services nor client used, but other processes did.
    """

    name: str
    latencies: Latencies
    cpu_ms: float
    others: float = 0.0
    stage_cpu_ms: Mapping[str, float] = field(default_factory=dict)


class ClientProcess:
    """A load client in its own process; its files are in `folder`."""

    def __init__(self, address: str, folder: Path, core: int | None = None) -> None:
        command = [sys.executable, "-m", "bench.serving.client", f"--address={address}"]
        command += [] if core is None else [f"--core={core}"]
        self._folder, self._numbers = folder, itertools.count()
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_single_threaded()
        )

    def start(self, requests: Path, method: str = RECOMMEND, **load: Any) -> Load:
        """Start a load; `load` are fields of `Load`."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        out = self._folder / f"calls-{id(self)}-{next(self._numbers)}.npz"
        started = Load(method=method, requests=str(requests), out=str(out), **load)
        self._process.stdin.write(json.dumps(asdict(started)) + "\n")
        self._process.stdin.flush()
        return started

    def finish(self, load: Load, limit: float = float("inf")) -> Latencies:
        """Wait for the end of a load.

        Raises:
            RuntimeError: the client failed.
        """
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        if self._process.stdout.readline().strip() != load.out:
            raise RuntimeError(f"the load client failed with exit status {self._process.poll()}")
        calls = load_calls(Path(load.out))
        seconds = load.seconds if load.rate else float(calls.done.max(initial=1e-9))
        return summarize(calls, seconds, limit)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


@contextmanager
def client(address: str, folder: Path, core: int | None = None) -> Iterator[ClientProcess]:
    """A load client until the end of the block."""
    process = ClientProcess(address, folder, core)
    try:
        yield process
    finally:
        process.close()


class Driver:
    """Loads services with the requests of a file and measures their CPU time."""

    def __init__(
        self, services: Services, load_client: ClientProcess, requests: Path, plan: LoadPlan
    ) -> None:
        self._services, self._client, self._requests, self.plan = services, load_client, requests, plan
        self._checks = requests.with_name("checks.bin")
        write_requests(self._checks, [b""])
        self._next = 0

    def measured(self, name: str, method: str = RECOMMEND, **load: Any) -> Phase:
        """One load, and the CPU time of the services during it."""
        requests = self._requests if method == RECOMMEND else self._checks
        stages, cpu = self._services.stage_cpu_seconds(), self._services.cpu_seconds()
        begin, busy = time.perf_counter(), procfs.busy_seconds()
        started = self._client.start(requests, method, first=self._next, **load)
        latencies = self._client.finish(started, self.plan.limit)
        cpu, busy = self._services.cpu_seconds() - cpu, procfs.busy_seconds() - busy
        own = cpu + 1e-3 * latencies.client_cpu_ms * latencies.calls
        others = (busy - own) / ((time.perf_counter() - begin) * (os.cpu_count() or 1))
        ms_a_call = 1e3 / max(latencies.calls, 1)
        by_stage = {
            stage: (seconds - stages.get(stage, 0.0)) * ms_a_call
            for stage, seconds in self._services.stage_cpu_seconds().items()
        }
        if method == RECOMMEND:  # later phases ask for other users
            self._next += latencies.calls
        return Phase(name, latencies, cpu * ms_a_call, max(others, 0.0), by_stage)

    def warm_up(self) -> None:
        """Send requests that are not measured."""
        self.measured("warm-up", count=_WARM_UP, timeout=60.0)
        self.measured("warm-up", CHECK, count=_WARM_UP)

    def floor(self, count: int = _CHECKS) -> Phase:
        """Calls that do nothing, of one caller."""
        return self.measured(FLOOR, CHECK, count=count)

    def one_caller(self, count: int = 0) -> Phase:
        """Requests of one caller, one after the other; as many as planned for a `count` of 0."""
        return self.measured(ONE_CALLER, count=count or self.plan.count)

    def rewind(self) -> None:
        """Let the next load begin with the first request again."""
        self._next = 0

    def rising(self, cpu_ms: float) -> list[Phase]:
        """Rising rates until goodput stops rising; `cpu_ms` is the CPU time of a request of one caller.

        If the first rate is too high already, as on a processor that does other work, falling ones.
        """
        rate = self.plan.first_share * 1e3 * (os.cpu_count() or 1) / cpu_ms
        phases = [self.at_rate(rate, self.plan.seconds)]
        step = self.plan.step if _sustained(phases[0]) else 1 / self.plan.step
        while len(phases) < self.plan.max_steps:
            rate *= step
            phases.append(self.at_rate(rate, self.plan.seconds))
            if step < 1:
                if _sustained(phases[-1]):
                    break
            elif not _sustained(phases[-1]) and phases[-1].latencies.goodput < peak(phases):
                break
        return sorted(phases, key=lambda phase: phase.latencies.offered)

    def at_rate(self, rate: float, seconds: float, note: str = "") -> Phase:
        """An open-loop load."""
        phase = self.measured(
            f"{rate:.1f}/s{note}", rate=rate, seconds=seconds, poisson=self.plan.poisson, seed=self._next
        )
        wait_until_idle(self._services)  # what was abandoned must not slow down the next phase
        return phase


def peak(phases: list[Phase]) -> float:
    """The highest goodput of phases, pages per second."""
    return max((phase.latencies.goodput for phase in phases), default=0.0)


def _sustained(phase: Phase) -> bool:
    """Whether nearly all pages were complete and in time."""
    return phase.latencies.goodput >= _SUSTAINED * phase.latencies.offered


def wait_until_idle(services: Services, seconds: float = _MAX_IDLE_WAIT) -> None:
    """Wait until the services have hardly anything to run, as after building an index, but no longer.

    Threads that could run count, not CPU time: on a busy machine a niced server gets little of it.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        busy = 0
        for _ in range(_IDLE_SAMPLES):
            time.sleep(_IDLE_PAUSE)
            busy += services.runnable_threads() > 0
        if busy <= _MAX_BUSY_SAMPLES:
            return


def _single_threaded() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
