"""One bundle loaded into a process: its services, over stores that outlive it.

Part of the composition root. Imports the code of a service only where the process hosts that service.
"""

import asyncio
import hashlib
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from services.catalog.bundle import Bundle, BundleCatalog, creation_time
from services.catalog.item_table import ItemTable
from services.core import executors, gc_tuning
from services.core.errors import Unavailable
from services.rpc.change_feed_follower import ChangeFeedFollower
from services.rpc.peers import Peers
from services.serving.settings import Settings
from services.storage.signing_secret import signing_secret

if TYPE_CHECKING:
    from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

    from services.embedding.catalog.search_view import SearchView
    from services.embedding.catalog.writer import CatalogWriter
    from services.embedding.encoders.encoder_pool import EncoderPool
    from services.embedding.encoders.encoders import ImageEncoder, TextEncoder
    from services.embedding.index.vector_index import VectorIndex
    from services.embedding.store.bundle_import import VectorBlock
    from services.embedding.store.item_store import ItemStore
    from services.gateway.experiments.scenarios import Scenarios
    from services.gateway.recommend.impression_log import ImpressionLog
    from services.gateway.servicer import GatewayServicer
    from services.ranking.events.event_followers import EventFollowers
    from services.ranking.events.event_store import EventStore
    from services.ranking.events.retention_clock import RetentionClock
    from services.ranking.service import RankingService

ALL = EMBEDDING, RANKING, GATEWAY = "embedding", "ranking", "gateway"
_MAX_ROUNDS, _ROUND_PAUSE = 100, 0.05

T = TypeVar("T")
Loop = Callable[[], Awaitable[None]]
"""Runs until its task is canceled."""


@dataclass
class ProcessResources:
    """What a process has once, whichever bundle it serves; a store only where its service is `hosted`.

    `bundle_versions` are the versions that calls may name, the current one first. `compute` is the thread
    that computes pages, None in a process without the ranking service.
    """

    settings: Settings
    hosted: tuple[str, ...]
    clock: Callable[[], datetime]
    peers: Peers
    bundle_versions: list[str] = field(default_factory=list)
    item_store: "ItemStore | None" = None
    event_store: "EventStore | None" = None
    event_followers: "EventFollowers | None" = None
    compute: ThreadPoolExecutor | None = None
    impression_log: "ImpressionLog | None" = None


class LoadedBundle:
    """The services of a bundle; `servicers` has them by name.

    `loaded_loops` have to run while the bundle is loaded: they let it follow the writes. `current_loops` have
    to run while it is the current one. `encoders` are the bundle's encoders if they exist already; their
    creator closes them unless `take_encoder_threads` is called.

    Raises:
        FailedPrecondition: a part of the bundle does not load.
        Unavailable: the engine of an index does not answer.
    """

    def __init__(
        self, resources: ProcessResources, bundle: Bundle, encoders: "EncoderPool | None" = None
    ) -> None:
        self.bundle, self._resources, self._settings = bundle, resources, resources.settings
        self.servicers: dict[str, object] = {}
        self.loaded_loops: list[Loop] = []
        self.current_loops: list[Loop] = []
        self.ready = asyncio.Event()
        """Set once it has the items, which may come from another process."""
        self.gateway: GatewayServicer | None = None
        self.retention_clock: RetentionClock | None = None
        self._view: SearchView | None = None
        self._catalog: CatalogWriter | None = None
        self._ranking: RankingService | None = None
        self._log_pages: Callable[[ranking_pb.LogPagesRequest], Awaitable[object]] | None = None
        self._follower: ChangeFeedFollower | None = None
        self._closing: list[Callable[[], None]] = []
        try:
            with gc_tuning.freeze_loaded():
                self._load(encoders)
        except BaseException:
            self.close()
            raise

    def hosts(self, service: str) -> bool:
        """Whether this process hosts a service."""
        return service in self._resources.hosted

    @property
    def view(self) -> "SearchView":
        """The indexes and the item table. Only for a process that hosts the embedding service."""
        return _hosted(self._view, EMBEDDING)

    @property
    def catalog(self) -> "CatalogWriter":
        """Writes items. Only for a process that hosts the embedding service."""
        return _hosted(self._catalog, EMBEDDING)

    @property
    def ranking(self) -> "RankingService":
        """The domain of the ranking service. Only for a process that hosts it."""
        return _hosted(self._ranking, RANKING)

    async def log_pages(self, pages: "ranking_pb.LogPagesRequest") -> object:
        """Log pages that the gateway answered. Only for a process that hosts the gateway."""
        return await _hosted(self._log_pages, GATEWAY)(pages)

    def _load(self, encoders: "EncoderPool | None") -> None:
        if self.hosts(EMBEDDING):
            self._load_embedding(encoders)
            self.ready.set()
        if self.hosts(RANKING):
            self._load_ranking()
        if self.hosts(GATEWAY):
            self._load_gateway()

    def close(self) -> None:
        """Close everything in reverse order."""
        for close in reversed(self._closing):
            close()

    def import_items(self) -> None:
        """Import the bundle's items into the item store, unless they were imported before. Blocks."""
        assert self._resources.item_store is not None  # noqa: S101 - its service is hosted
        self._import_items(self._resources.item_store, self.catalog.encoders)

    def _import_items(self, item_store: "ItemStore", encoders: "EncoderPool") -> None:
        version = self.bundle.version
        if item_store.imported(version):
            return
        contents = self.bundle.catalog()
        times = [creation_time(item) for item in contents.items]
        blocks = vector_blocks(contents, encoders.digests)
        item_store.load(version, contents.items, blocks, times, any_shop=self._settings.allow_other_shop)

    async def tidy(self) -> None:
        """Compact the indexes now: a large one is slow until it is compacted."""
        for index in self.view.spaces.values():
            await asyncio.to_thread(index.maintain, self.view.sequence)

    async def catch_up(self, other: "LoadedBundle") -> None:
        """Follow the writes until this bundle has every change that another bundle of this process has.

        It still has them on return, because no other task runs in between. If changes keep coming too fast
        it returns after some rounds.

        Raises:
            Unavailable: the items come from another process, and it is too slow or does not answer.
        """
        for _ in range(_MAX_ROUNDS):
            if self.hosts(EMBEDDING):
                await self.view.follow()
            if self.hosts(RANKING):
                await asyncio.to_thread(self.ranking.advance)
            positions = zip(self._positions(), other._positions(), strict=True)
            if all(own >= others for own, others in positions):
                return
            if not self.hosts(EMBEDDING):  # the feed brings more
                await asyncio.sleep(_ROUND_PAUSE)
        if not self.hosts(EMBEDDING):
            raise Unavailable("the change feed of the items does not catch up")

    def _positions(self) -> tuple[int, int]:
        """The sequences of the last changes of items and of events that it has."""
        if self._view is not None:
            items = self._view.sequence
        else:
            items = self._follower.position if self._follower is not None else 0
        return items, self.ranking.state.sequence if self.hosts(RANKING) else 0

    def take_encoder_threads(self, other: "LoadedBundle") -> None:
        """Take over the threads of another bundle's encoders, and close the own encoders at the end."""
        encoders = self.catalog.encoders
        other.catalog.encoders.transfer_threads_to(encoders)
        if encoders.close not in self._closing:
            self._closing.append(encoders.close)

    def _load_embedding(self, encoders: "EncoderPool | None") -> None:
        from services.embedding import servicer
        from services.embedding.catalog import image_fetch_worker, search_view, table_file, writer
        from services.embedding.encoders import encoder_pool
        from services.embedding.images import fetcher as image_fetcher

        item_store = self._resources.item_store
        assert item_store is not None  # noqa: S101 - its service is hosted
        if encoders is None:
            text, image = load_encoders(self.bundle, self._settings.device)
            encoders = encoder_pool.EncoderPool(text, image)
            self._closing.append(encoders.close)
            self._import_items(item_store, encoders)
        indexes = self._indexes(item_store, encoders)
        # A search by an engine waits for the network, and must not keep pages waiting.
        page_pool = None if self._settings.milvus else self._resources.compute
        source = " ".join((item_store.name, *(f"{space}-{encoders.digests[space]}" for space in indexes)))
        name = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
        file = table_file.TableFile(self._settings.state / "index" / f"items-{name}.table", source)
        self._view = search_view.SearchView(item_store, encoders.digests, indexes, page_pool, file)
        self._closing.append(self._view.close)
        self._catalog = writer.CatalogWriter(self._view, encoders)
        self.loaded_loops.append(self._view.maintain)
        if "image" in encoders.digests:
            fetcher = partial(image_fetcher.ImageFetcher, allowed=self._settings.fetch_networks)
            self.current_loops.append(image_fetch_worker.ImageFetchWorker(self._catalog, fetcher).run)
        self.servicers[EMBEDDING] = servicer.EmbeddingServicer(
            self._catalog, self.bundle.version, self._resources.bundle_versions
        )

    def _indexes(self, item_store: "ItemStore", encoders: "EncoderPool") -> "Mapping[str, VectorIndex]":
        """The index of each vector space, by the backend of the settings."""
        from services.embedding.index import backends

        settings = self._settings
        options = backends.IndexOptions(
            backend=settings.index_backend,
            device=device_of(self.bundle, settings.device),
            directory=settings.state / "index",
            storage=settings.index_storage,
            hnsw_min_items=settings.hnsw_min_items,
            exact=settings.exact_search,
            milvus=settings.milvus,
            milvus_token=settings.milvus_token,
        )
        spaces = [
            backends.VectorSpace(
                space,
                encoders.digests[space],
                dimension,
                partial(item_store.vectors, space=space, digest=encoders.digests[space]),
            )
            for space, dimension in encoders.dimensions.items()
        ]
        indexes, close = backends.make_indexes(options, item_store.name, spaces)
        self._closing.append(close)
        return indexes

    def _load_ranking(self) -> None:
        from services.ranking import service, servicer
        from services.ranking.events import retention_clock
        from services.ranking.models import co_occurrence

        event_store, settings = self._resources.event_store, self._settings
        followers, compute = self._resources.event_followers, self._resources.compute
        assert event_store is not None  # noqa: S101 - its service is hosted
        assert followers is not None  # noqa: S101 - its service is hosted
        assert compute is not None  # noqa: S101 - its service is hosted
        directory = self.bundle.component("graph")
        graph = co_occurrence.ItemGraph.load(directory) if directory else co_occurrence.ItemGraph.empty()
        self._ranking = service.RankingService(
            event_store,
            followers,
            compute,
            self._items(ItemTable()),
            graph,
            self.bundle.profile,
            ctr=self.bundle.component("ctr"),
            reranker=self.bundle.component("reranker"),
            sequence=self.bundle.component("sequence"),
            taste=self.bundle.component("taste"),
            propensity=self.bundle.component("propensity"),
        )
        self._closing.append(self._ranking.close)
        page_days = min(settings.impression_log_days, settings.event_retention_days or sys.maxsize)
        if settings.fixed_time is None:
            self.retention_clock = retention_clock.RetentionClock(
                self._resources.clock, event_store.observe_clock
            )
        self.current_loops.append(
            partial(
                self._ranking.retention.retain, settings.event_retention_days, page_days, self.retention_clock
            )
        )
        self.servicers[RANKING] = servicer.RankingServicer(
            self._ranking,
            self.bundle.version,
            self._resources.bundle_versions,
            self.ready,
            self._resources.clock,
            page_days,
        )

    def _load_gateway(self) -> None:
        from services.gateway import servicer
        from services.gateway.clients import backend_recovery
        from services.gateway.clients import backends as clients
        from services.gateway.conversation.language import interpreter_runner
        from services.gateway.recommend import pipeline, signed_tokens

        items, settings, peers = self._items(None), self._settings, self._resources.peers
        embedding: clients.EmbeddingBackend = (
            clients.LocalEmbedding(self.servicers[EMBEDDING])
            if self.hosts(EMBEDDING)
            else clients.RemoteEmbedding(peers.channel(EMBEDDING))
        )
        ranking: clients.RankingBackend = (
            clients.LocalRanking(self.servicers[RANKING])
            if self.hosts(RANKING)
            else clients.RemoteRanking(peers.channel(RANKING))
        )
        directory = self.bundle.component("popular")
        popular = np.load(directory / "numbers.npy") if directory else np.empty(0, np.int64)
        pool = executors.request_pool("gateway")
        self._closing.append(pool.close)
        stages = pipeline.Pipeline(embedding, ranking, items.table, popular, self.bundle.version, pool)
        backends = {
            name: clients.health(peers.channel(name), clients.SERVICES[name])
            for name in (EMBEDDING, RANKING)
            if not self.hosts(name)
        }
        if backends:
            self.loaded_loops.append(backend_recovery.BackendRecovery(backends, stages.breakers).run)
        runner = interpreter_runner.InterpreterRunner(pool, interpreter_runner.load(settings.interpreter))
        self._closing.append(runner.close)
        self.gateway = servicer.GatewayServicer(
            pipeline=stages,
            embedding=embedding,
            ranking=ranking,
            tokens=signed_tokens.SignedTokens(signing_secret(settings.secret, settings.state)),
            clock=self._resources.clock,
            wait_for=items.wait_for,
            scenarios=self._load_scenarios(),
            interpreter=runner,
            impression_log=self._resources.impression_log,
        )
        self._log_pages = ranking.log
        self.servicers[GATEWAY] = self.gateway

    def _load_scenarios(self) -> "Scenarios":
        from services.gateway.experiments.scenarios import Scenarios

        scenarios = Scenarios(self._settings.scenarios)
        if self._settings.scenarios is not None:
            self.current_loops.append(scenarios.follow)
        return scenarios

    def _items(self, table: ItemTable | None) -> "SearchView | ChangeFeedFollower":
        """The items: the view of this process, or a follower of another process's change feed.

        The follower fills `table`, or for None a table of the bundle's items.
        """
        if self._view is not None:
            return self._view
        if self._follower is None:
            from services.gateway.clients import backends as clients

            self._follower = ChangeFeedFollower(
                watch=clients.watch(self._resources.peers.channel(EMBEDDING)),
                table=table or _table_of(self.bundle.catalog()),
                bundle=self.bundle.version,
                ready=self.ready,
            )
            self.loaded_loops.append(self._follower.run)
        return self._follower


def _hosted(part: T | None, service: str) -> T:
    if part is None:
        raise LookupError(f"this process does not host the {service} service")
    return part


def device_of(bundle: Bundle, device: str) -> str:
    """The device of a bundle's encoders and indexes, from the setting `device`.

    A text encoder in int8 runs on the CPU only, so `auto` is the CPU for its bundle.

    Raises:
        FailedPrecondition: the setting names a GPU that torch cannot use.
    """
    from services.embedding.encoders import encoders
    from services.embedding.runtime import devices

    if device == devices.AUTO and encoders.is_int8(bundle.directory / "text"):
        return "cpu"
    return devices.resolve(device)


def load_encoders(bundle: Bundle, device: str) -> "tuple[TextEncoder, ImageEncoder | None]":
    """The text encoder of a bundle, and its image encoder if it has one, by the setting `device`."""
    from services.embedding.encoders import encoders

    device = device_of(bundle, device)
    image = bundle.component("image")
    text = encoders.TextEncoder(bundle.directory / "text", device)
    return text, encoders.ImageEncoder(image, device) if image else None


def vector_blocks(contents: BundleCatalog, digests: dict[str, str]) -> "list[VectorBlock]":
    """The vectors in a bundle, labeled with the digest of each space's encoder."""
    from services.embedding.store.bundle_import import VectorBlock

    return [
        VectorBlock(space, digests.get(space, ""), values, contents.present[space])
        for space, values in contents.vectors.items()
    ]


def _table_of(contents: BundleCatalog) -> ItemTable:
    times = [creation_time(item) for item in contents.items]
    return ItemTable.of(contents.items, contents.vectors, contents.present, times)
