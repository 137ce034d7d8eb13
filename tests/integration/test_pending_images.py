"""Items with image URLs are live at once, and their images follow."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.embedding.catalog.image_fetch_worker import ImageFetchWorker
from services.embedding.catalog.writer import CatalogWriter
from services.embedding.images.fetcher import ImageFetcher
from tests.support.catalogs import (
    CatalogServer,
    ServedCatalog,
    catalog,
    catalog_server,
    encoders,
    item,
    png_bytes,
    search_ids,
    upsert,
)
from tests.support.image_site import LOOPBACK, Site, site

__all__ = ["catalog", "catalog_server", "encoders", "site"]  # fixtures
READY, PENDING, FAILED = (
    item_pb2.MODALITY_STATE_READY,
    item_pb2.MODALITY_STATE_PENDING,
    item_pb2.MODALITY_STATE_FAILED,
)


def by_address(item_id: str, uri: str, title: str = "words") -> item_pb2.Item:
    return item(item_id, title, image=item_pb2.Image(uri=uri))


@asynccontextmanager
async def fetching(writer: CatalogWriter) -> AsyncIterator[None]:
    """Fetch images during the block, which has 30 seconds."""
    fetcher = partial(ImageFetcher, allowed=LOOPBACK, tries=1)
    task = asyncio.ensure_future(ImageFetchWorker(writer, fetcher).run())
    try:
        async with asyncio.timeout(30):
            yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def wait_for_images(stub: Any, *item_ids: str) -> dict[str, item_pb2.ItemRecord]:
    while True:
        records = (await stub.GetItems(pb.GetItemsRequest(item_ids=item_ids))).items
        if all(record.image_state != PENDING for record in records):
            return {record.item.id: record for record in records}
        await asyncio.sleep(0.02)


async def test_an_item_is_live_at_once_and_its_image_follows(catalog: ServedCatalog, site: Site) -> None:
    site.files = {f"/{colour}.png": png_bytes(colour) for colour in ("red", "blue")}
    [outcome] = await upsert(catalog.stub, by_address("a", f"{site.url}/red.png"))
    assert (outcome.text_state, outcome.image_state) == (READY, PENDING)
    assert await search_ids(catalog.stub, text="words", spaces=[item_pb2.SPACE_TEXT]) == ["a"]
    assert await search_ids(catalog.stub, image=png_bytes("red")) == []
    async with fetching(catalog.writer):
        record = (await wait_for_images(catalog.stub, "a"))["a"]
        assert (record.text_state, record.image_state) == (READY, READY)
        assert record.sequence > outcome.sequence
        request = pb.SearchRequest(image=png_bytes("red"), limit=1, min_sequence=record.sequence)
        assert len((await catalog.stub.Search(request)).results[0].item_hashes) == 1
        # The same again is not fetched again; another address is.
        [again] = await upsert(catalog.stub, by_address("a", f"{site.url}/red.png"))
        assert again.code == item_pb2.ITEM_OUTCOME_CODE_UNCHANGED
        [dearer] = await upsert(catalog.stub, item("a", price=3), mask=("price",))
        assert dearer.image_state == READY
        await upsert(catalog.stub, by_address("a", f"{site.url}/blue.png"))
        assert (await wait_for_images(catalog.stub, "a"))["a"].item.price == 0
        assert site.requested_paths == ["/red.png", "/blue.png"]


async def test_a_failed_image_has_a_reason_and_the_others_arrive(catalog: ServedCatalog, site: Site) -> None:
    site.files = {"/red.png": png_bytes("red"), "/torn.png": png_bytes("red")[:60]}
    async with fetching(catalog.writer):
        names = ("red.png", "torn.png", "plain.txt", "status/404")
        await upsert(catalog.stub, *(by_address(name, f"{site.url}/{name}") for name in names))
        await upsert(catalog.stub, by_address("inside", "http://10.0.0.1/a.png"))
        records = await wait_for_images(catalog.stub, *names, "inside")
        assert [records[n].image_state for n in names] == [READY, FAILED, FAILED, FAILED]
        assert all(record.text_state == READY for record in records.values())
        assert records["torn.png"].image_error.startswith("image.uri: is damaged")
        assert "not a readable" in records["plain.txt"].image_error
        assert records["status/404"].image_error == "image.uri: answers with status 404"
        assert "private network" in records["inside"].image_error
        # Sending it again tries again.
        site.files["/torn.png"] = png_bytes("red")
        [outcome] = await upsert(catalog.stub, by_address("torn.png", f"{site.url}/torn.png"))
        assert outcome.image_state == PENDING
        assert (await wait_for_images(catalog.stub, "torn.png"))["torn.png"].image_state == READY


async def test_a_restart_resumes_fetching_and_a_deleted_item_stays_deleted(
    catalog_server: CatalogServer, site: Site
) -> None:
    site.files = {f"/{n}.png": png_bytes("red") for n in range(40)}
    async with catalog_server.serve() as catalog:
        await upsert(catalog.stub, *(by_address(str(n), f"{site.url}/{n}.png") for n in range(40)))
    async with catalog_server.serve() as catalog:
        await catalog.stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["7"]))
        async with fetching(catalog.writer):
            records = await wait_for_images(catalog.stub, *(str(n) for n in range(40)))
            assert len(records) == 39
            assert {record.image_state for record in records.values()} == {READY}
