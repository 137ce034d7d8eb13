"""A shop directory, read and checked: items, events, photographs.

A bad row never ends the run, it is dropped and counted with its reason; a file that is of
no use does, and the error says what it lacks.
"""

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from services import catalog
from services.catalog import Attribute, Item, identifier_problem, item_number
from services.errors import FailedPrecondition, InvalidArgument
from training import tables
from training.photographs import Photographs
from training.shop_settings import EventColumns, ItemColumns, ShopSettings, read_settings

_EXAMPLES = 5
_NO_TIME = np.iinfo(np.int64).min


@dataclass
class TableReport:
    """What became of the rows of one file; `reasons` counts, `examples` holds the first row numbers."""

    file: str
    read: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[int]] = field(default_factory=dict)

    def note(self, reason: str, row: int, count: int = 1) -> None:
        """Count a row, or several from one on."""
        self.reasons[reason] += count
        known = self.examples.setdefault(reason, [])
        if len(known) < _EXAMPLES:
            known.append(row)


@dataclass(frozen=True)
class Events:
    """Events in columns of one length N, in the order of time.

    `user` int32 codes into `user_ids`; `item` int32 codes into `item_ids`, `number` int64 item
    numbers; `kind` int16, the place in the shop's event types; `time` int64, microseconds
    since 1970; `price` float64, NaN unknown; `position` int32, 0 unknown; `session` int32 codes
    into `session_ids`, `channel` int32 codes into `channel_names`, -1 for none.
    """

    event_ids: np.ndarray
    user: np.ndarray
    user_ids: list[str]
    item: np.ndarray
    item_ids: list[str]
    number: np.ndarray
    kind: np.ndarray
    time: np.ndarray
    price: np.ndarray
    position: np.ndarray
    session: np.ndarray
    session_ids: list[str]
    channel: np.ndarray
    channel_names: list[str]

    def __len__(self) -> int:
        return len(self.time)

    def take(self, rows: np.ndarray) -> "Events":
        """The events at `rows`, int64, of the same people, items and sessions."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Events(**{n: v[rows] if isinstance(v, np.ndarray) else v for n, v in columns.items()})


@dataclass(frozen=True)
class Shop:
    """A shop as training sees it; items without image bytes, in the order of their file."""

    settings: ShopSettings
    items: list[Item]
    events: Events
    photographs: Photographs
    reports: dict[str, TableReport]


def read_shop(directory: Path, settings_file: Path | None = None, until: datetime | None = None) -> Shop:
    """Read a shop directory; of its events those before `until`.

    Raises:
        FailedPrecondition: a file is missing, unreadable, empty, or lacks a required column.
        InvalidArgument: shop.toml is wrong.
    """
    default = directory / "shop.toml"
    settings = read_settings(settings_file or (default if default.is_file() else None))
    photographs = Photographs(directory / "images")
    items, of_items = _items(directory, settings.items, photographs)
    events, of_events = _events(directory, settings, until)
    known = {item.id for item in items}
    strangers = sum(item_id not in known for item_id in events.item_ids)
    if strangers:
        of_events.reasons["note: an item that items do not have"] = strangers
    return Shop(settings, items, events, photographs, {"items": of_items, "events": of_events})


def _require(table: pa.Table, path: Path, *names: str) -> None:
    for name in names:
        if name not in table.column_names:
            has = ", ".join(table.column_names)
            raise FailedPrecondition(f"{path.name} has no column {name!r}; it has {has}")


def _column(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist() if name and name in table.column_names else [None] * table.num_rows


def _items(directory: Path, columns: ItemColumns, photographs: Photographs) -> tuple[list[Item], TableReport]:
    path = tables.find(directory, "items", columns.file)
    table, bad = tables.read(path)
    _require(
        table, path, columns.id, *columns.text_attributes, *columns.number_attributes, *columns.filter_only
    )
    report = TableReport(path.name, read=table.num_rows + bad)
    if bad:
        report.note("unreadable line", 0, bad)
    items: list[Item] = []
    seen: set[str] = set()
    for row, item in enumerate(_item_rows(table, columns, report)):
        try:
            if item.id in seen:
                raise InvalidArgument.of("id", "was there before")
            has_photograph = item.id in photographs
            catalog.validate(item if not has_photograph else _with_photograph(item))
        except InvalidArgument as error:
            report.note(str(error), row)
            continue
        seen.add(item.id)
        items.append(item)
    report.kept = len(items)
    if not items:
        raise FailedPrecondition(f"{path.name} has no usable row: {dict(report.reasons)}")
    return items, report


def _with_photograph(item: Item) -> Item:
    return Item(**{**item.__dict__, "image_hash": b"there is one"})


def _item_rows(table: pa.Table, columns: ItemColumns, report: TableReport) -> Iterator[Item]:
    texts = [(name, _column(table, name)) for name in columns.text_attributes]
    texts += [(f"_{name}", _column(table, name)) for name in columns.filter_only]
    numbers = [(name, _column(table, name)) for name in columns.number_attributes]
    names = ("id", "title", "description", "family_id", "price", "available_from", "available_until")
    plain = zip(*(_column(table, getattr(columns, name)) for name in names), strict=True)
    for row, (item_id, title, description, family, price, start, end) in enumerate(plain):
        attributes = [Attribute(n, t) for n, values in texts if (t := _texts(values[row]))]
        for name, values in numbers:
            number = _number(values[row], name, row, report)
            if number is not None:
                attributes.append(Attribute(name, numbers=(number,)))
        yield Item(
            id=_text(item_id),
            title=_text(title),
            description=_text(description),
            attributes=tuple(attributes),
            family_id=_text(family),
            price=_number(price, "price", row, report),
            available_from=_moment(start, "available_from", row, report),
            available_until=_moment(end, "available_until", row, report),
        )


def _texts(value: object) -> tuple[str, ...]:
    """The texts of an attribute: a list has several, which files of text hold as JSON."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):  # a text may happen to begin so
            value = json.loads(value)
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for v in values if (text := _text(v))))


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of whole numbers with gaps is read as floats
    return str(value).strip()


def _number(value: object, name: str, row: int, report: TableReport) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (name == "price" and number < 0):
        report.note(f"value dropped: {name} is no number of its kind", row)
        return None
    return number


def _moment(value: object, name: str, row: int, report: TableReport) -> datetime | None:
    if value is None or value == "":
        return None
    micros = parse_time(value)
    if micros == _NO_TIME:
        report.note(f"value dropped: {name} is no time", row)
        return None
    return datetime.fromtimestamp(micros / 1e6, UTC)


def parse_time(value: object) -> int:
    """Microseconds since 1970 of a datetime, date, ISO 8601 text or number of seconds.

    What is none of these is the lowest int64.
    """
    try:
        if isinstance(value, str):
            text = value.strip()
            value = float(text) if text.replace(".", "", 1).isdigit() else datetime.fromisoformat(text)
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if isinstance(value, datetime):
            aware = value if value.tzinfo else value.replace(tzinfo=UTC)
            return round(aware.timestamp() * 1e6)
        return round(float(value) * 1e6)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return _NO_TIME


def _events(directory: Path, settings: ShopSettings, until: datetime | None) -> tuple[Events, TableReport]:
    columns = settings.events
    path = tables.find(directory, "events", columns.file)
    table, bad = tables.read(path)
    _require(table, path, columns.user_id, columns.item_id, columns.time)
    report = TableReport(path.name, read=table.num_rows + bad)
    if bad:
        report.note("unreadable line", 0, bad)
    user, user_ids = _codes(table, columns.user_id)
    item, item_ids = _codes(table, columns.item_id)
    session, session_ids = _codes(table, columns.session_id)
    channel, channel_names = _codes(table, columns.channel)
    time = _times(table, columns.time)
    kind = _kinds(table, columns, list(settings.event_types))
    price = _floats(table, columns.price)
    position = np.nan_to_num(_floats(table, columns.position)).astype(np.int32)
    checks = (
        ("no user or a bad one", _bad_ids(user, user_ids)),
        ("no item or a bad one", _bad_ids(item, item_ids)),
        ("unknown event type", kind < 0),
        ("no time that can be read", time == _NO_TIME),
    )
    keep = np.ones(table.num_rows, bool)
    for reason, failed in checks:
        rows = np.flatnonzero(failed & keep)
        for row in rows[:_EXAMPLES]:
            report.note(reason, int(row))
        report.reasons[reason] += max(0, len(rows) - _EXAMPLES)
        keep &= ~failed
    event_ids = _event_ids(table, columns)
    _, first = np.unique(event_ids, return_index=True)
    again = np.ones(table.num_rows, bool)
    again[first] = False
    report.reasons["an event_id that was there before"] += int((again & keep).sum())
    keep &= ~again
    if until is not None:
        keep &= time < until.timestamp() * 1e6
    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(time[rows], kind="stable")]
    report.kept = len(rows)
    report.reasons += Counter()  # drops the reasons of no row
    if not len(rows):
        raise FailedPrecondition(f"{path.name} has no usable row: {dict(report.reasons)}")
    numbers = np.array([item_number(i) for i in item_ids], np.int64)
    return (
        Events(
            event_ids[rows],
            user[rows],
            user_ids,
            item[rows],
            item_ids,
            numbers[item[rows]],
            kind[rows],
            time[rows],
            price[rows],
            position[rows],
            session[rows],
            session_ids,
            channel[rows],
            channel_names,
        ),
        report,
    )


def _codes(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """Codes int32 (N,), -1 for null, and the texts they stand for."""
    if name not in table.column_names:
        return np.full(table.num_rows, -1, np.int32), []
    encoded = pc.dictionary_encode(table[name].combine_chunks())
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int32)
    return codes, [_text(value) for value in encoded.dictionary.to_pylist()]


def _bad_ids(codes: np.ndarray, texts: list[str]) -> np.ndarray:
    bad = np.array([bool(identifier_problem(text)) for text in texts] + [True])
    return np.asarray(bad[codes])


def _times(table: pa.Table, name: str) -> np.ndarray:
    encoded = pc.dictionary_encode(table[name].combine_chunks())
    parsed = np.array([parse_time(v) for v in encoded.dictionary.to_pylist()] + [_NO_TIME], np.int64)
    return np.asarray(parsed[pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)])


def _kinds(table: pa.Table, columns: EventColumns, types: list[str]) -> np.ndarray:
    codes, texts = _codes(table, columns.type)
    default = types.index(columns.default_type)
    kinds = [types.index(t) if t in types else -1 for t in texts] + [default]
    return np.asarray(np.array(kinds, np.int16)[codes])


def _floats(table: pa.Table, name: str) -> np.ndarray:
    """Float64 (N,), NaN for what is missing, no number, or negative."""
    codes, texts = _codes(table, name)
    values = [math.nan]
    for text in reversed(texts):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        values.append(value if 0 <= value < math.inf else math.nan)
    return np.asarray(np.array(values[::-1])[codes])


def _event_ids(table: pa.Table, columns: EventColumns) -> np.ndarray:
    """The ids; where a row has none, one made of its content and, among equal rows, of their count."""
    names = (columns.user_id, columns.item_id, columns.session_id, columns.type, columns.time, columns.price)
    stated = [_text(v) for v in _column(table, columns.event_id)]
    content = zip(*([_text(v) for v in _column(table, name)] for name in names), strict=True)
    counted: Counter[tuple[str, ...]] = Counter()
    ids = []
    for event_id, row in zip(stated, content, strict=True):
        counted[row] += 1
        digest = hashlib.blake2b(repr((row, counted[row])).encode(), digest_size=12)
        ids.append(event_id or f"import:{digest.hexdigest()}")
    return np.array(ids, object)
