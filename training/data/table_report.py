"""Counts of the dropped and repaired rows and values of one file, with places, samples and remedies."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from training.data.column_match import Match
from training.data.readers.reader import Table
from training.data.values.values import as_json_texts

_EXAMPLES = 5
_SAMPLE_LENGTH = 60
Kind = Literal["row", "value", "note"]


@dataclass
class Entry:
    """The count of one reason: dropped rows ("row"), dropped values ("value"), guesses and repairs ("note").

    `field` is the field of dropped values.
    """

    kind: Kind
    count: int = 0
    places: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    remedy: str = ""
    field: str = ""

    def describe(self, reason: str) -> str:
        """The reason with its count, places, samples and remedy."""
        parts = [f"{reason}: {self.count:,}"]
        if self.places:
            parts.append(f"({', '.join(self.places)}{', …' if self.count > len(self.places) else ''})")
        if self.samples:
            parts.append("such as " + ", ".join(self.samples))
        return " ".join(parts) + (f"; {self.remedy}" if self.remedy else "")


@dataclass
class TableReport:
    """The report on one file.

    A file with `problems` is not used; `warnings` and `notes` are sentences; `entries` count by reason.
    `value_counts` has the number of values of each field, `formats` how they are written.
    """

    file: str
    rows_read: int = 0
    rows_used: int = 0
    match: Match | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    value_counts: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table) -> "TableReport":
        """The report of a table, with the notes of its reader."""
        report = cls(table.name, rows_read=table.read)
        for note in table.notes:
            if note.kind == "loss":
                places = [f"{note.file} line {row}".strip() for row in note.rows[:_EXAMPLES]]
                samples = [_sample(text) for text in note.samples[:2]]
                report.entries[note.text] = Entry("row", note.count, places, samples)
            else:
                report.notes.append(str(note))
        return report

    @property
    def reasons(self) -> dict[str, int]:
        """Rows or values by reason."""
        return {reason: entry.count for reason, entry in self.entries.items()}

    @property
    def rows_lost(self) -> int:
        """The number of dropped rows."""
        return sum(entry.count for entry in self.entries.values() if entry.kind == "row")

    def add(
        self,
        kind: Kind,
        reason: str,
        count: int,
        places: Sequence[str] = (),
        samples: Sequence[Any] = (),
        remedy: str = "",
        field_name: str = "",
    ) -> None:
        """Count rows or values under a reason; keep the first places and distinct samples."""
        if not count:
            return
        entry = self.entries.setdefault(reason, Entry(kind, remedy=remedy, field=field_name))
        entry.count += count
        entry.places += list(places)[: _EXAMPLES - len(entry.places)]
        for sample in samples:
            text = _sample(sample)
            if len(entry.samples) < _EXAMPLES and text not in entry.samples:
                entry.samples.append(text)

    def add_rows(
        self,
        kind: Kind,
        reason: str,
        table: Table,
        rows: np.ndarray,
        column: str = "",
        remedy: str = "",
        field_name: str = "",
    ) -> None:
        """Count `rows`, int64 (K,), of a table, with samples of a column."""
        if not len(rows):
            return
        first = rows[:_EXAMPLES].tolist()
        places = [table.place(row) for row in first]
        samples = as_json_texts(table.rows[column].take(first)).to_pylist() if column else []
        self.add(kind, reason, len(rows), places, [s for s in samples if s is not None], remedy, field_name)

    def to_dict(self) -> dict[str, Any]:
        """As training reports hold it."""
        entries = self.entries.items()
        return {
            "read": self.rows_read,
            "kept": self.rows_used,
            "reasons": self.reasons,
            "examples": {reason: entry.places for reason, entry in entries if entry.places},
            "samples": {reason: entry.samples for reason, entry in entries if entry.samples},
            "warnings": self.warnings,
            "notes": self.notes,
        }


def _sample(value: object) -> str:
    text = repr(str(value))
    return text if len(text) <= _SAMPLE_LENGTH else f"{text[: _SAMPLE_LENGTH - 2]}…'"
