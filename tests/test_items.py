"""The catalogue's truth: outcomes, sequences, tombstones, and what follows a change."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services import catalog
from services.catalog import Attribute, Item, item_number
from services.embedding.contents import Vector, photograph_hash
from services.embedding.item_rows import State, hashes_of
from services.embedding.item_writes import Block, Conflict, Outcome
from services.embedding.items import ItemStore
from services.errors import AlreadyExists, InvalidArgument, NotFound, OutOfRange
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
    written = items.write(SCARF, [TEXT, IMAGE]).result()
    record = items.get(["scarf", "nobody"])["scarf"]
    assert written.outcome is Outcome.CREATED
    assert record.item == replace(SCARF, image=b"", image_hash=photograph_hash(SCARF.image))
    assert items.image(record.item.image_hash) == SCARF.image
    assert (record.text_state, record.image_state) == (State.READY, State.READY)
    assert (record.created, record.updated, record.sequence) == (clock.now, clock.now, written.sequence)
    number = item_number("scarf")
    np.testing.assert_allclose(items.vectors([number], "text", "bert1")[number], _UNIT, atol=1e-3)
    assert items.vectors([number], "text", "other") == {}


def test_writing_the_same_again_changes_nothing(items: ItemStore) -> None:
    first = items.write(SCARF, [TEXT, IMAGE]).result()
    again = items.write(SCARF, [TEXT, IMAGE]).result()
    assert (again.outcome, again.sequence) == (Outcome.UNCHANGED, first.sequence)


def test_an_older_source_version_is_stale(items: ItemStore) -> None:
    items.write(SCARF).result()
    stale = items.write(replace(SCARF, title="Old", source_version=2)).result()
    assert stale.outcome is Outcome.STALE
    assert items.get(["scarf"])["scarf"].item.title == "Red scarf"
    assert items.write(replace(SCARF, title="New", source_version=4)).result().outcome is Outcome.UPDATED


def test_a_price_change_keeps_vectors_and_a_text_change_drops_other_encoders_of_it(items: ItemStore) -> None:
    number = item_number("scarf")
    items.write(SCARF, [TEXT, IMAGE, Vector("text", "bert2", _UNIT)]).result()
    items.write(replace(SCARF, price=9.0), [TEXT, IMAGE]).result()
    assert items.vectors([number], "text", "bert2")
    items.write(replace(SCARF, title="Blue scarf"), [TEXT, IMAGE]).result()
    assert not items.vectors([number], "text", "bert2")
    assert items.vectors([number], "image", "clip1")


def test_a_write_on_what_has_changed_since_is_a_conflict(items: ItemStore) -> None:
    assert items.write(SCARF, expected_sequence=0).result().sequence == 1
    with pytest.raises(Conflict):
        items.write(replace(SCARF, price=1.0), expected_sequence=0).result()
    assert items.write(replace(SCARF, price=1.0), expected_sequence=1).result().outcome is Outcome.UPDATED


def test_a_deleted_item_leaves_a_tombstone_and_returns_under_its_number(
    items: ItemStore, clock: Clock
) -> None:
    items.write(SCARF, [TEXT]).result()
    image_hash = items.get(["scarf"])["scarf"].item.image_hash
    gone = items.delete("scarf").result()
    assert items.get(["scarf"]) == {}
    assert items.page(-1, 10) == []
    assert not items.vectors([item_number("scarf")], "text", "bert1")
    with pytest.raises(NotFound):
        items.image(image_hash)
    [tombstone] = items.changes(1, 10)
    assert (tombstone.deleted, tombstone.item.id, tombstone.sequence) == (True, "scarf", gone.sequence)
    with pytest.raises(NotFound, match="scarf"):
        items.delete("scarf").result()
    clock.advance(days=1)
    assert items.write(SCARF, [TEXT]).result().outcome is Outcome.CREATED
    assert items.get(["scarf"])["scarf"].created == clock.now


def test_a_shared_photograph_stays_while_one_item_has_it(items: ItemStore) -> None:
    items.write(SCARF).result()
    items.write(replace(SCARF, id="twin")).result()
    items.delete("scarf").result()
    assert items.image(items.get(["twin"])["twin"].item.image_hash) == SCARF.image


def test_items_with_one_content_share_its_vectors_until_the_last_has_gone(
    items: ItemStore, engine: sa.Engine
) -> None:
    def stored() -> int:
        with engine.connect() as connection:
            return connection.scalar(sa.text("SELECT count(*) FROM content_vectors")) or 0

    items.write(SCARF, [TEXT, IMAGE]).result()
    items.write(replace(SCARF, id="twin"), [TEXT, replace(IMAGE, values=_UNIT)]).result()
    assert stored() == 2
    twin, hashes = item_number("twin"), hashes_of(SCARF)
    np.testing.assert_allclose(items.vectors([twin], "image", "clip1")[twin], _UNIT[::-1], atol=1e-3)
    assert set(items.known([*hashes.values(), b"x"], "image", "clip1")) == {hashes["image"]}
    items.delete("scarf").result()
    assert stored() == 2
    items.write(replace(SCARF, id="twin", title="Blue"), [TEXT, IMAGE]).result()
    assert stored() == 2
    items.delete("twin").result()
    assert stored() == 0


def test_items_without_a_text_share_nothing(items: ItemStore, clock: Clock) -> None:
    bare = replace(SCARF, id="bare", title="", description="", attributes=())
    brought = replace(bare, image=b"", image_hash=photograph_hash(bare.image))
    blocks = [Block(v.space, v.digest, v.values[None], np.ones(1, bool)) for v in (TEXT, IMAGE)]
    items.load("v1", [brought], blocks, [clock.now])
    items.write(replace(bare, id="other"), [IMAGE]).result()
    numbers = [item_number("bare"), item_number("other")]
    assert items.vectors(numbers, "text", "bert1") == {}
    assert set(items.vectors(numbers, "image", "clip1")) == set(numbers)
    assert items.get(["bare"])["bare"].text_state is State.ABSENT
    assert items.lacking({"text": "bert2"}) == []


def test_the_file_of_an_item_that_a_bundle_brought_is_kept_when_it_comes(
    items: ItemStore, clock: Clock
) -> None:
    brought = replace(SCARF, image=b"", image_hash=photograph_hash(SCARF.image))
    blocks = [Block(v.space, v.digest, v.values[None], np.ones(1, bool)) for v in (TEXT, IMAGE)]
    items.load("v1", [brought], blocks, [clock.now])
    with pytest.raises(NotFound):
        items.image(brought.image_hash)
    assert items.lacking({"text": "bert2", "image": "clip2"}) == ["scarf"]
    assert items.write(SCARF, [TEXT, IMAGE]).result().outcome is Outcome.UNCHANGED
    assert items.image(brought.image_hash) == SCARF.image
    assert items.lacking({"text": "bert2", "image": "clip2"}) == ["scarf", "scarf"]
    assert [c for c, _ in items.contents_lacking("image", "clip2", 0, b"", 9)] == [brought.image_hash]
    assert items.contents_lacking("image", "clip2", 1, b"", 9) == []
    items.keep_vectors("image", "clip2", {brought.image_hash: _UNIT}).result()
    assert items.contents_lacking("image", "clip2", 0, b"", 9) == []
    assert items.sequence == 1


def test_a_position_older_than_the_kept_tombstones_is_out_of_range(items: ItemStore) -> None:
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


def test_a_colliding_number_is_refused(items: ItemStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.embedding.item_writes.item_number", lambda _: 7)
    items.write(SCARF).result()
    with pytest.raises(AlreadyExists, match="choose another id"):
        items.write(replace(SCARF, id="other")).result()


_changes = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([None, 1.0, 2.0])), max_size=20)


@given(changes=_changes, chunk=st.integers(1, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_follower_ends_with_what_the_store_holds(
    items: ItemStore, changes: list[tuple[str, float | None]], chunk: int
) -> None:
    """None deletes, a price writes; a follower reading in chunks sees the same live items."""
    for name, price in changes:
        future = items.delete(name) if price is None else items.write(replace(SCARF, id=name, price=price))
        assert isinstance(future.exception(), NotFound | None)
    followed: dict[str, float | None] = {}
    position = 0
    while batch := items.changes(position, chunk):
        for record in batch:
            followed[record.item.id] = record.item.price
            if record.deleted:
                del followed[record.item.id]
        position = batch[-1].sequence
    assert followed == {r.item.id: r.item.price for r in items.page(-1, 100)}


def test_item_numbers_are_the_first_63_bits_of_blake2b() -> None:
    digest = hashlib.blake2b("écharpe".encode(), digest_size=8).hexdigest()
    assert item_number("écharpe") == int(f"{int(digest, 16):064b}"[:63], 2)


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
def test_a_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        catalog.validate(replace(SCARF, **change))
    assert [v.field for v in caught.value.violations] == [field]


@pytest.mark.parametrize("title", ["赤いマフラー", "وشاح أحمر", "🧣" * 100, "a" * 65_536])
def test_text_in_any_script_is_fine(title: str) -> None:
    catalog.validate(Item(id="x", title=title))
