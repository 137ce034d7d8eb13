"""What a preset is, and how one is applied to the files of an export."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from services.core.errors import FailedPrecondition
from training.data.readers import reader
from training.data.readers.reader import Dialect, Table

Rewrite = Callable[[Table], Table]
Spelling = Callable[[str], str]

_DETECTED = Dialect()


def _as_written(name: str) -> str:
    return name


@dataclass(frozen=True)
class TableSource:
    """A way in which an export holds a table: glob patterns of its files, how they are written.

    `required` are the columns without which it is another kind of file: of each tuple one must be there.
    `spelling` of a column's name is what `required` is compared with.
    """

    patterns: Sequence[str]
    rewrite: Rewrite
    dialect: Dialect = _DETECTED
    required: Sequence[tuple[str, ...]] = ()
    spelling: Spelling = _as_written

    def read(self, paths: Sequence[Path], preset: str) -> Table:
        """The table of an export in the standard form.

        Raises:
            FailedPrecondition: it cannot be read, or a required column is missing.
        """
        table = reader.read(paths, self.dialect)
        names = {self.spelling(name) for name in table.rows.column_names}
        missing = [" or ".join(group) for group in self.required if not names & set(group)]
        if missing:
            raise FailedPrecondition(
                f"{table.name} is no export that the preset {preset!r} reads: it has no column "
                f"{', '.join(missing)}; it has {', '.join(table.rows.column_names)}. Where the export is in "
                "another language, export it in English; for another kind of file remove preset from "
                "[source] and name the columns under [items] and [events]"
            )
        return self.rewrite(table)

    def find(self, directory: Path) -> list[Path]:
        """The files of the first pattern that fits; none where no pattern does."""
        for pattern in self.patterns:
            if paths := sorted(path for path in directory.glob(pattern) if path.is_file()):
                return paths
        return []

    def fits(self, file: str) -> bool:
        """Whether a file has the name of one of this kind, wherever it lies."""
        name = PurePosixPath(file).name
        return any(fnmatch(name, PurePosixPath(pattern).name) for pattern in self.patterns)


@dataclass(frozen=True)
class Preset:
    """How an export becomes items and events.

    `signature` are columns that tell such a file; `items` and `events` the ways in which an export may hold
    them, tried in order: where it has no items file, the last way makes items of the events' own file.
    `settings` is what shop.toml says by default, of the standard form.
    """

    name: str
    description: str
    signature: frozenset[str]
    items: Sequence[TableSource]
    events: Sequence[TableSource] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def read(self, section: str, directory: Path, file: str = "") -> Table | None:
        """The "items" or "events" of an export, from `file` if it is named; None if it has no such file.

        Raises:
            FailedPrecondition: it has no items; names the files that were looked for, or the columns.
        """
        parts = self.items if section == "items" else self.events
        if file and parts:
            part = next((part for part in parts if part.fits(file)), parts[0])
            return part.read(reader.find(directory, section, file), self.name)
        for part in parts:
            if paths := part.find(directory):
                return part.read(paths, self.name)
        if section == "events":
            return None
        if not directory.is_dir():
            raise FailedPrecondition(f"{directory} is no directory")
        patterns = ", ".join(pattern for part in parts for pattern in part.patterns)
        present = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise FailedPrecondition(
            f"{directory} holds no items of a {self.name} export ({patterns}); it holds {present}"
        )
