"""What a reader of files guessed, repaired or lost, collected while it reads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["guess", "loss", "repair"]

_EXAMPLES = 5
_SAMPLE_LENGTH = 120


@dataclass(frozen=True)
class Note:
    """Something the reader guessed, repaired or lost.

    `text` holds no counts, so that notes of several parts add up; `count` is the number of records it
    concerns; `rows` the first line or record numbers, `file` the name of the part they are in;
    `samples` raw values, cut to a readable length. `str(note)` is the whole message.
    """

    kind: Kind
    text: str
    count: int = 0
    rows: tuple[int, ...] = ()
    samples: tuple[str, ...] = ()
    file: str = ""

    def __str__(self) -> str:
        details = [self.file] if self.file else []
        if self.rows:
            more = ", ..." if self.count > len(self.rows) else ""
            word = "line" if len(self.rows) == 1 else "lines"
            details.append(f"{word} {', '.join(map(str, self.rows))}{more}")
        if self.samples:
            details.append(f"such as {self.samples[0]!r}")
        count = f"{self.count} {'row' if self.count == 1 else 'rows'}: " if self.count else ""
        return f"{count}{self.text}" + (f" ({', '.join(details)})" if details else "")


class NoteCollector:
    """Adds up notes of one text; keeps the first rows and samples of each."""

    def __init__(self) -> None:
        self._notes: dict[tuple[Kind, str], Note] = {}

    def add(self, kind: Kind, text: str, rows: Sequence[int] = (), samples: Sequence[str] = ()) -> None:
        """Note records at `rows`, or a fact about the whole file when there are none."""
        short_samples = tuple(_cut(sample) for sample in samples[:_EXAMPLES])
        self.add_note(Note(kind, text, len(rows), tuple(rows[:_EXAMPLES]), short_samples))

    def add_encoding(self, codec: str, line: int, sample: str) -> None:
        """Note that the encoding is a guess; `sample` is a line that is no UTF-8."""
        text = f'not UTF-8, read as {codec}: if letters are wrong, write encoding = "..." in shop.toml'
        self.add_note(Note("guess", text, 0, (line,) if line else (), (_cut(sample),) if sample else ()))

    def add_note(self, note: Note) -> None:
        """Add a note, which may be of another part."""
        previous = self._notes.get((note.kind, note.text))
        if previous is None:
            self._notes[note.kind, note.text] = note
            return
        same_file = previous.file == note.file
        self._notes[note.kind, note.text] = replace(
            previous,
            count=previous.count + note.count,
            rows=(previous.rows + note.rows)[:_EXAMPLES] if same_file else previous.rows,
            samples=(previous.samples + note.samples)[:_EXAMPLES],
        )

    def add_all(self, notes: Iterable[Note], file: str) -> None:
        """Add the notes of one part, whose name is `file`."""
        for note in notes:
            self.add_note(replace(note, file=file))

    def notes(self) -> tuple[Note, ...]:
        """Everything noted, losses first."""
        order = {"loss": 0, "repair": 1, "guess": 2}
        return tuple(sorted(self._notes.values(), key=lambda note: order[note.kind]))


def _cut(sample: str) -> str:
    line = sample.rstrip("\r\n")
    return line if len(line) <= _SAMPLE_LENGTH else f"{line[:_SAMPLE_LENGTH]}..."
