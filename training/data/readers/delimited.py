"""Tables of delimited text: csv, tsv, MovieLens' .dat and their kin, read in blocks of whole lines.

A block in which nothing can go wrong is cut by Arrow: it is valid UTF-8, every line is a record with as
many cells as the header, every quotation mark stands where the rules have it. Any other block is cut by
Python's csv reader, which knows the line of each record. Both give the same cells.
"""

import codecs
import io
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from services.core.errors import FailedPrecondition
from training.data.readers import dialect as dialects
from training.data.readers import encodings
from training.data.readers.dialect import Dialect, Format
from training.data.readers.header import HeaderRow, read_header
from training.data.readers.notes import NoteCollector
from training.data.readers.parts import REPLACEMENT, FilePart, strings, without_empty_rows
from training.data.readers.records import RecordCutter

_LF, _CR = b"\n\r"
_PLACEHOLDER = b"\x1f"
_LINE_END = re.compile(rb"\r\n|\r|\n")
_EXCEL_SEPARATOR = "sep="
_UNDECODED = "bytes that are no valid text in the encoding {}: replaced by U+FFFD"


def read_delimited(
    open_stream: Callable[[], AbstractContextManager[BinaryIO]],
    dialect: Dialect,
    expected_names: Collection[str],
    block_size: int = 1 << 23,
) -> FilePart:
    """Read a table of strings, empty cells null; `open_stream` gives the bytes from the start, each time.

    `block_size` bytes are read at a time. The first of them must hold the header.

    Raises:
        FailedPrecondition: the header is missing or holds two columns of one name.
    """
    notes = NoteCollector()
    codec = _codec(open_stream, dialect.encoding, notes)
    with open_stream() as stream:
        blocks = _blocks(stream, codec, block_size)
        block = next(blocks, b"")
        form, header = _detect_header(block, dialect, expected_names, notes)
        reader = _BlockReader(form, header, codec, notes)
        block = block[_offset(block, header.lines) :]
        for next_block in blocks:
            reader.read(block, final=False)
            block = next_block
        reader.read(block, final=True)
    return reader.part()


def _codec(
    open_stream: Callable[[], AbstractContextManager[BinaryIO]], codec_name: str, notes: NoteCollector
) -> str:
    if codec_name:
        try:
            name = codecs.lookup(codec_name).name
        except LookupError:
            raise FailedPrecondition(f"cannot be read: encoding {codec_name!r} is not known") from None
        return "utf-16" if name.startswith("utf-16") and _has_mark(open_stream) else name
    with open_stream() as stream:
        encoding = encodings.detect(stream)
    if encoding.guessed:
        notes.add_encoding(encoding.codec, encoding.line, encoding.sample)
    return encoding.codec


def _has_mark(open_stream: Callable[[], AbstractContextManager[BinaryIO]]) -> bool:
    with open_stream() as stream:
        return stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _blocks(stream: BinaryIO, codec: str, size: int) -> Iterator[bytes]:
    """UTF-8 without a mark, in blocks that end at a line end.

    Bytes that cannot be decoded become U+FFFD, but in a file of UTF-8 they stay.
    """
    decoder = None
    if codec not in ("utf-8", "utf-8-sig"):
        decoder = codecs.getincrementaldecoder(codec)("replace")
    pieces: list[bytes] = []
    line_end, mark = b"", codecs.BOM_UTF8
    while chunk := stream.read(size):
        text = decoder.decode(chunk).encode("utf-8", "replace") if decoder else chunk
        text, mark = text.removeprefix(mark), b""
        line_end = line_end or (b"\n" if b"\n" in text else b"\r" if b"\r" in text else b"")
        end = text.rfind(line_end) + 1 if line_end else 0
        if end:
            yield b"".join([*pieces, text[:end]])
            pieces = []
        pieces.append(text[end:])
    if decoder:
        pieces.append(decoder.decode(b"", final=True).encode("utf-8", "replace"))
    if remainder := b"".join(pieces):
        yield remainder


def _detect_header(
    block: bytes, dialect: Dialect, expected_names: Collection[str], notes: NoteCollector
) -> tuple[Format, HeaderRow]:
    lines = _lines(block.decode("utf-8", "replace").replace("\0", ""))
    lines_before = 0
    if lines and lines[0].lower().startswith(_EXCEL_SEPARATOR):
        separator = lines[0].rstrip("\r\n")[len(_EXCEL_SEPARATOR) :]
        dialect = replace(dialect, separator=dialect.separator or separator)
        lines_before = 1
    skipped = dialects.lines_above_table(lines[lines_before:], dialect)
    if skipped:
        text = "the first lines have a single cell, those below have more: the header is below them"
        notes.add(
            "guess",
            text,
            range(lines_before + 1, lines_before + skipped + 1),
            lines[lines_before : lines_before + skipped],
        )
        lines_before += skipped
    form = dialects.detect(lines[lines_before:], dialect)
    if not dialect.separator and form.separator not in ",\t":
        notes.add("guess", str(form))
    header = read_header(lines[lines_before:], form, dialect.columns, expected_names, notes)
    return form, HeaderRow(header.names, header.lines + lines_before)


def _lines(text: str) -> list[str]:
    """Lines with their ends: LF, CR LF or CR, and none of the others that `str.splitlines` knows."""
    return io.StringIO(text, newline="").readlines()


def _offset(block: bytes, lines: int) -> int:
    """Where the line after the first `lines` begins."""
    ends = [match.end() for match, _ in zip(_LINE_END.finditer(block), range(lines), strict=False)]
    return 0 if not lines else ends[-1] if len(ends) == lines else len(block)


def _is_well_quoted(block: bytes, mark: bytes, separator: bytes) -> bool:
    """Whether each quotation mark begins a cell, ends it, or is one of a doubled pair, within its line."""
    data = np.frombuffer(block, np.uint8)
    marks = np.flatnonzero(data == mark[0])
    if len(marks) % 2 or len(mark) > 1:
        return False
    edged = np.concatenate([[_LF], data, [_LF]])  # so that the first and last cells have neighbors
    before, after = edged[marks[::2]], edged[marks[1::2] + 2]
    opens = (before == separator[0]) | (before == _LF) | (before == mark[0])
    closes = (after == separator[0]) | (after == _LF) | (after == _CR) | (after == mark[0])
    line_ends = np.flatnonzero(data == _LF)
    within = np.searchsorted(marks, line_ends) % 2
    return bool(opens.all() and closes.all() and not within.any())


class _BlockReader:
    """Adds up the rows of blocks of lines; keeps the lines of a record that a later block ends."""

    def __init__(self, form: Format, header: HeaderRow, codec: str, notes: NoteCollector) -> None:
        self._form = form
        self._names = header.names
        self._notes = notes
        self._undecoded = _UNDECODED.format(codec)
        self._cutter = RecordCutter(form, len(header.names), notes)
        self._next_line = header.lines + 1
        self._pending_lines: list[str] = []
        self._tables: list[pa.Table] = []
        self._line_numbers: list[np.ndarray] = []
        self._loss_count = 0

    def read(self, block: bytes, *, final: bool) -> None:
        """Read lines of UTF-8 that follow those read before; `final` when they are the last."""
        rows = None if self._pending_lines else self._read_fast(block)
        if rows is None:
            self._read_carefully(block, final)
            return
        self._add(rows, np.arange(self._next_line, self._next_line + rows.num_rows))
        self._next_line += rows.num_rows

    def part(self) -> FilePart:
        """All rows read so far."""
        empty = pa.table({name: pa.array([], pa.string()) for name in self._names})
        rows = pa.concat_tables([empty, *self._tables])
        lines = np.concatenate([np.zeros(0, np.int64), *self._line_numbers])
        rows, lines = without_empty_rows(rows, lines, self._notes)
        return FilePart(rows, lines, rows.num_rows + self._loss_count, self._notes.notes())

    def _add(self, rows: pa.Table, lines: np.ndarray) -> None:
        self._tables.append(rows)
        self._line_numbers.append(lines)

    def _read_fast(self, block: bytes) -> pa.Table | None:
        """The rows of a block of which each line is a row; None where a closer look is due."""
        form = self._form
        quote, separator = form.quote.encode(), form.separator.encode()
        if len(separator) > 1 and _PLACEHOLDER not in block:
            block, separator = block.replace(separator, _PLACEHOLDER), _PLACEHOLDER
        special = [form.escape.encode(), REPLACEMENT.encode(), b"\0"]
        if form.skip_spaces or len(separator) > 1 or any(mark in block for mark in special if mark):
            return None
        if block.count(b"\r") != block.count(b"\r\n"):
            return None
        is_quoted = bool(quote) and quote in block
        if is_quoted and not _is_well_quoted(block, quote, separator):
            return None
        try:
            rows = pa_csv.read_csv(
                pa.py_buffer(block),
                read_options=pa_csv.ReadOptions(column_names=self._names),
                parse_options=pa_csv.ParseOptions(
                    delimiter=separator.decode(), quote_char=form.quote if is_quoted else False
                ),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(self._names, pa.string()),
                    strings_can_be_null=True,
                    null_values=[""],
                ),
            )
        except pa.ArrowInvalid:
            return None
        lines = block.count(b"\n") + (not block.endswith(b"\n"))
        if rows.num_rows != lines:
            return None  # it passes over empty lines
        if separator == _PLACEHOLDER:
            columns = [pc.replace_substring(column, "\x1f", form.separator) for column in rows.columns]
            rows = pa.table(columns, self._names)
        return rows

    def _read_carefully(self, block: bytes, final: bool) -> None:
        text = block.decode("utf-8", "replace")
        new_lines = _lines(text)
        if REPLACEMENT in text:
            self._note_replacements(new_lines)
        lines = self._pending_lines + new_lines
        records = self._cutter.cut(lines, self._next_line, final)
        line_numbers = [self._next_line + line for line in records.lines]
        columns = zip(*records.cells, strict=True) if records.cells else [()] * len(self._names)
        arrays = [strings(column, line_numbers, self._notes) for column in columns]
        self._add(pa.table(arrays, self._names), np.array(line_numbers, np.int64))
        self._loss_count += records.lost
        self._pending_lines = lines[records.used :]
        self._next_line += records.used

    def _note_replacements(self, lines: list[str]) -> None:
        first = self._next_line + len(self._pending_lines)
        positions = [position for position, line in enumerate(lines) if REPLACEMENT in line]
        samples = [lines[position] for position in positions]
        self._notes.add("repair", self._undecoded, [first + position for position in positions], samples)
