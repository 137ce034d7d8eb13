"""The names of a table's columns: from the header line of a file, or stated for a file without one."""

import csv
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.core.errors import FailedPrecondition
from training.data.readers.dialect import Format
from training.data.readers.notes import NoteCollector

_VALUE = re.compile(r"[-+]?\d+([.,:/T -]\d+)*Z?")  # a number, a date, a time
_MAX_CELLS = 12


@dataclass(frozen=True)
class HeaderRow:
    """The columns' names, and how many lines of the file come before the first row."""

    names: list[str]
    lines: int


def read_header(
    lines: Sequence[str],
    form: Format,
    columns: Sequence[str],
    expected_names: Collection[str],
    notes: NoteCollector,
) -> HeaderRow:
    """The header at the beginning of `lines`; `columns` are the names of a file without one.

    Raises:
        FailedPrecondition: there is no line, the first one looks like data, two names are equal, or
            `columns` are not as many as the cells of the first line.
    """
    cells, count = _first_record(lines, form)
    if not cells:
        raise FailedPrecondition("is empty")
    if not columns:
        return HeaderRow(column_names(cells, expected_names, notes), count)
    if [cell.strip() for cell in cells] == list(columns):
        return HeaderRow(list(columns), count)
    if len(cells) != len(columns):
        raise FailedPrecondition(
            f"has {len(cells)} cells in its first line, but shop.toml names {len(columns)} columns, "
            f"or its preset does: {_display_cells(cells)}; {form}"
        )
    return HeaderRow(list(columns), 0)


def column_names(cells: Sequence[str], expected_names: Collection[str], notes: NoteCollector) -> list[str]:
    """The names in a header's cells, without spaces, byte order mark and quotation marks around them.

    Raises:
        FailedPrecondition: two names are equal, or none is `expected_names` and the cells look like data.
    """
    names = [cell.strip("\ufeff \t\r\n\xa0\"'") for cell in cells]
    if not set(names) & set(expected_names) and any(_VALUE.fullmatch(name) for name in names):
        example = ", ".join(f'"column_{index}"' for index in range(1, len(names) + 1))
        raise FailedPrecondition(
            f"seems to have no header: its first line is {_display_cells(names)}. Name its columns in "
            f"shop.toml, in the section of this file ([items] or [events]): columns = [{example}]"
        )
    for index, name in enumerate(names):
        if not name:
            names[index] = f"column_{index + 1}"
            notes.add("guess", f"the header gives column {index + 1} no name: it is called {names[index]}")
    for name, times in Counter(names).items():
        if times > 1:
            positions = ", ".join(str(index + 1) for index, other in enumerate(names) if other == name)
            raise FailedPrecondition(
                f"has {times} columns called {name!r} (places {positions}): rename or remove all but one"
            )
    return names


def _first_record(lines: Sequence[str], form: Format) -> tuple[list[str], int]:
    """The cells of the first record and how many lines it and those before it take."""
    rows, single = form.single(lines[:100])
    reader = single.records(iter(rows))
    try:
        for cells in reader:
            if cells:
                separator = form.separator
                return [cell.replace(single.separator, separator) for cell in cells], reader.line_num
    except csv.Error:
        index = next(index for index, line in enumerate(lines) if line.strip())
        return form.cells(lines[index].rstrip("\r\n")), index + 1
    return [], 0


def _display_cells(cells: Sequence[str]) -> str:
    more = ", ..." if len(cells) > _MAX_CELLS else ""
    return ", ".join(repr(cell[:40]) for cell in cells[:_MAX_CELLS]) + more
