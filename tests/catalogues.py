"""A served catalogue for tests, and what they ask of it."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
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

from services import store
from services.embedding.builder import Builder
from services.embedding.catalogue import Catalogue
from services.embedding.encoders import ImageEncoder, TextEncoder
from services.embedding.encoding import Encoding
from services.embedding.items import ItemStore
from services.embedding.segmented import Keep, SegmentedIndex
from services.embedding.servicer import EmbeddingServicer
from services.embedding.view import CatalogueView
from services.generation import EMBEDDING
from services.server import CHANNEL_OPTIONS, Server, Service
from services.settings import Settings
from services.wiring import NEXT_BUNDLE, App
from tests.conftest import Clock
from tests.models import make_image_encoder, make_text_encoder

NAME = "vitrine.embedding.v1.EmbeddingService"
Body = Callable[[Any, Catalogue, int], Awaitable[None]]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextEncoder, ImageEncoder]:
    root = tmp_path_factory.mktemp("encoders")
    return TextEncoder(make_text_encoder(root / "text")), ImageEncoder(make_image_encoder(root / "image"))


Run = Callable[[Body], None]


@pytest.fixture
def run(tmp_path: Path, clock: Clock, encoders: tuple[TextEncoder, ImageEncoder]) -> Run:
    """Runs a body against a served catalogue; a second run starts again from the same state."""

    def run(body: Body) -> None:
        async def main() -> None:
            engine = store.open_engine(f"sqlite:///{tmp_path / 'items.sqlite'}")
            encoding = Encoding(*encoders)
            items, builder = ItemStore(engine, clock), Builder()
            indexes = {
                space: SegmentedIndex(dimension, 50, builder, Keep(tmp_path / "index" / space, items.name))
                for space, dimension in encoding.dimensions.items()
            }
            view = CatalogueView(items, encoding.digests, indexes)
            catalogue = Catalogue(view, encoding)
            add = pb_grpc.add_EmbeddingServiceServicer_to_server
            server = Server([Service(NAME, EmbeddingServicer(catalogue, "v1", ["v1"]), add)], "127.0.0.1:0")
            await server.start()
            await server.set_ready(NAME)
            target = f"127.0.0.1:{server.port}"
            try:
                async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
                    await body(pb_grpc.EmbeddingServiceStub(channel), catalogue, server.port)
            finally:
                await server.stop(1)
                encoding.close()
                view.close()
                items.close()
                engine.dispose()

        asyncio.run(main())

    return run


def picture(colour: str) -> bytes:
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


async def found(stub: Any, **fields: Any) -> list[str]:
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


def served(
    root: Path,
    body: Callable[[App, Any, Any], Awaitable[None]],
    hosted: Collection[str] = (EMBEDDING,),
    **more: Any,
) -> None:
    """Run `body` with an app on the newest bundle of `root`, and stubs of embedding and health."""

    async def main() -> None:
        app = App(
            Settings(bundle=root / "bundles", state=root / "state", address="127.0.0.1:0", **more),
            hosted,
        )
        await app.start()
        target = f"127.0.0.1:{app.port}"
        try:
            async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
                stubs = pb_grpc.EmbeddingServiceStub(channel), health_pb2_grpc.HealthStub(channel)
                await asyncio.wait_for(body(app, *stubs), 90)
        finally:
            await app.stop()

    asyncio.run(main())


async def nearest(stub: Any, text: str, min_sequence: int = 0) -> str:
    request = pb.SearchRequest(text=text, limit=1, view=item_pb2.VIEW_READABLE, min_sequence=min_sequence)
    request.spaces.append(item_pb2.SPACE_TEXT)
    return str((await stub.Search(request)).results[0].hits[0].item_id)


async def next_bundle(health: Any) -> Any:
    """The health of the next bundle; None while there is none."""
    try:
        return (await health.Check(health_pb2.HealthCheckRequest(service=NEXT_BUNDLE))).status
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND
        return None


async def prepared(health: Any) -> None:
    while await next_bundle(health) != health_pb2.HealthCheckResponse.SERVING:
        await asyncio.sleep(0.02)
