"""Logs of behavior: Google Analytics 4, and the data sets that people try a recommender on first."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.data.presets.columns import map_values, rebuild, rename_columns, texts, with_column
from training.data.presets.preset import Preset, Rewrite, TableSource
from training.data.readers.reader import Dialect, Note, Table

_GA4_TYPES = {
    "view_item_list": "impression",
    "view_promotion": "impression",
    "select_item": "click",
    "select_promotion": "click",
    "view_item": "view",
    "add_to_wishlist": "wishlist",
    "add_to_cart": "cart",
    "begin_checkout": "checkout",
    "purchase": "purchase",
}
_WEIGHTS = {"impression": 0.0, "click": 0.2, "view": 0.2, "wishlist": 0.4, "cart": 0.5, "checkout": 0.6}


def _types(*names: str) -> dict[str, float]:
    return {name: _WEIGHTS.get(name, 1.0) for name in names}


def _ga4(table: Table) -> Table:
    """Read https://support.google.com/analytics/answer/7029846: an event names the items it is about."""
    names, times = texts(table, "event_name"), texts(table, "event_timestamp")
    users, visitors, items = texts(table, "user_id"), texts(table, "user_pseudo_id"), texts(table, "items")
    sessions = [_ga4_session(value) for value in texts(table, "event_params")]
    columns: dict[str, list[object]] = {
        name: []
        for name in ("user_id", "item_id", "type", "time", "session_id", "price", "quantity", "position")
    }
    rows, other, empty, partial = list[int](), list[int](), list[int](), list[int]()
    for row, name in enumerate(names):
        if name not in _GA4_TYPES:
            other.append(row)
            continue
        parsed, others = _objects(items[row])
        if parsed and others:
            partial.append(row)
        if not parsed:
            empty.append(row)
        for item in parsed:
            rows.append(row)
            columns["user_id"].append(users[row] or visitors[row])
            columns["item_id"].append(_text(item.get("item_id")))
            columns["type"].append(_GA4_TYPES[name])
            columns["time"].append(times[row])
            columns["session_id"].append(sessions[row] and f"{visitors[row]}:{sessions[row]}")
            columns["price"].append(_text(item.get("price")))
            columns["quantity"].append(_text(item.get("quantity")) if name == "purchase" else "")
            columns["position"].append(_text(item.get("item_list_index")))
    notes = []
    if other:
        kinds = ", ".join(sorted({names[row] for row in other})[:8])
        notes.append(_loss(table, f"events about no item ({kinds})", other))
    if empty:
        notes.append(_loss(table, "events without items", empty))
    if partial:
        text = "events with values among their items that are no objects: these are left out"
        notes.append(replace(_loss(table, text, partial), kind="guess"))
    return rebuild(table, rows, columns, notes)


def _ga4_items(table: Table) -> Table:
    """The items as the events describe them, each as its last event does."""
    latest: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for row, cell in enumerate(texts(table, "items")):
        for item in _objects(cell)[0]:
            if item_id := _text(item.get("item_id")):
                latest[item_id] = row, item
    columns = {
        "id": list(latest),
        "title": [_text(item.get("item_name")) for _, item in latest.values()],
        "price": [_text(item.get("price")) for _, item in latest.values()],
        "brand": [_text(item.get("item_brand")) for _, item in latest.values()],
        "category": [_text(item.get("item_category")) for _, item in latest.values()],
    }
    return rebuild(table, [row for row, _ in latest.values()], columns)


def _ga4_session(cell: str) -> str:
    for parameter in _objects(cell)[0]:
        if parameter.get("key") == "ga_session_id":
            value = parameter.get("value")
            return _text(value.get("int_value") if isinstance(value, dict) else value)
    return ""


def _objects(cell: str) -> tuple[list[dict[str, Any]], int]:
    """The objects in a list in JSON, and how many values of it are none; no object in anything else."""
    try:
        values = json.loads(cell) if cell else []
    except ValueError:
        return [], 1
    if not isinstance(values, list):
        return [], 1
    objects = [value for value in values if isinstance(value, dict)]
    return objects, len(values) - len(objects)


def _text(value: object) -> str:
    # BigQuery writes this where the site did not say.
    return "" if value is None or value == "(not set)" else str(value)


def _loss(table: Table, text: str, rows: list[int]) -> Note:
    return Note("loss", text, len(rows), tuple(int(table.lines[row]) for row in rows[:5]))


def _events(names: Mapping[str, str], types: Mapping[str, str] = MappingProxyType({})) -> Rewrite:
    """A rewrite that renames columns, old to new, and event types."""

    def rewrite(table: Table) -> Table:
        events = rename_columns(table, names)
        return with_column(events, "type", map_values(events.rows["type"], types)) if types else events

    return rewrite


def _retailrocket_items(table: Table) -> Table:
    """The last value of each property of each item; its texts are hashed, so that a category is the title."""
    used = pc.is_in(table.rows["property"], pa.array(["categoryid", "available", _RETAILROCKET_PRICE]))
    rows = np.flatnonzero(used.to_numpy(zero_copy_only=False))
    stamps = [str(stamp) for stamp in table.rows["timestamp"].take(rows).to_pylist()]
    has_time = np.array([bool(_MILLISECONDS.fullmatch(stamp)) for stamp in stamps], bool)
    invalid_rows = rows[~has_time].tolist()
    notes = [_loss(table, "timestamp is no number of milliseconds", invalid_rows)] if invalid_rows else []
    rows = rows[has_time]
    selected = table.rows.take(pa.array(rows))
    time = np.array(
        [int(stamp) for stamp, is_valid in zip(stamps, has_time, strict=True) if is_valid], np.int64
    )
    ids, names, values = (selected[name].to_pylist() for name in ("itemid", "property", "value"))
    latest: dict[str, dict[str, str]] = {}
    row_of: dict[str, int] = {}
    for index in np.argsort(time, kind="stable").tolist():
        row_of.setdefault(ids[index], int(rows[index]))
        latest.setdefault(ids[index], {})[names[index]] = values[index]
    file_time = datetime.fromtimestamp(int(time.max()) / 1e3, UTC).isoformat() if len(time) else ""
    columns: dict[str, list[object]] = {
        "id": list(latest),
        "title": [f"category {item.get('categoryid', 'unknown')}" for item in latest.values()],
        "category": [item.get("categoryid", "") for item in latest.values()],
        "price": [_retailrocket_price(item.get(_RETAILROCKET_PRICE, "")) for item in latest.values()],
        "available_until": [file_time if item.get("available") == "0" else "" for item in latest.values()],
    }
    return rebuild(table, list(row_of.values()), columns, notes)


def _retailrocket_price(text: str | None) -> object:
    """The price, which the data set writes in thousandths behind an n."""
    digits = (text or "").removeprefix("n")
    return float(digits) / 1000 if digits.replace(".", "", 1).isdigit() else ""


def _distinct(names: Mapping[str, str], title: Callable[[Mapping[str, str]], str]) -> Rewrite:
    """A rewrite of events into their items, each as its last row says; `names` are columns, old to new."""

    def rewrite(table: Table) -> Table:
        columns = {new: texts(table, old) for old, new in names.items()}
        last = {item_id: row for row, item_id in enumerate(columns["id"]) if item_id}
        items = [{new: values[row] for new, values in columns.items()} for row in last.values()]
        cells: dict[str, list[object]] = {new: [item[new] for item in items] for new in columns}
        return rebuild(table, list(last.values()), cells | {"title": [title(item) for item in items]})

    return rewrite


def _rees46_title(item: Mapping[str, str]) -> str:
    words = [item["brand"], *item["category"].split(".")]
    return " ".join(word.replace("_", " ") for word in words if word) or f"category {item['category_id']}"


def _online_retail_name(column: str) -> str:
    return column.replace(" ", "").lower()


def _online_retail(table: Table) -> Table:
    """Invoices, in either spelling of the columns; number and quantity mark a cancellation."""
    names = {_online_retail_name(name): name for name in table.rows.column_names}
    return rename_columns(table, {names[old]: new for old, new in _ONLINE_RETAIL.items() if old in names})


def _online_retail_items(table: Table) -> Table:
    names = {_online_retail_name(name): name for name in table.rows.column_names}
    columns = {names["stockcode"]: "id", names["description"]: "name"}
    columns |= {names[old]: "price" for old in ("unitprice", "price") if old in names}
    return _distinct(columns, lambda item: item["name"])(table)


_RETAILROCKET_PRICE = "790"
_MILLISECONDS = re.compile(r"[0-9]{1,14}")
_ONLINE_RETAIL = {
    "invoiceno": "session_id",
    "invoice": "session_id",
    "stockcode": "item_id",
    "quantity": "quantity",
    "invoicedate": "time",
    "unitprice": "price",
    "price": "price",
    "customerid": "user_id",
}
_GA4_FILES = ("events_*", "ga4*", "events.*")
_GA4_COLUMNS = (("event_name",), ("event_timestamp",), ("items",), ("user_id", "user_pseudo_id"))
_REES46_FILES = ("20*", "events*")
_REES46_EVENTS = {
    "user_id": "user_id",
    "product_id": "item_id",
    "event_type": "type",
    "event_time": "time",
    "user_session": "session_id",
    "price": "price",
}
_REES46_COLUMNS = (
    *(("user_id",), ("product_id",), ("event_type",), ("event_time",)),
    ("category_id", "category_code", "brand"),
)
_REES46_ITEMS = {
    "product_id": "id",
    "category_id": "category_id",
    "category_code": "category",
    "brand": "brand",
    "price": "price",
}
_TAOBAO_FILES = ("UserBehavior*", "events*")
_TAOBAO_DIALECT = Dialect(columns=("user_id", "item_id", "category", "type", "time"))
_TAOBAO_EVENTS = {name: name for name in ("user_id", "item_id", "type", "time")}
_ONLINE_RETAIL_FILES = ("OnlineRetail*", "online_retail*", "Online Retail*", "events*")

GA4 = Preset(
    "ga4",
    "the BigQuery export of Google Analytics 4, as JSON lines or Parquet",
    frozenset({"event_name", "event_timestamp", "items"}),
    [TableSource(_GA4_FILES, _ga4_items, required=_GA4_COLUMNS)],
    [TableSource(_GA4_FILES, _ga4, required=_GA4_COLUMNS)],
    {"event_types": _types(*_GA4_TYPES.values())},
)
RETAILROCKET = Preset(
    "retailrocket",
    "the RetailRocket data set: events.csv and item_properties_part1.csv, item_properties_part2.csv",
    frozenset({"visitorid", "itemid", "event", "timestamp"}),
    [
        TableSource(
            ("item_properties*",),
            _retailrocket_items,
            required=(("timestamp",), ("itemid",), ("property",), ("value",)),
        )
    ],
    [
        TableSource(
            ("events*",),
            _events(
                {"visitorid": "user_id", "itemid": "item_id", "event": "type", "timestamp": "time"},
                {"addtocart": "cart", "transaction": "purchase"},
            ),
            required=(("visitorid",), ("itemid",), ("event",), ("timestamp",)),
        )
    ],
    {"event_types": _types("view", "cart", "purchase")},
)
REES46 = Preset(
    "rees46",
    "the behavior data sets of REES46: 2019-Oct.csv and the like",
    frozenset({"event_time", "event_type", "product_id", "user_session"}),
    [TableSource(_REES46_FILES, _distinct(_REES46_ITEMS, _rees46_title), required=_REES46_COLUMNS)],
    [TableSource(_REES46_FILES, _events(_REES46_EVENTS), required=_REES46_COLUMNS)],
    {"event_types": _types("view", "cart", "purchase") | {"remove_from_cart": 0.0}},
)
TAOBAO = Preset(
    "taobao",
    "the user behavior of Taobao, UserBehavior.csv",
    frozenset(_TAOBAO_DIALECT.columns),
    [
        TableSource(
            _TAOBAO_FILES,
            _distinct({"item_id": "id", "category": "category"}, lambda item: f"category {item['category']}"),
            _TAOBAO_DIALECT,
        )
    ],
    [
        TableSource(
            _TAOBAO_FILES,
            _events(_TAOBAO_EVENTS, {"pv": "view", "fav": "wishlist", "buy": "purchase"}),
            _TAOBAO_DIALECT,
        )
    ],
    {"event_types": _types("view", "wishlist", "cart", "purchase")},
)
ONLINE_RETAIL = Preset(
    "online-retail",
    "the Online Retail data sets of the UCI repository, as CSV or xlsx",
    frozenset({"StockCode", "InvoiceDate", "Quantity"}),
    [
        TableSource(
            _ONLINE_RETAIL_FILES,
            _online_retail_items,
            required=(("stockcode",), ("description",)),
            spelling=_online_retail_name,
        )
    ],
    [
        TableSource(
            _ONLINE_RETAIL_FILES,
            _online_retail,
            required=(("stockcode",), ("customerid",), ("invoicedate",)),
            spelling=_online_retail_name,
        )
    ],
)
