"""The composition root: a process, its stores, its server, and the bundles that it serves."""

import asyncio
import importlib
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services import next_bundle, store
from services.bundle import Bundle
from services.companions import Companions
from services.errors import FailedPrecondition
from services.exchange import Exchange, ended, kept_up
from services.generation import ALL, EMBEDDING, GATEWAY, RANKING, Generation, Shared
from services.neighbours import Neighbours
from services.next_bundle import NextBundle
from services.server import Server, Service
from services.settings import Settings
from services.telemetry import Reading, Telemetry

if TYPE_CHECKING:
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
NEXT_BUNDLE = "vitrine.next-bundle"
"""The health of a newer bundle than the served one: NOT_SERVING while items are encoded for it."""


class App:
    """The services `hosted` by one process, over one state directory; begins with `bundle`, else the newest.

    To be made within an event loop.

    Raises:
        FailedPrecondition: the bundle is none, or another process has the state.
        Unavailable: an index's engine is away.
    """

    def __init__(self, settings: Settings, hosted: Collection[str] = ALL, bundle: Path | None = None) -> None:
        if settings.beside and set(hosted) != set(ALL):
            raise FailedPrecondition("bundles are served beside where one process has all services")
        self.settings = settings
        self.telemetry, self.metrics_port = Telemetry(), 0
        self._closing: list[Callable[[], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._logging: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self.port = 0
        neighbours = _neighbours(settings, hosted)
        there = tuple(name for name in ALL if name in hosted)
        self._shared = Shared(settings, there, _clock(settings.clock), neighbours)
        if GATEWAY in hosted:
            from services.gateway.served_log import ServedLog

            self._shared.served = ServedLog(self._keep, keep=settings.served_days > 0)
        first = Bundle(bundle or settings.bundle)
        if owned := sorted(set(hosted) - {GATEWAY}):
            self._closing.append(store.StateLock(settings.state / "-".join(owned)).release)
        try:
            self._open_stores(first)
            self.exchange = Exchange(self._shared, Generation(self._shared, first))
            self._next = NextBundle(self._shared, self.exchange)
        except BaseException:
            self._close()
            raise
        self._companions = Companions(self._shared)
        self._tell()

    @property
    def now(self) -> Generation:
        """The services of the bundle that is served now."""
        return self.exchange.now

    @property
    def bundle(self) -> Bundle:
        """What is served now."""
        return self.now.bundle

    @property
    def gateway(self) -> "GatewayServicer | None":
        """The gateway of the bundle that is served now, if this process has one."""
        return self.now.gateway

    async def start(self) -> None:
        """Accept calls; a service is SERVING once it has what it needs."""
        for directory in self.settings.beside:
            await self._companions.add(directory, self.now)
        if self.now.catalogue is not None:
            await self.now.catalogue.reencode()
        self.exchange.begin()
        self._tasks = [asyncio.ensure_future(kept_up(run)) for run in self._companions.background]
        if self._shared.served is not None:
            self._logging = asyncio.ensure_future(kept_up(self._shared.served.run))
        services = [Service(NAMES[name], to, _add(name)) for name, to in self.exchange.currents.items()]
        if self.settings.metrics:
            self.metrics_port, close = self.telemetry.serve(self.settings.metrics)
            self._closing.append(close)
        self._server = Server(services, self.settings.address, called=self.telemetry.called)
        await self._server.start()
        self.port = self._server.port
        self._next.look(partial(self._server.say, NEXT_BUNDLE))
        for name in self._shared.hosted:
            if name == RANKING:  # it is nothing without items, of which another process may have to tell
                self._tasks.append(asyncio.ensure_future(self._announce(name)))
            else:
                await self._server.set_ready(NAMES[name])

    async def stop(self) -> None:
        """Drain, then close what was opened, the last first."""
        if self._server is not None:
            await self._server.stop(self.settings.grace)
        await ended([self._logging] if self._logging else [])
        if self._shared.served is not None:
            await self._shared.served.close()
        await self._next.stop()
        await self.exchange.stop()  # whose calls have ended
        await ended(self._tasks)
        await self._companions.close()
        self.exchange.close()
        await self._shared.neighbours.close()
        self._close()

    def _close(self) -> None:
        for close in reversed(self._closing):
            close()

    async def _announce(self, name: str) -> None:
        await self.exchange.ready.wait()
        if self._server is not None:
            await self._server.set_ready(NAMES[name])

    def _open_stores(self, bundle: Bundle) -> None:
        shared, settings = self._shared, self.settings
        if EMBEDDING in shared.hosted:
            from services.embedding import items

            engine = self._database(settings.embedding_database, EMBEDDING)
            shared.items = items.ItemStore(engine, shared.clock)
            self._closing.append(shared.items.close)
        if RANKING in shared.hosted:
            from services.ranking import behaviour

            engine = self._database(settings.ranking_database, RANKING)
            shared.events = behaviour.BehaviourStore(engine, bundle.profile.event_types, shared.clock)
            self._closing.append(shared.events.close)

    def _database(self, url: str, name: str) -> Any:
        self.settings.state.mkdir(parents=True, exist_ok=True)
        engine = store.open_engine(url or f"sqlite:///{(self.settings.state / name).absolute()}.sqlite")
        self._closing.append(engine.dispose)
        return engine

    async def _keep(self, pages: Any) -> None:
        await self.now.log(pages)  # of whichever bundle is served by then

    def _tell(self) -> None:
        """Let operators read what the encoders, the indexes and the next bundle do."""

        def work(of: str) -> Mapping[str, float]:
            return getattr(self.now.catalogue.encoding, of) if self.now.catalogue else {}

        def items() -> Mapping[str, float]:
            return (
                {space: len(index) for space, index in self.now.view.spaces.items()} if self.now.view else {}
            )

        def sequence() -> Mapping[str, float]:
            return {"searchable": self.now.view.sequence} if self.now.view else {}

        def preparation() -> Mapping[str, float]:
            return {"done": at.done, "left": at.left} if (at := self._next.preparation) else {}

        def pages() -> Mapping[str, float]:
            return self._shared.served.counts if self._shared.served else {}

        self.telemetry.add(
            Reading("vitrine_served_pages_total", "Pages logged, and lost", "state", pages, counts=True),
            Reading("vitrine_encoded_total", "Rows encoded", "kind", lambda: work("totals"), counts=True),
            Reading(
                "vitrine_encoding_waiting",
                "Rows that wait for their encoder",
                "kind",
                lambda: work("waiting"),
            ),
            Reading("vitrine_index_items", "Items that can be found, by space", "space", items),
            Reading("vitrine_catalogue_sequence", "The last change that is reflected", "of", sequence),
            Reading(
                "vitrine_next_bundle_contents",
                "Texts and photographs encoded for the next bundle, and those that are left",
                "state",
                preparation,
            ),
        )


async def first_bundle(settings: Settings, hosted: Collection[str]) -> Path:
    """The bundle that an `App` had best begin with; see `next_bundle.first`."""
    neighbours = _neighbours(settings, hosted)
    try:
        return await next_bundle.first(settings, neighbours)
    finally:
        await neighbours.close()


def _neighbours(settings: Settings, hosted: Collection[str]) -> Neighbours:
    """Those of other processes that the hosted services ask."""
    return Neighbours(
        "" if EMBEDDING in hosted else settings.embedding,
        settings.ranking if GATEWAY in hosted and RANKING not in hosted else "",
    )


def _add(name: str) -> Callable[[Any, Any], None]:
    """The generated function that adds a service to a server."""
    stubs = importlib.import_module(_STUBS[name])
    service = NAMES[name].rpartition(".")[2]
    add: Callable[[Any, Any], None] = getattr(stubs, f"add_{service}Servicer_to_server")
    return add


def _clock(fixed: datetime | None) -> Callable[[], datetime]:
    return (lambda: datetime.now(UTC)) if fixed is None else (lambda: fixed)
