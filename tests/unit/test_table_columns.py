"""A table read from a file equals the one that was written, also if it was written to meanwhile."""

import random
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog import table_columns
from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.catalog.table_columns import TableColumns, load, save

START = datetime(2026, 1, 1, tzinfo=UTC)


def random_change(number: int, sequence: int, rng: random.Random) -> Change:
    """A deletion or any item; names of attributes come and go, and vectors too."""
    if rng.random() < 0.2:
        return Change(item_hash(f"i{number}"), sequence, None)
    attributes = []
    for name in rng.sample(["colour", "tags", "größe", "size", "rare"], rng.randrange(4)):
        if name == "size":
            attributes.append(Attribute(name, (), tuple(float(rng.randrange(9)) for _ in range(2))))
        else:
            texts = tuple(f"{name} {rng.randrange(30)}\n\ud83d" for _ in range(rng.randrange(1, 3)))
            attributes.append(Attribute(name, texts))
    item = Item(
        f"i{number}",
        f"title {rng.randrange(50)} of {number}",
        "",
        tuple(attributes),
        "f" * (number % 3),
        rng.choice([None, 2.5]),
        available_from=rng.choice([None, START]),
        available_until=rng.choice([None, START + timedelta(1)]),
    )
    vectors = {
        space: np.full(4, rng.random(), np.float32) for space in ("text", "image") if rng.random() < 0.7
    }
    return Change(item_hash(item.id), sequence, item, START + timedelta(seconds=sequence), vectors)


def contents(table: ItemTable) -> dict[str, object]:
    """All that a table says of its items, by id."""
    rows = table.rows(np.array(sorted(table.item_hashes.tolist())))
    assert (rows >= 0).all()
    live = table.live[rows]

    def texts(attribute: str) -> list[tuple[str, ...]]:
        return [table.texts_of(attribute, row) for row in rows.tolist()]

    codes, vocabulary = table.words_of_rows(rows)
    words = {code: word for word, code in vocabulary.items()}
    every = {
        "ids": table.ids(rows),
        "live": live.tolist(),
        "sequence": table.sequence,
        "sequences": table.sequences[rows].tolist(),
        "created": table.created[rows].tolist(),
        "available": table.available(START)[rows].tolist(),
        "words": [[words[code] for code in row if code >= 0] for row in codes.tolist()],
        "names": sorted(table.text_attributes),
        "texts": {name: texts(name) for name in table.text_attributes},
    }
    for name in ("price", "size"):
        if (numbers := table.numbers(name)) is not None:
            every[name] = [sorted(v for v in row if not np.isnan(v)) for row in numbers[rows].tolist()]
    for space in table.spaces:
        vectors = table.vectors(space)
        assert vectors is not None
        every[space] = vectors[0][rows].tolist(), vectors[1][rows].tolist()
    return every


def saved(table: ItemTable, path: Path) -> ItemTable:
    save(table.columns(), path, "store")
    columns = load(path, "store")
    assert columns is not None
    return ItemTable.of_columns(columns)


@given(seed=st.integers(0, 1 << 30), writes=st.integers(0, 400), ids=st.sampled_from([1, 3, 40, 300]))
@settings(max_examples=40, deadline=None)
def test_a_saved_table_equals_the_table_now_and_after_more_changes(
    seed: int, writes: int, ids: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, table = random.Random(seed), ItemTable(capacity=2)
    changes = [random_change(rng.randrange(ids), sequence, rng) for sequence in range(1, writes + 1)]
    table.apply(changes)
    copy = saved(table, tmp_path_factory.mktemp("table") / "items")
    assert contents(copy) == contents(table)
    more = [random_change(rng.randrange(2 * ids), writes + n, rng) for n in range(1, 200)]
    for one in (table, copy):
        one.apply(more)
    assert contents(copy) == contents(table)


def test_changes_while_the_columns_are_read_are_repaired_by_applying_them_again() -> None:
    rng, table = random.Random(3), ItemTable(capacity=2)
    copies, done = list[TableColumns](), threading.Event()
    changes = [random_change(rng.randrange(300), sequence, rng) for sequence in range(1, 12_000)]
    table.apply(changes[:50])

    def copy_columns() -> None:
        while not done.is_set():
            columns = table.columns()
            copies.append(columns)
            # The arrays of the table change in place: what a file would hold is kept.
            for name, values in columns.arrays.items():
                columns.arrays[name] = values.copy()
            for space, (values, present) in columns.vectors.items():
                columns.vectors[space] = values.copy(), present.copy()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    reader = threading.Thread(target=copy_columns)
    reader.start()
    try:
        for change in changes[50:]:
            table.apply([change])
    finally:
        done.set()
        reader.join()
        sys.setswitchinterval(interval)
    during = [columns for columns in copies if 50 < columns.sequence < len(changes)]
    assert during
    for columns in during[:: max(len(during) // 20, 1)]:
        copy = ItemTable.of_columns(columns)
        copy.apply(changes[columns.sequence :])
        assert contents(copy) == contents(table)


def test_a_file_that_is_damaged_or_of_something_else_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, table, path = random.Random(1), ItemTable(), tmp_path / "items"
    table.apply(random_change(n, n, rng) for n in range(1, 100))
    save(table.columns(), path, "store")
    whole = path.read_bytes()
    assert load(path, "other store") is None
    assert "is of another store" in caplog.text
    for size in [0, 1, 100, *range(200, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        caplog.clear()
        assert load(path, "store") is None
        assert "is damaged" in caplog.text
    path.write_bytes(whole + b"x")
    assert load(path, "store") is None
    path.write_bytes(whole)
    left_over = path.with_name("items.1.partial")
    left_over.write_bytes(b"half")
    assert load(path, "store") is not None
    assert not left_over.exists()
    monkeypatch.setattr(table_columns, "_code_digest", lambda: "of another version")
    assert load(path, "store") is None
    assert "was written by other code" in caplog.text
    assert load(tmp_path / "none", "store") is None
