"""The composition root: builds the services that a process hosts and connects them."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from services import store
from services.bundle import Bundle, Catalogue, created, newest
from services.errors import FailedPrecondition
from services.follower import Follower
from services.item_table import ItemTable
from services.server import Server, Service
from services.settings import Settings
from services.telemetry import Reading, Telemetry

if TYPE_CHECKING:
    from services.gateway.servicer import GatewayServicer

EMBEDDING, RANKING, GATEWAY = "embedding", "ranking", "gateway"
ALL = (EMBEDDING, RANKING, GATEWAY)
NAMES = {
    EMBEDDING: "vitrine.embedding.v1.EmbeddingService",
    RANKING: "vitrine.ranking.v1.RankingService",
    GATEWAY: "vitrine.gateway.v1.RecommendationService",
}


NEXT_BUNDLE = "vitrine.next-bundle"
"""The health of a newer bundle than the served one: NOT_SERVING while items are encoded for it."""
_PAUSE = 5.0
_log = logging.getLogger(__name__)


class App:
    """The services `hosted` by one process over one bundle and one state directory.

    Raises:
        FailedPrecondition: the bundle is none, or another process has the state.
    """

    def __init__(self, settings: Settings, hosted: Collection[str] = ALL) -> None:
        self.settings, self._hosted = settings, tuple(hosted)
        self.bundle = Bundle(settings.bundle)
        self.clock: Callable[[], datetime] = _clock(settings.clock)
        self._closing: list[Callable[[], None]] = []
        self._followers: list[Follower] = []
        self._background: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._services: list[Service] = []
        self._server: Server | None = None
        self.gateway: GatewayServicer | None = None
        self.port = 0
        self._preparation: Any = None
        if EMBEDDING in hosted or RANKING in hosted:
            lock = store.StateLock(settings.state / "-".join(sorted(set(hosted) - {GATEWAY})))
            self._closing.append(lock.release)
        self.telemetry, self.metrics_port = Telemetry(), 0
        self._view: Any = None
        self._catalogue: Any = None
        self._local: dict[str, Any] = {}
        builds = {EMBEDDING: self._embedding, RANKING: self._ranking, GATEWAY: self._gateway}
        try:
            for name, build in builds.items():
                if name in hosted:
                    build()
        except BaseException:
            self._close()
            raise

    async def start(self) -> None:
        """Accept calls; a service is SERVING once it has what it needs."""
        if EMBEDDING in self._hosted:
            await self._catalogue.reencode()
        self._tasks = [asyncio.ensure_future(follower.run()) for follower in self._followers]
        self._tasks += [asyncio.ensure_future(_kept_up(run)) for run in self._background]
        self._server = Server(self._services, self.settings.address, called=self.telemetry.called)
        await self._server.start()
        if self.settings.metrics:
            self.metrics_port, close = self.telemetry.serve(self.settings.metrics)
            self._closing.append(close)
        self.port = self._server.port
        waits = {RANKING: self._followers[0].ready} if RANKING in self._hosted and self._followers else {}
        for name in self._hosted:
            if name in waits:
                self._tasks.append(asyncio.ensure_future(self._announce(name, waits[name])))
            else:
                await self._server.set_ready(NAMES[name])

    async def stop(self) -> None:
        """Drain, then close what was opened, the last first."""
        if self._server is not None:
            await self._server.stop(self.settings.grace)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close()

    def _close(self) -> None:
        """Close what was opened, the last first."""
        for close in reversed(self._closing):
            close()

    async def _announce(self, name: str, ready: asyncio.Event) -> None:
        await ready.wait()
        if self._server is not None:
            await self._server.set_ready(NAMES[name])

    def _database(self, url: str, name: str) -> Any:
        self.settings.state.mkdir(parents=True, exist_ok=True)
        engine = store.open_engine(url or f"sqlite:///{(self.settings.state / name).absolute()}.sqlite")
        self._closing.append(engine.dispose)
        return engine

    def _embedding(self) -> None:
        from vitrine.embedding.v1 import embedding_service_pb2_grpc as grpc_stubs

        from services.embedding import catalogue, encoding, fetching, items, pending, servicer, view

        kept = items.ItemStore(self._database(self.settings.embedding_database, EMBEDDING), self.clock)
        text, image = self._encoders(self.bundle)
        if not kept.imported(self.bundle.version):
            brought = self.bundle.catalogue()
            since = [created(item) for item in brought.items]
            blocks = _blocks(brought, text, image)
            kept.load(self.bundle.version, brought.items, blocks, since).result()
        work = encoding.Encoding(text, image)
        self._view = view.CatalogueView(kept, work.digests, self._indexes(kept, work))
        self._catalogue = catalogue.Catalogue(self._view, work)
        self._tell_of(work)
        self._background += [self._view.maintain, self._look_for_the_next]
        self._closing.append(self._catalogue.close)
        if image:
            fetcher = partial(fetching.Fetcher, allowed=self.settings.fetch_networks)
            self._background.append(pending.PendingPhotographs(self._catalogue, fetcher).run)
        hosted = servicer.EmbeddingServicer(self._catalogue, self.bundle.version)
        self._local[EMBEDDING] = hosted
        self._services.append(
            Service(NAMES[EMBEDDING], hosted, grpc_stubs.add_EmbeddingServiceServicer_to_server)
        )

    def _tell_of(self, work: Any) -> None:
        self.telemetry.add(
            Reading("vitrine_encoded_total", "Rows encoded", "kind", lambda: work.finished, counts=True),
            Reading(
                "vitrine_encoding_waiting", "Rows that wait for their encoder", "kind", lambda: work.waiting
            ),
            Reading(
                "vitrine_index_items",
                "Items that can be found, by space",
                "space",
                lambda: {space: len(index) for space, index in self._view.spaces.items()},
            ),
            Reading(
                "vitrine_catalogue_sequence",
                "The last change that search and item table reflect",
                "of",
                lambda: {"searchable": self._view.sequence},
            ),
            Reading(
                "vitrine_next_bundle_contents",
                "Texts and photographs encoded for the next bundle, and those that are left",
                "state",
                lambda: {"done": at.done, "left": at.left} if (at := self._preparation) else {},
            ),
        )

    def _indexes(self, items: Any, work: Any) -> dict[str, Any]:
        """What searches each space: Milvus if there is one, else this process, by a GPU if it has one."""
        if self.settings.milvus:
            from services.embedding import milvus

            client = milvus.connect(self.settings.milvus, self.settings.milvus_token)
            self._closing.append(client.close)
            return {
                space: milvus.MilvusIndex(client, items.name, space, work.digests[space], dimension)
                for space, dimension in work.dimensions.items()
            }
        from services.embedding import on_device, segmented, segments

        device, folder = self.settings.device, self.settings.state / "index"
        build = (
            segments.Builder(self.settings.storage) if device == "cpu" else on_device.DeviceBuilder(device)
        )
        return {
            space: segmented.SegmentedIndex(
                dimension,
                self.settings.graph_rows,
                build,
                segmented.Keep(folder / f"{space}-{work.digests[space]}", items.name),
                partial(items.vectors, space=space, digest=work.digests[space]),
            )
            for space, dimension in work.dimensions.items()
        }

    def _encoders(self, bundle: Bundle) -> tuple[Any, Any]:
        from services.embedding import encoders

        photographs = bundle.component("image")
        text = encoders.TextEncoder(bundle.directory / "text", self.settings.device)
        return text, encoders.ImageEncoder(photographs, self.settings.device) if photographs else None

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
        """Encode for the newest bundle, and keep it up; ends only when that cannot be done."""
        from services.embedding import encoding, preparing

        if self._server is None:
            return
        await self._server.say(NEXT_BUNDLE, False)
        try:
            bundle = await asyncio.to_thread(Bundle, self.settings.bundle)
            text, image = await asyncio.to_thread(self._encoders, bundle)
            brought = await asyncio.to_thread(bundle.catalogue)
            work = encoding.Encoding(text, image, self._catalogue.encoding)
            try:
                preparation = preparing.Preparation(self._view, work, bundle.version)
                self._preparation = preparation
                await preparation.bring(brought.items, _blocks(brought, text, image))
                done = await preparation.run()
                _log.info("bundle %s is prepared: start again to serve it", bundle.version)
                await self._server.say(NEXT_BUNDLE, True)
                while True:  # what is written until then is encoded for both
                    await self._view.moved(done)
                    done = await preparation.run(done)
            finally:
                await asyncio.to_thread(work.close)
        except Exception:  # the one that is served goes on; it is tried again at the next look
            _log.exception("the newest bundle in %s cannot be prepared", self.settings.bundle)
            await self._server.say(NEXT_BUNDLE, False)

    def _ranking(self) -> None:
        from vitrine.ranking.v1 import ranking_service_pb2_grpc as grpc_stubs

        from services.ranking import behaviour, graph, ranking, servicer

        engine = self._database(self.settings.ranking_database, RANKING)
        events = behaviour.BehaviourStore(engine, self.bundle.profile.event_types, self.clock)
        directory = self.bundle.component("graph")
        fitted = graph.ItemGraph.load(directory) if directory else graph.ItemGraph.empty()
        domain = ranking.Ranking(
            events,
            self._items(ItemTable()),
            fitted,
            self.bundle.profile,
            self.bundle.component("ctr"),
            self.bundle.component("reranker"),
            self.bundle.component("sequence"),
        )
        self._closing.append(domain.close)
        hosted = servicer.RankingServicer(domain, self.bundle.version)
        self._local[RANKING] = hosted
        self._services.append(
            Service(NAMES[RANKING], hosted, grpc_stubs.add_RankingServiceServicer_to_server)
        )

    def _gateway(self) -> None:
        from vitrine.gateway.v1 import recommendation_service_pb2_grpc as grpc_stubs

        from services.gateway import clients, pipeline, servicer, tokens

        mirror = self._items(None)
        embedding: clients.Embedding = (
            clients.LocalEmbedding(self._local[EMBEDDING])
            if EMBEDDING in self._local
            else clients.RemoteEmbedding(self.settings.embedding)
        )
        ranking: clients.Ranking = (
            clients.LocalRanking(self._local[RANKING])
            if RANKING in self._local
            else clients.RemoteRanking(self.settings.ranking)
        )
        directory = self.bundle.component("popular")
        popular = np.load(directory / "numbers.npy") if directory else np.empty(0, np.int64)
        stages = pipeline.Pipeline(embedding, ranking, mirror.table, popular, self.bundle.version)
        self.gateway = servicer.GatewayServicer(
            stages, embedding, ranking, tokens.Tokens(self._secret()), self.clock, mirror.wait_for
        )
        self._services.append(
            Service(NAMES[GATEWAY], self.gateway, grpc_stubs.add_RecommendationServiceServicer_to_server)
        )

    def _items(self, table: ItemTable | None) -> Any:
        """The items: the catalogue of this process, or a follower; a gateway's begins with the bundle's."""
        if self._view is None:
            from services.gateway import clients

            follower = Follower(
                clients.watch(self.settings.embedding), table or _table_of(self.bundle.catalogue())
            )
            self._followers.append(follower)
            self._view = follower
        return self._view

    def _secret(self) -> bytes:
        if self.settings.secret:
            return self.settings.secret.encode()
        self.settings.state.mkdir(parents=True, exist_ok=True)
        path = self.settings.state / "secret"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        return path.read_bytes()


async def _kept_up(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run what never ends; should it fail, begin again."""
    while True:
        try:
            await run()
            return
        except Exception:  # the store may be away for a while
            _log.exception("%s failed and begins again", getattr(run, "__qualname__", run))
            await asyncio.sleep(_PAUSE)


def _blocks(brought: Catalogue, text: Any, image: Any) -> list[Any]:
    """The vectors that a bundle brings, by its encoders."""
    from services.embedding.items import Block

    digests = {"text": text.digest, "image": image.digest if image else ""}
    return [Block(s, digests[s], values, brought.present[s]) for s, values in brought.vectors.items()]


def _clock(fixed: datetime | None) -> Callable[[], datetime]:
    return (lambda: datetime.now(UTC)) if fixed is None else (lambda: fixed)


def _table_of(brought: Catalogue) -> ItemTable:
    since = [created(item) for item in brought.items]
    return ItemTable.of(brought.items, brought.vectors, brought.present, since)
