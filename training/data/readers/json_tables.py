"""Tables of JSON: an object a line, an array of objects, objects in a row, or a list inside one object."""

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from services.core.errors import FailedPrecondition
from training.data.readers import encodings
from training.data.readers.notes import NoteCollector
from training.data.readers.parts import REPLACEMENT, FilePart, strings

_CHUNK = 1 << 20
_BATCH = 20_000
_MAX_KEYS = 64  # an object with more is a mapping from ids, not a record
_LIST_NAMES = ("items", "products", "events", "data", "results", "records", "rows")
_LIST_DEPTH = 3
_GAP = re.compile(r"[\s,]*")
_UNDECODED = "bytes that are no valid text: replaced by U+FFFD"

_Numbered = tuple[int, object]  # a line or record number and what it holds


def read_json(open_stream: Callable[[], AbstractContextManager[BinaryIO]], codec: str = "") -> FilePart:
    """Read a table of strings; lists are JSON text, an object {"a": {"b": 1}} becomes a column 'a.b'.

    Raises:
        FailedPrecondition: a document is no JSON, or holds no list of objects.
    """
    notes = NoteCollector()
    with open_stream() as stream:
        encoding = encodings.FileEncoding(codec) if codec else encodings.detect(stream)
    if encoding.guessed:
        notes.add_encoding(encoding.codec, encoding.line, encoding.sample)
    codec = "utf-8-sig" if encoding.codec == "utf-8" else encoding.codec
    by_line = _is_by_line(open_stream, codec)
    with open_stream() as stream:
        text = io.TextIOWrapper(stream, encoding=codec, errors="replace")
        records = _Records(_lines(text, notes) if by_line else _document(text, notes), notes)
        tables, record_numbers = [], []
        for rows, lines in records.tables():
            tables.append(rows)
            record_numbers.append(lines)
    if not tables:
        raise FailedPrecondition("holds no JSON object")
    rows = pa.concat_tables(tables, promote_options="default")
    return FilePart(rows, np.concatenate(record_numbers), rows.num_rows + _lost(notes), notes.notes())


def _lost(notes: NoteCollector) -> int:
    return sum(note.count for note in notes.notes() if note.kind == "loss")


def _is_by_line(open_stream: Callable[[], AbstractContextManager[BinaryIO]], codec: str) -> bool:
    """Whether one of the first two lines is an object by itself."""
    with open_stream() as stream:
        text = io.TextIOWrapper(stream, encoding=codec, errors="replace")
        lines = islice((line for line in text if line.strip()), 2)
        return any(isinstance(_object(line), dict) for line in lines)


def _object(line: str) -> object:
    """The value on a line; None for what is no JSON."""
    try:
        return json.loads(line.strip().removesuffix(","))
    except ValueError:
        return None


def _lines(text: Iterable[str], notes: NoteCollector) -> Iterator[_Numbered]:
    first: _Numbered | None = None  # may be an object that holds the list, if nothing follows
    count = 0
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        if REPLACEMENT in line:
            notes.add("repair", _UNDECODED, [number], [line])
        value = _object(line)
        record = (number, value if isinstance(value, dict) else line)
        count += 1
        if count == 1:
            first = record
            continue
        if first:
            yield first
            first = None
        yield record
    if first:
        yield from _unwrapped(first[1], notes)


def _document(text: io.TextIOBase, notes: NoteCollector) -> Iterator[_Numbered]:
    """The elements of an array, or the objects of a document, decoded as the text is read."""
    buffer = text.read(_CHUNK).lstrip("\ufeff \t\r\n")
    is_array = buffer.startswith("[")
    values = enumerate(_values(buffer.removeprefix("["), text, is_array, notes), 1)
    first = [] if is_array else list(islice(values, 2))
    if len(first) == 1:
        yield from _unwrapped(first[0][1], notes)
        return
    yield from first
    yield from values


def _values(buffer: str, text: io.TextIOBase, is_array: bool, notes: NoteCollector) -> Iterator[object]:
    """Values that follow each other with commas or white space between, up to ']' or the end."""
    decoder, position, count = json.JSONDecoder(), 0, 0
    while True:
        position += len(_GAP.match(buffer, position)[0])  # type: ignore[index]  # matches nothing, too
        try:
            value, position = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            if is_array and buffer.startswith("]", position):
                return
            more = text.read(max(_CHUNK, len(buffer) - position))
            if not more:
                _check_end(error, buffer[position:], error.pos - position, is_array, count, notes)
                return
            buffer, position = buffer[position:] + more, 0
            continue
        count += 1
        yield value


def _check_end(
    error: json.JSONDecodeError,
    remainder: str,
    position: int,
    is_array: bool,
    count: int,
    notes: NoteCollector,
) -> None:
    """A document that was cut off loses its last record; one that is damaged elsewhere is refused."""
    if not remainder:
        if is_array:
            notes.add("guess", "the JSON list is not closed: the file was cut off after a record")
        return
    is_cut = position >= len(remainder.rstrip()) - 1 or error.msg.startswith("Unterminated string")
    if not is_cut or not count:
        excerpt = remainder[max(0, position - 40) : position + 40]
        raise FailedPrecondition(f"is no valid JSON in record {count + 1}: {error.msg}, near {excerpt!r}")
    notes.add(
        "loss", "the JSON document ends inside a record: the file was cut off", [count + 1], [remainder]
    )


def _unwrapped(value: object, notes: NoteCollector) -> Iterator[_Numbered]:
    """The objects of the list that a single object holds; else the object itself."""
    lists = dict(_lists_of_objects(value, "", _LIST_DEPTH))
    if not lists:
        yield 1, value
        return
    by_name = [name for list_name in _LIST_NAMES for name in lists if name.split(".")[-1] == list_name]
    name = by_name[0] if by_name else max(lists, key=lambda name: len(lists[name]))
    others = ", ".join(other for other in lists if other != name)
    notes.add("guess", f"the records are the list {name!r}" + (f", not {others}" if others else ""))
    yield from enumerate(lists[name], 1)


def _lists_of_objects(value: object, name: str, depth: int) -> Iterator[tuple[str, list[object]]]:
    if isinstance(value, list) and value and all(isinstance(element, dict) for element in value):
        yield name, value
    elif isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield from _lists_of_objects(inner, f"{name}.{key}" if name else key, depth - 1)


class _Records:
    """Makes tables of records; what is no object is lost."""

    def __init__(self, records: Iterator[_Numbered], notes: NoteCollector) -> None:
        self._records = records
        self._notes = notes
        self._as_text: set[str] | None = None

    def tables(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Tables of strings with the numbers int64 of their rows."""
        while batch := list(islice(self._records, _BATCH)):
            objects = [(number, value) for number, value in batch if isinstance(value, dict)]
            for number, value in batch:
                if not isinstance(value, dict):
                    sample = value if isinstance(value, str) else json.dumps(value)
                    self._notes.add("loss", "no JSON object", [number], [sample])
            if objects:
                yield self._table(objects)

    def _table(self, objects: list[tuple[int, dict[str, Any]]]) -> tuple[pa.Table, np.ndarray]:
        if self._as_text is None:
            self._as_text = _mappings(value for _, value in objects)
        rows = [
            dict(_flat(value, "", self._as_text)) if dict in map(type, value.values()) else value
            for _, value in objects
        ]
        names = list(dict.fromkeys(chain.from_iterable(rows)))
        record_numbers = [number for number, _ in objects]
        columns = [self._column([row.get(name) for row in rows], record_numbers) for name in names]
        return pa.table(columns, [_sound(name) for name in names]), np.array(record_numbers, np.int64)

    def _column(self, values: list[object], record_numbers: list[int]) -> pa.Array:
        if not set(map(type, values)) <= {str, type(None)}:
            values = [_text(value) for value in values]
        return strings(cast(list[str | None], values), record_numbers, self._notes)


def _mappings(records: Iterable[dict[str, Any]]) -> set[str]:
    """Names of nested objects with so many keys that they cannot be columns."""
    keys: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, value in _flat(record, "", set()):
            del value
            parent, _, key = name.rpartition(".")
            keys[parent].add(key)
    return {parent for parent, names in keys.items() if parent and len(names) > _MAX_KEYS}


def _flat(value: dict[str, Any], prefix: str, as_text: set[str]) -> Iterator[tuple[str, object]]:
    for key, inner in value.items():
        name = prefix + key
        if isinstance(inner, dict) and inner and name not in as_text:
            yield from _flat(inner, f"{name}.", as_text)
        else:
            yield name, inner


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sound(name: str) -> str:
    return name.encode("utf-8", "replace").decode()
