"""`vitrine evaluate`: answers past queries through the serving path, as of their days.

For each day it loads the earlier events into a state of its own, fixes the clock at that day, and calls the
gateway's Recommend with public requests.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
from vitrine.catalog.v1 import event_pb2, filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from cli.evaluation_queries import EvalQuery, by_day, held_out_queries, micros, read_queries, time_of
from cli.evaluation_report import Answer, Page, evaluation_of, notes_of, print_evaluation, simple_pages
from cli.import_events import import_events
from services.catalog.bundle import Bundle
from services.core import deadline
from services.core.errors import FailedPrecondition, VitrineError
from services.gateway.query import RankedPage
from services.rpc.server import CHANNEL_OPTIONS
from services.serving.app import App
from services.serving.settings import Settings
from training.data.config import Evaluation
from training.data.dataset import ShopData, read_shop

_NOON = timedelta(hours=12)
_MAX_HELD_OUT = 1000
_DAYS_PER_LINE = 10
# Long, so that the result does not depend on the load of the machine.
_TIMEOUT_SECONDS = 60.0
_STOP_SECONDS = 30
PAGE = 20
_SCORE_TOLERANCE = 1e-3


def evaluate(
    data: Path,
    bundle_path: Path,
    split: str | None,
    out: Path | None,
    *,
    shop_file: Path | None,
    limit: int = 0,
    reverse: bool = False,
    unfiltered: bool = False,
    over_grpc: int = 200,
    as_json: bool = False,
) -> None:
    """Answer queries day by day, and print how good the pages are, next to those of simple methods.

    The queries are those of a split, or else the baskets after the bundle's time. With `out`, the page of
    each query is a line of JSON there. `unfiltered` ignores the task's filter: every item of the catalog is a
    candidate.

    Raises:
        FailedPrecondition: the bundle used events of the query days, a response was degraded, or the
            responses of three separate processes differ.
    """
    bundle = Bundle(bundle_path)
    until, notes = time_of(bundle), list[str]()
    if split:
        first_day, queries = read_queries(data, shop_file, split, several_days=True)
        if until > first_day:
            raise FailedPrecondition(
                f"bundle {bundle.version} used events up to {until}, and the first queries are of "
                f"{first_day:%Y-%m-%d}: train again with --until {first_day:%Y-%m-%d}"
            )
        shop = read_shop(data, shop_file)
    else:
        shop = read_shop(data, shop_file)
        queries, notes = held_out_queries(shop, bundle, limit or _MAX_HELD_OUT)
    queries = queries[:limit] if limit else queries
    notes += notes_of(shop, queries)
    task = shop.settings.task.model_copy(update={"filter": {}} if unfiltered else {})
    requests = [request_of(query, task) for query in queries]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            bundle=bundle.directory,
            state=Path(folder),
            address="127.0.0.1:0",
            exact_search=True,  # gives the same hits in every process
            device="cpu",  # and the same vectors on every machine
            impression_log_days=0,
        )
        runs: dict[int, Answer] = {}
        since: datetime | None = None
        days = by_day(queries)
        for count, (day, indices) in enumerate(days.items(), 1):
            import_events(settings, bundle, _between(shop, since, day))
            settings, since = settings.model_copy(update={"fixed_time": day + _NOON}), day
            of_day = [requests[i] for i in indices], [queries[i] for i in indices]
            runs |= zip(indices, asyncio.run(_run(settings, *of_day, reverse=reverse)), strict=True)
            if len(days) > 1 and not count % _DAYS_PER_LINE:
                print(f"{count} of {len(days)} days answered", file=sys.stderr)  # noqa: T201 - progress
        answers = [runs[index] for index in range(len(queries))]
        if out:
            with out.open("w") as file:
                for query, answer in zip(queries, answers, strict=True):
                    user = int(query.user_id) if query.user_id.isdigit() else query.user_id
                    file.write(json.dumps({"user_id": user, "items": [i for i, _ in answer.page]}) + "\n")
        simple = simple_pages(shop, queries, task, first_day=min(days))
        print_evaluation(evaluation_of(queries, answers, simple, PAGE, notes), as_json=as_json)
        if degraded := sum(answer.degraded for answer in answers):
            raise FailedPrecondition(f"{degraded} responses were degraded")
        if over_grpc:  # with the state of the last day
            last = list(days.values())[-1]
            pages = [answers[i].page for i in last]
            asyncio.run(_compare(settings, [requests[i] for i in last], pages, over_grpc))


def _between(shop: ShopData, since: datetime | None, until: datetime) -> ShopData:
    """The shop with the events from `since` on, if it is given, and before `until`."""
    time = shop.events.time
    is_late = time >= micros(since) if since else np.ones(len(time), bool)
    rows = np.flatnonzero(is_late & (time < micros(until)))
    return replace(shop, events=shop.events.take(rows))


async def _run(
    settings: Settings,
    requests: Sequence[pb.RecommendRequest],
    queries: Sequence[EvalQuery],
    *,
    reverse: bool,
) -> list[Answer]:
    """The answers to requests of one day, in their order."""
    app = App(settings)
    await app.start()
    gateway = app.gateway
    assert gateway is not None  # noqa: S101 - all services are hosted
    pipeline, ranked_pages = gateway.pipeline, list[RankedPage]()
    pipeline.observe(ranked_pages.append)
    answers = dict[int, Answer]()
    order = range(len(requests))
    for count, index in enumerate(reversed(order) if reverse else order, 1):
        start = time.perf_counter()
        with deadline.within(_TIMEOUT_SECONDS):
            response = await gateway.Recommend(requests[index], None)
        seconds = time.perf_counter() - start
        ranked = ranked_pages.pop()
        ids = set(pipeline.table.ids(pipeline.table.rows(ranked.item_hashes)))
        answers[index] = Answer(
            page=_page(response),
            milliseconds=1e3 * seconds,
            candidates={source: len(indices) for source, indices, _ in ranked.candidates.columns()},
            targets_among_candidates=len(ids.intersection(queries[index].targets)),
            degraded=bool(response.degraded),
        )
        if count % 500 == 0:
            print(f"{count} of {len(requests)} answered", file=sys.stderr)  # noqa: T201 - progress
    await app.stop()
    return [answers[index] for index in order]


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
    types = query.types or ("",) * len(query.session)
    session = zip(query.session, types, strict=True)
    request = pb.RecommendRequest(
        user_id=query.user_id,
        session=[event_pb2.SessionItem(item_id=item_id, type=kind) for item_id, kind in session],
        exclude_item_ids=query.excluded,
        page_size=PAGE,
        purchased_items_policy=policy,
    )
    for attribute, text in task.filter.items():
        part = request.filter.all_of.filters.add()
        part.equals.CopyFrom(filter_pb2.Equals(attribute=attribute, text=text))
    return request


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
    message = f"{len(sample)} queries over gRPC to three processes: {different} pages differ"
    print(message, file=sys.stderr)  # noqa: T201
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
