"""`vitrine sync` brings a service up to date with a catalog file through the public API."""

import asyncio
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from cli.catalog_sync import FIELDS, RemoteCatalog, ServedItem, compare, synchronize
from cli.main import main
from services.catalog.items import Attribute, Item
from services.core.errors import FailedPrecondition, Unavailable
from tests.support import shops
from tests.support.catalogs import png_bytes
from tests.support.processes import free_port
from tests.support.shop_server import Shop, Stub

_OWN = ("colour", "size")
_items = st.builds(
    Item,
    id=st.sampled_from("abcdef"),
    title=st.sampled_from(["cup", "plate"]),
    price=st.sampled_from([None, 1.0, 2.0]),
    attributes=st.sampled_from([(), (Attribute("colour", ("red",)),), (Attribute("size", numbers=(3.0,)),)]),
)
_catalogs = st.dictionaries(st.sampled_from("abcdef"), _items).map(
    lambda items: {item_id: replace(item, id=item_id) for item_id, item in items.items()}
)


def _apply(
    file: dict[str, Item], served_items: dict[str, ServedItem], images: dict[str, bytes]
) -> dict[str, ServedItem]:
    """What is served once the difference is written, by the rule of update masks."""
    difference = compare(file.values(), served_items, FIELDS, _OWN, images.get)
    after = {item_id: old for item_id, old in served_items.items() if item_id not in difference.removed}
    for update in (*difference.added, *difference.changed):
        old = after.get(update.item.id, ServedItem(update.item))
        fields = {name: getattr(update.item, name) for name in update.fields if name != "image"}
        image = hashlib.blake2b(update.item.image, digest_size=32).digest() if update.item.image else b""
        after[update.item.id] = ServedItem(replace(old.item, image=b"", **fields), image or old.image_hash)
    return after


@given(
    file=_catalogs, before=_catalogs, images=st.dictionaries(st.sampled_from("abcdef"), st.binary(min_size=1))
)
def test_the_written_changes_make_the_service_match_the_file(
    file: dict[str, Item], before: dict[str, Item], images: dict[str, bytes]
) -> None:
    stock = Attribute("stock", numbers=(7.0,))  # the API's own, which the file knows nothing of
    served_items = {
        i: ServedItem(replace(item, attributes=(*item.attributes, stock))) for i, item in before.items()
    }
    try:
        after = _apply(file, served_items, images)
    except FailedPrecondition:  # no item in common
        assert not any(i in before and before[i].title == item.title for i, item in file.items())
        return
    assert after.keys() == file.keys()
    for item_id, item in file.items():
        now = after[item_id].item
        assert now.title == item.title
        assert now.price == item.price
        assert {a for a in now.attributes if a.name in _OWN} == set(item.attributes)
        assert item_id not in before or stock in now.attributes
        if item_id in images:
            assert after[item_id].image_hash == hashlib.blake2b(images[item_id], digest_size=32).digest()
    again = compare(file.values(), after, FIELDS, _OWN, images.get)
    assert again.changes == 0


async def test_a_file_is_synchronized_with_a_real_service(all_in_one_stub: Stub) -> None:
    """Dry first, then for good: a new item with its photograph, a price, a title, and items that are gone."""
    file = {item.id: item for item in shops.items()[3:]}
    new_title_id, new_price_id = "garden-05", "kitchen-07"
    file[new_title_id] = replace(file[new_title_id], title="walrus lamp")
    file[new_price_id] = replace(file[new_price_id], price=0.5)
    file["new"] = Item(id="new", title="a new thing", price=3.0)
    photograph = png_bytes("red")

    def sync(target: str, *, apply: bool, max_deletions: float = 0.5) -> list[str]:
        catalog = RemoteCatalog(target)
        try:
            images = {"new": photograph}
            return list(
                synchronize(
                    catalog,
                    list(file.values()),
                    FIELDS,
                    ("world", "colour"),
                    images.get,
                    apply=apply,
                    max_deletions=max_deletions,
                )
            )
        finally:
            catalog.close()

    async def get_item(item_id: str) -> item_pb2.ItemRecord:
        return (await all_in_one_stub.GetItem(pb.GetItemRequest(item_id=item_id))).item

    stock = item_pb2.Attribute(name="stock", numbers=[4])
    api_item = item_pb2.Item(id=new_title_id, title="by the API", attributes=[stock])
    await all_in_one_stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[api_item]))
    lines = await asyncio.to_thread(sync, all_in_one_stub.target, apply=False)
    assert lines[0] == f"the file has 38 items, {all_in_one_stub.target} serves 40"
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["new", "1"], ["changed", "2"], ["gone", "3"], ["unchanged", "35"],
    ]  # fmt: skip
    assert "nothing was written" in lines[-1]
    assert (await get_item(new_title_id)).item.title == "by the API"
    with pytest.raises(FailedPrecondition, match="3 of 40 served items are not in the file"):
        await asyncio.to_thread(sync, all_in_one_stub.target, apply=True, max_deletions=0.01)
    assert (await asyncio.to_thread(sync, all_in_one_stub.target, apply=True))[-1] == "6 items written"
    assert (await asyncio.to_thread(sync, all_in_one_stub.target, apply=True))[-1] == "nothing to write"
    record = await get_item(new_title_id)
    assert record.item.title == "walrus lamp"
    assert stock in record.item.attributes
    assert (await get_item(new_price_id)).item.price == 0.5
    assert (await get_item("new")).image_state == item_pb2.MODALITY_STATE_READY
    page = await all_in_one_stub.Recommend(pb.RecommendRequest(user_id="x", page_size=100))
    assert {item.item_id for item in page.items} <= file.keys()


async def test_unreadable_rows_prevent_deletions(
    all_in_one: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row with a bad title is an item that the file has: the whole command keeps it."""
    rows = [{"id": item.id, "title": item.title, "price": 2.0} for item in shops.items()]
    (tmp_path / "shop.toml").write_text("")

    def sync(target: str, rows: list[dict[str, Any]], *options: str) -> str:
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main(["sync", f"--data={tmp_path}", f"--server={target}", "--apply", *options])
        output = capsys.readouterr()
        assert code == 0, output.err
        return output.out

    async with all_in_one.serve() as stub:

        async def ids() -> set[str]:
            return {r.item.id for r in (await stub.ListItems(pb.ListItemsRequest(page_size=100))).items}

        before = await ids()
        unread = [{"id": rows[0]["id"], "title": ""}, *rows[2:]]
        out = await asyncio.to_thread(sync, stub.target, unread)
        assert await ids() == before
        assert "2 served items are not in the file" in out
        assert "1 rows of the file could not be read" in out
        out = await asyncio.to_thread(sync, stub.target, rows[2:])
        assert await ids() == before - {rows[0]["id"], rows[1]["id"]}


def test_fields_without_a_column_are_unchanged() -> None:
    served_items = {
        "a": ServedItem(
            Item(id="a", title="cup", price=2.0, attributes=(Attribute("stock", numbers=(7.0,)),))
        )
    }
    assert compare([Item(id="a", title="cup")], served_items, ("title",), (), lambda _: None).changes == 0
    update = compare(
        [Item(id="a", title="cup")], served_items, ("title", "price"), (), lambda _: None
    ).changed[0]
    assert update.fields == ("price",)


def test_an_unavailable_service_is_named() -> None:
    catalog = RemoteCatalog(f"127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match=r"127.0.0.1:\d+ does not answer ListItems"):
        catalog.read()
    catalog.close()
