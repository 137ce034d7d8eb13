"""Photographs by address: items are live at once, pictures follow, failures are told, restarts go on."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.embedding.catalogue import Catalogue
from services.embedding.fetching import Fetcher
from services.embedding.pending import PendingPhotographs
from tests.catalogues import Run, encoders, found, item, picture, run, upsert
from tests.sites import LOOPBACK, Site, site

__all__ = ["encoders", "run", "site"]  # fixtures
READY, PENDING, FAILED = (
    item_pb2.MODALITY_STATE_READY,
    item_pb2.MODALITY_STATE_PENDING,
    item_pb2.MODALITY_STATE_FAILED,
)


def by_address(item_id: str, uri: str, title: str = "words") -> item_pb2.Item:
    return item(item_id, title, image=item_pb2.Image(uri=uri))


async def fetching(catalogue: Catalogue, body: Callable[[], Awaitable[None]]) -> None:
    """Run `body` beside what fetches."""
    fetcher = partial(Fetcher, allowed=LOOPBACK, tries=1)
    task = asyncio.ensure_future(PendingPhotographs(catalogue, fetcher).run())
    try:
        await asyncio.wait_for(body(), 30)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def settled(stub: Any, *item_ids: str) -> dict[str, item_pb2.ItemRecord]:
    while True:
        records = (await stub.GetItems(pb.GetItemsRequest(item_ids=item_ids))).items
        if all(record.image_state != PENDING for record in records):
            return {record.item.id: record for record in records}
        await asyncio.sleep(0.02)


def test_the_item_is_live_at_once_and_its_photograph_follows(run: Run, site: Site) -> None:
    site.files = {f"/{colour}.png": picture(colour) for colour in ("red", "blue")}

    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        [outcome] = await upsert(stub, by_address("a", f"{site.url}/red.png"))
        assert (outcome.text_state, outcome.image_state) == (READY, PENDING)
        assert await found(stub, text="words", spaces=[item_pb2.SPACE_TEXT]) == ["a"]
        assert await found(stub, image=picture("red")) == []

        async def follow() -> None:
            record = (await settled(stub, "a"))["a"]
            assert (record.text_state, record.image_state) == (READY, READY)
            assert record.sequence > outcome.sequence
            request = pb.SearchRequest(image=picture("red"), limit=1, min_sequence=record.sequence)
            assert len((await stub.Search(request)).results[0].item_numbers) == 1
            # The same again is not fetched again; another address is.
            [again] = await upsert(stub, by_address("a", f"{site.url}/red.png"))
            assert again.code == item_pb2.ITEM_OUTCOME_CODE_UNCHANGED
            [dearer] = await upsert(stub, item("a", price=3), mask=("price",))
            assert dearer.image_state == READY
            await upsert(stub, by_address("a", f"{site.url}/blue.png"))
            assert (await settled(stub, "a"))["a"].item.price == 0
            assert site.asked == ["/red.png", "/blue.png"]

        await fetching(catalogue, follow)

    run(body)


def test_what_fails_says_why_beside_what_comes(run: Run, site: Site) -> None:
    site.files = {"/red.png": picture("red"), "/torn.png": picture("red")[:60]}

    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        async def follow() -> None:
            names = ("red.png", "torn.png", "plain.txt", "status/404")
            await upsert(stub, *(by_address(name, f"{site.url}/{name}") for name in names))
            await upsert(stub, by_address("inside", "http://10.0.0.1/a.png"))
            records = await settled(stub, *names, "inside")
            assert [records[n].image_state for n in names] == [READY, FAILED, FAILED, FAILED]
            assert all(record.text_state == READY for record in records.values())
            assert records["torn.png"].image_error.startswith("image.uri: is damaged")
            assert "not a readable" in records["plain.txt"].image_error
            assert records["status/404"].image_error == "image.uri: answers with status 404"
            assert "private network" in records["inside"].image_error
            # Sending it again tries again.
            site.files["/torn.png"] = picture("red")
            [outcome] = await upsert(stub, by_address("torn.png", f"{site.url}/torn.png"))
            assert outcome.image_state == PENDING
            assert (await settled(stub, "torn.png"))["torn.png"].image_state == READY

        await fetching(catalogue, follow)

    run(body)


def test_a_restart_goes_on_fetching_and_a_deleted_item_stays_deleted(run: Run, site: Site) -> None:
    site.files = {f"/{n}.png": picture("red") for n in range(40)}

    async def write(stub: Any, catalogue: Catalogue, port: int) -> None:
        await upsert(stub, *(by_address(str(n), f"{site.url}/{n}.png") for n in range(40)))

    async def follow(stub: Any, catalogue: Catalogue, port: int) -> None:
        await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["7"]))

        async def all_come() -> None:
            records = await settled(stub, *(str(n) for n in range(40)))
            assert len(records) == 39
            assert {record.image_state for record in records.values()} == {READY}

        await fetching(catalogue, all_come)

    run(write)
    run(follow)
