"""The composition root: a process, its server, and the bundle that it serves now."""

import asyncio
import importlib
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services import store
from services.bundle import Bundle, newest
from services.companions import Companions
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
_PAUSE, _LONGEST_PAUSE, _PATIENCE = 5.0, 600.0, 1.0
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
        self._logging: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Future[None]] = set()
        self._preparation: Preparation | None = None
        self._server: Server | None = None
        self.port = 0
        self._shared = Shared(settings, tuple(name for name in ALL if name in hosted), _clock(settings.clock))
        if GATEWAY in hosted:
            from services.gateway.served_log import ServedLog

            self._shared.served = ServedLog(self._keep, keep=settings.served_days > 0)
        if settings.beside and self._shared.hosted != ALL:
            raise FailedPrecondition("bundles are served beside where one process has all services")
        bundle = Bundle(settings.bundle)
        if owned := sorted(set(hosted) - {GATEWAY}):
            self._closing.append(store.StateLock(settings.state / "-".join(owned)).release)
        try:
            self._open_stores(bundle)
            self.now = Generation(self._shared, bundle)
            self._alive = [self.now]  # those with calls that go on, the served one last
        except BaseException:
            self._close()
            raise
        self._companions = Companions(self._shared)
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
        for directory in self.settings.beside:
            await self._companions.add(directory, self.now)
        if self.now.catalogue is not None:
            await self.now.catalogue.reencode()
        self._tasks = _running(self.now)
        self._tasks += [asyncio.ensure_future(_kept_up(run)) for run in self._companions.background]
        if self._shared.served is not None:
            self._logging = asyncio.ensure_future(_kept_up(self._shared.served.run))
        services = [Service(NAMES[name], to, _add(name)) for name, to in self._currents.items()]
        if self.settings.metrics:
            self.metrics_port, close = self.telemetry.serve(self.settings.metrics)
            self._closing.append(close)
        self._server = Server(services, self.settings.address, called=self.telemetry.called)
        await self._server.start()
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
        if self._looking:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await asyncio.gather(*self._retiring, return_exceptions=True)  # their calls have ended
        await _ended([self._logging] if self._logging else [])
        if self._shared.served is not None:
            await self._shared.served.close()
        await _ended(self._tasks)
        await self._companions.close()
        for generation in reversed(self._alive):
            generation.close()
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
            return {"done": at.done, "left": at.left} if (at := self._preparation) else {}

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

    async def _look_for_the_next(self) -> None:
        """Prepare the bundle that is last in the directory, where that is not the served one."""
        seen, preparing, failed, again_at = "", None, 0, 0.0
        try:
            while self.settings.look_every:
                await asyncio.sleep(self.settings.look_every)
                try:
                    directory = await asyncio.to_thread(newest, self.settings.bundle)
                except (FailedPrecondition, OSError):  # they are being moved
                    continue
                name, served = directory.name, self.bundle.directory.name
                same = name == seen and name != served
                if same and preparing and (not preparing.done() or time.monotonic() < again_at):
                    continue
                failed = failed + 1 if same else 0
                if preparing:  # its models leave the encoders' thread before others come
                    preparing.cancel()
                    await asyncio.gather(preparing, return_exceptions=True)
                seen, preparing = name, None
                if name != served:
                    pause = min(self.settings.look_every * 2**failed, _LONGEST_PAUSE)
                    again_at = time.monotonic() + pause
                    preparing = asyncio.ensure_future(self._prepare(directory))
        finally:
            if preparing:
                preparing.cancel()
                await asyncio.gather(preparing, return_exceptions=True)

    async def _prepare(self, directory: Path) -> None:
        """Encode for a bundle, then serve it, or keep it up until a start on it."""
        from services.embedding import encoding, preparing

        if self._server is None:
            return
        await self._server.say(NEXT_BUNDLE, False)
        work: Encoding | None = None
        try:
            bundle = await asyncio.to_thread(Bundle, directory)
            text, image = await asyncio.to_thread(encoders_of, bundle, self.settings.device)
            brought = await asyncio.to_thread(bundle.catalogue)
            now = self.now
            work = encoding.Encoding(text, image, now.catalogue.encoding)
            self._preparation = preparation = preparing.Preparation(now.view, work, bundle.version)
            await preparation.bring(brought.items, blocks_of(brought, work.digests))
            done = await preparation.once()
            if self._exchangeable(bundle):
                new = await self._second(bundle, work, preparation, done)
                work = None  # the new generation's
                self._exchange(new)
                await self._server.say(NEXT_BUNDLE, True)
                return
            done = await preparation.run(done)
            await self._server.say(NEXT_BUNDLE, True)
            _log.info("bundle %s is prepared: start again to serve it", bundle.version)
            while True:  # what is written until then is encoded for both
                await now.view.moved(done)
                done = await preparation.run(done)
        except Exception:  # the one that is served goes on; it is tried again at the next look
            _log.exception("the bundle in %s cannot be prepared", directory)
            await self._server.say(NEXT_BUNDLE, False)
        finally:
            if work is not None:
                self._encode_no_more(work)
                await asyncio.shield(asyncio.to_thread(work.close))

    def _encode_no_more(self, work: "Encoding") -> None:
        for generation in self._alive:
            generation.catalogue.beside = tuple(e for e in generation.catalogue.beside if e is not work)

    def _exchangeable(self, bundle: Bundle) -> bool:
        """Whether a bundle can be served without a start; other types of events want another store."""
        alone = self._shared.hosted == ALL and not self.settings.beside
        if not self.settings.exchange or not alone or self._shared.events is None:
            return False
        same = self._shared.events.types == set(bundle.profile.event_types)
        if not same:
            _log.warning("bundle %s has other types of events", bundle.version)
        return same

    async def _second(
        self, bundle: Bundle, work: "Encoding", preparation: "Preparation", done: int
    ) -> Generation:
        """A generation beside the served one that lacks nothing; as it was before if that fails."""
        old, making = self.now, None
        # From now on what is written has vectors by both; what was written before gets them in one more pass.
        for generation in self._alive:
            generation.catalogue.beside = (*generation.catalogue.beside, work)
        since = old.view.written
        try:
            await asyncio.wrap_future(old.view.items.settled())
            await old.view.follow()
            await preparation.once(done)
            making = asyncio.ensure_future(asyncio.to_thread(Generation, self._shared, bundle, work))
            new = await asyncio.shield(making)
            await new.tidy()
            await asyncio.to_thread(new.load_items)
            await new.catch_up(old)
            if any(work not in generation.catalogue.beside for generation in self._alive):
                raise RuntimeError("its encoders failed beside the served ones")
        except BaseException:
            if making is not None:  # a thread cannot be cancelled
                await asyncio.shield(self._kept(_closed(making)))
                # It may have put older vectors into an engine's index that both use.
                await asyncio.shield(self._kept(old.view.repeat(since)))
            raise
        return new

    def _kept(self, work: Coroutine[Any, Any, None]) -> "asyncio.Future[None]":
        """A task that `stop` waits for."""
        task = asyncio.ensure_future(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    def _exchange(self, new: Generation) -> None:
        """Let calls go to another generation from now on; each ends on the one that it began on."""
        old, ended, self._preparation = self.now, self._tasks, None
        drained = [current.exchange(new.servicers[name]) for name, current in self._currents.items()]
        new.succeed(old)
        for generation in self._alive:  # whose calls go on, writes among them
            generation.catalogue.view, generation.ranking.heirs = new.view, [new.ranking]
        self._alive.append(new)
        self.now, self._tasks = new, _running(new)
        old.view.end_feeds()
        _log.info("bundle %s is served", new.bundle.version)

        async def retire() -> None:
            await _ended(ended)
            try:
                await new.view.follow()
                await old.view.follow()  # for who waits there
            except Exception:  # `maintain` tries again
                _log.exception("the store cannot be followed")
            await asyncio.gather(*drained)
            self._alive.remove(old)
            self._encode_no_more(old.catalogue.encoding)
            await asyncio.to_thread(old.close)

        self._kept(retire())


async def _closed(making: "asyncio.Future[Generation]") -> None:
    """Wait for a generation that nobody wants any more, and close it."""
    try:
        made = await making
    except Exception:  # whoever waited for it was told
        return
    try:
        await asyncio.to_thread(made.close)
    except Exception:
        _log.exception("bundle %s is not served, and did not close", made.bundle.version)


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
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_PATIENCE)  # one may have lost a cancellation


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
