"""The item store keeps outcomes, sequence numbers and tombstones consistent."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.catalog import items as catalog
from services.catalog.items import Attribute, Item, item_hash
from services.core.errors import AlreadyExists, InvalidArgument, NotFound, OutOfRange
from services.embedding.store.bundle_import import VectorBlock
from services.embedding.store.content_addressed import Vector, image_file_hash
from services.embedding.store.item_store import ItemStore
from services.embedding.store.mutations import WriteConflict, WriteOutcome
from services.embedding.store.schema import ModalityState, content_hashes
from tests.conftest import Clock

SCARF = Item(
    id="scarf",
    title="Red scarf",
    description="Wool, soft",
    attributes=(Attribute("colour", ("red",)), Attribute("length", numbers=(1.8,))),
    family_id="scarves",
    price=12.5,
    image=b"not really a picture",
    source_version=3,
)
_UNIT = np.array([0.6, 0.8], np.float32)
TEXT, IMAGE = Vector("text", "bert1", _UNIT), Vector("image", "clip1", _UNIT[::-1])


@pytest.fixture
def items(engine: sa.Engine, clock: Clock) -> Iterator[ItemStore]:
    items = ItemStore(engine, clock)
    yield items
    items.close()


def test_an_item_comes_back_as_written(items: ItemStore, clock: Clock) -> None:
    outcome = items.write(SCARF, [TEXT, IMAGE]).result()
    record = items.get(["scarf", "nobody"])["scarf"]
    assert outcome.outcome is WriteOutcome.CREATED
    assert record.item == replace(SCARF, image=b"", image_hash=image_file_hash(SCARF.image))
    assert items.image(record.item.image_hash) == SCARF.image
    assert (record.text_state, record.image_state) == (ModalityState.READY, ModalityState.READY)
    assert (record.created, record.updated, record.sequence) == (clock.now, clock.now, outcome.sequence)
    number = item_hash("scarf")
    np.testing.assert_allclose(items.vectors([number], "text", "bert1")[number], _UNIT, atol=1e-3)
    assert items.vectors([number], "text", "other") == {}


def test_a_repeated_write_changes_nothing(items: ItemStore) -> None:
    first = items.write(SCARF, [TEXT, IMAGE]).result()
    again = items.write(SCARF, [TEXT, IMAGE]).result()
    assert (again.outcome, again.sequence) == (WriteOutcome.UNCHANGED, first.sequence)


def test_an_older_source_version_is_stale(items: ItemStore) -> None:
    items.write(SCARF).result()
    stale = items.write(replace(SCARF, title="Old", source_version=2)).result()
    assert stale.outcome is WriteOutcome.STALE
    assert items.get(["scarf"])["scarf"].item.title == "Red scarf"
    assert items.write(replace(SCARF, title="New", source_version=4)).result().outcome is WriteOutcome.UPDATED


def test_a_price_change_keeps_vectors_and_a_text_change_drops_them(items: ItemStore) -> None:
    number = item_hash("scarf")
    items.write(SCARF, [TEXT, IMAGE, Vector("text", "bert2", _UNIT)]).result()
    items.write(replace(SCARF, price=9.0), [TEXT, IMAGE]).result()
    assert items.vectors([number], "text", "bert2")
    items.write(replace(SCARF, title="Blue scarf"), [TEXT, IMAGE]).result()
    assert not items.vectors([number], "text", "bert2")
    assert items.vectors([number], "image", "clip1")


def test_a_write_based_on_an_outdated_item_is_a_conflict(items: ItemStore) -> None:
    assert items.write(SCARF, expected_sequence=0).result().sequence == 1
    with pytest.raises(WriteConflict):
        items.write(replace(SCARF, price=1.0), expected_sequence=0).result()
    assert (
        items.write(replace(SCARF, price=1.0), expected_sequence=1).result().outcome is WriteOutcome.UPDATED
    )


def test_a_deleted_item_leaves_a_tombstone_and_returns_under_its_hash(items: ItemStore, clock: Clock) -> None:
    items.write(SCARF, [TEXT]).result()
    image_hash = items.get(["scarf"])["scarf"].item.image_hash
    deletion = items.delete("scarf").result()
    assert items.get(["scarf"]) == {}
    assert items.page(-1, 10) == []
    assert not items.vectors([item_hash("scarf")], "text", "bert1")
    with pytest.raises(NotFound):
        items.image(image_hash)
    [tombstone] = items.changes(1, 10)
    assert (tombstone.deleted, tombstone.item.id, tombstone.sequence) == (True, "scarf", deletion.sequence)
    with pytest.raises(NotFound, match="scarf"):
        items.delete("scarf").result()
    clock.advance(days=1)
    assert items.write(SCARF, [TEXT]).result().outcome is WriteOutcome.CREATED
    assert items.get(["scarf"])["scarf"].created == clock.now


def test_a_shared_image_stays_while_one_item_uses_it(items: ItemStore) -> None:
    items.write(SCARF).result()
    items.write(replace(SCARF, id="twin")).result()
    items.delete("scarf").result()
    assert items.image(items.get(["twin"])["twin"].item.image_hash) == SCARF.image


def test_items_with_equal_content_share_vectors_until_the_last_is_deleted(
    items: ItemStore, engine: sa.Engine
) -> None:
    def vector_count() -> int:
        with engine.connect() as connection:
            return connection.scalar(sa.text("SELECT count(*) FROM content_vectors")) or 0

    items.write(SCARF, [TEXT, IMAGE]).result()
    items.write(replace(SCARF, id="twin"), [TEXT, replace(IMAGE, values=_UNIT)]).result()
    assert vector_count() == 2
    twin, hashes = item_hash("twin"), content_hashes(SCARF)
    np.testing.assert_allclose(items.vectors([twin], "image", "clip1")[twin], _UNIT[::-1], atol=1e-3)
    assert set(items.stored_vectors([*hashes.values(), b"x"], "image", "clip1")) == {hashes["image"]}
    items.delete("scarf").result()
    assert vector_count() == 2
    items.write(replace(SCARF, id="twin", title="Blue"), [TEXT, IMAGE]).result()
    assert vector_count() == 2
    items.delete("twin").result()
    assert vector_count() == 0


def test_items_without_a_text_share_nothing(items: ItemStore, clock: Clock) -> None:
    bare = replace(SCARF, id="bare", title="", description="", attributes=())
    bundle_item = replace(bare, image=b"", image_hash=image_file_hash(bare.image))
    blocks = [VectorBlock(v.space, v.digest, v.values[None], np.ones(1, bool)) for v in (TEXT, IMAGE)]
    items.load("v1", [bundle_item], blocks, [clock.now])
    items.write(replace(bare, id="other"), [IMAGE]).result()
    numbers = [item_hash("bare"), item_hash("other")]
    assert items.vectors(numbers, "text", "bert1") == {}
    assert set(items.vectors(numbers, "image", "clip1")) == set(numbers)
    assert items.get(["bare"])["bare"].text_state is ModalityState.ABSENT
    assert items.ids_without_vectors({"text": "bert2"}) == []


def test_the_image_file_of_a_bundle_item_is_stored_when_it_arrives(items: ItemStore, clock: Clock) -> None:
    bundle_item = replace(SCARF, image=b"", image_hash=image_file_hash(SCARF.image))
    blocks = [VectorBlock(v.space, v.digest, v.values[None], np.ones(1, bool)) for v in (TEXT, IMAGE)]
    items.load("v1", [bundle_item], blocks, [clock.now])
    with pytest.raises(NotFound):
        items.image(bundle_item.image_hash)
    assert items.ids_without_vectors({"text": "bert2", "image": "clip2"}) == ["scarf"]
    assert items.write(SCARF, [TEXT, IMAGE]).result().outcome is WriteOutcome.UNCHANGED
    assert items.image(bundle_item.image_hash) == SCARF.image
    assert items.ids_without_vectors({"text": "bert2", "image": "clip2"}) == ["scarf", "scarf"]
    assert [c for c, _ in items.contents_without_vectors("image", "clip2", 0, b"", 9)] == [
        bundle_item.image_hash
    ]
    assert items.contents_without_vectors("image", "clip2", 1, b"", 9) == []
    items.store_vectors("image", "clip2", {bundle_item.image_hash: _UNIT}).result()
    assert items.contents_without_vectors("image", "clip2", 0, b"", 9) == []
    assert items.sequence == 1


def test_a_position_before_the_oldest_tombstone_is_out_of_range(items: ItemStore) -> None:
    for name in "abc":
        items.write(replace(SCARF, id=name)).result()
    items.delete("a").result()
    items.trim(4).result()
    with pytest.raises(OutOfRange):
        items.changes(3, 10)
    with pytest.raises(OutOfRange):
        items.changes(5, 10)
    assert [r.item.id for r in items.changes(0, 10)] == ["b", "c"]
    assert items.changes(4, 10) == []


def test_a_hash_collision_is_refused(items: ItemStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.embedding.store.mutations.item_hash", lambda _: 7)
    items.write(SCARF).result()
    with pytest.raises(AlreadyExists, match="choose another id"):
        items.write(replace(SCARF, id="other")).result()


_changes = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([None, 1.0, 2.0])), max_size=20)


@given(changes=_changes, chunk=st.integers(1, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_follower_converges_to_the_store(
    items: ItemStore, changes: list[tuple[str, float | None]], chunk: int
) -> None:
    """None deletes, a price writes; a follower reading in chunks sees the same live items."""
    for name, price in changes:
        future = items.delete(name) if price is None else items.write(replace(SCARF, id=name, price=price))
        assert isinstance(future.exception(), NotFound | None)
    prices: dict[str, float | None] = {}
    position = 0
    while batch := items.changes(position, chunk):
        for record in batch:
            prices[record.item.id] = record.item.price
            if record.deleted:
                del prices[record.item.id]
        position = batch[-1].sequence
    assert prices == {r.item.id: r.item.price for r in items.page(-1, 100)}


def test_item_hashes_are_the_first_63_bits_of_blake2b() -> None:
    digest = hashlib.blake2b("écharpe".encode(), digest_size=8).hexdigest()
    assert item_hash("écharpe") == int(f"{int(digest, 16):064b}"[:63], 2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": "a\nb"}, "id"),
        ({"title": "x" * 70_000}, "title"),
        ({"description": "x" * 3_000_000}, "description"),
        ({"description": "a\0b"}, "description"),
        ({"price": float("inf")}, "price"),
        ({"price": -1.0}, "price"),
        ({"price": 1e13}, "price"),
        ({"image": b"x" * (17 << 20)}, "image.data"),
        ({"image_uri": "file:///etc/passwd"}, "image.uri"),
        ({"title": "", "description": " ", "image": b""}, "title"),
        ({"attributes": (Attribute("a", ("x",)), Attribute("a", ("y",)))}, "attributes[1]"),
        ({"attributes": (Attribute("a"),)}, "attributes[0]"),
        ({"attributes": (Attribute("a", numbers=(float("nan"),)),)}, "attributes[0]"),
        ({"attributes": (Attribute("a", ("x",)),) * 65}, "attributes"),
        ({"source_version": 1 << 63}, "source_version"),
    ],
)
def test_an_invalid_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        catalog.validate(replace(SCARF, **change))
    assert [v.field for v in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x" * 257, "has 257 characters, at most 256 are allowed: 'xxx"),
        ("a\0b", r"holds a NUL character: 'a\\x00b'"),
    ],
)
def test_an_invalid_attribute_text_is_named_with_its_index_and_limit(text: str, problem: str) -> None:
    item = replace(SCARF, attributes=(Attribute("fit", ("slim",)), Attribute("care", ("x" * 256, text))))
    with pytest.raises(InvalidArgument, match=rf"attributes\[1\]: texts\[1\] of 'care' {problem}"):
        catalog.validate(item)


@pytest.mark.parametrize("title", ["赤いマフラー", "وشاح أحمر", "🧣" * 100, "a" * 65_536])
def test_text_in_any_script_is_valid(title: str) -> None:
    catalog.validate(Item(id="x", title=title))
