"""A view that starts from the file of its item table equals one that reads the whole store."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from services.catalog.items import Attribute, Item, item_hash, item_text
from services.embedding.catalog import table_file
from services.embedding.catalog.search_view import SearchView
from services.embedding.catalog.table_file import TableFile
from services.embedding.index.segmented_index import SegmentedIndex
from services.embedding.store.content_addressed import Vector
from services.embedding.store.item_store import ItemStore
from services.embedding.store.schema import content_hashes
from services.storage import store
from tests.support.disks import small_disk

DIGESTS = {"text": "t1", "image": "i1"}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def few_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written for a few changes, and as often as wished."""
    monkeypatch.setattr(table_file, "_MIN_CHANGES", 5)
    monkeypatch.setattr(table_file, "_PAUSE_FACTOR", 0)


@pytest.fixture
def items(tmp_path: Path) -> Iterator[ItemStore]:
    engine = store.open_engine(f"sqlite:///{tmp_path / 'items.sqlite'}")
    items = ItemStore(engine, lambda: NOW)
    yield items
    items.close()
    engine.dispose()


@contextmanager
def view_of(items: ItemStore, path: Path | None) -> Iterator[SearchView]:
    spaces = {space: SegmentedIndex(4) for space in DIGESTS}
    file = TableFile(path, items.name) if path else None
    view = SearchView(items, DIGESTS, spaces, file=file)
    yield view
    view.close()


def write(items: ItemStore, number: int, rng: random.Random) -> None:
    """An item whose text has a vector, and whose image may have one, or a deletion."""
    if rng.random() < 0.2:
        items.delete(f"i{number}").exception()
        return
    title, image = f"title {rng.randrange(1000)}", bytes([rng.randrange(200)]) * 32
    colour = Attribute("colour", (f"c{rng.randrange(5)}",))
    item = Item(f"i{number}", title, "", (colour,), image_hash=image)
    spaces = ["text"] if rng.random() < 0.5 else ["text", "image"]
    hashes = content_hashes(item)
    vectors = [Vector(space, DIGESTS[space], unit(hashes[space])) for space in spaces]
    items.write(item, vectors).result()


def unit(content: bytes) -> np.ndarray:
    vector = np.random.default_rng(content[0]).standard_normal(4).astype(np.float32)
    return vector / np.linalg.norm(vector)


def search_results(view: SearchView) -> list[list[tuple[int, float]]]:
    queries = np.eye(4, dtype=np.float32)
    results = []
    for index in view.spaces.values():
        for hits in index.search(queries, 100):
            results.append(list(zip(hits.hashes.tolist(), np.round(hits.scores, 3).tolist(), strict=True)))
    return results


def test_a_start_from_the_file_equals_a_start_from_the_store(items: ItemStore, tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "index" / "items"
    for _ in range(8):
        for _ in range(rng.randrange(1, 25)):
            write(items, rng.randrange(30), rng)
        with view_of(items, path) as view, view_of(items, None) as whole:
            assert search_results(view) == search_results(whole)
            rows = view.table.rows(whole.table.item_hashes)
            assert (rows >= 0).all()
            assert view.table.live.sum() == whole.table.live.sum()
            assert view.table.sequence == whole.table.sequence == items.sequence
            assert view.sequence == whole.sequence
            for row in np.flatnonzero(whole.table.live).tolist():
                assert view.table.texts_of("colour", int(rows[row])) == whole.table.texts_of("colour", row)
            if rng.random() < 0.6:
                asyncio.run(asyncio.to_thread(TableFile(path, items.name).save_if_outdated, view.table))
    assert path.is_file()


def test_vectors_that_a_backfill_stored_after_the_file_was_written_are_found(
    items: ItemStore, tmp_path: Path
) -> None:
    path = tmp_path / "items"
    every = [Item(f"i{n}", f"title {n}") for n in range(10)]
    for item in every:
        items.write(item).result()
    with view_of(items, path) as view:
        assert TableFile(path, items.name).save_if_outdated(view.table)
        assert [len(hits) for hits in search_results(view)] == [0] * 8
    sequence = items.sequence
    contents = {content_hashes(item)["text"]: item_text(item) for item in every}
    items.store_vectors("text", "t1", {content: unit(content) for content in contents}).result()
    assert items.sequence == sequence
    with view_of(items, path) as view, view_of(items, None) as whole:
        assert [len(hits) for hits in search_results(view)] == [10] * 4 + [0] * 4
        assert search_results(view) == search_results(whole)


def test_a_file_from_before_deletions_that_are_forgotten_is_not_used(
    items: ItemStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "items"
    for number in range(10):
        items.write(Item(f"i{number}", "title")).result()
    with view_of(items, path) as view:
        assert TableFile(path, items.name).save_if_outdated(view.table)
    items.delete("i3").result()
    items.trim(items.sequence).result()
    items.write(Item("i10", "title")).result()
    with view_of(items, path) as view:
        assert view.table.rows(np.array([item_hash("i3")])).tolist() == [-1]
        assert view.table.live.sum() == 10
    assert "the saved item table is of no use" in caplog.text


def test_few_changes_write_no_file_and_a_full_disk_is_no_failure(
    items: ItemStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        items.write(Item(f"i{number}", "title")).result()
    with view_of(items, tmp_path / "items") as view:
        assert not TableFile(tmp_path / "items", items.name).save_if_outdated(view.table)
    for number in range(4, 3000):
        items.write(Item(f"i{number}", f"title {number}", "x" * 50))
    items.flush().result()
    with view_of(items, None) as view, small_disk(tmp_path / "disk", 1) as disk:
        (disk.path / "ballast").write_bytes(bytes(900_000))
        file = TableFile(disk.path / "items", items.name)
        assert not file.save_if_outdated(view.table)
        assert "the item table is not saved" in caplog.text
        assert sorted(p.name for p in disk.path.iterdir() if p.name != "lost+found") == ["ballast"]
        assert not file.save_if_outdated(view.table)  # not before a minute has passed
        assert caplog.text.count("is not saved") == 1
