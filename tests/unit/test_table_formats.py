"""JSON, Parquet, spreadsheets, feeds and archives are read."""

import gzip
import json
import struct
import zipfile
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xlsxwriter
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import FailedPrecondition
from training.data.readers import reader

RECORDS: list[dict[str, Any]] = [
    {"id": "1", "title": "Blue hat", "tags": ["a", "b"], "price": {"amount": 9.5, "currency": "EUR"}},
    {"id": "2", "title": None, "tags": [], "new": True},
]
ROWS = [
    {
        "id": "1",
        "title": "Blue hat",
        "tags": '["a", "b"]',
        "price.amount": "9.5",
        "price.currency": "EUR",
        "new": None,
    },
    {"id": "2", "title": None, "tags": "[]", "price.amount": None, "price.currency": None, "new": "true"},
]
JSON = {
    "an object a line": "\n".join(map(json.dumps, RECORDS)),
    "with a mark and empty lines": "\ufeff" + "\r\n\r\n".join(map(json.dumps, RECORDS)) + "\r\n",
    "a comma after each line": ",\n".join(map(json.dumps, RECORDS)),
    "an array": json.dumps(RECORDS),
    "an array over lines": json.dumps(RECORDS, indent=1),
    "objects over lines": "\n".join(json.dumps(record, indent=1) for record in RECORDS),
    "a list in an object": json.dumps({"total": 2, "links": [{"href": "x"}] * 3, "items": RECORDS}, indent=1),
    "a list in an object on one line": json.dumps({"meta": {"total": 2}, "answer": {"products": RECORDS}}),
}


def read_table(directory: Path, stem: str = "items") -> reader.Table:
    return reader.read(reader.find(directory, stem, ""))


@pytest.mark.parametrize("shape", list(JSON))
def test_json_of_every_shape_reads_alike(tmp_path: Path, shape: str) -> None:
    (tmp_path / "items.json").write_text(JSON[shape], encoding="utf-8")
    table = read_table(tmp_path)
    assert table.rows.select(list(ROWS[0])).to_pylist() == ROWS
    assert table.read == 2
    assert any("the records are the list" in str(note) for note in table.notes) == ("in an object" in shape)


def test_damaged_json_is_read_as_far_as_possible(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": "1"}\n{"id": "2"\n[3]\n{"id": "4", "title": "hat \\ud83d"}\n')
    table = read_table(tmp_path)
    assert table.rows.to_pylist() == [{"id": "1", "title": None}, {"id": "4", "title": "hat \ufffd"}]
    loss, repair = table.notes
    assert (loss.kind, loss.count, loss.rows, loss.samples) == ("loss", 2, (2, 3), ('{"id": "2"', "[3]"))
    assert (repair.kind, repair.rows) == ("repair", (4,))
    assert (table.read, table.place(1)) == (4, "line 4")
    whole = json.dumps([{"id": str(place)} for place in range(50_000)], indent=1)
    path.write_text(whole[: whole.index('"40000"')])
    table = read_table(tmp_path)
    assert (table.rows.num_rows, table.read, table.notes[0].kind) == (40_000, 40_001, "loss")
    path.write_text('[{"id": "1"}, {"id": broken}, {"id": "3"}]')
    with pytest.raises(FailedPrecondition, match=r"items.jsonl is no valid JSON in record 2: .*broken"):
        read_table(tmp_path)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(
        st.dictionaries(st.sampled_from("abc"), TEXT | st.none() | st.integers(), min_size=1), min_size=1
    ),
    indent=st.sampled_from([None, 1]),
    as_array=st.booleans(),
)
def test_json_records_are_read_unchanged(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[str, Any]],
    indent: int | None,
    as_array: bool,
) -> None:
    path = tmp_path_factory.mktemp("shop") / "items.json"
    each = "\n".join(json.dumps(record, indent=indent, ensure_ascii=False) for record in records)
    path.write_text(json.dumps(records, indent=indent) if as_array else each, encoding="utf-8", newline="")
    rows = reader.read([path]).rows.to_pylist()
    for row, record in zip(rows, records, strict=True):
        texts = {name: None if v in (None, "") else str(v) for name, v in record.items()}
        assert {name: row.get(name) for name in texts} == texts


def test_parquet_of_warehouses_reads_as_plain_values(tmp_path: Path) -> None:
    far = datetime(9999, 12, 31, tzinfo=UTC)
    table = pa.table(
        {
            "id": pa.array([b"1", b"2"], pa.binary()),
            "code": pa.array([bytes(range(16)), None], pa.binary(16)),
            "price": pa.array([Decimal("9.50"), None], pa.decimal128(9, 2)),
            "kind": pa.array(["view", "view"]).dictionary_encode(),
            "sizes": pa.array([[1, 2], None]),
            "names": pa.array([[b"a"], []], pa.list_(pa.binary())),
            "user": pa.array([{"id": "u", "geo": {"zip": "1"}}, None]),
            "lines": pa.array([[{"sku": "1", "n": 2}], None]),
            "until": pa.array([far, None], pa.timestamp("us", "UTC")),
            "time": pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", "UTC")),
            "day": pa.array([date(2026, 1, 2), None]),
            "count": pa.array([1, 2**40]),
            "long": pa.array(["x", None], pa.large_string()),
        }
    )
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=1)
    assert read_table(tmp_path).rows.to_pylist()[0] == {
        "id": "1",
        "code": "00010203-0405-0607-0809-0a0b0c0d0e0f",
        "price": "9.50",
        "kind": "view",
        "sizes": [1, 2],
        "names": ["a"],
        "user.id": "u",
        "user.geo.zip": "1",
        "lines": '[{"sku": "1", "n": 2}]',
        "until": far,
        "time": datetime(2023, 11, 14, 22, 13, 20, 123456, UTC),
        "day": date(2026, 1, 2),
        "count": 1,
        "long": "x",
    }


def test_a_parquet_folder_of_spark_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "events.parquet"
    for place, day in enumerate(("2026-01-01", "2026%2F01%2F02", "__HIVE_DEFAULT_PARTITION__")):
        (folder / f"day={day}").mkdir(parents=True)
        times = pa.array([datetime(2026, 1, 1), datetime(9999, 12, 31)], pa.timestamp("us"))
        rows = pa.table({"time": times, "user": [1, 2] if place else ["a", "b"]})
        pq.write_table(
            rows.slice(0, 2 - place),
            folder / f"day={day}" / "part-0.parquet",
            use_deprecated_int96_timestamps=True,
        )
    (folder / "_SUCCESS").write_text("")
    (folder / "day=2026-01-01" / ".part-0.parquet.crc").write_text("x")
    table = read_table(tmp_path, "events")
    assert table.name == "events.parquet (3 parts)"
    assert sorted(map(tuple, (row.values() for row in table.rows.to_pylist())), key=str) == [
        (datetime(2026, 1, 1), "1", "2026/01/02"),
        (datetime(2026, 1, 1), "a", "2026-01-01"),
        (datetime(9999, 12, 31), "b", "2026-01-01"),
    ]
    assert any("other types in the columns user" in note.text for note in table.notes)


def test_spreadsheets_are_read(tmp_path: Path) -> None:
    with xlsxwriter.Workbook(tmp_path / "items.xlsx", {"default_date_format": "dd/mm/yyyy hh:mm"}) as book:
        sheet = book.add_worksheet()
        sheet.write_row(0, 0, ["id", "title", "price", "from", "new"])
        sheet.write_row(1, 0, [123, "Hat", 9.5])
        sheet.write_datetime(1, 3, datetime(2026, 1, 2))
        sheet.write_boolean(1, 4, True)
        sheet.write_row(2, 0, ["007", None, 12.0])
        sheet.write_datetime(2, 3, datetime(2026, 1, 2, 10, 30))
        book.add_worksheet("Notes").write_row(0, 0, ["x"])
    table = read_table(tmp_path)
    assert [list(row.values()) for row in table.rows.to_pylist()] == [
        ["123", "Hat", "9.5", "2026-01-02", "true"],
        ["007", None, "12", "2026-01-02T10:30:00", None],
    ]
    assert "sheets that are not read: 'Notes'" in str(table.notes[0])


FEED = """<?xml version="1.0"?><rss xmlns:g="http://base.google.com/ns/1.0"><channel><title>Shop</title>
<item><g:id>1</g:id><title>Hat &amp; scarf</title><g:image_link>a</g:image_link><g:image_link>b</g:image_link>
<g:shipping><g:price>5 EUR</g:price></g:shipping></item><item><g:id>2</g:id></item></channel></rss>"""


def test_feeds_are_read(tmp_path: Path) -> None:
    (tmp_path / "items.xml").write_text(FEED)
    first, second = read_table(tmp_path).rows.to_pylist()
    assert first == {"id": "1", "title": "Hat & scarf", "image_link": '["a", "b"]', "shipping.price": "5 EUR"}
    assert second["id"] == "2"
    (tmp_path / "items.xml").write_text("<a><b/></a>")
    with pytest.raises(FailedPrecondition, match=r"XML without an element .*convert it to CSV"):
        read_table(tmp_path)


def test_files_without_a_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    archive = gzip.compress(b"id\n" + b"1\n" * 10_000)
    files = {
        b"<!DOCTYPE html><html></html>": "is a web page",
        b"version https://git-lfs.github.com/spec/v1\noid": "pointer of Git LFS",
        b"Obj\x01": "is an Avro file",
        b"\x89HDF\r\n": "is an HDF5 file",
        archive[:-20]: "cannot be read: Compressed file ended",
        archive[:30] + b"\xff" * 40: "cannot be read",
        b"PAR1": "damaged Parquet",
        struct.pack("<I", 0xE011CFD0) + b"x" * 600: "damaged or protected spreadsheet|install the extra",
    }
    for content, message in files.items():
        path.write_bytes(content)
        with pytest.raises(FailedPrecondition, match=rf"^items.csv .*({message})"):
            reader.read([path])
    path.rename(tmp_path / "items.parquet")
    (tmp_path / "items.parquet").write_text("id\n1\n")
    with pytest.raises(FailedPrecondition, match=r"by its name it is .parquet, by its content it is not"):
        read_table(tmp_path)


def test_a_file_is_found_or_the_error_lists_the_files_present(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="has nothing"):
        reader.find(tmp_path, "items", "")
    for name in (
        "catalogue.xlsx",
        "events.csv",
        "events.tsv",
        "orders-01.csv",
        "orders-02.csv.gz",
        "items.csv.bak",
    ):
        (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(
        FailedPrecondition, match=r"no items file .* has catalogue.xlsx, events.csv, .*items.csv.bak"
    ):
        reader.find(tmp_path, "items", "")
    with pytest.raises(
        FailedPrecondition, match=r"more than one events file: events.csv, events.tsv.*\[events\]"
    ):
        reader.find(tmp_path, "events", "")
    with pytest.raises(FailedPrecondition, match=r"items.csv does not exist; .* has catalogue.xlsx"):
        reader.find(tmp_path, "items", "items.csv")
    assert reader.find(tmp_path, "events", "events.tsv") == [tmp_path / "events.tsv"]
    both = [tmp_path / "orders-01.csv", tmp_path / "orders-02.csv.gz"]
    assert reader.find(tmp_path, "orders", "") == reader.find(tmp_path, "events", "orders-*") == both
    with zipfile.ZipFile(tmp_path / "shop.zip", "w") as archive:
        archive.writestr("a/events.csv", "user\n1\n")
        archive.writestr("a/items.csv", "id\n1\n")
    member = reader.find(tmp_path, "events", "shop.zip/a/events.csv")
    assert reader.read(member).rows.to_pylist() == [{"user": "1"}]
    with pytest.raises(FailedPrecondition, match=r"has no column of the parts before it: id, not user"):
        reader.read(reader.find(tmp_path, "events", "shop.zip"))
    with pytest.raises(FailedPrecondition, match=r"no item named 'a/orders.csv' in the archive"):
        reader.read(reader.find(tmp_path, "events", "shop.zip/a/orders.csv"))


def test_an_empty_parquet_column_takes_the_type_of_another_part_or_text(tmp_path: Path) -> None:
    empty = pa.table({"id": ["1"], "price": pa.nulls(1), "tags": pa.nulls(1), "note": pa.nulls(1)})
    other = pa.table({"id": ["2"], "price": [9], "tags": [["a"]], "note": pa.nulls(1)})
    for place, part in enumerate((empty, other)):
        pq.write_table(part, tmp_path / f"items-{place}.parquet")
    table = read_table(tmp_path)
    assert (table.rows.schema.field("price").type, table.rows.schema.field("note").type) == (
        pa.int64(),
        pa.string(),
    )
    assert table.rows["tags"].to_pylist() == [None, ["a"]]
    text = pa.table({"id": ["3"], "tags": ["a"]})
    pq.write_table(text, tmp_path / "items-2.parquet")
    assert read_table(tmp_path).rows["tags"].to_pylist() == [None, '["a"]', "a"]
