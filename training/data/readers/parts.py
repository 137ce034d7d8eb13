"""One part of a table as it is read from one file, before parts are united."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.data.readers.notes import Note, NoteCollector

_EMPTY_ROW = "no value at all: skipped as an empty line"
_NULS = "NUL characters: removed"
SURROGATES = "half a character (a lone surrogate, or a byte that is no text): replaced by U+FFFD"
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class FilePart:
    """The rows of one file; `lines` int64 (N,) their line or record numbers; `read` counts lost ones too."""

    rows: pa.Table
    lines: np.ndarray
    read: int
    notes: tuple[Note, ...]


def strings(values: Sequence[str | None], lines: Sequence[int], notes: NoteCollector) -> pa.Array:
    """Strings of one column, empty ones null; NUL and lone surrogates are taken out and noted."""
    try:
        column = pa.array(values, pa.string())
    except UnicodeEncodeError:
        sound = [None if value is None else _without_surrogates(value) for value in values]
        rows = [line for line, value, text in zip(lines, values, sound, strict=True) if text != value]
        samples = [text for value, text in zip(values, sound, strict=True) if text and text != value]
        notes.add("repair", SURROGATES, rows, samples)
        column = pa.array(sound, pa.string())
    has_nul = pc.match_substring(column, "\0")
    if pc.any(has_nul).as_py():
        rows = [lines[row] for row in np.flatnonzero(pc.fill_null(has_nul, False).to_numpy(False)).tolist()]
        notes.add("repair", _NULS, rows)
        column = pc.replace_substring(column, "\0", "")
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def without_empty_rows(
    rows: pa.Table, lines: np.ndarray, notes: NoteCollector
) -> tuple[pa.Table, np.ndarray]:
    """The table without rows that hold nothing, such as the tail of separators that Excel writes."""
    has_value = np.zeros(rows.num_rows, bool)
    for column in rows.columns:
        has_value |= pc.is_valid(column).to_numpy()
    if has_value.all():
        return rows, lines
    notes.add("guess", _EMPTY_ROW, lines[~has_value].tolist())
    return rows.filter(pa.array(has_value)), lines[has_value]


def _without_surrogates(text: str) -> str:
    """Pairs become the character they encode, halves U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
