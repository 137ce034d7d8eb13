"""How a delimited file is written: its separator and quoting, stated by the shop or detected.

The header line decides: a separator is one that the header holds and that gives the lines of a sample
the same number of cells. Well-formed text is read as RFC 4180 has it (quoted cells, doubled quotes).
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

_SEPARATORS = ("::", "\t", ";", ",", "|", "\x01")  # at equal merit the earlier one; \x01 is Hive's
_SAMPLE_LINES = 500
_MAX_LINES_ABOVE = 20
_CLEAR = 0.9
_LINE_BY_LINE = 0.99  # worth less than the same share of records that are well formed
_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
_PLACEHOLDERS = ("\x1f", "\x1e", "\x1d", "\ue000", "\uf8ff")


@dataclass(frozen=True)
class Dialect:
    """How a file is written, as shop.toml states it; what is empty is detected.

    `separator` between cells, one or more characters; `encoding` a Python codec name; `quote` the
    quotation mark, empty for none; `columns` the names of the columns when the file has no header.
    """

    separator: str = ""
    encoding: str = ""
    quote: str = '"'
    columns: tuple[str, ...] = ()


class RecordReader(Protocol):
    """Cells of one record after the other; `line_num` counts the lines they took."""

    @property
    def line_num(self) -> int: ...  # noqa: D102 - said above
    def __iter__(self) -> Iterator[list[str]]: ...


@dataclass(frozen=True)
class Format:
    """Everything that cutting a line into cells depends on."""

    separator: str
    quote: str = '"'
    escape: str = ""
    skip_spaces: bool = False

    def records(self, lines: Iterator[str], strict: bool = True) -> "RecordReader":
        """A csv reader; its separator has one character."""
        csv.field_size_limit(1 << 30)
        return csv.reader(
            lines,
            delimiter=self.separator,
            quotechar=self.quote or None,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            escapechar=self.escape or None,
            skipinitialspace=self.skip_spaces,
            strict=strict,
        )

    def single(self, lines: Sequence[str]) -> tuple[Sequence[str], "Format"]:
        """The lines and the format with a separator of one character, as a csv reader needs it."""
        if len(self.separator) == 1:
            return lines, self
        stand_in = next(mark for mark in _PLACEHOLDERS if not any(mark in line for line in lines))
        return [line.replace(self.separator, stand_in) for line in lines], replace(self, separator=stand_in)

    def readings(self, line: str) -> Iterator[list[str]]:
        """The cells of a damaged line, in several ways, the likeliest first.

        A quotation mark inside a quoted cell is text; so is one that opens a cell but does not end it;
        so is each.
        """
        yield self.cells(line)
        yield self._cut(line, marks_inside=False)
        mark = self.quote or "\0"
        yield [
            cell[1:-1] if len(cell) > 1 and cell[0] == mark == cell[-1] else cell
            for cell in line.split(self.separator)
        ]

    def cells(self, line: str) -> list[str]:
        """The cells of a line that need not be well formed."""
        return self._cut(line, marks_inside=True)

    def _cut(self, line: str, marks_inside: bool) -> list[str]:
        if not self.quote:
            return line.split(self.separator)
        end = rf"({re.escape(self.separator)}|\Z)"
        mark = re.escape(self.quote)
        quoted = rf"\s*{mark}((?:[^{mark}]|{mark}{mark})*){mark}\s*{end}"
        with_marks = rf"\s*{mark}([^{mark}].*?){mark}\s*{end}" if marks_inside else r"(?!)()()"
        pattern = re.compile(rf"{quoted}|{with_marks}|(.*?){end}", re.DOTALL)
        cells, position, separator = [], 0, "some"
        while separator:
            match = pattern.match(line, position)
            assert match  # noqa: S101 - the last alternative matches anything
            escaped, *others = match.group(1, 3, 5)
            text = escaped.replace(self.quote * 2, self.quote) if escaped is not None else None
            cells.append(text if text is not None else next(text for text in others if text is not None))
            separator, position = match[2] or match[4] or match[6], match.end()
        return cells

    def __str__(self) -> str:
        name = {"\t": "a tab", "\x01": "\\x01"}.get(self.separator, repr(self.separator))
        escape = ", with backslashes before quotation marks" if self.escape else ""
        return f"cells are separated by {name}{escape}"


def lines_above_table(lines: Sequence[str], dialect: Dialect) -> int:
    """How many lines of a title, as reports have it, stand above the header; 0 when that is unclear."""
    rows = [index for index, line in enumerate(lines[:_SAMPLE_LINES]) if line.strip()]
    for rank, index in enumerate(rows[:_MAX_LINES_ABOVE]):
        sample = [lines[row] for row in rows[rank:]]
        best = max(_merit(sample, candidate) for candidate in _candidates(dialect))
        if best > (_CLEAR if rank else 0):
            return index if rank and len(sample) > 1 else 0
    return 0


def _candidates(dialect: Dialect) -> list[Format]:
    separators = [_NAMES.get(dialect.separator, dialect.separator)] if dialect.separator else _SEPARATORS
    return [Format(separator, dialect.quote) for separator in separators]


def detect(lines: Sequence[str], dialect: Dialect) -> Format:
    """The format of the lines of a sample, the header among them; line ends are kept."""
    sample = [line for line in lines[:_SAMPLE_LINES] if line.strip()]
    candidates = _candidates(dialect)
    merits = [_merit(sample, candidate) for candidate in candidates]
    best = candidates[merits.index(max(merits))] if any(merits) else Format(",", dialect.quote)
    if dialect.separator:
        best = candidates[0]
    for variant in _variants(best, "".join(sample)):
        if _merit(sample, variant) > max(merits):
            return variant
    return best


def _variants(best: Format, text: str) -> Iterator[Format]:
    if best.quote and f"\\{best.quote}" in text:
        yield replace(best, escape="\\")
    if best.quote and re.search(re.escape(best.separator) + " +" + re.escape(best.quote), text):
        yield replace(best, skip_spaces=True)


def _merit(lines: Sequence[str], candidate: Format) -> float:
    """The share of records with as many cells as the first one; 0 when that has a single cell."""
    rows, single = candidate.single(lines)
    widths: list[int] = []
    reader, weight = single.records(iter(rows)), 1.0
    try:
        widths.extend(len(record) for record in reader if record)
    except csv.Error:
        if not widths or reader.line_num < len(rows):  # else the end of the sample cuts a record
            widths = [len(candidate.cells(line.rstrip("\r\n"))) for line in lines]
            weight = _LINE_BY_LINE
    if not widths or widths[0] == 1:
        return 0.0
    return weight * widths.count(widths[0]) / len(widths)
