"""Operations on the rows of a table that presets share."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.data.readers.reader import Note, Table


def texts(table: Table, name: str) -> list[str]:
    """The cells of a column as texts without surrounding spaces, "" for null; all empty if it is absent."""
    if name not in table.rows.column_names:
        return [""] * table.rows.num_rows
    return ["" if value is None else str(value).strip() for value in table.rows[name].to_pylist()]


def first(table: Table, *names: str) -> list[str]:
    """The cells of the first of these columns that is there and has any."""
    for name in names:
        if any(values := texts(table, name)):
            return values
    return [""] * table.rows.num_rows


def rebuild(
    table: Table, rows: Sequence[int], columns: Mapping[str, Sequence[object]], notes: Sequence[Note] = ()
) -> Table:
    """A table of new columns, one value for each of `rows`, which are places in the old one."""
    positions = np.asarray(rows, np.int64)
    arrays = {
        name: pa.array([None if value == "" else value for value in values])
        for name, values in columns.items()
    }
    all_notes = (*table.notes, *notes)
    return replace(
        table,
        rows=pa.table({name: _typed(array) for name, array in arrays.items()}),
        lines=table.lines[positions],
        parts=table.parts[positions],
        notes=all_notes,
        # Rows that only belong to another, such as further images of a product, are no losses.
        read=len(positions) + sum(note.count for note in all_notes if note.kind == "loss"),
    )


def _typed(array: pa.Array) -> pa.Array:
    return array.cast(pa.string()) if pa.types.is_null(array.type) else array


def rename_columns(table: Table, names: Mapping[str, str]) -> Table:
    """A table of the columns `names`, old to new, of those that are there; no row changes."""
    available = {old: new for old, new in names.items() if old in table.rows.column_names}
    rows = pa.table({new: table.rows[old] for old, new in available.items()})
    return replace(table, rows=rows)


def with_column(table: Table, name: str, column: pa.ChunkedArray | pa.Array) -> Table:
    """The table with a column replaced or added."""
    rows = table.rows
    if name in rows.column_names:
        return replace(table, rows=rows.set_column(rows.column_names.index(name), name, column))
    return replace(table, rows=rows.append_column(name, column))


def map_values(column: pa.ChunkedArray, values: Mapping[str, str]) -> pa.ChunkedArray:
    """A column of texts with some values replaced."""
    encoded = pc.dictionary_encode(column.combine_chunks())
    words = [values.get(word, word) for word in encoded.dictionary.to_pylist()]
    return pa.chunked_array([pc.take(pa.array(words, pa.string()), encoded.indices)])


def attribute_name(text: str) -> str:
    """A name for an attribute: "Shoe Size" becomes shoe_size."""
    return re.sub(r"\W+", "_", text.strip().casefold()).strip("_")[:64]


def parts_of(text: str, separator: str) -> list[str]:
    """The different values of a cell that holds several."""
    return list(dict.fromkeys(part for raw in text.split(separator) if (part := raw.strip())))
