"""The composition root: a process, its server, and the bundle that it serves now."""

import asyncio
import importlib
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from services import store
from services.bundle import Bundle, newest
from services.errors import FailedPrecondition
from services.generation import EMBEDDING, GATEWAY, RANKING, Generation, Shared, blocks_of, encoders_of
from services.server import Current, Server, Service
from services.settings import Settings
from services.telemetry import Reading, Telemetry

if TYPE_CHECKING:
    from services.embedding.encoding import Encoding
    from services.embedding.preparing import Preparation
    from services.gateway.servicer import GatewayServicer

ALL = (EMBEDDING, RANKING, GATEWAY)
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
_PAUSE = 5.0
_log = logging.getLogger(__name__)


class App:
    """The services `hosted` by one process, over one state directory and the newest bundle.

    Raises:
        FailedPrecondition: the bundle is none, or another process has the state.
        Unavailable: an index's engine is away.
    """

    def __init__(self, settings: Settings, hosted: Collection[str] = ALL) -> None:
        self.settings = settings
        self.telemetry, self.metrics_port = Telemetry(), 0
        self._closing: list[Callable[[], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._looking: asyncio.Task[None] | None = None
        self._preparation: Preparation | None = None
        self._server: Server | None = None
        self.port = 0
        self._shared = Shared(settings, tuple(name for name in ALL if name in hosted), _clock(settings.clock))
        bundle = Bundle(settings.bundle)
        if owned := sorted(set(hosted) - {GATEWAY}):
            self._closing.append(store.StateLock(settings.state / "-".join(owned)).release)
        try:
            self._open_stores(bundle)
            self.now = Generation(self._shared, bundle)
        except BaseException:
            self._close()
            raise
        self._currents = {name: Current(servicer) for name, servicer in self.now.servicers.items()}
        self._tell()

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
        await self.now.catch_up()
        self._tasks = _running(self.now)
        services = [Service(NAMES[name], to, _add(name)) for name, to in self._currents.items()]
        self._server = Server(services, self.settings.address, called=self.telemetry.called)
        await self._server.start()
        if self.settings.metrics:
            self.metrics_port, close = self.telemetry.serve(self.settings.metrics)
            self._closing.append(close)
        self.port = self._server.port
        if EMBEDDING in self._shared.hosted:
            self._looking = asyncio.ensure_future(_kept_up(self._look_for_the_next))
        waits = {RANKING: self.now.followers[0].ready} if self.now.followers else {}
        for name in self._shared.hosted:
            if name in waits:
                self._tasks.append(asyncio.ensure_future(self._announce(name, waits[name])))
            else:
                await self._server.set_ready(NAMES[name])

    async def stop(self) -> None:
        """Drain, then close what was opened, the last first."""
        if self._server is not None:
            await self._server.stop(self.settings.grace)
        await _ended([self._looking] if self._looking else [])
        await _ended(self._tasks)
        self.now.close()
        self._close()

    def _close(self) -> None:
        for close in reversed(self._closing):
            close()

    async def _announce(self, name: str, ready: asyncio.Event) -> None:
        await ready.wait()
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
            return {"done": at.done, "left": at.left} if (at := self._preparation) else {}

        self.telemetry.add(
            Reading("vitrine_encoded_total", "Rows encoded", "kind", lambda: work("finished"), counts=True),
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

    async def _look_for_the_next(self) -> None:
        """Encode for a newer bundle beside the calls, so that a start on it finds everything done."""
        seen, preparing = self.bundle.directory.name, None
        try:
            while self.settings.look_every:
                await asyncio.sleep(self.settings.look_every)
                try:
                    name = (await asyncio.to_thread(newest, self.settings.bundle)).name
                except (FailedPrecondition, OSError):  # they are being moved
                    continue
                if name == seen and (preparing is None or not preparing.done()):
                    continue
                if preparing is not None:  # its models leave the encoders' thread before others come
                    preparing.cancel()
                    await asyncio.gather(preparing, return_exceptions=True)
                if name == self.bundle.directory.name:
                    continue
                seen, preparing = name, asyncio.ensure_future(self._prepare())
        finally:
            if preparing is not None:
                preparing.cancel()
                await asyncio.gather(preparing, return_exceptions=True)

    async def _prepare(self) -> None:
        """Encode for the newest bundle, then serve it, or keep it up until a start on it."""
        from services.embedding import encoding, preparing

        now = self.now
        if self._server is None or now.catalogue is None or now.view is None:
            return
        await self._server.say(NEXT_BUNDLE, False)
        try:
            bundle = await asyncio.to_thread(Bundle, self.settings.bundle)
            text, image = await asyncio.to_thread(encoders_of, bundle, self.settings.device)
            brought = await asyncio.to_thread(bundle.catalogue)
            work = encoding.Encoding(text, image, now.catalogue.encoding)
            served = False
            try:
                self._preparation = preparation = preparing.Preparation(now.view, work, bundle.version)
                await preparation.bring(brought.items, blocks_of(brought, work.digests))
                done = await preparation.run()
                if self.settings.exchange and self._shared.hosted == ALL:
                    served = await self._exchange(bundle, work)
                await self._server.say(NEXT_BUNDLE, True)
                if served:
                    return
                _log.info("bundle %s is prepared: start again to serve it", bundle.version)
                while True:  # what is written until then is encoded for both
                    await now.view.moved(done)
                    done = await preparation.run(done)
            finally:
                if not served:
                    await asyncio.to_thread(work.close)
        except Exception:  # the one that is served goes on; it is tried again at the next look
            _log.exception("the newest bundle in %s cannot be prepared", self.settings.bundle)
            await self._server.say(NEXT_BUNDLE, False)

    async def _exchange(self, bundle: Bundle, work: "Encoding") -> bool:
        """Serve another bundle whole; a call ends on the one it began on. Whether that was done."""
        old = self.now
        old.catalogue.beside = work
        await _ended(self._tasks)  # two would compact the same index where the encoder is the same
        new: Generation | None = None
        try:
            await asyncio.wrap_future(old.view.items.settled())
            new = await asyncio.to_thread(Generation, self._shared, bundle, work)
            await new.tidy()
            await new.catch_up()
        except Exception as error:
            old.catalogue.beside = None
            if new is not None:
                await asyncio.to_thread(new.close)
            self._tasks = _running(old)
            if not isinstance(error, FailedPrecondition):
                raise
            _log.warning("%s; start again to serve it", error)
            return False
        drained = [current.exchange(new.servicers[name]) for name, current in self._currents.items()]
        self.now, self._tasks = new, _running(new)
        new.succeed(old)
        _log.info("bundle %s is served", bundle.version)
        old.view.end_feeds()
        await new.catch_up()  # what was written since it did so first
        await asyncio.gather(*drained)
        await new.catch_up()
        await asyncio.to_thread(old.close)
        return True


def _add(name: str) -> Callable[[Any, Any], None]:
    """The generated function that adds a service to a server."""
    stubs = importlib.import_module(_STUBS[name])
    service = NAMES[name].rpartition(".")[2]
    add: Callable[[Any, Any], None] = getattr(stubs, f"add_{service}Servicer_to_server")
    return add


def _running(generation: Generation) -> list["asyncio.Task[None]"]:
    tasks = [asyncio.ensure_future(follower.run()) for follower in generation.followers]
    return tasks + [asyncio.ensure_future(_kept_up(run)) for run in generation.background]


async def _ended(tasks: Collection["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _kept_up(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run what never ends; should it fail, begin again."""
    while True:
        try:
            await run()
            return
        except Exception:  # the store may be away for a while
            _log.exception("%s failed and begins again", getattr(run, "__qualname__", run))
            await asyncio.sleep(_PAUSE)


def _clock(fixed: datetime | None) -> Callable[[], datetime]:
    return (lambda: datetime.now(UTC)) if fixed is None else (lambda: fixed)
