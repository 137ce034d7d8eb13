"""Read a table from the file a shop has: delimited text, JSON, Parquet, a spreadsheet, an XML feed.

`read` finds out the format from the content, not from the name. It says in `Table.notes` whatever it
guessed, repaired or lost. It does not know what the columns mean.
"""

import os
import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from services.core.errors import FailedPrecondition
from training.data.readers.archives import kind, members, open_binary
from training.data.readers.delimited import read_delimited
from training.data.readers.dialect import Dialect
from training.data.readers.feeds import read_feed
from training.data.readers.json_tables import read_json
from training.data.readers.notes import Note, NoteCollector
from training.data.readers.parquet_tables import read_parquet
from training.data.readers.parts import FilePart
from training.data.readers.spreadsheets import read_spreadsheet
from training.data.readers.table_paths import find
from training.data.values.values import as_json_texts

__all__ = ["Dialect", "Note", "Table", "find", "read"]

_DETECTED = Dialect()
_PARTITION = re.compile(r"([A-Za-z_][\w.-]*)=(.*)")
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_PART_NUMBER = re.compile(r"[-_.]?(part)?[-_.]?\d.*|\..*")


@dataclass(frozen=True)
class Table:
    """A table of N rows from one file, or from several parts of one table.

    `name` is what messages call it: 'items.csv' or 'events (12 parts)'. In `rows`, cells of delimited
    text, JSON, XML and spreadsheets are strings, and null where empty; a JSON list stays JSON text.
    Parquet keeps numbers, booleans, dates, timestamps and lists of these; binary values, decimals,
    dictionaries and columns without any value become strings; a struct becomes columns 'a.b'; other nested
    values become JSON text.
    `lines` int64 (N,): the 1-based line or record number of each row within its part; `parts` int32 (N,):
    the place of that part in `paths`. `read` counts records, lost ones included:
    `read == rows.num_rows + sum(note.count for note in notes if note.kind == "loss")`.
    """

    paths: tuple[Path, ...]
    name: str
    rows: pa.Table
    lines: np.ndarray
    parts: np.ndarray
    read: int
    notes: tuple[Note, ...]

    def place(self, row: int) -> str:
        """Where a row stands in its file, for messages: 'line 17', or 'events-2.csv line 17'."""
        part = self.paths[self.parts[row]].name + " " if len(self.paths) > 1 else ""
        return f"{part}line {self.lines[row]}"


def read(paths: Sequence[Path], dialect: Dialect = _DETECTED, expected_names: Collection[str] = ()) -> Table:
    """Read the parts of one table; columns are united by name.

    `expected_names` are names that columns may have: a first line without any of them that looks like data is
    refused with an example of `columns = [...]`.

    Raises:
        FailedPrecondition: a file cannot be read, has no rows, no header, or two columns of one name.
    """
    paths = tuple(part for path in paths for part in members(path))
    notes = NoteCollector()
    used_paths: list[Path] = []
    parts: list[FilePart] = []
    names: list[str] = []
    for path in paths:
        try:
            if len(paths) > 1 and _is_empty(path):
                notes.add("guess", f"the part {path.name} is empty: skipped")
                continue
            part = _read(path, dialect, expected_names)
            names = names or part.rows.column_names
            _check_same_table(part, names)
            part = _with_partitions(part, path)
        except FailedPrecondition as error:
            raise FailedPrecondition(f"{path.name} {error}") from None
        used_paths.append(path)
        parts.append(part)
        notes.add_all(part.notes, path.name if len(paths) > 1 else "")
    name = _name(paths)
    rows = _typed(_concatenate([part.rows for part in parts], notes)) if parts else pa.table({})
    if not rows.num_rows:
        losses = "".join(f"; {note}" for note in notes.notes())
        raise FailedPrecondition(f"{name} has no rows{losses}")
    return Table(
        paths=tuple(used_paths),
        name=name,
        rows=rows,
        lines=np.concatenate([part.lines for part in parts]),
        parts=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.lines) for part in parts]),
        read=sum(part.read for part in parts),
        notes=notes.notes(),
    )


def _read(path: Path, dialect: Dialect, expected_names: Collection[str]) -> FilePart:
    def open_stream() -> AbstractContextManager[BinaryIO]:
        return open_binary(path)

    match kind(path):
        case "text":
            part = read_delimited(open_stream, dialect, expected_names)
        case "json":
            part = read_json(open_stream, dialect.encoding)
        case "parquet":
            with open_stream() as stream:
                part = read_parquet(stream)
        case "spreadsheet":
            with open_stream() as stream:
                part = read_spreadsheet(stream, dialect.columns, expected_names)
        case "xml":
            with open_stream() as stream:
                part = read_feed(stream)
        case other:
            raise FailedPrecondition(f"is {other}: unpack or export it as CSV (UTF-8), JSON lines or Parquet")
    return part


def _is_empty(path: Path) -> bool:
    with open_binary(path) as stream:
        return not stream.read(1)


def _with_partitions(part: FilePart, path: Path) -> FilePart:
    """The part with the columns that names of folders above it state, such as 'date=2026-01-01'."""
    rows = part.rows
    for folder in path.parents:
        match = _PARTITION.fullmatch(folder.name)
        if not match:
            break
        name, value = match.groups()
        if name not in rows.column_names:
            text = None if value == _NO_PARTITION else unquote(value)
            rows = rows.append_column(name, pa.array([text] * rows.num_rows, pa.string()))
    return FilePart(rows, part.lines, part.read, part.notes)


def _check_same_table(part: FilePart, names: list[str]) -> None:
    columns = part.rows.column_names
    if not set(columns) & set(names):
        expected = ", ".join(names)
        raise FailedPrecondition(
            f"has no column of the parts before it: {', '.join(columns)}, not {expected}"
        )


def _concatenate(tables: list[pa.Table], notes: NoteCollector) -> pa.Table:
    """One table; a column of several types has the one that holds all values, or else strings."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pass
    types: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for field in table.schema:
            types.setdefault(field.name, set()).add(field.type)
    mixed = {name for name, kinds in types.items() if len(kinds) > 1}
    notes.add("guess", f"parts have other types in the columns {', '.join(sorted(mixed))}: read as text")
    return pa.concat_tables([_as_strings(table, mixed) for table in tables], promote_options="permissive")


def _as_strings(table: pa.Table, names: set[str]) -> pa.Table:
    for index, name in enumerate(table.column_names):
        if name in names:
            table = table.set_column(index, name, as_json_texts(table.column(index)).cast(pa.string()))
    return table


def _typed(table: pa.Table) -> pa.Table:
    """The table with strings for columns without a type, in which no part has any value."""
    untyped = {field.name for field in table.schema if pa.types.is_null(field.type)}
    return _as_strings(table, untyped)


def _name(paths: Sequence[Path]) -> str:
    if len(paths) == 1:
        return paths[0].name
    stems = {_PART_NUMBER.sub("", path.name) for path in paths}
    folder = Path(os.path.commonpath(paths))
    while _PARTITION.fullmatch(folder.name):
        folder = folder.parent
    return f"{stems.pop() if len(stems) == 1 and all(stems) else folder.name} ({len(paths)} parts)"
