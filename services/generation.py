"""One bundle's services in one process, over stores that outlive it.

With `wiring.py` the composition root: what a process does not host it does not import.
"""

import asyncio
import secrets
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from services import heap
from services.bundle import Bundle, Catalogue, created
from services.errors import Unavailable
from services.follower import Follower
from services.item_table import ItemTable
from services.neighbours import Neighbours
from services.settings import Settings

if TYPE_CHECKING:
    from services.embedding.encoding import Encoding
    from services.embedding.item_writes import Block
    from services.embedding.items import ItemStore
    from services.gateway.served_log import ServedLog
    from services.gateway.servicer import GatewayServicer
    from services.ranking.behaviour import BehaviourStore

ALL = EMBEDDING, RANKING, GATEWAY = "embedding", "ranking", "gateway"
_MOST_ROUNDS, _BETWEEN_ROUNDS = 100, 0.05


@dataclass
class Shared:
    """What a process has once, whichever bundle it serves; a store only where its service is `hosted`.

    `bundles` are the versions that calls may name, the current one first.
    """

    settings: Settings
    hosted: tuple[str, ...]
    clock: Callable[[], datetime]
    neighbours: Neighbours
    bundles: list[str] = field(default_factory=list)
    items: "ItemStore | None" = None
    events: "BehaviourStore | None" = None
    served: "ServedLog | None" = None


class Generation:
    """The services of a bundle: `servicers`, by service.

    `upkeep` lets them know what is written, `background` is what a process does by one bundle alone;
    neither ever ends. `work` are its encoders when they are at work already; whoever made them closes them
    unless `succeed` is called.

    Raises:
        FailedPrecondition: a part of the bundle does not load.
        Unavailable: an index's engine is away.
    """

    def __init__(self, shared: Shared, bundle: Bundle, work: "Encoding | None" = None) -> None:
        self.bundle, self._shared, self._settings = bundle, shared, shared.settings
        self.servicers: dict[str, Any] = {}
        self.upkeep: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.background: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.ready = asyncio.Event()
        """Set once it knows the items, which a follower has to be told."""
        # A CatalogueView, Catalogue and Ranking, each None where it is not hosted.
        self.view: Any = None
        self.catalogue: Any = None
        self.ranking: Any = None
        self.gateway: GatewayServicer | None = None
        self.log: Any = None  # takes pages that its gateway answered
        self._mirror: Any = None
        self._closing: list[Callable[[], None]] = []
        try:
            with heap.loading():
                self._load(work)
        except BaseException:
            self.close()
            raise

    def _load(self, work: "Encoding | None") -> None:
        if EMBEDDING in self._shared.hosted:
            self._embedding(work)
            self.ready.set()
        if RANKING in self._shared.hosted:
            self._ranking()
        if GATEWAY in self._shared.hosted:
            self._gateway()

    def close(self) -> None:
        """Close what was opened, the last first."""
        for close in reversed(self._closing):
            close()

    def load_items(self) -> None:
        """Let the items that the bundle brings be in the store; blocks."""
        self._load_items(self._shared.items, self.catalogue.encoding)

    def _load_items(self, items: Any, work: "Encoding") -> None:
        if not items.imported(self.bundle.version):
            brought = self.bundle.catalogue()
            since = [created(item) for item in brought.items]
            items.load(self.bundle.version, brought.items, blocks_of(brought, work.digests), since)

    async def tidy(self) -> None:
        """Do now what indexes would do at leisure: a large one is searched slowly until it is compacted."""
        for index in self.view.spaces.values():
            await asyncio.to_thread(index.tidy, self.view.sequence)

    async def catch_up(self, other: "Generation") -> None:
        """Follow what is written until nothing is missing that another generation of this process knows.

        On return nothing else has run since that was so, unless so much is written that it never is.

        Raises:
            Unavailable: where the items are another process's, for that or because it does not tell of them.
        """
        for _ in range(_MOST_ROUNDS):
            if self.view is not None:
                await self.view.follow()
            if self.ranking is not None:
                await asyncio.to_thread(self.ranking.advance)
            if all(mine >= theirs for mine, theirs in zip(self._known(), other._known(), strict=True)):
                return
            if self.view is None:  # its follower is on the way
                await asyncio.sleep(_BETWEEN_ROUNDS)
        if self.view is None:
            raise Unavailable("the items cannot be followed")

    def _known(self) -> tuple[int, int]:
        """The last changes of items and of events that it reflects."""
        items = self.view.sequence if self.view is not None else self._mirror.position
        return items, self.ranking.state.sequence if self.ranking is not None else 0

    def succeed(self, other: "Generation") -> None:
        """Take over the threads of the encoders."""
        other.catalogue.encoding.pass_on(self.catalogue.encoding)
        if self.catalogue.encoding.close not in self._closing:
            self._closing.append(self.catalogue.encoding.close)

    def _embedding(self, work: "Encoding | None") -> None:
        from services.embedding import catalogue, encoding, fetching, pending, servicer, view

        items = self._shared.items
        assert items is not None  # noqa: S101 - its service is hosted
        if work is None:
            work = encoding.Encoding(*encoders_of(self.bundle, self._settings.device))
            self._closing.append(work.close)
            self._load_items(items, work)
        self.view = self._mirror = view.CatalogueView(items, work.digests, self._indexes(items, work))
        self._closing.append(self.view.close)
        self.catalogue = catalogue.Catalogue(self.view, work)
        self.upkeep.append(self.view.maintain)
        if "image" in work.digests:
            fetcher = partial(fetching.Fetcher, allowed=self._settings.fetch_networks)
            self.background.append(pending.PendingPhotographs(self.catalogue, fetcher).run)
        self.servicers[EMBEDDING] = servicer.EmbeddingServicer(
            self.catalogue, self.bundle.version, self._shared.bundles
        )

    def _indexes(self, items: "ItemStore", work: "Encoding") -> dict[str, Any]:
        """What searches each space: Milvus if there is one, else this process, by a GPU if it has one."""
        settings = self._settings
        if settings.milvus:
            from services.embedding import milvus

            client = milvus.connect(settings.milvus, settings.milvus_token)
            self._closing.append(client.close)
            return {
                space: milvus.MilvusIndex(client, items.name, space, work.digests[space], dimension)
                for space, dimension in work.dimensions.items()
            }
        from services.embedding import builder, on_device, segmented

        on_gpu, folder = settings.device != "cpu", settings.state / "index"
        exact = settings.exact and not on_gpu  # a GPU compares every vector
        build: on_device.DeviceBuilder | builder.Builder
        if on_gpu:
            large, build = on_device.LARGE_ROWS, on_device.DeviceBuilder(settings.device)
        else:
            large, build = builder.LARGE_ROWS, builder.Builder(settings.storage, settings.graph_rows)
        return {
            space: segmented.SegmentedIndex(
                dimension,
                0 if exact else large,
                build,
                None
                if on_gpu or exact
                else segmented.Keep(folder / f"{space}-{work.digests[space]}", items.name),
                partial(items.vectors, space=space, digest=work.digests[space]),
            )
            for space, dimension in work.dimensions.items()
        }

    def _ranking(self) -> None:
        from services.ranking import graph, ranking, servicer

        events, profile = self._shared.events, self.bundle.profile
        assert events is not None  # noqa: S101 - its service is hosted
        directory = self.bundle.component("graph")
        fitted = graph.ItemGraph.load(directory) if directory else graph.ItemGraph.empty()
        models = [self.bundle.component(part) for part in ("ctr", "reranker", "sequence", "propensity")]
        self.ranking = ranking.Ranking(events, self._items(ItemTable()), fitted, profile, *models)
        self._closing.append(self.ranking.close)
        if days := self._settings.retention_days:
            self.background.append(partial(self.ranking.keeping.keep_for, days, self._shared.clock))
        days = min(self._settings.served_days, self._settings.retention_days or sys.maxsize)
        self.background.append(partial(self.ranking.keeping.keep_pages_for, days, self._shared.clock))
        self.servicers[RANKING] = servicer.RankingServicer(
            self.ranking, self.bundle.version, self._shared.bundles, self.ready
        )

    def _gateway(self) -> None:
        from services.gateway import clients, pipeline, readers, servicer, tokens

        mirror, settings = self._items(None), self._settings
        embedding: clients.Embedding = (
            clients.LocalEmbedding(self.servicers[EMBEDDING])
            if EMBEDDING in self.servicers
            else clients.RemoteEmbedding(self._shared.neighbours.to(EMBEDDING))
        )
        ranking: clients.Ranking = (
            clients.LocalRanking(self.servicers[RANKING])
            if RANKING in self.servicers
            else clients.RemoteRanking(self._shared.neighbours.to(RANKING))
        )
        directory = self.bundle.component("popular")
        popular = np.load(directory / "numbers.npy") if directory else np.empty(0, np.int64)
        stages = pipeline.Pipeline(embedding, ranking, mirror.table, popular, self.bundle.version)
        signed = tokens.Tokens(_secret(settings))
        shared = self._shared
        reader = readers.Reader(readers.load(settings.interpreter))
        self._closing.append(reader.close)
        waiting = mirror.wait_for, self._scenarios(), reader, shared.served
        self.gateway = servicer.GatewayServicer(stages, embedding, ranking, signed, shared.clock, *waiting)
        self.log = ranking.log
        self.servicers[GATEWAY] = self.gateway

    def _scenarios(self) -> Any:
        from services.gateway import scenarios

        found = scenarios.Scenarios(self._settings.scenarios)
        if self._settings.scenarios is not None:
            self.background.append(found.follow)
        return found

    def _items(self, table: ItemTable | None) -> Any:
        """The items: the catalogue of this process, or a follower; a gateway's begins with the bundle's."""
        if self._mirror is None:
            from services.gateway import clients

            known = table or _table_of(self.bundle.catalogue())
            watch = clients.watch(self._shared.neighbours.to(EMBEDDING))
            self._mirror = Follower(watch, known, self.bundle.version, self.ready)
            self.upkeep.append(self._mirror.run)
        return self._mirror


def encoders_of(bundle: Bundle, device: str) -> tuple[Any, Any]:
    """The text encoder of a bundle, and the image encoder or None."""
    from services.embedding import encoders

    photographs = bundle.component("image")
    text = encoders.TextEncoder(bundle.directory / "text", device)
    return text, encoders.ImageEncoder(photographs, device) if photographs else None


def blocks_of(brought: Catalogue, digests: dict[str, str]) -> "list[Block]":
    """The vectors that a bundle brings, as encoders of these digests made them."""
    from services.embedding.item_writes import Block

    return [
        Block(space, digests.get(space, ""), values, brought.present[space])
        for space, values in brought.vectors.items()
    ]


def _secret(settings: Settings) -> bytes:
    if settings.secret:
        return settings.secret.encode()
    settings.state.mkdir(parents=True, exist_ok=True)
    path = settings.state / "secret"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return path.read_bytes()


def _table_of(brought: Catalogue) -> ItemTable:
    since = [created(item) for item in brought.items]
    return ItemTable.of(brought.items, brought.vectors, brought.present, since)
