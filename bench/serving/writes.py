"""Writes next to reads: events per second, what they do to pages, and how soon a new item is recommended."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from vitrine.catalog.v1 import event_pb2, filter_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from bench.serving.arrivals import Latencies, percentiles
from bench.serving.client import WRITE_EVENTS, write_requests
from bench.serving.driver import ClientProcess, Driver, wait_until_idle
from bench.serving.requests import event_batches
from bench.serving.servers import Services
from bench.serving.shops import Shop
from services.catalog.candidate_sources import BACKFILL

_PAGE = 500
_MARK = "_bench"
_CALL_SECONDS, _POLL_SECONDS, _MAX_WAIT_SECONDS, _PAUSE_SECONDS = 10.0, 0.02, 10.0, 1.0
_FILL_SECONDS = 5.0


@dataclass(frozen=True)
class WritePlan:
    """Event rates per second, in writes of `batch` events, next to pages at a `part` of their peak."""

    rates: Sequence[float]
    batch: int = 50
    part: float = 0.5


@dataclass(frozen=True)
class Freshness:
    """New items: milliseconds from the upsert to its acknowledgment, and to a page with the item.

    `sources` are those that proposed the items on these pages, `missing` the number of items that came on no
    page within ten seconds.
    """

    items: int
    missing: int
    acknowledged_p50: float
    acknowledged_max: float
    recommended_p50: float
    recommended_max: float
    sources: Sequence[str]


@dataclass(frozen=True)
class WriteResult:
    """Pages at one rate, without writes and with them; `p99_ratio` is the second p99 over the first.

    `cpu_ms_per_event` is the CPU time of the services for an event, of writes alone.
    """

    event_rate: float
    batch: int
    alone: Latencies
    writes: Latencies
    quiet: Latencies
    busy: Latencies
    p99_ratio: float
    cpu_ms_per_event: float
    freshness: Freshness


class FreshItems(threading.Thread):
    """Upserts an item each second and asks for pages until it is on one, until `stop` is called.

    An item reads like the one before it, which the user views: by text the new one is among the nearest. Each
    has new words, so that it is encoded. The pages are filtered to new items, so that an item need not win
    against the catalog; it counts once a source has proposed it, not when it only fills a page.
    """

    def __init__(self, address: str, seed_item: str) -> None:
        super().__init__(daemon=True)
        self._address, self._previous, self._stopped = address, seed_item, threading.Event()
        self._acknowledged: list[float] = []
        self._recommended: list[float] = []
        self._sources: dict[str, None] = {}
        self._error: Exception | None = None

    def run(self) -> None:
        """Write and read until the end."""
        try:
            with grpc.insecure_channel(self._address) as channel:
                stub: Any = pb_grpc.RecommendationServiceStub(channel)
                seed = stub.GetItem(pb.GetItemRequest(item_id=self._previous), timeout=_CALL_SECONDS)
                number = 0
                while not self._stopped.wait(_PAUSE_SECONDS):
                    self._write_one(stub, seed.item.item, number)
                    number += 1
        except Exception as error:  # raised by `stop`, in the thread that measures
            self._error = error

    def stop(self) -> Freshness:
        """Stop after the item at hand; what was measured."""
        self._stopped.set()
        self.join()
        if self._error is not None:
            raise self._error
        answered = [seconds for seconds in self._recommended if seconds < _MAX_WAIT_SECONDS]
        acknowledged, recommended = (1e3 * np.array(times) for times in (self._acknowledged, answered))
        return Freshness(
            items=len(self._recommended),
            missing=len(self._recommended) - len(answered),
            acknowledged_p50=percentiles(acknowledged)[0],
            acknowledged_max=percentiles(acknowledged, [100])[0],
            recommended_p50=percentiles(recommended)[0],
            recommended_max=percentiles(recommended, [100])[0],
            sources=list(self._sources),
        )

    def _write_one(self, stub: Any, seed: item_pb2.Item, number: int) -> None:
        item = item_pb2.Item()
        item.CopyFrom(seed)
        item.id = f"bench-{time.time_ns()}"
        item.title = f"{seed.title} {number}"
        item.attributes.add(name=_MARK, texts=[_MARK])
        item.ClearField("image")
        item.ClearField("source_version")
        start = time.perf_counter()
        outcome = stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]), timeout=_CALL_SECONDS)
        if outcome.outcomes[0].code != item_pb2.ITEM_OUTCOME_CODE_CREATED:
            raise RuntimeError(f"the new item was not written: {outcome.outcomes[0]}")
        self._acknowledged.append(time.perf_counter() - start)
        session = [event_pb2.SessionItem(item_id=self._previous)]
        mark = filter_pb2.Filter(equals=filter_pb2.Equals(attribute=_MARK, text=_MARK))
        request = pb.RecommendRequest(session=session, page_size=_PAGE, filter=mark)
        while (waited := time.perf_counter() - start) < _MAX_WAIT_SECONDS:
            page = stub.Recommend(request, timeout=_CALL_SECONDS)
            sources = [s.source for shown in page.items if shown.item_id == item.id for s in shown.sources]
            if set(sources) - {BACKFILL}:
                waited = time.perf_counter() - start
                self._sources |= dict.fromkeys(sources)
                break
            time.sleep(_POLL_SECONDS)
        self._recommended.append(waited)
        self._previous = item.id


def measure_writes(
    services: Services,
    driver: Driver,
    writer: ClientProcess,
    shop: Shop,
    folder: Path,
    *,
    page_rate: float,
    event_rate: float,
    batch: int,
    seconds: float,
) -> WriteResult:
    """Pages at `page_rate` without and with `event_rate` events per second, in writes of `batch` events."""

    def batches(name: str, duration: float) -> Path:
        path = folder / f"{name}-{event_rate:.0f}.bin"  # of its own: the client reads a path once
        count = int(1.5 * event_rate / batch * duration) + 20  # no event is sent twice
        write_requests(path, event_batches(shop, batch, count, f"{name}-{event_rate:.0f}"))
        return path

    evenly: dict[str, Any] = {"rate": event_rate / batch, "poisson": False, "timeout": 30.0}
    cpu = services.cpu_seconds()
    alone = writer.finish(
        writer.start(batches("alone", _FILL_SECONDS), WRITE_EVENTS, seconds=_FILL_SECONDS, **evenly)
    )
    wait_until_idle(services)
    cpu = services.cpu_seconds() - cpu
    quiet = driver.at_rate(page_rate, seconds)

    def with_writes(name: str) -> tuple[Latencies, Latencies]:
        started = writer.start(batches(name, seconds), WRITE_EVENTS, seconds=seconds, **evenly)
        pages = driver.measured(name, rate=page_rate, seconds=seconds)
        return pages.latencies, writer.finish(started)

    busy, writes = with_writes("busy")
    # Apart from it, because its own pages are load.
    fresh = FreshItems(services.address, shop.item_ids[0])
    fresh.start()
    with_writes("fresh")
    freshness = fresh.stop()
    wait_until_idle(services)
    return WriteResult(
        event_rate=event_rate,
        batch=batch,
        alone=alone,
        writes=writes,
        quiet=quiet.latencies,
        busy=busy,
        p99_ratio=busy.p99 / quiet.latencies.p99,
        cpu_ms_per_event=1e3 * cpu / max(alone.calls * batch, 1),
        freshness=freshness,
    )
