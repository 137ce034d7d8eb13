"""`vitrine evaluate`: answers the queries of a day through the serving path, as of that day.

It loads the earlier events into a new state, fixes the clock at that day, and calls the gateway's Recommend
with public requests.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
from vitrine.catalog.v1 import event_pb2, filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from cli.import_events import import_events
from services.catalog.bundle import Bundle
from services.core import deadline
from services.core.errors import FailedPrecondition, VitrineError
from services.gateway.query import RankedPage
from services.rpc.server import CHANNEL_OPTIONS
from services.serving.app import App
from services.serving.settings import Settings
from training.data.config import Evaluation
from training.data.dataset import read_shop

_NOON = timedelta(hours=12)
# Long, so that the result does not depend on the load of the machine.
_TIMEOUT_SECONDS = 60.0
_STOP_SECONDS = 30
PAGE = 20
_SCORE_TOLERANCE = 1e-3

Page = list[tuple[str, float]]
"""Item ids, best first, with their scores."""


@dataclass(frozen=True)
class EvalQuery:
    """A user, the items of the day's session so far, and the items that followed."""

    user_id: str
    session: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class EvalRun:
    """The pages, in the order of the queries, and statistics.

    `candidates` is the mean number of candidates per query, by source; `recall` the share of the targets
    among the candidates; `degraded` the number of degraded responses.
    """

    pages: list[Page]
    milliseconds: np.ndarray
    candidates: Mapping[str, float]
    recall: float
    degraded: int


def evaluate(
    data: Path,
    bundle_path: Path,
    split: str,
    out: Path,
    *,
    shop_file: Path | None,
    limit: int = 0,
    reverse: bool = False,
    unfiltered: bool = False,
    over_grpc: int = 200,
) -> None:
    """Answer the queries of a split, write a line of JSON for each into `out`, and print statistics.

    `unfiltered` ignores the task's filter: every item of the catalog is a candidate.

    Raises:
        FailedPrecondition: the bundle used events of the query day, a response was degraded, or the responses
            of three separate processes differ.
    """
    bundle = Bundle(bundle_path)
    day, queries = read_queries(data, shop_file, split)
    queries = queries[:limit] if limit else queries
    if bundle.until is None or bundle.until > day:
        raise FailedPrecondition(
            f"bundle {bundle.version} used events up to {bundle.until}; the day is {day}"
        )
    shop = read_shop(data, shop_file, until=day)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            bundle=bundle.directory,
            state=Path(folder),
            address="127.0.0.1:0",
            fixed_time=day + _NOON,
            exact_search=True,  # gives the same hits in every process
            device="cpu",  # and the same vectors on every machine
            impression_log_days=0,
        )
        import_events(settings, bundle, shop)
        task = shop.settings.task.model_copy(update={"filter": {}} if unfiltered else {})
        requests = [request_of(query, task) for query in queries]
        run = asyncio.run(_run(settings, requests, queries, reverse=reverse))
        with out.open("w") as file:
            for query, page in zip(queries, run.pages, strict=True):
                user = int(query.user_id) if query.user_id.isdigit() else query.user_id
                file.write(json.dumps({"user_id": user, "items": [item for item, _ in page]}) + "\n")
        _print(run)
        if run.degraded:
            raise FailedPrecondition(f"{run.degraded} responses were degraded")
        if over_grpc:
            asyncio.run(_compare(settings, requests, run.pages, over_grpc))


def read_queries(data: Path, shop_file: Path | None, split: str) -> tuple[datetime, list[EvalQuery]]:
    """The day and the queries of a split, from the file in shop.toml."""
    from training.data.settings_file import read_settings

    default = data / "shop.toml"
    settings = read_settings(shop_file or (default if default.is_file() else None))
    name = settings.task.queries.get(split)  # type: ignore[call-overload]
    if name is None:
        raise FailedPrecondition(f"shop.toml names no queries of {split!r} under task.queries")
    rows = [json.loads(line) for line in (data / name).read_text().splitlines()]
    days = {row["date"] for row in rows}
    if len(days) != 1:
        raise FailedPrecondition(f"{name} holds queries of {len(days)} days, one is needed")
    day = datetime.fromisoformat(days.pop()).replace(tzinfo=UTC)
    return day, [EvalQuery(str(r["user_id"]), tuple(r["session"]), tuple(r["targets"])) for r in rows]


async def _run(
    settings: Settings,
    requests: Sequence[pb.RecommendRequest],
    queries: Sequence[EvalQuery],
    *,
    reverse: bool,
) -> EvalRun:
    app = App(settings)
    await app.start()
    gateway = app.gateway
    assert gateway is not None  # noqa: S101 - all services are hosted
    pipeline, runs = gateway.pipeline, list[RankedPage]()
    pipeline.observe(runs.append)
    pages: list[Page] = [[] for _ in requests]
    milliseconds, counts = np.zeros(len(requests)), Counter[str]()
    hits, targets, degraded = 0, 0, 0
    order = range(len(requests))
    for count, index in enumerate(reversed(order) if reverse else order, 1):
        start = time.perf_counter()
        with deadline.within(_TIMEOUT_SECONDS):
            response = await gateway.Recommend(requests[index], None)
        milliseconds[index] = 1e3 * (time.perf_counter() - start)
        pages[index] = _page(response)
        degraded += bool(response.degraded)
        ranked = runs.pop()
        counts.update({source: len(indices) for source, indices, _ in ranked.candidates.columns()})
        ids = set(pipeline.table.ids(pipeline.table.rows(ranked.item_hashes)))
        hits += len(ids.intersection(queries[index].targets))
        targets += len(queries[index].targets)
        if count % 500 == 0:
            print(f"{count} of {len(requests)} answered", file=sys.stderr)  # noqa: T201 - progress
    await app.stop()
    per_query = {source: count / len(requests) for source, count in sorted(counts.items())}
    return EvalRun(
        pages=pages,
        milliseconds=milliseconds,
        candidates=per_query,
        recall=hits / max(targets, 1),
        degraded=degraded,
    )


def _page(response: pb.RecommendResponse) -> Page:
    return [(item.item_id, item.score) for item in response.items]


def equivalent(one: Page, other: Page) -> bool:
    """Whether two pages have the same items in the same order, except among scores within 1e-3.

    The last bits of a score depend on the item's position among the candidates, so items with almost equal
    scores may come in either order, and either may be cut off.
    """
    if len(one) != len(other):
        return False
    scores, others = dict(one), dict(other)
    pairs = [(a, b) for (_, a), (_, b) in zip(one, other, strict=True)]
    pairs += [(scores[item], others[item]) for item in scores.keys() & others.keys()]
    pairs += [(scores[item], other[-1][1]) for item in scores.keys() - others.keys()]
    pairs += [(others[item], one[-1][1]) for item in others.keys() - scores.keys()]
    return all(abs(a - b) <= _SCORE_TOLERANCE for a, b in pairs)


def request_of(query: EvalQuery, task: Evaluation) -> pb.RecommendRequest:
    """The request of a query, with the task's filter."""
    policy = pb.PURCHASED_ITEMS_POLICY_EXCLUDE if task.exclude_purchased else pb.PURCHASED_ITEMS_POLICY_KEEP
    request = pb.RecommendRequest(
        user_id=query.user_id,
        session=[event_pb2.SessionItem(item_id=item_id) for item_id in query.session],
        page_size=PAGE,
        purchased_items_policy=policy,
    )
    for attribute, text in task.filter.items():
        part = request.filter.all_of.filters.add()
        part.equals.CopyFrom(filter_pb2.Equals(attribute=attribute, text=text))
    return request


def _print(run: EvalRun) -> None:
    milliseconds = run.milliseconds
    summary = {
        "queries": len(run.pages),
        "candidates_per_query": {name: round(count, 1) for name, count in run.candidates.items()},
        "targets_among_candidates": round(run.recall, 4),
        "ms_per_query": {
            "mean": round(milliseconds.mean(), 2),
            "p99": round(float(np.quantile(milliseconds, 0.99)), 2),
        },
        "degraded": run.degraded,
    }
    print(json.dumps(summary, indent=1))  # noqa: T201 - a command's answer


async def _compare(
    settings: Settings, requests: Sequence[pb.RecommendRequest], pages: Sequence[Page], count: int
) -> None:
    """Send a sample of the queries to three processes over gRPC; their pages must be equivalent.

    The processes end with this function, also at SIGTERM.
    """
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    sample = np.random.default_rng(0).permutation(len(requests))[:count]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        # One after the other: a channel without a server waits before it reconnects.
        embedding = await _spawn(processes, settings, "embedding")
        ranking = await _spawn(processes, settings, "ranking", f"--embedding={embedding}")
        gateway = await _spawn(
            processes, settings, "gateway", f"--embedding={embedding}", f"--ranking={ranking}"
        )
        different = 0
        async with grpc.aio.insecure_channel(gateway, options=CHANNEL_OPTIONS) as channel:
            stub = pb_grpc.RecommendationServiceStub(channel)
            for index in sample:
                response = await stub.Recommend(requests[index], timeout=_TIMEOUT_SECONDS)
                if response.degraded:
                    raise FailedPrecondition(f"degraded by three processes: {response.degraded[0].message}")
                if not equivalent(page := _page(response), pages[index]):
                    different += 1
                    pairs = zip(pages[index], page, strict=False)
                    difference = next((pair for pair in pairs if pair[0][0] != pair[1][0]), "their scores")
                    print(f"query {index}: the pages differ in {difference}", file=sys.stderr)  # noqa: T201
    except asyncio.CancelledError:
        raise VitrineError("stopped by SIGTERM") from None
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    print(f"{len(sample)} queries over gRPC to three processes: {different} pages differ")  # noqa: T201
    if different:
        raise FailedPrecondition(f"{different} of {len(sample)} pages differ between one process and three")


async def _spawn(
    processes: list[subprocess.Popen[bytes]], settings: Settings, service: str, *flags: str
) -> str:
    """Start a process and wait until it serves; its address."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "cli.main", "serve", service, f"--address={address}"]
    fixed_time = settings.fixed_time.isoformat() if settings.fixed_time else ""
    command += [f"--bundle={settings.bundle}", f"--state={settings.state}", f"--fixed-time={fixed_time}"]
    command += [f"--exact-search={settings.exact_search}", "--impression-log-days=0", *flags]
    processes.append(subprocess.Popen(command))  # noqa: S603 - our own command
    await _wait_until_serving(address)
    return address


async def _wait_until_serving(address: str, seconds: float = 300) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    end = time.monotonic() + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < end:
            try:
                response = await stub.Check(health_pb2.HealthCheckRequest())
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.2)
    raise VitrineError(f"nothing serves at {address}")
