"""Event ids: each event of a file has its own id, and the same file gives the same ids again."""

import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa

from services.catalog.items import identifier_problem
from training.data.config import EventColumns
from training.data.shop_tables import ShopTable
from training.data.values.values import to_text

REPEATED_ID = "a repeated event_id with the same item and type"


def event_ids(shop_table: ShopTable) -> np.ndarray:
    """The event ids; a row without a valid id gets a hash of its content and its count among equal rows."""
    names = ("user_id", "item_id", "session_id", "type", "time", "price")
    columns: EventColumns = shop_table.columns  # type: ignore[assignment]

    def texts(field: str) -> list[str]:
        column = shop_table.match.fields.get(field)
        cells: pa.ChunkedArray | None = shop_table.table.rows[column] if column else None
        return [""] * shop_table.size if cells is None else [to_text(value) for value in cells.to_pylist()]

    counts: Counter[tuple[str, ...]] = Counter()
    ids = []
    file_ids = texts("event_id") if columns.event_id else [""] * shop_table.size
    for event_id, row in zip(file_ids, zip(*map(texts, names), strict=True), strict=True):
        if not event_id or identifier_problem(event_id):
            counts[row] += 1
            ids.append(_content_id((row, counts[row])))
        else:
            ids.append(event_id)
    return np.array(ids, object)


def without_repeats(
    shop_table: ShopTable, rows: np.ndarray, ids: np.ndarray, items: np.ndarray, kind: np.ndarray
) -> np.ndarray:
    """Drop repeated events from `rows`, int64 (K,), and give each remaining event its own id in `ids`.

    The lines of one order may share the order number as event_id. A line with another item or type is another
    event: its new id is a hash of the shared id and the number of the line.
    """
    events, lines = set[tuple[str, int, int]](), Counter[str]()
    first, repeats, renamed = list[int](), list[int](), 0
    entries = zip(rows.tolist(), items[rows].tolist(), kind[rows].tolist(), strict=True)
    for row, item_code, type_code in entries:
        event_id = ids[row]
        event = (event_id, item_code, type_code)
        if event in events:
            repeats.append(row)
            continue
        events.add(event)
        first.append(row)
        lines[event_id] += 1
        if lines[event_id] > 1:
            renamed += 1
            ids[row] = _content_id((event_id, lines[event_id]))
    remedy = 'if they are different events, write event_id = "" under [events]'
    column = shop_table.match.fields.get("event_id", "")
    shop_table.report.add_rows(
        "row", REPEATED_ID, shop_table.table, np.array(repeats, np.int64), column, remedy
    )
    if renamed:
        shop_table.report.notes.append(
            f"event_id: {renamed:,} rows share their event_id with a row of another item or type, "
            "such as lines of one order: each row is a separate event with an id derived from the shared one"
        )
    return np.array(first, np.int64)


def _content_id(content: object) -> str:
    """An id that is the same for the same content."""
    return f"import:{hashlib.blake2b(repr(content).encode(), digest_size=12).hexdigest()}"
