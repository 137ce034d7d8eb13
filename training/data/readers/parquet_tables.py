"""Tables of Parquet, as pandas, Spark, Impala and warehouses write them, in plain types."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from services.core.errors import FailedPrecondition
from training.data.readers.notes import NoteCollector
from training.data.readers.parts import REPLACEMENT, FilePart
from training.data.values.values import as_json_texts

_NOT_TEXT = "bytes that are no valid UTF-8 in column {!r}: replaced by U+FFFD"
_UUID_BYTES = 16


def read_parquet(source: Path | BinaryIO) -> FilePart:
    """Read a table of numbers, booleans, strings, dates, timestamps, and lists of these.

    Binary values are text, decimals decimal strings, dictionaries decoded, timestamps at most of
    microseconds; a struct becomes columns 'a.b'; other nested values become JSON text.

    Raises:
        FailedPrecondition: the file is damaged, or has two columns of one name.
    """
    notes = NoteCollector()
    try:
        # INT96 in nanoseconds ends in 2262: a date such as 9999-12-31 would wrap around
        rows = pq.ParquetFile(source, coerce_int96_timestamp_unit="us").read()
    except (pa.ArrowException, OSError) as error:
        raise FailedPrecondition(f"is a damaged Parquet file: {error}") from None
    while any(pa.types.is_struct(field.type) for field in rows.schema):
        rows = rows.flatten()
    names = rows.column_names
    for name in names:
        if names.count(name) > 1:
            raise FailedPrecondition(f"has {names.count(name)} columns called {name!r}: rename all but one")
    columns = [_plain(rows.column(name), name, notes) for name in names]
    plain = pa.table(columns, names) if columns else rows
    return FilePart(plain, np.arange(1, rows.num_rows + 1), rows.num_rows, notes.notes())


def _plain(column: pa.ChunkedArray, name: str, notes: NoteCollector) -> pa.ChunkedArray:
    """The column in one of the types that `read_parquet` promises."""
    data_type = column.type
    if isinstance(data_type, pa.BaseExtensionType):
        return _plain(
            pa.chunked_array([chunk.storage for chunk in column.chunks], data_type.storage_type), name, notes
        )
    if pa.types.is_dictionary(data_type):
        return _plain(column.cast(data_type.value_type), name, notes)
    if pa.types.is_decimal(data_type) or pa.types.is_time(data_type) or pa.types.is_duration(data_type):
        return column.cast(pa.string())
    if _is_binary(data_type):
        return _as_text(column, name, notes)
    if pa.types.is_large_string(data_type) or pa.types.is_string_view(data_type):
        return column.cast(pa.string())
    if pa.types.is_timestamp(data_type) and data_type.unit == "ns":
        return column.cast(pa.timestamp("us", data_type.tz), safe=False)
    if pa.types.is_nested(data_type):
        return _list(column, name, notes)
    return column


def _list(column: pa.ChunkedArray, name: str, notes: NoteCollector) -> pa.ChunkedArray:
    """Lists of plain values stay lists; maps and lists of nested values become JSON text."""
    data_type = column.type
    if not _is_list(data_type) or pa.types.is_nested(data_type.value_type):
        return as_json_texts(column)
    chunks = []
    for chunk in column.chunks:
        simple = chunk.cast(pa.list_(data_type.value_type))
        values = _plain(pa.chunked_array([simple.values]), name, notes).combine_chunks()
        chunks.append(pa.ListArray.from_arrays(simple.offsets, values, mask=simple.is_null()))
    return pa.chunked_array(chunks, None if chunks else pa.list_(pa.string()))


def _as_text(column: pa.ChunkedArray, name: str, notes: NoteCollector) -> pa.ChunkedArray:
    """Bytes as UTF-8; 16 bytes that are no text are a UUID and get its usual form."""
    plain = column.cast(pa.binary())
    values = plain.to_pylist() if _may_be_uuid(column.type) else []
    if any(value and not value.decode("utf-8", "replace").isprintable() for value in values):
        return pa.chunked_array([pa.array([None if v is None else _uuid(v) for v in values], pa.string())])
    try:
        return plain.cast(pa.string())
    except pa.ArrowInvalid:
        texts = [None if value is None else value.decode("utf-8", "replace") for value in plain.to_pylist()]
    rows = [row for row, text in enumerate(texts, 1) if text and REPLACEMENT in text]
    notes.add("repair", _NOT_TEXT.format(name), rows, [texts[row - 1] or "" for row in rows[:5]])
    return pa.chunked_array([pa.array(texts, pa.string())])


def _may_be_uuid(data_type: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_binary(data_type) and data_type.byte_width == _UUID_BYTES)


def _uuid(value: bytes) -> str:
    digits = value.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _is_binary(data_type: pa.DataType) -> bool:
    checks = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    return any(check(data_type) for check in checks)


def _is_list(data_type: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(data_type)
        or pa.types.is_large_list(data_type)
        or pa.types.is_fixed_size_list(data_type)
    )
