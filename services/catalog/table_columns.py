"""The columns of an item table as arrays and lists, and the file that holds them.

The file is for the next start: reading a million items of a store takes minutes, reading their columns
seconds. It is a sequence of NumPy arrays (format NPY 1.0); the first is a JSON text with all strings.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

Entries = tuple[np.ndarray, np.ndarray, list[str]]
"""Texts by row: rows int32 (E,) in order, codes int32 (E,), and the text of each code."""

_SPARE_ROWS, _SPARE_SHARE = 1024, 16  # room for new items: growing copies the vectors
_ROW_ARRAYS = {
    "item_hashes": (np.int64, 1),
    "live": (np.bool_, 1),
    "created": (np.int64, 1),
    "windows": (np.int64, 2),
    "sequences": (np.int64, 1),
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableColumns:
    """A table of `length` rows that reflects the changes up to `sequence`, and perhaps some later ones.

    `arrays` has item_hashes, live, created, sequences (N, 1) and windows (N, 2), with N at least `length`;
    `words` are those of the titles; `numbers` maps an attribute to rows int32 (E,) and values float64 (E,);
    `vectors` maps a space to vectors float16 (N, D) and which rows have one, bool (N, 1).
    """

    sequence: int
    length: int
    ids: list[str]
    arrays: dict[str, np.ndarray]
    texts: dict[str, Entries]
    words: Entries
    numbers: dict[str, tuple[np.ndarray, np.ndarray]]
    vectors: dict[str, tuple[np.ndarray, np.ndarray]]


def save(columns: TableColumns, path: Path, source: str) -> None:
    """Write columns to a file; `source` says what they come from, and `load` compares it.

    Raises:
        OSError: the file cannot be written. Then an earlier file stays as it is.
    """
    header = {
        "source": source,
        "code": _code_digest(),
        "sequence": columns.sequence,
        "length": columns.length,
        "ids": columns.ids,
        "texts": {name: texts for name, (_, _, texts) in columns.texts.items()},
        "words": columns.words[2],
        "numbers": list(columns.numbers),
        "vectors": list(columns.vectors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial_path.open("wb") as file:
            text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
            np.save(file, np.frombuffer(text, np.uint8))
            for values in _arrays(columns):
                np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
        partial_path.rename(path)
    except BaseException:  # frees the space on a full disk
        partial_path.unlink(missing_ok=True)
        raise


def _arrays(columns: TableColumns) -> Iterator[np.ndarray]:
    """The arrays in the order of the file."""
    for name in _ROW_ARRAYS:
        yield columns.arrays[name][: columns.length]
    for rows, codes, _ in (*columns.texts.values(), columns.words):
        yield rows
        yield codes
    for of_attribute in columns.numbers.values():
        yield from of_attribute
    for values, present in columns.vectors.values():
        yield values[: columns.length]
        yield present[: columns.length]


def load(path: Path, source: str) -> TableColumns | None:
    """The columns in a file, with room for more rows; None, with a log line, if it is of no use.

    A file of another source or of other code is of no use, and neither is a damaged one.
    """
    if not path.is_file():
        return None
    try:
        for left_over in path.parent.glob(f"{path.name}.*.partial"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        with path.open("rb") as file:
            header = json.loads(np.load(file, allow_pickle=False).tobytes().decode("utf-8", "surrogatepass"))
            if header["source"] != source:
                reason = "is of another store or encoder"
            elif header["code"] != _code_digest():
                reason = "was written by other code"
            else:
                return _read(file, header)
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"is damaged: {error!r}"
    _log.warning("the item table in %s %s; the items are read from the store", path, reason)
    return None


def _read(file: IO[bytes], header: dict[str, Any]) -> TableColumns:
    length = int(header["length"])
    capacity = length + max(_SPARE_ROWS, length // _SPARE_SHARE)
    arrays = {
        name: _rows_of(file, length, capacity, np.dtype(dtype), width)
        for name, (dtype, width) in _ROW_ARRAYS.items()
    }

    def entries(values_type: type[np.generic]) -> tuple[np.ndarray, np.ndarray]:
        rows, values = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
        if rows.dtype != np.int32 or values.dtype != values_type or rows.shape != values.shape:
            raise ValueError("a column has another form")
        if len(rows) and not 0 <= rows[0] <= rows[-1] < length:
            raise ValueError("a column has rows that the table lacks")
        return rows, values

    def texts(of_codes: list[str]) -> Entries:
        rows, codes = entries(np.int32)
        if len(codes) and not 0 <= codes.min() <= codes.max() < len(of_codes):
            raise ValueError("a column has codes without a text")
        return rows, codes, of_codes

    columns = TableColumns(
        sequence=int(header["sequence"]),
        length=length,
        ids=header["ids"],
        arrays=arrays,
        texts={name: texts(of_codes) for name, of_codes in header["texts"].items()},
        words=texts(header["words"]),
        numbers={name: entries(np.float64) for name in header["numbers"]},
        vectors={
            space: (
                _rows_of(file, length, capacity, np.dtype(np.float16), None),
                _rows_of(file, length, capacity, np.dtype(np.bool_), 1),
            )
            for space in header["vectors"]
        },
    )
    if len(columns.ids) != length or file.read(1):
        raise ValueError("it has another number of rows or arrays")
    return columns


def _rows_of(
    file: IO[bytes], length: int, capacity: int, dtype: np.dtype[Any], width: int | None
) -> np.ndarray:
    """The next array of the file, with zeros for the rows after the first `length`."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array has another format")
    shape, is_fortran, stored = np.lib.format.read_array_header_1_0(file)
    if is_fortran or stored != dtype or shape[:-1] != (length,):
        raise ValueError("an array has another form")
    if width not in (None, shape[1]):
        raise ValueError("an array has another width")
    values = np.zeros((capacity, shape[1]), dtype)
    view = values[:length].reshape(-1).view(np.uint8).data
    while view:
        if not (count := file.readinto(view)):  # type: ignore[attr-defined] # buffered files have it
            raise EOFError("it is too short")
        view = view[count:]
    return values


@cache
def _code_digest() -> str:
    """A digest of the code that makes columns of items: other code may make others of the same item."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
