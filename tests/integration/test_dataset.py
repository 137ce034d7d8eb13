"""A shop directory reads alike in every format, with bad rows counted and useless files refused."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from services.core.errors import FailedPrecondition, InvalidArgument
from tests.conftest import skip_without
from training.data.dataset import read_shop
from training.data.settings_file import read_settings, with_training

Rows = list[dict[str, Any]]
ITEMS: Rows = [
    {"id": "001", "title": "Röd scarf", "description": "Wool", "price": 9.5, "colour": "red"},
    {"id": "002", "title": "茶碗", "description": None, "price": None, "colour": "blue"},
]
EVENTS: Rows = [
    {"user_id": "u1", "item_id": "001", "time": "2026-01-02T10:00:00", "price": 9.0},
    {"user_id": "u2", "item_id": "002", "time": "2026-01-01", "price": None},
    {"user_id": "u1", "item_id": "001", "time": "2026-01-02T10:00:00", "price": 9.0},
]
TOML = '[items]\ntext_attributes = ["colour"]\n'


def as_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


def as_csv(path: Path, rows: Rows) -> None:
    pa_csv.write_csv(pa.Table.from_pylist(rows), path.with_suffix(".csv"))


def as_csv_with_a_mark_and_gzip(path: Path, rows: Rows) -> None:
    plain = io.BytesIO()
    pa_csv.write_csv(pa.Table.from_pylist(rows), plain)
    data = b"\xef\xbb\xbf" + plain.getvalue().replace(b"\n", b"\r\n")
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(data))


def as_lines(path: Path, rows: Rows) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def as_lines_gzip(path: Path, rows: Rows) -> None:
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(data))


FORMATS = [as_parquet, as_csv, as_csv_with_a_mark_and_gzip, as_lines, as_lines_gzip]


def make(directory: Path, items: Rows, events: Rows, write: Callable[[Path, Rows], None] = as_lines) -> Path:
    write(directory / "items", items)
    write(directory / "events", events)
    (directory / "shop.toml").write_text(TOML)
    return directory


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_shop(tmp_path: Path, write: Callable[[Path, Rows], None]) -> None:
    shop = read_shop(make(tmp_path, ITEMS, EVENTS, write))
    assert [(i.id, i.title, i.description, i.price) for i in shop.items] == [
        ("001", "Röd scarf", "Wool", 9.5),
        ("002", "茶碗", "", None),
    ]
    assert shop.items[0].attributes[0].texts == ("red",)
    events = shop.events
    assert [events.user_ids[u] for u in events.user] == ["u2", "u1", "u1"]
    assert [events.item_ids[i] for i in events.item] == ["002", "001", "001"]
    np.testing.assert_array_equal(events.price, [np.nan, 9, 9])
    assert events.time[0] == datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1e6


def test_made_event_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = read_shop(make(tmp_path / "a", ITEMS, EVENTS)).events.event_ids
    other = read_shop(make(tmp_path / "b", ITEMS, EVENTS[::-1])).events.event_ids
    assert sorted(one) == sorted(other)
    assert len(set(one)) == 3


def test_bad_rows_are_dropped_and_counted_and_the_rest_stays(tmp_path: Path) -> None:
    items = [
        *ITEMS,
        {"id": "", "title": "x"},
        {"id": "a\tb", "title": "x"},
        {"id": "001", "title": "again"},
        {"id": "bare"},
        {"id": "dear", "title": "x", "price": "much"},
    ]
    events = [
        *EVENTS,
        {"user_id": "", "item_id": "001", "time": "2026-01-01"},
        {"user_id": "u1", "item_id": None, "time": "2026-01-01"},
        {"user_id": "u1", "item_id": "001", "time": "soon"},
        {"user_id": "u1", "item_id": "001", "time": "2026-01-01", "type": "hug"},
        {"user_id": "u1", "item_id": "gone", "time": "2026-01-01"},
        {"user_id": "u1", "item_id": "001", "time": "2026-01-01", "event_id": "e"},
        {"user_id": "u1", "item_id": "001", "time": "2026-01-01", "event_id": "e"},
    ]
    make(tmp_path, items, events)
    (tmp_path / "shop.toml").write_text(TOML + '[events]\ndefault_type = "purchase"\n')
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write("{broken\n[1]\n")
    shop = read_shop(tmp_path)
    assert [item.id for item in shop.items] == ["001", "002", "dear"]
    assert shop.items[2].price is None
    assert sum(n for r, n in shop.reports["items"].reasons.items() if "dropped" not in r) == 4
    assert shop.reports["events"].reasons == {
        "no JSON object": 2,
        "no user id or an invalid one": 1,
        "no item id or an invalid one": 1,
        "time: not a readable time": 1,
        "unknown event type": 1,
        "a repeated event_id with the same item and type": 1,
        "note: the items file does not have this item": 1,
    }
    assert (shop.reports["events"].rows_read, shop.reports["events"].rows_used) == (12, 5)


def test_until_is_exclusive(tmp_path: Path) -> None:
    shop = read_shop(make(tmp_path, ITEMS, EVENTS), until=datetime(2026, 1, 2, 10, tzinfo=UTC))
    assert [shop.events.user_ids[u] for u in shop.events.user] == ["u2"]


def test_useless_files_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="holds no items file"):
        read_shop(tmp_path)
    make(tmp_path, ITEMS, EVENTS)
    (tmp_path / "items.csv").write_text("id\n1\n")
    with pytest.raises(FailedPrecondition, match="more than one items file"):
        read_shop(tmp_path)
    (tmp_path / "items.csv").unlink()
    as_lines(tmp_path / "events", [{"user_id": "u"}])
    with pytest.raises(FailedPrecondition, match=r"events.jsonl has no column 'item_id'; it has user_id"):
        read_shop(tmp_path)
    (tmp_path / "items.jsonl").unlink()
    (tmp_path / "items.parquet").write_bytes(b"no parquet")
    with pytest.raises(FailedPrecondition, match=r"items.parquet cannot be read"):
        read_shop(tmp_path)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[items]\nname = 'x'\n", "items.name"),
        ("[time]\ngranularity = 'year'\n", "time.granularity"),
        ("[event_types]\nclick = 0.0\n", "event_types"),
        ("[task]\ntargets = ['hug']\n", "event_types"),
        ("[items\n", "is not valid TOML"),
        ("[events]\ndefault_type = 'hug'\n", "events.default_type: 'hug' is not one of event_types"),
        ("[task]\ntargets = ['hug']\n", "task.targets: 'hug' is not one of event_types"),
        ("[event_types]\nview = nan\n", "event_types"),
        ("source = 'shopify'\n", r"source: is a section, not 'shopify': write \[source\]"),
        ("[source]\npreset = ['shopify']\n", r"source.preset: \['shopify'\] is not one of"),
        ("[item]\nid = 'x'\n", "item: unknown; did you mean items"),
        ("[items]\ntitel = 'x'\n", "items.titel: unknown; did you mean title"),
        ("[items]\nencoding = 'utf8mb4'\n", "items.encoding: 'utf8mb4' is not a text encoding"),
        ("[events]\nencoding = 'hex'\n", "events.encoding: 'hex' is not a text encoding"),
        ("[items]\ncolumns = ['a', 'a', 'b']\n", "items.columns: 'a' is repeated"),
    ],
)
def test_a_wrong_shop_toml_names_the_key(tmp_path: Path, text: str, where: str) -> None:
    make(tmp_path, ITEMS, EVENTS)
    (tmp_path / "shop.toml").write_text(text)
    with pytest.raises(InvalidArgument, match=where):
        read_shop(tmp_path)


def test_shop_toml_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    make(tmp_path, ITEMS, EVENTS)
    (tmp_path / "shop.toml").write_bytes(b"\xef\xbb\xbf[event_types]\nbuy = 1.0\n")
    assert read_shop(tmp_path).settings.targets == ("buy",)


def test_files_are_named_by_an_absolute_glob_too(tmp_path: Path) -> None:
    make(tmp_path, ITEMS, EVENTS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, row in enumerate(EVENTS):
        as_lines(elsewhere / f"part{number}", [row])
    (tmp_path / "shop.toml").write_text(f'[events]\nfile = "{elsewhere}/*.jsonl"\n')
    assert len(read_shop(tmp_path).events) == len(EVENTS)
    (tmp_path / "shop.toml").write_text('[events]\nfile = "x**.jsonl"\n')
    with pytest.raises(FailedPrecondition, match=r"file = 'x\*\*\.jsonl' is no pattern of files"):
        read_shop(tmp_path)


def test_a_training_file_overrides_only_training_keys(tmp_path: Path) -> None:
    shop, less = tmp_path / "shop.toml", tmp_path / "less.toml"
    shop.write_text(
        "[time]\ngranularity = 'day'\n[text]\ntrainable_layers = 2\nsteps = 150\n[image]\nepochs = 4\n"
    )
    less.write_text("[text]\nsteps = 20\n[ranking]\nmax_queries = 50\n")
    settings = with_training(read_settings(shop), less)
    assert (settings.time.granularity, settings.text.trainable_layers, settings.text.steps) == ("day", 2, 20)
    assert (settings.image.epochs, settings.ranking.max_queries) == (4, 50)
    assert settings.graph == read_settings(shop).graph
    wrong = {"[time]\ngranularity = 'hour'\n": "less.toml: time", "[text]\nstep = 1\n": "text.step"}
    for text, where in wrong.items():
        less.write_text(text)
        with pytest.raises(InvalidArgument, match=where):
            with_training(read_settings(shop), less)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        with_training(read_settings(shop), tmp_path / "nothing.toml")


def test_images_are_found_in_files_and_tars(tmp_path: Path) -> None:
    make(tmp_path, [*ITEMS, {"id": "003"}], EVENTS)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "deep" / "001.PNG").write_bytes(b"one")
    with tarfile.open(tmp_path / "images" / "more.tar", "w") as archive:
        info = tarfile.TarInfo("folder/003.webp")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"three"))
    shop = read_shop(tmp_path)
    assert [item.id for item in shop.items] == ["001", "002", "003"]
    assert (shop.images.read("001"), shop.images.read("003")) == (b"one", b"three")
    assert "002" not in shop.images


def test_the_real_shop_reads_completely() -> None:
    root = Path(os.environ.get("VITRINE_HM", Path(__file__).parents[3] / "shared/data/hm"))
    if not root.is_dir():
        skip_without("hm", f"{root} is not there")
    shop = read_shop(root, Path(__file__).parents[2] / "bench/hm/shop.toml")
    assert len(shop.items) == 105_542
    assert (len(shop.events), len(shop.events.user_ids), len(shop.events.item_ids)) == (
        215_627,
        61_800,
        28_946,
    )
    assert sum(i in shop.images for i in shop.events.item_ids) == 28_920
    assert shop.reports["events"].reasons == {}


@pytest.mark.parametrize("write", [as_parquet, as_lines, as_csv])
def test_a_list_is_an_attribute_of_several_texts(write: Callable[[Path, Rows], None], tmp_path: Path) -> None:
    colours: list[Any] = [["red", "blue", "red", ""], None, ["[sic"]]
    if write is as_csv:
        colours = [json.dumps(colour) if colour else "" for colour in colours[:2]] + ["[sic"]
    items = [{"id": str(n), "title": "scarf", "colour": colour} for n, colour in enumerate(colours)]
    shop = read_shop(make(tmp_path, items, EVENTS, write))
    assert [tuple(a.texts for a in item.attributes) for item in shop.items] == [
        (("red", "blue"),),
        (),
        (("[sic",),),
    ]
