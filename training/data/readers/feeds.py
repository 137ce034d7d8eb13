"""Tables of XML: product feeds (Google Merchant's RSS and Atom, Yandex' YML) and lists of like elements."""

import json
from collections.abc import Iterator
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa

from services.core.errors import FailedPrecondition
from training.data.readers.notes import NoteCollector
from training.data.readers.parts import FilePart, strings

_RECORDS = ("item", "entry", "product", "offer", "event", "row", "record")


def read_feed(stream: BinaryIO) -> FilePart:
    """Read the elements <item>, <entry>, <product>, <offer>, <event>, <row> or <record> as rows.

    An element or attribute inside is a column named without its namespace ('id' of <g:id>); one that is
    repeated becomes JSON text of a list; one inside another is named 'shipping.price'.

    Raises:
        FailedPrecondition: it is no XML, or has no such elements.
    """
    notes = NoteCollector()
    rows: list[dict[str, list[str]]] = []
    try:
        for element in _elements(stream):
            row: dict[str, list[str]] = {}
            for name, text in _fields(element, ""):
                row.setdefault(name, []).append(text)
            rows.append(row)
            element.clear()
    except ElementTree.ParseError as error:
        if not rows:
            raise FailedPrecondition(f"is no valid XML: {error}") from None
        notes.add("loss", f"the XML is damaged, what follows is not read: {error}", [len(rows) + 1])
    if not rows:
        raise FailedPrecondition(
            f"is XML without an element {', '.join(f'<{name}>' for name in _RECORDS)}: convert it to CSV"
            " or JSON lines, one record a line"
        )
    record_numbers = range(1, len(rows) + 1)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [strings([_text(row.get(name)) for row in rows], record_numbers, notes) for name in names]
    loss_count = sum(note.count for note in notes.notes() if note.kind == "loss")
    return FilePart(
        pa.table(columns, names), np.array(record_numbers, np.int64), len(rows) + loss_count, notes.notes()
    )


def _elements(stream: BinaryIO) -> Iterator[ElementTree.Element]:
    """The outermost elements that are records."""
    depth = 0
    for event, element in ElementTree.iterparse(stream, ("start", "end")):  # noqa: S314 - Expat limits entities
        if _local(element.tag) not in _RECORDS:
            continue
        depth += 1 if event == "start" else -1
        if event == "end" and depth == 0:
            yield element


def _fields(element: ElementTree.Element, prefix: str) -> Iterator[tuple[str, str]]:
    for name, text in element.attrib.items():
        yield prefix + _local(name), text
    for child in element:
        name = prefix + _local(child.tag)
        if child.text and child.text.strip():
            yield name, child.text.strip()
        yield from _fields(child, f"{name}.")


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _text(values: list[str] | None) -> str | None:
    if not values:
        return None
    return values[0] if len(values) == 1 else json.dumps(values, ensure_ascii=False)
