"""Shop files read back as written, and lost rows are counted and named."""

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import FailedPrecondition
from training.data.readers import reader
from training.data.readers.delimited import read_delimited
from training.data.readers.dialect import Dialect
from training.data.readers.parts import FilePart
from training.data.readers.reader import Table

Rows = list[list[str | None]]


def zip_file(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._events.csv", b"\0\1")
        archive.writestr("events.csv", data)
    return buffer.getvalue()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    ".zip": zip_file,
}
DETECTED = ("utf-8", "utf-8-sig", "utf-16")
STATED = ("utf-16-le", "gb18030", "cp1252")


@st.composite
def files(draw: st.DrawFn) -> tuple[Rows, bytes, Dialect]:
    """Rows of an id and texts, the file they make, and what shop.toml says of it."""
    codec = draw(st.sampled_from(DETECTED + STATED))
    separator = draw(st.sampled_from([",", ";", "\t", "|", "\x01"]))
    line_end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    quoting: int = (
        csv.QUOTE_ALL if line_end == "\r" else draw(st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
    )
    text = st.text(st.sampled_from("ab 1.,;\t|:'\"\n\\é中\u2028\x0b"), max_size=12).map(
        lambda text: text.encode(codec, "ignore").decode(codec) or None
    )
    width = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(text, min_size=width, max_size=width), min_size=1, max_size=20))
    rows = [[f"sku-{place}", *row] for place, row in enumerate(rows)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator=line_end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerow(["id", *(f"column {place}" for place in range(width))])
    writer.writerows(rows)
    return rows, buffer.getvalue().encode(codec), Dialect(encoding=codec if codec in STATED else "")


def cells(table: Table | FilePart) -> Rows:
    columns = [column.to_pylist() for column in table.rows.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def opener(data: bytes) -> Callable[[], AbstractContextManager[BinaryIO]]:
    return lambda: contextlib.nullcontext(io.BytesIO(data))


@settings(max_examples=300, deadline=None)
@given(case=files(), compression=st.sampled_from(list(COMPRESSIONS)))
def test_a_well_formed_file_round_trips(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Rows, bytes, Dialect], compression: str
) -> None:
    rows, data, dialect = case
    directory = tmp_path_factory.mktemp("shop")
    (directory / f"events.csv{compression}").write_bytes(COMPRESSIONS[compression](data))
    table = reader.read(reader.find(directory, "events", ""), dialect)
    assert cells(table) == rows
    assert table.read == len(rows)
    assert {note.kind for note in table.notes} <= {"guess"}


@settings(max_examples=300, deadline=None)
@given(case=files(), size=st.integers(90, 200))
def test_blocks_can_end_anywhere(case: tuple[Rows, bytes, Dialect], size: int) -> None:
    rows, data, dialect = case
    part = read_delimited(opener(data), dialect, (), block_size=size)
    assert cells(part) == rows


QUOTED = st.text(st.sampled_from("ab ,;'é"), max_size=8)
DAMAGES = {
    "one cell more": lambda line: line + ",more",
    "one cell fewer": lambda line: line.rpartition(",")[0],
    "an inch mark": lambda line: line.replace("plain", '27" plain'),
    "a mark that does not end": lambda line: line.replace("plain", '"plain'),
    "a mark inside a quoted cell": lambda line: line.replace("plain", '"a 27" plain"'),
    "a byte that is no UTF-8": lambda line: line.replace("plain", "pl\udc92ain"),
    "a NUL": lambda line: line.replace("plain", "pl\0ain"),
}
LOST = {"one cell more", "one cell fewer"}


@settings(max_examples=500, deadline=None)
@given(
    texts=st.lists(QUOTED, min_size=12, max_size=40),
    damages=st.dictionaries(st.integers(0, 11), st.sampled_from(sorted(DAMAGES))),
    block_size=st.sampled_from([120, 1 << 20]),
)
def test_a_damaged_line_loses_only_itself(texts: list[str], damages: dict[int, str], block_size: int) -> None:
    open_marks = [line for line, damage in damages.items() if damage == "a mark that does not end"]
    for line in open_marks[1:]:
        del damages[line]  # the second would close the first: the text between is a cell, by the rules
    if open_marks:
        damages = {
            line: d for line, d in damages.items() if d not in ("an inch mark", "a mark inside a quoted cell")
        }
    lines = [f'{place},plain,"{text}",é{place}' for place, text in enumerate(texts)]
    output_lines = [
        DAMAGES[damages[place]](line) if place in damages else line for place, line in enumerate(lines)
    ]
    data = "\n".join(["id,name,text,last", *output_lines]).encode("utf-8", "surrogateescape")
    part = read_delimited(opener(data), Dialect(separator=","), (), block_size=block_size)
    lost = sum(note.count for note in part.notes if note.kind == "loss")
    assert part.read == len(lines) == part.rows.num_rows + lost
    by_id = {row[0]: (row, line) for row, line in zip(cells(part), part.lines, strict=True)}
    for place, text in enumerate(texts):
        damage = damages.get(place, "")
        if damage in LOST:
            assert str(place) not in by_id
        elif damage != "a mark that does not end" or "," not in text:
            row, line = by_id[str(place)]
            assert (row[2], row[3], line) == (text or None, f"é{place}", place + 2)
    note_rows = {row for note in part.notes if note.kind != "guess" for row in note.rows}
    assert note_rows <= {place + 2 for place in damages}
    allowed = {"an inch mark", "a mark that does not end"}  # no rule forbids it, or another mark may end it
    line_numbers = {place + 2 for place, damage in damages.items() if damage not in allowed}
    assert len(line_numbers) > 5 or note_rows >= line_numbers


def test_an_unclosed_quote_loses_only_its_line_in_a_large_file(tmp_path: Path) -> None:
    lines = [f"{place},plain,{place}.5" for place in range(600_000)]
    lines[7] = '7,"plain,7.5'
    lines[500_000] = '500000,"two\nlines",5.5'
    (tmp_path / "items.csv").write_text("id,name,price\n" + "\n".join(lines))
    table = reader.read(reader.find(tmp_path, "items", ""))
    assert table.rows.num_rows == table.read == 600_000
    (note,) = [note for note in table.notes if note.kind == "repair"]
    assert (note.count, note.rows, note.samples) == (1, (9,), ('7,"plain,7.5',))
    assert table.place(500_001) == "line 500004"


def test_empty_lines_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("id,name\n1,a\n\n2,b\n\n\n,\n3,c\n")
    table = reader.read([path])
    assert table.lines.tolist() == [2, 4, 8]
    assert (table.read, table.place(2)) == (3, "line 8")


def test_a_cell_of_megabytes_is_read(tmp_path: Path) -> None:
    text = "x" * 3_000_000
    (tmp_path / "items.csv").write_text(f'id,text\n1,{text}\n2,"{text}\n,"\n3,c\n')
    table = reader.read(reader.find(tmp_path, "items", ""))
    assert [len(cell) for cell in table.rows["text"].to_pylist()] == [3_000_000, 3_000_002, 1]


def test_a_header_is_cleaned_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_bytes(b'\xef\xbb\xbf"id", title , price,\n1,a,2,\n')
    assert reader.read([path]).rows.column_names == ["id", "title", "price", "column_4"]
    path.write_text("id,price,title,price\n1,2,3,4\n")
    with pytest.raises(FailedPrecondition, match=r"items.csv has 2 columns called 'price' \(places 2, 4\)"):
        reader.read([path])
    path.write_text("22,32,view\n44,62,cart\n")
    with pytest.raises(
        FailedPrecondition, match=r"no header: its first line is '22', '32', 'view'.*columns = "
    ):
        reader.read([path])
    names = ("user", "item", "type")
    assert reader.read([path], Dialect(columns=names)).rows.to_pylist()[0] == dict(
        zip(names, ["22", "32", "view"], strict=True)
    )
    with pytest.raises(
        FailedPrecondition, match=r"has 3 cells in its first line, but shop.toml names 2 columns"
    ):
        reader.read([path], Dialect(columns=names[:2]))
    path.write_text("id,2019,2020\n1,2,3\n")
    assert reader.read([path], expected_names=["id"]).rows.column_names == ["id", "2019", "2020"]
    path.write_text("")
    with pytest.raises(FailedPrecondition, match=r"items.csv is empty"):
        reader.read([path])
    path.write_text("id,title\n1\n2\n")
    with pytest.raises(FailedPrecondition, match=r"has no rows; 2 rows: not as many cells .*lines 2, 3"):
        reader.read([path])


DIALECTS = {
    "Excel's own line": b"sep=;\r\nid;price\r\n1;2,5\r\n",
    "semicolons": b"id;price\n1;2,5\n2;3,5\n",
    "tabs": b"id\tprice\n1\t2,5\n",
    "MovieLens": b"id::price\n1::2,5\n",
    "spaces before quotation marks": b'id, "price"\n1, "2,5"\n',
    "backslashes": b'id,price,name\n1,"2,5","27\\" wide"\n2,"2,5","a, \\"b\\""\n',
    "a tail of nothing": b'id,price\n1,"2,5"\n,\n,\n\n',
    "a separator at the end": b'id,price\n1,"2,5",\n',
    "a title above": b"Products of 2026\n\nid;price;name\n1;2,5;a\n",
    "UTF-16 without a mark": 'id,price\n1,"2,5"\n'.encode("utf-16-le"),
}


@pytest.mark.parametrize("name", list(DIALECTS))
def test_dialects_are_detected(tmp_path: Path, name: str) -> None:
    (tmp_path / "items.csv").write_bytes(DIALECTS[name])
    table = reader.read(reader.find(tmp_path, "items", ""))
    assert table.rows.slice(0, 1).select(["id", "price"]).to_pylist() == [{"id": "1", "price": "2,5"}]
    assert not [note for note in table.notes if note.kind == "loss"]


ENCODED = {
    "cp1252": "Größe £5 Amélie’s",
    "gb18030": "时尚连衣裙,女装,红色",
    "cp1251": "Красное платье",
    "cp932": "赤いドレス、レディース",
}


@pytest.mark.parametrize("codec", list(ENCODED))
def test_encodings_are_guessed_and_reported(tmp_path: Path, codec: str) -> None:
    plain = "".join(f"{place};plain\n" for place in range(1000))
    (tmp_path / "items.csv").write_bytes(f"id;title\n{plain}x;{ENCODED[codec]}\n".encode(codec))
    table = reader.read(reader.find(tmp_path, "items", ""))
    assert table.rows["title"][-1].as_py() == ENCODED[codec]
    (note,) = [note for note in table.notes if "encoding" in note.text]
    assert note.rows == (1002,)
    assert codec in note.text and ENCODED[codec] in note.samples[0]


def test_one_bad_byte_among_utf8_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_bytes("id,title\n1,é\n2,è\n3,a".encode() + b"\x92s\n")
    table = reader.read(reader.find(tmp_path, "items", ""))
    assert table.rows["title"].to_pylist() == ["é", "è", "a\ufffds"]
    (note,) = table.notes
    assert (note.kind, note.count, note.rows) == ("repair", 1, (4,))


def test_parts_are_joined_by_column_name(tmp_path: Path) -> None:
    folder = tmp_path / "events" / "day=2026-01-01"
    folder.mkdir(parents=True)
    (folder / "part-0.csv").write_text("user,item\nu1,1\nu2,2,3\n")
    (folder / "part-1.csv.gz").write_bytes(gzip.compress(b"item,user,price\n2,u2,5\n"))
    (folder / "part-2.csv").write_text("")
    (tmp_path / "events" / "_SUCCESS").write_text("")
    table = reader.read(reader.find(tmp_path, "events", ""))
    assert cells(table) == [["u1", "1", "2026-01-01", None], ["u2", "2", "2026-01-01", "5"]]
    assert (table.name, table.read, table.place(1)) == ("events (3 parts)", 3, "part-1.csv.gz line 2")
    assert any(note.file == "part-0.csv" and note.rows == (3,) for note in table.notes)
    (folder / "part-3.csv").write_text("other\n1\n")
    with pytest.raises(FailedPrecondition, match=r"part-3.csv has no column of the parts before it"):
        reader.read(reader.find(tmp_path, "events", ""))
