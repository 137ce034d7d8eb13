"""Tables of spreadsheets: .xlsx, .xlsb, .xls and .ods, by python-calamine (the extra `xlsx`)."""

import io
from collections.abc import Collection, Sequence
from datetime import date, datetime
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from services.core.errors import FailedPrecondition
from training.data.readers.header import column_names
from training.data.readers.notes import NoteCollector
from training.data.readers.parts import FilePart, strings, without_empty_rows


def read_spreadsheet(stream: BinaryIO, columns: Sequence[str], expected_names: Collection[str]) -> FilePart:
    """Read the first sheet that has rows, as strings: 123.0 is '123', a date ISO 8601.

    Raises:
        FailedPrecondition: python-calamine is not installed, or the file is damaged or empty.
    """
    try:
        import python_calamine  # noqa: PLC0415 - an extra
    except ImportError:
        raise FailedPrecondition(
            "is a spreadsheet: install the extra that reads it (pip install 'vitrine[xlsx]'),"
            " or save it as CSV UTF-8"
        ) from None
    notes = NoteCollector()
    try:
        workbook = python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(stream.read()))
        sheets = [(name, workbook.get_sheet_by_name(name).to_python()) for name in workbook.sheet_names]
    except python_calamine.CalamineError as error:
        raise FailedPrecondition(f"is a damaged or protected spreadsheet: {error}") from None
    filled = [(name, cells) for name, cells in sheets if any(map(any, cells))]
    if not filled:
        raise FailedPrecondition("is empty")
    name, cells = filled[0]
    if len(filled) > 1:
        others = ", ".join(repr(sheet) for sheet, _ in filled[1:])
        notes.add("guess", f"the table is the sheet {name!r}; sheets that are not read: {others}")
    return _part([[_text(cell) for cell in row] for row in cells], columns, expected_names, notes)


def _part(
    rows: list[list[str]], columns: Sequence[str], expected_names: Collection[str], notes: NoteCollector
) -> FilePart:
    start = next(index for index, row in enumerate(rows) if any(row))
    width = max(index + 1 for row in rows for index, cell in enumerate(row) if cell)
    if columns:
        names = list(columns)
        if len(names) != width:
            raise FailedPrecondition(f"has {width} columns, but shop.toml names {len(names)}")
    else:
        names = column_names(rows[start][:width], expected_names, notes)
        start += 1
    row_numbers = list(range(start + 1, len(rows) + 1))
    cells = [[row[index] for row in rows[start:]] for index in range(width)]
    table = pa.table([strings(column, row_numbers, notes) for column in cells], names)
    table, lines = without_empty_rows(table, np.array(row_numbers, np.int64), notes)
    return FilePart(table, lines, table.num_rows, notes.notes())


def _text(cell: object) -> str:
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # a spreadsheet has no whole numbers, so ids come as 123.0
    if isinstance(cell, datetime) and not (cell.hour or cell.minute or cell.second or cell.microsecond):
        return cell.date().isoformat()
    return cell.isoformat() if isinstance(cell, date) else str(cell)
