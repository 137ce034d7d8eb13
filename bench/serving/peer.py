"""Another recommender over the same shop, measured in the same run: what a page costs there.

The peer is Cornac, because it serves recommendations over HTTP, is kept up, and pip installs it. It answers
only users whom its model has been fitted on, so the comparison takes the requests that name a user, in the
same order on both sides.
"""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from bench.runs import ROOT
from bench.serving import cornac_server, procfs
from bench.serving.arrivals import Calls, arrivals, summarize
from bench.serving.client import write_requests
from bench.serving.cornac_server import CornacServer, FittedModel, PeerError
from bench.serving.driver import ONE_CALLER, ClientProcess, Driver, LoadPlan, Phase
from bench.serving.http_load import HttpClient
from bench.serving.requests import PAGE
from bench.serving.servers import Services
from bench.serving.shops import Shop

CORNAC = "cornac"
PEERS = (CORNAC,)
CORNAC_PYTHON = ROOT / "build" / "peers" / CORNAC / "bin" / "python"
_INSTALL = f"`make build/peers/{CORNAC}/ready` installs it"
COMPUTES = (
    "Cornac: one dot product of 64 factors (BPR) for each item that has an event, a sort of all of them, and "
    "items of the user's events left out; no sessions, vectors, features, further models, rules or log. "
    "Vitrine: candidates of all sources, features and models per request, rules, the impression log"
)
_WARM_UP = 60


@dataclass(frozen=True)
class PeerResult:
    """What a peer's pages cost, and Vitrine's for the same requests.

    `own` is Vitrine's phase of one caller, and `phases` are those of the peer. The peer has no page for the
    `share_without_user` of all requests, which name no user. `left_out` events could not be given to it.
    """

    name: str
    own: Phase
    phases: list[Phase]
    model: FittedModel
    memory: procfs.Memory
    left_out: int = 0
    share_without_user: float = 0.0
    computes: str = COMPUTES


def requests_of_users(requests: Sequence[bytes]) -> tuple[list[bytes], list[str]]:
    """The requests that name a user, the last one first, and their users.

    The other phases begin with the first requests, so these pages are not those just computed.
    """
    parsed = ((request, pb.RecommendRequest.FromString(request).user_id) for request in reversed(requests))
    named = [(request, user_id) for request, user_id in parsed if user_id]
    return [request for request, _ in named], [user_id for _, user_id in named]


def measure_peer(
    shop: Shop,
    services: Services,
    load_client: ClientProcess,
    requests: Sequence[bytes],
    folder: Path,
    plan: LoadPlan,
    rate: float,
    python: Path,
) -> PeerResult:
    """Fit and start Cornac over the events of a shop, then load Vitrine and Cornac with the same requests.

    Each has one caller. Then Cornac is loaded with `rate` pages per second; 0 leaves that out.

    Raises:
        PeerError: Cornac cannot be measured.
    """
    if not python.is_file():
        raise PeerError(f"Cornac is not installed at {python}: {_INSTALL}")
    files = folder / CORNAC
    files.mkdir()
    named, users = requests_of_users(requests)
    write_requests(files / "requests.bin", named)
    lines, left_out = cornac_server.interaction_lines(shop.events(), shop.item_ids)
    model = cornac_server.fit(python, lines, files)
    with cornac_server.running(python, model, files) as server:
        load = _PeerLoad(server, users, plan)
        load.warm_up()
        own = Driver(services, load_client, files / "requests.bin", plan).one_caller()
        phases = [load.one_caller()]
        if rate:
            phases.append(load.at_rate(rate))
        memory = server.memory()
    own = replace(own, name=f"{ONE_CALLER}, users")
    return PeerResult(CORNAC, own, phases, model, memory, left_out, 1 - len(users) / len(requests))


class _PeerLoad:
    """Loads Cornac with pages of users, and measures its CPU time."""

    def __init__(self, server: CornacServer, users: Sequence[str], plan: LoadPlan) -> None:
        self._server, self._plan = server, plan
        self._paths = [cornac_server.page_path(user_id, PAGE) for user_id in users]
        self._next = itertools.cycle(self._paths)
        self._client = HttpClient(server.port, cornac_server.page_items)

    def warm_up(self) -> None:
        """Wait until the model is loaded, then ask for the last pages, which are not measured."""
        first = HttpClient(self._server.port, cornac_server.page_items, cornac_server.START_SECONDS)
        if first.in_turn(self._paths[-1:]).code.any():
            raise PeerError("Cornac's server fails to answer its first request")
        self._client.in_turn(self._paths[-_WARM_UP:])

    def one_caller(self) -> Phase:
        """As many pages as planned, one after the other."""
        paths = list(itertools.islice(self._next, self._plan.count))
        return self._measured(ONE_CALLER, lambda: self._client.in_turn(paths))

    def at_rate(self, rate: float) -> Phase:
        """An open-loop load, as long as that of Vitrine at a part of its peak."""
        seconds = self._plan.part_seconds
        due = arrivals(rate, seconds, poisson=self._plan.poisson)
        paths = list(itertools.islice(self._next, len(due)))
        return self._measured(f"{rate:.1f}/s", lambda: self._client.when_due(paths, due), seconds)

    def _measured(self, name: str, send: Callable[[], Calls], seconds: float = 0.0) -> Phase:
        """One load, and the CPU time of the peer during it; `seconds` of 0 are those that the calls took."""
        cpu, busy, begin = self._server.cpu_seconds(), procfs.busy_seconds(), time.perf_counter()
        calls = send()
        cpu, busy = self._server.cpu_seconds() - cpu, procfs.busy_seconds() - busy
        elapsed = (time.perf_counter() - begin) * (os.cpu_count() or 1)
        latencies = summarize(calls, seconds or float(calls.done.max(initial=1e-9)), self._plan.limit)
        others = max((busy - cpu - calls.cpu_seconds) / elapsed, 0.0)
        return Phase(name, latencies, 1e3 * cpu / max(latencies.calls, 1), others)
