"""Which files of a shop's directory hold a table: one file, the parts in a folder, an archive, a glob."""

import re
from pathlib import Path

from services.core.errors import FailedPrecondition
from training.data.readers.archives import is_hidden, members

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
_ENDINGS = {
    *(".csv", ".tsv", ".tab", ".psv", ".txt", ".dat", ".json", ".jsonl", ".ndjson"),
    *(".parquet", ".pq", ".xml", ".xlsx", ".xlsb", ".xls", ".ods"),
}
_GLOB = re.compile(r"[*?]|\[[^\]]+\]")
_PART_NUMBER = r"[-_.]?(part)?[-_.]?\d[-_.\dT]*"
_MAX_NAMES = 12


def find(directory: Path, stem: str, name: str) -> list[Path]:
    """The parts of the table `name` (a file, a folder, a glob, 'archive.zip/member'), else of `stem`.

    A zip archive is given as its members, each as a path below the archive. Of names, `stem` fits
    'events.csv', 'events.csv.gz', a folder 'events' or 'events.parquet', and the parts 'events-01.csv' on.

    Raises:
        FailedPrecondition: nothing or more than one table fits; names what is there.
    """
    paths = _named(directory, name) if name else _by_stem(directory, stem)
    parts = [part for path in paths for part in _parts(path)]
    if not parts:
        raise FailedPrecondition(f"{paths[0]} holds no file of data")
    return parts


def _named(directory: Path, name: str) -> list[Path]:
    path = directory / name
    if path.exists() or any(parent.is_file() for parent in path.parents):
        return [path]
    if _GLOB.search(name):
        # An absolute glob starts at the root of the file system.
        start, pattern = (
            (Path(path.anchor), path.relative_to(path.anchor))
            if Path(name).is_absolute()
            else (directory, Path(name))
        )
        try:
            paths = sorted(path for path in start.glob(str(pattern)) if not path.name.startswith("."))
        except ValueError as error:
            raise FailedPrecondition(f"file = {name!r} is no pattern of files: {error}") from None
        if paths:
            return paths
    raise FailedPrecondition(f"{path} does not exist; {_content(directory)}")


def _by_stem(directory: Path, stem: str) -> list[Path]:
    if not directory.is_dir():
        raise FailedPrecondition(f"{directory} is no directory")
    entries = sorted(directory.iterdir())
    tables = [
        path for path in entries if path.name.lower().split(".")[0] == stem and _may_be_table(path, stem)
    ]
    if len(tables) == 1:
        return tables
    setting = f"name one under [{stem}] in shop.toml, such as"
    if tables:
        names = ", ".join(_display_name(path) for path in tables)
        raise FailedPrecondition(
            f'{directory} holds more than one {stem} file: {names}; {setting} file = "{tables[0].name}"'
        )
    part_pattern = re.compile(rf"{re.escape(stem)}{_PART_NUMBER}(?=\.[a-z])", re.IGNORECASE)
    parts = [path for path in entries if part_pattern.match(path.name) and _may_be_table(path, stem)]
    endings = {_ending(path) for path in parts}
    if len(endings) == 1:
        return parts
    raise FailedPrecondition(
        f"{directory} holds no {stem} file ({stem}.csv, {stem}.tsv, {stem}.jsonl, {stem}.parquet, a folder"
        f' {stem}/, each compressed or not); {_content(directory)}; {setting} file = "..."'
    )


def _may_be_table(path: Path, stem: str) -> bool:
    return path.name == stem or _ending(path) in _ENDINGS or path.name == f"{stem}.zip"


def _ending(path: Path) -> str:
    """'.csv' of 'events.csv.gz'."""
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _parts(path: Path) -> list[Path]:
    if not path.is_dir():
        return members(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [part for file in files if not is_hidden(file.relative_to(path)) for part in members(file)]


def _content(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is no directory"
    entries = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    names = ", ".join(_display_name(path) for path in entries[:_MAX_NAMES]) or "nothing"
    more = f" and {len(entries) - _MAX_NAMES} more" if len(entries) > _MAX_NAMES else ""
    return f"{directory.name or directory} has {names}{more}"


def _display_name(path: Path) -> str:
    return f"folder {path.name}/" if path.is_dir() else path.name
