"""The composition root: builds a process from its stores, its server, and the bundles that it serves."""

import asyncio
import importlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from services.catalog.bundle import Bundle
from services.core.errors import FailedPrecondition
from services.core.telemetry import Gauge, Telemetry
from services.rpc.admission import AdmissionLimits
from services.rpc.peers import Peers
from services.rpc.server import AddServicer, Server, Service
from services.serving import bundle_watcher, write_reports
from services.serving.bundle_watcher import BundleWatcher
from services.serving.candidate_bundles import CandidateBundles
from services.serving.loaded_bundle import ALL, EMBEDDING, GATEWAY, RANKING, LoadedBundle, ProcessResources
from services.serving.settings import Settings
from services.serving.version_manager import BundleVersionManager, cancel_tasks, restart_on_failure
from services.storage import store
from services.storage.database_lock import FileLock, lock_database
from services.storage.write_health import WriteHealth

if TYPE_CHECKING:
    import sqlalchemy as sa
    from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

    from services.embedding.encoders.encoder_pool import EncoderPool
    from services.gateway.servicer import GatewayServicer

NAMES = {
    EMBEDDING: "vitrine.embedding.v1.EmbeddingService",
    RANKING: "vitrine.ranking.v1.RankingService",
    GATEWAY: "vitrine.gateway.v1.RecommendationService",
}
_STUBS = {
    EMBEDDING: "vitrine.embedding.v1.embedding_service_pb2_grpc",
    RANKING: "vitrine.ranking.v1.ranking_service_pb2_grpc",
    GATEWAY: "vitrine.gateway.v1.recommendation_service_pb2_grpc",
}
WRITES = "{}/write"
"""The name of the health entry of a service's writes, by the service's full name.

It is NOT_SERVING while the service's database refuses writes.
"""
NEXT_BUNDLE = "vitrine.next-bundle"
"""The name of the health entry of the next bundle: NOT_SERVING while items are encoded for it."""


class App:
    """The services `hosted` in one process over one state directory; starts with `bundle`, else the newest.

    Create it within an event loop.

    Raises:
        FailedPrecondition: the bundle is invalid, or another process writes to one of the databases.
        Unavailable: the engine of an index does not answer.
    """

    def __init__(self, settings: Settings, hosted: Collection[str] = ALL, bundle: Path | None = None) -> None:
        if settings.candidate_bundles and set(hosted) != set(ALL):
            raise FailedPrecondition("--candidate-bundles needs one process that runs all services")
        self.settings = settings
        self.telemetry, self.metrics_port = Telemetry(), 0
        self._closing: list[Callable[[], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._log_task: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self.port = 0
        self._resources = ProcessResources(
            settings=settings,
            hosted=tuple(name for name in ALL if name in hosted),
            clock=_clock(settings.fixed_time),
            peers=_peers(settings, hosted),
        )
        if GATEWAY in hosted:
            from services.gateway.recommend.impression_log import ImpressionLog

            self._resources.impression_log = ImpressionLog(
                self._send_pages, keep=settings.impression_log_days > 0
            )
        first = Bundle(bundle or settings.bundle)
        try:
            self._open_stores(first)
            self.version_manager = BundleVersionManager(self._resources, LoadedBundle(self._resources, first))
            self._watcher = BundleWatcher(self._resources, self.version_manager)
        except BaseException:
            self._close()
            raise
        self._candidates = CandidateBundles(self._resources)
        self._add_metrics()

    @property
    def current(self) -> LoadedBundle:
        """The services of the current bundle."""
        return self.version_manager.current

    @property
    def bundle(self) -> Bundle:
        """The current bundle."""
        return self.current.bundle

    @property
    def gateway(self) -> "GatewayServicer | None":
        """The gateway of the current bundle, None where the process does not host the gateway."""
        return self.current.gateway

    @property
    def device(self) -> str:
        """The device of the current bundle's encoders, cpu or cuda; empty if this process has none."""
        return self.current.catalog.encoders.text.device if self.current.hosts(EMBEDDING) else ""

    async def start(self) -> None:
        """Accept calls; a service is SERVING once it has everything that it needs."""
        for directory in self.settings.candidate_bundles:
            await self._candidates.add(directory, self.current)
        if self.current.hosts(EMBEDDING):
            await self.current.catalog.reencode()
        self.version_manager.start()
        self._tasks = [asyncio.ensure_future(restart_on_failure(loop)) for loop in self._candidates.loops]
        if self._resources.impression_log is not None:
            self._log_task = asyncio.ensure_future(restart_on_failure(self._resources.impression_log.run))
        services = [
            Service(NAMES[name], router, _add_function(name))
            for name, router in self.version_manager.routers.items()
        ]
        if self.settings.metrics:
            self.metrics_port, close = self.telemetry.serve(self.settings.metrics)
            self._closing.append(close)
        limits = AdmissionLimits(idle_seconds=self.settings.stream_idle_seconds)
        self._server = Server(services, self.settings.address, limits, self.telemetry.observe_call)
        await self._server.start()
        self.port = self._server.port
        self._tasks.append(asyncio.ensure_future(restart_on_failure(self._report_writes)))
        self._watcher.start(partial(self._server.set_health, NEXT_BUNDLE))
        for name in self._resources.hosted:
            if name == RANKING:  # it needs the items, which may come from another process
                self._tasks.append(asyncio.ensure_future(self._set_ready_with_items(name)))
            else:
                await self._server.set_ready(NAMES[name])

    async def stop(self) -> None:
        """Drain, then close everything in reverse order."""
        self.version_manager.end_feeds()  # feeds do not end by themselves
        if self._server is not None:
            await self._server.stop(self.settings.grace)
        await cancel_tasks([self._log_task] if self._log_task else [])
        if self._resources.impression_log is not None:
            await self._resources.impression_log.close()
        await self._watcher.stop()
        await self.version_manager.stop()  # all calls have ended
        await cancel_tasks(self._tasks)
        await self._candidates.close()
        self.version_manager.close()
        await self._resources.peers.close()
        self._close()

    def _close(self) -> None:
        for close in reversed(self._closing):
            close()

    async def _set_ready_with_items(self, name: str) -> None:
        await self.version_manager.ready.wait()
        if self._server is not None:
            await self._server.set_ready(NAMES[name])

    def _open_stores(self, bundle: Bundle) -> None:
        resources, settings = self._resources, self.settings
        if EMBEDDING in resources.hosted:
            from services.embedding.store import item_store

            # Guards the index files and the served-bundle file too, which the database lock does not.
            guard = FileLock(settings.state / f"{EMBEDDING}.lock", settings.state, self._holder)
            self._closing.append(guard.release)
            engine = self._open_database(settings.embedding_database, EMBEDDING)
            resources.item_store = item_store.ItemStore(engine, resources.clock, settings.max_attribute_names)
            self._closing.append(resources.item_store.close)
        if RANKING in resources.hosted:
            from services.ranking.events import event_followers, event_store

            engine = self._open_database(settings.ranking_database, RANKING)
            resources.event_store = event_store.EventStore(
                engine, bundle.profile.event_types, resources.clock
            )
            self._closing.append(resources.event_store.close)
            resources.event_followers = event_followers.EventFollowers()
            resources.compute = _compute_pool()
            self._closing.append(resources.compute.shutdown)

    def _open_database(self, url: str, name: str) -> "sa.Engine":
        self.settings.state.mkdir(parents=True, exist_ok=True)
        engine = store.open_engine(url or f"sqlite:///{(self.settings.state / name).absolute()}.sqlite")
        self._closing.append(lock_database(engine, name, self._holder).release)
        self._closing.append(engine.dispose)
        return engine

    @property
    def _holder(self) -> str:
        """The description of this process in the error of a process that wants the same database."""
        return f"vitrine serve: {', '.join(self._resources.hosted)}"

    def _write_healths(self) -> dict[str, WriteHealth]:
        """Whether each database of this process takes writes, by service."""
        stores = {EMBEDDING: self._resources.item_store, RANKING: self._resources.event_store}
        return {name: one.health for name, one in stores.items() if one is not None}

    async def _report_writes(self) -> None:
        async def report(name: str, writable: bool) -> None:
            assert self._server is not None  # noqa: S101 - it was started
            await self._server.set_health(WRITES.format(NAMES[name]), writable)

        await write_reports.report_changes(self._write_healths, report)

    async def _send_pages(self, pages: "ranking_pb.LogPagesRequest") -> object:
        return await self.current.log_pages(pages)  # to the bundle that is current when they are sent

    def _add_metrics(self) -> None:
        """Add the metrics of the encoders, the indexes and the next bundle."""

        def encoders(read: "Callable[[EncoderPool], Mapping[str, float]]") -> Mapping[str, float]:
            return read(self.current.catalog.encoders) if self.current.hosts(EMBEDDING) else {}

        def items() -> Mapping[str, float]:
            if not self.current.hosts(EMBEDDING):
                return {}
            return {space: len(index) for space, index in self.current.view.spaces.items()}

        def recall() -> Mapping[str, float]:
            if not self.current.hosts(EMBEDDING):
                return {}
            recalls = {space: index.recall for space, index in self.current.view.spaces.items()}
            return {space: recall for space, recall in recalls.items() if recall is not None}

        def sequence() -> Mapping[str, float]:
            return {"searchable": self.current.view.sequence} if self.current.hosts(EMBEDDING) else {}

        def backfill() -> Mapping[str, float]:
            progress = self._watcher.backfill
            return {"done": progress.encoded, "left": progress.remaining} if progress else {}

        def calls() -> Mapping[str, float]:
            return self._server.admission.open if self._server else {}

        def pages() -> Mapping[str, float]:
            return self._resources.impression_log.counts if self._resources.impression_log else {}

        def retention() -> Mapping[str, float]:
            return {"retention": clock.offset} if (clock := self.current.retention_clock) else {}

        self.telemetry.add(
            *write_reports.gauges(self._write_healths),
            Gauge(
                "vitrine_encoder_device",
                "1 for the device that the encoders of the current bundle run on: cpu or cuda",
                "device",
                lambda: {self.device: 1} if self.device else {},
            ),
            Gauge("vitrine_open_calls", "Open calls and streams", "kind", calls),
            Gauge(
                "vitrine_clock_offset_seconds",
                "How far the clock is ahead of the time of retention; 0 while retention trusts the clock",
                "of",
                retention,
            ),
            Gauge(
                "vitrine_impression_log_pages_total", "Pages logged, and lost", "state", pages, counts=True
            ),
            Gauge(
                "vitrine_encoded_total",
                "Rows encoded",
                "kind",
                lambda: encoders(lambda pool: pool.totals),
                counts=True,
            ),
            Gauge(
                "vitrine_encoder_queue_size",
                "Rows that wait for their encoder",
                "kind",
                lambda: encoders(lambda pool: pool.waiting),
            ),
            Gauge(
                "vitrine_images_decoded_total",
                "Image files decoded in a thread or a process, and those whose process was killed",
                "outcome",
                lambda: encoders(lambda pool: pool.decoded),
                counts=True,
            ),
            Gauge("vitrine_index_items", "Searchable items, by space", "space", items),
            Gauge(
                "vitrine_index_recall",
                "Share of the nearest items that a search finds, on a sample, by space",
                "space",
                recall,
            ),
            Gauge("vitrine_catalog_sequence", "The last searchable change of the items", "of", sequence),
            Gauge(
                "vitrine_next_bundle_contents",
                "Texts and images encoded for the next bundle, and those left to encode",
                "state",
                backfill,
            ),
        )


async def first_bundle(settings: Settings, hosted: Collection[str]) -> Path:
    """The directory of the bundle that an `App` starts with; see `bundle_watcher.choose_first`."""
    peers = _peers(settings, hosted)
    try:
        return await bundle_watcher.choose_first(settings, peers)
    finally:
        await peers.close()


def _peers(settings: Settings, hosted: Collection[str]) -> Peers:
    """The services of other processes that the hosted services call."""
    return Peers(
        embedding="" if EMBEDDING in hosted else settings.embedding,
        ranking=settings.ranking if GATEWAY in hosted and RANKING not in hosted else "",
    )


def _add_function(name: str) -> AddServicer:
    """The generated function that adds a service to a server."""
    stubs = importlib.import_module(_STUBS[name])
    service = NAMES[name].rpartition(".")[2]
    add: AddServicer = getattr(stubs, f"add_{service}Servicer_to_server")
    return add


def _compute_pool() -> ThreadPoolExecutor:
    """The thread that computes pages, which uses one core.

    More of these threads would mostly wait for Python's lock (docs/decisions/0052). A second thread of torch
    for one page costs more than it brings.
    """
    import torch

    return ThreadPoolExecutor(1, "compute", partial(torch.set_num_threads, 1))


def _clock(fixed: datetime | None) -> Callable[[], datetime]:
    return (lambda: datetime.now(UTC)) if fixed is None else (lambda: fixed)
