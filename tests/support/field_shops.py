"""Rows, files and images of a small synthetic shop: the number of an item or event determines its values."""

import csv
import io
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from services.embedding.images import headers  # noqa: F401 - it makes Pillow write HEIC

Row = dict[str, Any]
ITEMS, EVENTS = 120, 840
LAST = datetime(2025, 11, 27, 20, tzinfo=UTC)
TYPES = "[event_types]\nview = 0.2\ncart = 0.5\npurchase = 1.0\n"
TOML = f'[items]\ntext_attributes = ["colour", "type"]\n{TYPES}'
_COLORS, _KINDS = ("blue", "black", "red", "white", "green"), ("hat", "bag", "lamp", "sock", "scarf", "chair")


def item_price(n: int) -> float:
    """The price of an item."""
    return round(5.19 + n * 0.73, 2)


def item_rows(
    id_of: Callable[[int], object] = "sku-{:04}".format, **columns: Callable[[int], object]
) -> list[Row]:
    """The rows of the items; `columns` replace or add some."""
    rows = []
    for n in range(ITEMS):
        color, kind = _COLORS[n % 5], _KINDS[n % 6]
        row: Row = {"id": id_of(n), "title": f"{color.title()} {kind} {n}"}
        row |= {"description": f"A {color} {kind} for every day", "price": f"{item_price(n):.2f}"}
        row |= {"colour": color, "type": kind}
        rows.append(row | {name: of(n) for name, of in columns.items()})
    return rows


def event_time(n: int) -> datetime:
    """The time of an event."""
    return LAST - timedelta(minutes=48 * (EVENTS - 1 - n))


def event_type(n: int) -> str:
    """The type of an event."""
    return ("view", "view", "view", "cart", "purchase")[n % 5]


def item_of_event(n: int) -> int:
    """The number of the item of an event."""
    return n * 7 % ITEMS


def event_rows(
    id_of: Callable[[int], object] = "sku-{:04}".format, **columns: Callable[[int], object]
) -> list[Row]:
    """The rows of the events; `columns` replace or add some."""
    rows = []
    for n in range(EVENTS):
        row: Row = {"user_id": f"u{n % 60}", "item_id": id_of(item_of_event(n)), "type": event_type(n)}
        row["time"] = event_time(n).isoformat()
        rows.append(row | {name: of(n) for name, of in columns.items()})
    return rows


def csv_text(rows: Sequence[Row], separator: str = ",", end: str = "\r\n", *, header: bool = True) -> str:
    """Rows as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end)
    if header:
        writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return out.getvalue()


def unquoted_csv(rows: Sequence[Row], separator: str = ",") -> str:
    """Rows as CSV without quotation marks."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "".join(separator.join(line) + "\n" for line in lines)


def write_shop(
    directory: Path,
    items_file: str | bytes | None = None,
    events_file: str | bytes | None = None,
    toml: str = TOML,
    names: tuple[str, str] = ("items.csv", "events.csv"),
) -> None:
    """Write the files of a shop: None writes the standard content, an empty string writes no file."""
    contents = items_file, events_file
    for name, content, rows in zip(names, contents, (item_rows, event_rows), strict=True):
        if content != "":
            data = csv_text(rows()) if content is None else content
            (directory / name).write_bytes(data.encode() if isinstance(data, str) else data)
    if toml:
        (directory / "shop.toml").write_text(toml)


def rename_columns(rows: list[Row], **names: str) -> list[Row]:
    """Rows with other column names."""
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


def image_bytes(form: str, mode: str = "RGB", color: Any = (40, 90, 160)) -> bytes:
    """An image file."""
    out = io.BytesIO()
    Image.new(mode, (48, 48), color).save(out, form)
    return out.getvalue()
