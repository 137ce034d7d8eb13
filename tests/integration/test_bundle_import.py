"""A bundle and the API share one item store, and the last writer of an item wins."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.catalog.items import Item
from services.core.errors import FailedPrecondition, NotFound
from services.embedding.store.bundle_import import ImportResult, VectorBlock
from services.embedding.store.item_store import ItemStore
from services.rpc.server import CHANNEL_OPTIONS
from services.serving.app import App
from services.serving.loaded_bundle import ALL
from services.storage import store
from tests.conftest import Clock
from tests.support.catalogs import serve_app
from tests.support.shops import UNTIL, make_bundle
from tests.support.shops import items as items_of_shop

_SINCE = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def items(engine: sa.Engine, clock: Clock) -> ItemStore:
    return ItemStore(engine, clock)


def _load(
    items: ItemStore, version: str, prices: dict[str, float], *, any_shop: bool = False
) -> ImportResult:
    """Import a bundle of items with these prices, each with a vector."""
    catalog = [Item(id=name, title=f"item {name}", price=price) for name, price in prices.items()]
    blocks = [
        VectorBlock("text", "bert", np.eye(max(len(catalog), 1))[: len(catalog)], np.ones(len(catalog), bool))
    ]
    return items.load(version, catalog, blocks, [_SINCE] * len(catalog), any_shop=any_shop)


def _stored_prices(items: ItemStore) -> dict[str, float | None]:
    return {record.item.id: record.item.price for record in items.page(-1, 1000)}


def test_a_newer_bundle_updates_and_removes_what_the_api_did_not_write(items: ItemStore) -> None:
    assert _load(items, "20260101T000000-a", dict.fromkeys("abcdefgh", 1.0)) == ImportResult(added=8)
    items.write(Item(id="a", title="item a", price=5.0)).result()
    items.write(Item(id="b", title="item b", price=1.0)).result()
    items.delete("c").result()
    before = items.sequence
    result = _load(items, "20260102T000000-b", {"a": 2.0, "c": 2.0, "d": 2.0, "e": 1.0, "i": 1.0, "f": 1.0})
    assert result == ImportResult(added=1, updated=1, removed=2, differing=1, deleted=1)
    assert _stored_prices(items) == {"a": 5.0, "b": 1.0, "d": 2.0, "e": 1.0, "f": 1.0, "i": 1.0}
    # Followers learn of every change: one added, one updated, two removed.
    assert {r.item.id for r in items.changes(before, 100)} == {"d", "g", "h", "i"}
    assert _load(
        items, "20260103T000000-c", {"d": 2.0, "e": 1.0, "f": 1.0, "g": 3.0, "h": 1.0}
    ) == ImportResult(added=0, updated=2, removed=1)
    assert _stored_prices(items)["g"] == 3.0


def test_an_older_bundle_changes_nothing(items: ItemStore) -> None:
    _load(items, "20260102T000000-b", {"a": 2.0, "b": 2.0})
    assert _load(items, "20260101T000000-a", {"a": 1.0, "c": 1.0}) == ImportResult(differing=1)
    assert _stored_prices(items) == {"a": 2.0, "b": 2.0}


def test_most_of_the_catalog_is_never_removed_by_a_bundle(items: ItemStore) -> None:
    _load(items, "20260101T000000-a", dict.fromkeys("abcdefgh", 1.0))
    assert _load(items, "20260102T000000-b", {"a": 1.0, "b": 3.0}) == ImportResult(updated=1, spared=6)
    assert len(_stored_prices(items)) == 8


def test_a_bundle_of_another_shop_is_refused(items: ItemStore) -> None:
    _load(items, "20260101T000000-a", {str(n): 1.0 for n in range(200)})
    other = [Item(id=str(n), title=f"another {n}") for n in range(200)]
    with pytest.raises(FailedPrecondition, match=r"0 have the same id and title.*--allow-other-shop"):
        items.load("20260102T000000-b", other, [], [_SINCE] * 200)
    assert not items.imported("20260102T000000-b")
    assert items.get(["7"])["7"].item.title == "item 7"
    assert _load(items, "20260102T000000-b", {f"n{n}": 1.0 for n in range(200)}, any_shop=True).added == 200


def test_reencoding_does_not_count_as_a_write_of_the_api(items: ItemStore) -> None:
    _load(items, "20260101T000000-a", {"a": 1.0, "b": 1.0})
    for record in items.get(["a", "b"]).values():
        items.write(record.item, expected_sequence=record.sequence, by_api=record.item.id == "b").result()
    assert _load(items, "20260102T000000-b", {"a": 2.0, "b": 2.0}) == ImportResult(updated=1, differing=1)


@pytest.mark.parametrize("running", [True, False])
async def test_items_removed_from_the_file_are_not_recommended_after_a_retrain(
    tmp_path: Path, *, running: bool
) -> None:
    """A product leaves the items file, a price changes there, another through the API; the shop retrains."""
    make_bundle(tmp_path)
    catalog = {item.id: item for item in items_of_shop()}
    removed_ids = [catalog.pop(f"garden-{n:02}").id for n in range(10)]
    catalog["kitchen-03"] = replace(catalog["kitchen-03"], price=999.0, title="walrus lamp")
    catalog["kitchen-04"] = replace(catalog["kitchen-04"], price=111.0)

    def retrain() -> None:
        make_bundle(tmp_path, until=UNTIL + timedelta(days=1), catalog=list(catalog.values()))

    async def check(stub: Any) -> None:
        page = await stub.Recommend(pb.RecommendRequest(user_id="anybody", page_size=100))
        assert not {item.item_id for item in page.items} & set(removed_ids)
        prices = {}
        async for record in _records(stub):
            prices[record.item.id] = record.item.price
        assert prices.keys() == catalog.keys()
        assert (prices["kitchen-03"], prices["kitchen-04"]) == (999.0, 7.0)
        response = await stub.SearchItems(pb.SearchItemsRequest(text="walrus lamp", page_size=1))
        assert response.items[0].item_id == "kitchen-03"

    async with serve_app(tmp_path, ALL, bundle_poll_seconds=0.02) as (app, _, _), _gateway(app) as stub:
        update = pb.BatchUpsertItemsRequest(items=[item_pb2.Item(id="kitchen-04", price=7.0)])
        update.update_mask.paths.append("price")
        await stub.BatchUpsertItems(update)
        if running:
            retrain()
            while app.bundle.until == UNTIL:
                await asyncio.sleep(0.02)
            await check(stub)
    if not running:
        retrain()
        async with serve_app(tmp_path, ALL, hot_swap=False) as (app, _, _), _gateway(app) as stub:
            assert app.bundle.until != UNTIL
            await check(stub)


@asynccontextmanager
async def _gateway(app: App) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}", options=CHANNEL_OPTIONS) as channel:
        yield pb_grpc.RecommendationServiceStub(channel)


async def _records(stub: Any) -> AsyncIterator[item_pb2.ItemRecord]:
    token, more = "", True
    while more:
        page = await stub.ListItems(pb.ListItemsRequest(page_size=10, page_token=token))
        for record in page.items:
            yield record
        token = page.next_page_token
        more = bool(token)


@dataclass
class _Model:
    """What the store should hold: prices, and of each item the price that a bundle brought last, if any."""

    prices: dict[str, float] = field(default_factory=dict)
    bundle_prices: dict[str, float | None] = field(default_factory=dict)

    def write(self, name: str, price: float) -> None:
        self.prices[name] = price
        self.bundle_prices.pop(name, None)

    def delete(self, name: str) -> None:
        self.prices.pop(name, None)
        self.bundle_prices.pop(name, None)

    def load(self, file: dict[str, float], ever: set[str]) -> None:
        for name, price in file.items():
            if name not in ever or self.bundle_prices.get(name, -1.0) == self.prices.get(name):
                self.prices[name] = self.bundle_prices[name] = price
        ours = {
            n for n, price in self.bundle_prices.items() if price is not None and price == self.prices.get(n)
        }
        absent = ours - file.keys()
        if len(absent) <= sum(price is not None for price in self.bundle_prices.values()) / 2:
            for name in absent:
                del self.prices[name]
                self.bundle_prices[name] = None


_prices = st.sampled_from([1.0, 2.0])
_steps = st.one_of(
    st.tuples(st.just("write"), st.sampled_from("abcde"), _prices),
    st.tuples(st.just("delete"), st.sampled_from("abcde"), st.none()),
    st.tuples(st.just("load"), st.dictionaries(st.sampled_from("abcde"), _prices, min_size=1), st.none()),
)


@given(steps=st.lists(_steps, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_store_follows_the_rule_of_the_last_writer(
    engine: sa.Engine, clock: Clock, steps: list[tuple[Any, ...]]
) -> None:
    items = ItemStore(engine, clock)
    with engine.begin() as connection:
        for table in ("items", "item_origins", "item_imports", "content_vectors"):
            connection.execute(store.metadata.tables[table].delete())
    model, ever = _Model(), set[str]()
    for at, (kind, what, price) in enumerate(steps):
        if kind == "write":
            items.write(Item(id=what, title=f"item {what}", price=price)).result()
            model.write(what, price)
            ever.add(what)
        elif kind == "delete":
            failure = items.delete(what).exception()
            assert isinstance(failure, NotFound | None)
            if failure is None:
                model.delete(what)
        else:
            _load(items, f"20260101T{at:06}-x", what, any_shop=True)
            model.load(what, ever)
            ever |= what.keys()
        assert _stored_prices(items) == model.prices, (at, kind)
    items.close()
