"""Tables from files: parquet, csv and json lines, the latter two gzipped or not."""

import codecs
import gzip
import json
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from services.errors import FailedPrecondition

FORMATS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")


def find(directory: Path, stem: str, named: str) -> Path:
    """The file `named`, or the one `stem`.* that can be read; FailedPrecondition when not exactly one."""
    if named:
        path = directory / named
        if not path.is_file():
            raise FailedPrecondition(f"{path} does not exist")
        return path
    found = [path for form in FORMATS if (path := directory / f"{stem}{form}").is_file()]
    if len(found) != 1:
        what = "holds no" if not found else "holds more than one"
        raise FailedPrecondition(f"{directory} {what} {stem} file ({', '.join(FORMATS)})")
    return found[0]


def read(path: Path) -> tuple[pa.Table, int]:
    """The table and the number of lines that could not be read.

    Csv cells are texts, none of them a number, so that ids keep their zeros; empty ones are
    null. FailedPrecondition for a file that is not what its name says, or is empty.
    """
    try:
        table, bad = _read(path)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"{path} cannot be read: {error}") from None
    if not table.num_rows:
        raise FailedPrecondition(f"{path} has no rows")
    return table, bad


def _read(path: Path) -> tuple[pa.Table, int]:
    if path.name.endswith(".parquet"):
        return pq.read_table(path), 0
    if path.name.endswith((".csv", ".csv.gz")):
        return _read_csv(path)
    return _read_lines(path)


def _read_csv(path: Path) -> tuple[pa.Table, int]:
    with _opened(path) as file:
        header = file.readline().removeprefix(codecs.BOM_UTF8)
    names = pa_csv.read_csv(pa.py_buffer(header)).column_names
    bad = 0

    def skip(_row: object) -> str:
        nonlocal bad
        bad += 1
        return "skip"

    table = pa_csv.read_csv(
        path,
        parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=pa_csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=[""]
        ),
    )
    return table, bad


def _read_lines(path: Path) -> tuple[pa.Table, int]:
    rows, bad = [], 0
    with _opened(path) as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append({name: _text(value) for name, value in row.items()})
            elif line.strip():
                bad += 1
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}), bad


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
