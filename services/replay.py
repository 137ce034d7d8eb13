"""`vitrine evaluate`: answers the queries of a day through the serving path, as of that day.

A fresh state, loaded with what was known before; the clock stands at the day; then the
gateway's own Recommend, its public request fields included.
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

from services import deadline, store
from services.bundle import Bundle
from services.errors import FailedPrecondition, VitrineError
from services.gateway.pipeline import Pipeline
from services.gateway.wish import Ordered, Wish
from services.ranking.behaviour import BehaviourStore, Event, EventItem
from services.server import CHANNEL_OPTIONS
from services.settings import Settings
from services.wiring import App
from training.dataset import Shop, read_shop
from training.shop_settings import Task

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NOON = timedelta(hours=12)
# What an answer may take: evaluated is what is answered, however busy the machine.
_PATIENCE = timedelta(minutes=1)
_STOP_SECONDS = 30
PAGE = 20
_SAME = 1e-3

Page = list[tuple[str, float]]
"""Items, best first, with their scores."""


@dataclass(frozen=True)
class Query:
    """A person, what the day's session showed so far, and what it went on to hold."""

    user_id: str
    session: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Replay:
    """The answers, in the order of the queries, and what was seen on the way."""

    pages: list[Page]
    milliseconds: np.ndarray
    candidates: Mapping[str, float]
    held: float
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
    """Answer the queries of a split into `out`, a line of JSON each, and print what it took.

    `unfiltered` leaves the task's filter out: every item of the catalogue is a candidate.

    Raises:
        FailedPrecondition: the bundle used events of the query day, an answer was degraded, or
            three split processes answered otherwise.
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
            clock=day + _NOON,
            exact=True,  # the same in every process
            served_days=0,
        )
        import_events(settings, bundle, shop)
        task = shop.settings.task.model_copy(update={"filter": {}} if unfiltered else {})
        requests = [request_of(query, task) for query in queries]
        replay = asyncio.run(_replay(settings, requests, queries, reverse=reverse))
        with out.open("w") as file:
            for query, page in zip(queries, replay.pages, strict=True):
                user = int(query.user_id) if query.user_id.isdigit() else query.user_id
                file.write(json.dumps({"user_id": user, "items": [item for item, _ in page]}) + "\n")
        _print(replay)
        if replay.degraded:
            raise FailedPrecondition(f"{replay.degraded} answers were degraded")
        if over_grpc:
            asyncio.run(_compare(settings, requests, replay.pages, over_grpc))


def read_queries(data: Path, shop_file: Path | None, split: str) -> tuple[datetime, list[Query]]:
    """The day and the queries of a split, from the file that shop.toml names."""
    from training.shop_settings import read_settings

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
    return day, [Query(str(r["user_id"]), tuple(r["session"]), tuple(r["targets"])) for r in rows]


def import_events(settings: Settings, bundle: Bundle, shop: Shop) -> int:
    """Load a shop's events into a state that no process serves; how many were new."""
    events = shop.events
    settings.state.mkdir(parents=True, exist_ok=True)
    url = settings.ranking_database or f"sqlite:///{(settings.state / 'ranking').absolute()}.sqlite"
    engine = store.open_engine(url)
    kept = BehaviourStore(engine, list(bundle.profile.event_types), lambda: datetime.now(UTC))
    kinds = list(shop.settings.event_types)  # the order that the events' kinds count in
    rows = zip(
        events.event_ids,
        events.user.tolist(),
        events.item.tolist(),
        events.kind.tolist(),
        events.time.tolist(),
        events.price.tolist(),
        events.position.tolist(),
        events.session.tolist(),
        events.channel.tolist(),
        strict=True,
    )
    count = kept.load(
        Event(
            event_id=event_id,
            type=kinds[kind],
            items=(
                EventItem(
                    events.item_ids[item], price=None if np.isnan(price) else price, position=position or None
                ),
            ),
            user_id=events.user_ids[user],
            session_id=events.session_ids[session] if session >= 0 else "",
            occurred=_EPOCH + timedelta(microseconds=micros),
            channel=events.channel_names[channel] if channel >= 0 else "",
        )
        for event_id, user, item, kind, micros, price, position, session, channel in rows
    ).result()
    kept.close()
    engine.dispose()
    return count


class _Observed(Pipeline):
    """The pipeline as it is, with a look at the candidates of the last run."""

    last: Ordered

    @classmethod
    def around(cls, pipeline: Pipeline) -> "_Observed":
        observed = cls.__new__(cls)
        observed.__dict__.update(pipeline.__dict__)
        return observed

    async def run(self, wish: Wish) -> Ordered:
        self.last = await super().run(wish)
        return self.last


async def _replay(
    settings: Settings, requests: Sequence[pb.RecommendRequest], queries: Sequence[Query], *, reverse: bool
) -> Replay:
    app = App(settings)
    await app.start()
    gateway = app.gateway
    assert gateway is not None  # noqa: S101 - all services are hosted
    pipeline = _Observed.around(gateway.pipeline)
    gateway.recommending.pipeline = pipeline
    pages: list[Page] = [[] for _ in requests]
    took, counts, held, wanted, degraded = np.zeros(len(requests)), Counter[str](), 0, 0, 0
    order = range(len(requests))
    for done, at in enumerate(reversed(order) if reverse else order, 1):
        began = time.perf_counter()
        with deadline.within(_PATIENCE.total_seconds()):
            response = await gateway.Recommend(requests[at], None)
        took[at] = 1e3 * (time.perf_counter() - began)
        pages[at] = _page(response)
        degraded += bool(response.degraded)
        found = pipeline.last
        counts.update(source for sources in found.candidates.sources.values() for source in sources)
        ids = set(pipeline.table.ids(pipeline.table.rows(found.numbers)))
        held += len(ids.intersection(queries[at].targets))
        wanted += len(queries[at].targets)
        if done % 500 == 0:
            print(f"{done} of {len(requests)} answered", file=sys.stderr)  # noqa: T201 - progress
    await app.stop()
    per_query = {source: count / len(requests) for source, count in sorted(counts.items())}
    return Replay(pages, took, per_query, held / max(wanted, 1), degraded)


def _page(response: pb.RecommendResponse) -> Page:
    return [(item.item_id, item.score) for item in response.items]


def alike(one: Page, other: Page) -> bool:
    """Whether two lists are the same items in the same order, except among scores within 1e-3.

    Arithmetic differs in its last bits with an item's place among the candidates, so that items that are
    as good as equal may stand, or be cut off, in either order.
    """
    if len(one) != len(other):
        return False
    scores, others = dict(one), dict(other)
    pairs = [(a, b) for (_, a), (_, b) in zip(one, other, strict=True)]
    pairs += [(scores[item], others[item]) for item in scores.keys() & others.keys()]
    pairs += [(scores[item], other[-1][1]) for item in scores.keys() - others.keys()]
    pairs += [(others[item], one[-1][1]) for item in others.keys() - scores.keys()]
    return all(abs(a - b) <= _SAME for a, b in pairs)


def request_of(query: Query, task: Task) -> pb.RecommendRequest:
    """A query as a shop would ask it, under the task's filter."""
    policy = pb.BOUGHT_POLICY_EXCLUDE if task.exclude_bought else pb.BOUGHT_POLICY_KEEP
    request = pb.RecommendRequest(
        user_id=query.user_id,
        session=[event_pb2.SessionItem(item_id=item_id) for item_id in query.session],
        page_size=PAGE,
        bought_policy=policy,
    )
    for attribute, text in task.filter.items():
        part = request.filter.all_of.filters.add()
        part.equals.CopyFrom(filter_pb2.Equals(attribute=attribute, text=text))
    return request


def _print(replay: Replay) -> None:
    took = replay.milliseconds
    summary = {
        "queries": len(replay.pages),
        "candidates_per_query": {name: round(count, 1) for name, count in replay.candidates.items()},
        "targets_among_candidates": round(replay.held, 4),
        "ms_per_query": {"mean": round(took.mean(), 2), "p99": round(float(np.quantile(took, 0.99)), 2)},
        "degraded": replay.degraded,
    }
    print(json.dumps(summary, indent=1))  # noqa: T201 - a command's answer


async def _compare(
    settings: Settings, requests: Sequence[pb.RecommendRequest], pages: Sequence[Page], count: int
) -> None:
    """Ask three processes over gRPC for a sample of the queries; their lists must be alike.

    Whatever ends it, SIGTERM too, ends the three.
    """
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    sample = np.random.default_rng(0).permutation(len(requests))[:count]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        # One after the other: a channel that found nobody takes a while to look again.
        embedding = await _spawn(processes, settings, "embedding")
        ranking = await _spawn(processes, settings, "ranking", f"--embedding={embedding}")
        neighbours = f"--embedding={embedding}", f"--ranking={ranking}"
        gateway = await _spawn(processes, settings, "gateway", *neighbours)
        different = 0
        timeout = _PATIENCE.total_seconds()
        async with grpc.aio.insecure_channel(gateway, options=CHANNEL_OPTIONS) as channel:
            stub = pb_grpc.RecommendationServiceStub(channel)
            for at in sample:
                response = await stub.Recommend(requests[at], timeout=timeout)
                if response.degraded:
                    raise FailedPrecondition(f"degraded by three processes: {response.degraded[0].message}")
                if not alike(page := _page(response), pages[at]):
                    different += 1
                    pairs = zip(pages[at], page, strict=False)
                    parted = next((pair for pair in pairs if pair[0][0] != pair[1][0]), "their scores")
                    print(f"question {at}: the lists part at {parted}", file=sys.stderr)  # noqa: T201
    except asyncio.CancelledError:
        raise VitrineError("told to stop") from None
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    print(f"{len(sample)} queries over gRPC to three processes: {different} lists differ")  # noqa: T201
    if different:
        raise FailedPrecondition(f"{different} of {len(sample)} lists differ between one process and three")


async def _spawn(
    processes: list[subprocess.Popen[bytes]], settings: Settings, service: str, *flags: str
) -> str:
    """The address of a process that serves."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "services.cli", "serve", service, f"--address={address}"]
    clock = settings.clock.isoformat() if settings.clock else ""
    command += [f"--bundle={settings.bundle}", f"--state={settings.state}", f"--clock={clock}"]
    command += [f"--exact={settings.exact}", "--served-days=0", *flags]
    processes.append(subprocess.Popen(command))  # noqa: S603 - our own command
    await _serving(address)
    return address


async def _serving(address: str, seconds: float = 300) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    end = time.monotonic() + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < end:
            try:
                reply = await stub.Check(health_pb2.HealthCheckRequest())
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.2)
    raise VitrineError(f"nothing serves at {address}")
