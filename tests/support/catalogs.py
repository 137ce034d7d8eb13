"""Serves a catalog for tests, with helpers that call it."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from PIL import Image
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from services.embedding.catalog.search_view import SearchView
from services.embedding.catalog.writer import CatalogWriter
from services.embedding.encoders.encoder_pool import EncoderPool
from services.embedding.encoders.encoders import ImageEncoder, TextEncoder
from services.embedding.index.builder import Builder
from services.embedding.index.segmented_index import SegmentedIndex, SegmentFile
from services.embedding.servicer import EmbeddingServicer
from services.embedding.store.item_store import ItemStore
from services.rpc.server import CHANNEL_OPTIONS, Server, Service
from services.serving.app import NEXT_BUNDLE, App
from services.serving.loaded_bundle import EMBEDDING
from services.serving.settings import Settings
from services.storage import store
from tests.conftest import Clock
from tests.support.models import make_image_encoder, make_text_encoder

NAME = "vitrine.embedding.v1.EmbeddingService"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextEncoder, ImageEncoder]:
    root = tmp_path_factory.mktemp("encoders")
    return TextEncoder(make_text_encoder(root / "text")), ImageEncoder(make_image_encoder(root / "image"))


@dataclass(frozen=True)
class ServedCatalog:
    """A stub of the embedding service, and what it serves from."""

    stub: "pb_grpc.EmbeddingServiceAsyncStub"  # a type only
    writer: CatalogWriter
    port: int


class CatalogServer:
    """Serves a catalog in a directory; a second `serve` restarts from the same state."""

    def __init__(self, directory: Path, clock: Clock, encoders: tuple[TextEncoder, ImageEncoder]) -> None:
        self._directory, self._clock, self._encoders = directory, clock, encoders

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[ServedCatalog]:
        engine = store.open_engine(f"sqlite:///{self._directory / 'items.sqlite'}")
        encoding = EncoderPool(*self._encoders)
        items, builder = ItemStore(engine, self._clock), Builder()
        indexes = {
            space: SegmentedIndex(
                dimension, 50, builder, SegmentFile(self._directory / "index" / space, items.name)
            )
            for space, dimension in encoding.dimensions.items()
        }
        view = SearchView(items, encoding.digests, indexes)
        writer = CatalogWriter(view, encoding)
        add = pb_grpc.add_EmbeddingServiceServicer_to_server
        server = Server([Service(NAME, EmbeddingServicer(writer, "v1", ["v1"]), add)], "127.0.0.1:0")
        await server.start()
        await server.set_ready(NAME)
        try:
            async with grpc.aio.insecure_channel(
                f"127.0.0.1:{server.port}", options=CHANNEL_OPTIONS
            ) as channel:
                yield ServedCatalog(pb_grpc.EmbeddingServiceStub(channel), writer, server.port)
        finally:
            await server.stop(1)
            encoding.close()
            view.close()
            items.close()
            engine.dispose()


@pytest.fixture
def catalog_server(tmp_path: Path, clock: Clock, encoders: tuple[TextEncoder, ImageEncoder]) -> CatalogServer:
    return CatalogServer(tmp_path, clock, encoders)


@pytest.fixture
async def catalog(catalog_server: CatalogServer) -> AsyncIterator[ServedCatalog]:
    async with catalog_server.serve() as catalog:
        yield catalog


def png_bytes(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(out, "PNG")
    return out.getvalue()


def item(item_id: str, title: str = "", **fields: Any) -> item_pb2.Item:
    return item_pb2.Item(id=item_id, title=title, **fields)


async def upsert(stub: Any, *items: item_pb2.Item, mask: tuple[str, ...] = ()) -> list[item_pb2.ItemOutcome]:
    async def chunks() -> AsyncIterator[pb.UpsertItemsRequest]:
        request = pb.UpsertItemsRequest(items=items)
        request.update_mask.paths.extend(mask)
        yield request

    return [outcome async for response in stub.UpsertItems(chunks()) for outcome in response.outcomes]


async def search_ids(stub: Any, **fields: Any) -> list[str]:
    request = pb.SearchRequest(limit=10, view=item_pb2.VIEW_READABLE, **fields)
    response = await stub.Search(request)
    return [hit.item_id for result in response.results for hit in result.hits]


async def violations(call: Awaitable[Any]) -> tuple[grpc.StatusCode, list[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    bad = error_details_pb2.BadRequest()
    fields = [v.field for d in status.details if d.Unpack(bad) for v in bad.field_violations]
    return caught.value.code(), fields


@asynccontextmanager
async def serve_app(
    root: Path, hosted: Collection[str] = (EMBEDDING,), **more: Any
) -> AsyncIterator[tuple[App, "pb_grpc.EmbeddingServiceAsyncStub", Any]]:
    """Serve the newest bundle of `root`; yield the app and stubs for embedding and health.

    Raises:
        TimeoutError: the block takes more than 90 seconds.
    """
    settings = Settings(bundle=root / "bundles", state=root / "state", address="127.0.0.1:0", **more)
    app = App(settings, hosted)
    await app.start()
    target = f"127.0.0.1:{app.port}"
    try:
        async with (
            grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel,
            asyncio.timeout(90),
        ):
            yield app, pb_grpc.EmbeddingServiceStub(channel), health_pb2_grpc.HealthStub(channel)
    finally:
        await app.stop()


async def nearest(stub: Any, text: str, min_sequence: int = 0) -> str:
    request = pb.SearchRequest(text=text, limit=1, view=item_pb2.VIEW_READABLE, min_sequence=min_sequence)
    request.spaces.append(item_pb2.SPACE_TEXT)
    return str((await stub.Search(request)).results[0].hits[0].item_id)


async def next_bundle_status(health: Any) -> Any:
    """The health status of the next bundle, or None without one."""
    try:
        return (await health.Check(health_pb2.HealthCheckRequest(service=NEXT_BUNDLE))).status
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND
        return None


async def wait_for_next_bundle(health: Any) -> None:
    while await next_bundle_status(health) != health_pb2.HealthCheckResponse.SERVING:
        await asyncio.sleep(0.02)
