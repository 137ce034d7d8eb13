"""Cut lines of delimited text into records, one by one where the text is not well formed.

A quotation mark that does not end swallows at most its own line: the record is closed at its line end
and reading goes on with the next line. A record of another number of cells than the header is lost.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field

from training.data.readers.dialect import Format
from training.data.readers.notes import NoteCollector

_OTHER_WIDTH = "not as many cells as the header ({}); put a cell that holds {!r} into quotation marks"
_UNCLOSED = "a quotation mark is not closed before the line ends: read as text"
_STRAY = "a quotation mark inside a quoted cell is not doubled: read as text"
_MORE_EMPTY = "empty cells beyond the columns of the header: ignored"
_OPEN_LIMIT = 1 << 24  # characters; a quoted cell that is longer counts as not closed
# A record of so many lines, nearly each of which is a record by itself, is one quotation mark that
# another one far below closes by chance. Texts of fewer lines may look so.
_MANY_LINES = 6
_MANY_CELLS = 3
_NEARLY_ALL, _HALF = 0.9, 0.5


@dataclass
class RecordBlock:
    """Records cut from some lines: `cells` of each, and `lines`, the 0-based line each begins in.

    `used` lines were cut; those after them belong to a record whose end is not there yet. `lost`
    records are counted apart.
    """

    cells: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    used: int = 0
    lost: int = 0


class RecordCutter:
    """Cuts lines into records of `width` cells; what it repairs or loses it notes by line number."""

    def __init__(self, form: Format, width: int, notes: NoteCollector) -> None:
        self._form = form
        self._width = width
        self._notes = notes

    def cut(self, lines: Sequence[str], first_line: int, final: bool) -> RecordBlock:
        """Cut `lines`, whose first is number `first_line` of the file; `final` when no more follow."""
        lines, form = self._form.single(lines)
        block = RecordBlock()
        start = 0
        while start < len(lines):
            stop = self._well_formed(lines, start, first_line, form, block)
            if stop is None:
                block.used = len(lines)
                break
            start, end = stop
            is_open = end == len(lines) and not final
            if is_open and sum(map(len, lines[start:])) < _OPEN_LIMIT:
                block.used = start
                break
            self._damaged(lines[start], end - start, start, first_line, form, block)
            start += 1
        else:
            block.used = len(lines)
        if form is not self._form:
            separator = self._form.separator
            block.cells = [[cell.replace(form.separator, separator) for cell in row] for row in block.cells]
        return block

    def _well_formed(
        self, lines: Sequence[str], start: int, first_line: int, form: Format, block: RecordBlock
    ) -> tuple[int, int] | None:
        """Cut from line `start` on up to a record that is not well formed: its first line and the one after.

        None when there is no such record.
        """
        reader = form.records(map(lines.__getitem__, range(start, len(lines))))
        index = start
        try:
            for row in reader:
                end = start + reader.line_num
                if row and not self._accept(row, lines[index:end], index, first_line, form, block):
                    return index, end
                index = end
        except csv.Error:
            return index, start + reader.line_num
        return None

    def _accept(
        self,
        row: list[str],
        raw: Sequence[str],
        index: int,
        first_line: int,
        form: Format,
        block: RecordBlock,
    ) -> bool:
        """Add a record to the block or to the losses; False when it swallowed lines that are records."""
        if len(raw) > 1 and self._swallowed(row, raw, form):
            return False
        if len(row) < self._width or any(row[self._width :]):
            self._lose(raw[0], index, first_line, block)
            return True
        if len(row) > self._width:
            self._notes.add("repair", _MORE_EMPTY, [first_line + index])
        block.cells.append(row[: self._width])
        block.lines.append(index)
        return True

    def _swallowed(self, row: list[str], raw: Sequence[str], form: Format) -> bool:
        """Whether a record of several lines is a quotation mark that does not end, and other records."""
        marks = sum(line.count(form.quote) for line in raw)
        if form.escape:
            marks -= sum(line.count(form.escape + form.quote) for line in raw)
        if marks % 2:
            return True  # a well-formed record opens as many quoted cells as it closes
        if len(row) == self._width and (len(raw) < _MANY_LINES or self._width < _MANY_CELLS):
            return False
        record_count = sum(len(form.cells(line.rstrip("\r\n"))) == self._width for line in raw[1:])
        threshold = _NEARLY_ALL if len(row) == self._width else _HALF
        return self._width > 1 and record_count > threshold * (len(raw) - 1)

    def _damaged(
        self, line: str, lines_read: int, index: int, first_line: int, form: Format, block: RecordBlock
    ) -> None:
        """Read one line by itself: with its quotation marks, else as if they were text."""
        text = line.rstrip("\r\n")
        for cells in form.readings(text):
            if len(cells) == self._width:
                block.cells.append(cells)
                block.lines.append(index)
                self._notes.add(
                    "repair", _UNCLOSED if lines_read > 1 else _STRAY, [first_line + index], [text]
                )
                return
        self._lose(text, index, first_line, block)

    def _lose(self, raw: str, index: int, first_line: int, block: RecordBlock) -> None:
        block.lost += 1
        self._notes.add(
            "loss", _OTHER_WIDTH.format(self._width, self._form.separator), [first_line + index], [raw]
        )
