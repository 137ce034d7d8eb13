"""Read the events file into columns; unusable rows are dropped and counted by reason."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow.compute as pc

from services.catalog.items import identifier_problem, item_hash
from training.data.config import ShopConfig
from training.data.event_ids import event_ids, without_repeats
from training.data.events import Events
from training.data.shop_tables import ShopTable, format_counts
from training.data.values import times
from training.data.values.item_ids import reconcile
from training.data.values.values import to_text

UNKNOWN_TYPE = "unknown event type"
NO_TYPE = "no event type"
UNKNOWN_ITEM = "note: the items file does not have this item"
OUT_OF_RANGE = "time before 1990 or after tomorrow"
_CANCELLATION = re.compile(r"[Cc]\d+")
_MIN_NUMBER_SHARE = 0.5
_MAX_SUGGESTIONS = 10
_NO_TYPE_CODE = -2
# Suggested weights of event types by a part of their name; the first match counts.
_WEIGHTS = (
    *(("remove", 0.0), ("refund", 0.0), ("return", 0.0), ("cancel", 0.0)),
    *(("impress", 0.0), ("click", 0.3), ("cart", 0.5), ("basket", 0.5), ("fav", 0.4)),
    *(("purch", 1.0), ("buy", 1.0), ("transact", 1.0), ("order", 1.0)),
)
_DEFAULT_WEIGHT = 0.2


@dataclass(frozen=True)
class _Codes:
    """Codes int32 (N,), -1 for nothing, of different texts."""

    codes: np.ndarray
    texts: list[str]

    def bad(self) -> np.ndarray:
        """Which rows have no text that can be an id: bool (N,)."""
        return np.asarray(np.array([bool(identifier_problem(t)) for t in self.texts] + [True])[self.codes])

    def renamed(self, names: Sequence[str]) -> "_Codes":
        """The codes under new texts, one per old text; equal texts share a code."""
        code_of = {name: code for code, name in enumerate(dict.fromkeys(names))}
        new_codes = np.array([*(code_of[name] for name in names), -1], np.int32)
        return _Codes(new_codes[self.codes], list(code_of))

    def rows(self) -> np.ndarray:
        """How many rows each text has, int64 (T,)."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.texts))


def read_events(
    shop_table: ShopTable, settings: ShopConfig, until: datetime | None, item_ids: Collection[str]
) -> Events:
    """The events of a table before `until`, ordered by time; the report counts the dropped rows."""
    report, fields = shop_table.report, shop_table.match.fields
    columns = settings.events
    user, item = (
        _codes(shop_table, "user_id"),
        _reconcile_items(shop_table, _codes(shop_table, "item_id"), item_ids),
    )
    session, channel = _codes(shop_table, "session_id"), _codes(shop_table, "channel")
    kind, unknown = _event_types(shop_table, settings)
    untyped = kind == _NO_TYPE_CODE
    parsed_times = shop_table.times("time")
    assert parsed_times is not None  # noqa: S101 - a required column
    time, has_time = parsed_times.micros, shop_table.has_value("time")
    is_guest = np.isin(user.codes, [code for code, text in enumerate(user.texts) if text in columns.guests])
    out_of_range = times.out_of_range(time, datetime.now(UTC))
    tomorrow = f"today is {datetime.now(UTC).date()} by this machine's clock"
    checks = [
        ("no user id or an invalid one", user.bad(), "user_id", ""),
        ("note: a user listed in events.guests", is_guest, "user_id", ""),
        ("no item id or an invalid one", item.bad(), "item_id", ""),
        (UNKNOWN_TYPE, (kind < 0) & ~untyped, "type", unknown),
        (NO_TYPE, untyped, "", _default_type_advice(settings)),
        *(
            (reason, rows, "time", remedy)
            for reason, rows, remedy in shop_table.time_losses("time", parsed_times, has_time)
        ),
        ("time: no value", (time == times.NO_TIME) & ~has_time, "time", ""),
        (OUT_OF_RANGE, out_of_range, "time", tomorrow),
    ]
    price = shop_table.amounts("price")
    is_return = _returns(shop_table, settings, kind, session, price)
    checks.append(("note: a cancellation or return, not a purchase", is_return, "quantity", ""))
    keep = np.ones(shop_table.size, bool)
    for reason, failed, field, remedy in checks:
        rows = np.flatnonzero(failed & keep)
        entry_kind = "note" if reason.startswith("note") else "row"
        report.add_rows(entry_kind, reason, shop_table.table, rows, fields.get(field, ""), remedy)  # type: ignore[arg-type]
        keep &= ~failed
    prices, position = _prices(shop_table, price, is_return), shop_table.amounts("position")
    if until is not None:
        keep &= time < until.timestamp() * 1e6
    ids = event_ids(shop_table)
    rows = without_repeats(shop_table, np.flatnonzero(keep), ids, item.codes, kind)
    rows = rows[np.argsort(time[rows], kind="stable")]
    report.rows_used = len(rows)
    _report_unknown_items(shop_table, item, rows, item_ids)
    hashes = np.array([item_hash(i) for i in item.texts], np.int64)
    positions = np.zeros(shop_table.size) if position is None else np.nan_to_num(position.clip(0, 2**31 - 1))
    return Events(
        ids[rows],
        user.codes[rows],
        user.texts,
        item.codes[rows],
        item.texts,
        hashes[item.codes[rows]],
        kind[rows],
        time[rows],
        prices[rows],
        positions[rows].astype(np.int32),
        session.codes[rows],
        session.texts,
        channel.codes[rows],
        channel.texts,
    )


def _codes(shop_table: ShopTable, field: str) -> _Codes:
    cells = shop_table.cells(field)
    if cells is None:
        return _Codes(np.full(shop_table.size, -1, np.int32), [])
    encoded = pc.dictionary_encode(cells.combine_chunks())
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int32)
    texts = [to_text(value) for value in encoded.dictionary.to_pylist()]
    return _Codes(codes, texts).renamed(texts)  # two that differ in spaces around them are one


def _reconcile_items(shop_table: ShopTable, item: _Codes, item_ids: Collection[str]) -> _Codes:
    """Replace the item ids of events by the ids that the items file uses for the same items."""
    id_match = reconcile(item.texts, item.rows(), item_ids)
    for how, count in id_match.how.items():
        shop_table.report.warnings.append(
            f"item_id: {count:,} rows match an item only if {how} count as the same id; they are matched. "
            "Use the same ids in both files and in calls"
        )
    return item.renamed([id_match.item_of.get(text, text) for text in item.texts])


def _report_unknown_items(
    shop_table: ShopTable, item: _Codes, rows: np.ndarray, item_ids: Collection[str]
) -> None:
    is_unknown = np.array([text not in item_ids for text in item.texts] + [False])
    unknown_rows = rows[is_unknown[item.codes[rows]]]
    items = len(np.unique(item.codes[unknown_rows]))
    remedy = f"{items:,} different items" if items else ""
    shop_table.report.add_rows(
        "note", UNKNOWN_ITEM, shop_table.table, unknown_rows, shop_table.match.fields["item_id"], remedy
    )


def _event_types(shop_table: ShopTable, settings: ShopConfig) -> tuple[np.ndarray, str]:
    """The index of each row's event type, int16 (N,), and advice on unknown types.

    The index is -1 for an unknown type, and for a row without a type that of the default type or
    `_NO_TYPE_CODE`.
    """
    types = list(settings.event_types)
    has_column = bool(shop_table.match.fields.get("type"))
    untyped = _NO_TYPE_CODE
    if settings.events.default_type or not has_column:
        untyped = types.index(settings.default_type)
    type_codes = _codes(shop_table, "type")
    alike = {name.casefold(): name for name in types}
    kinds, unknown = [], dict[str, int]()
    for text, count in zip(type_codes.texts, type_codes.rows().tolist(), strict=True):
        name = text if text in types else alike.get(text.casefold(), "")
        if name and name != text:
            shop_table.report.notes.append(f"type: {text!r} ({count:,} rows) is read as {name!r}")
        if text and not name:
            unknown[text] = count
        kinds.append(types.index(name) if name else -1 if text else untyped)
    if has_column:
        totals = dict(zip(type_codes.texts, type_codes.rows().tolist(), strict=True))
        shop_table.report.formats["type"] = format_counts(totals)
    remedy = ""
    if unknown:
        frequent = sorted(unknown, key=lambda name: -unknown[name])[:_MAX_SUGGESTIONS]
        weights = {name: _weight(name) for name in frequent} | settings.event_types
        lines = ", ".join(f"{_key(name)} = {weight}" for name, weight in weights.items())
        remedy = f"unknown types: {format_counts(unknown)}; known types: {', '.join(types)}; write {lines} "
        remedy += "under [event_types]"
    return np.array([*kinds, untyped], np.int16)[type_codes.codes], remedy


def _default_type_advice(settings: ShopConfig) -> str:
    default = f'default_type = "{settings.default_type}"'
    return f"if all such events have one type, write for example {default} under [events]"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'


def _weight(name: str) -> float:
    """A suggested weight for an event type, by its name."""
    text = name.casefold()
    return next((weight for part, weight in _WEIGHTS if part in text), _DEFAULT_WEIGHT)


def _returns(
    shop_table: ShopTable, settings: ShopConfig, kind: np.ndarray, session: _Codes, price: np.ndarray | None
) -> np.ndarray:
    """Which purchase rows are cancellations or returns: bool (N,); `price` is float64 (N,)."""
    types = list(settings.event_types)
    is_purchase = np.isin(kind, [types.index(name) for name in settings.targets])
    is_return = np.zeros(shop_table.size, bool)
    quantity = shop_table.amounts("quantity")
    with np.errstate(invalid="ignore"):
        if quantity is not None:
            is_return |= quantity <= 0
        if price is not None:
            is_return |= price < 0
    counts = session.rows()
    is_cancellation = np.array([bool(_CANCELLATION.fullmatch(text)) for text in session.texts], bool)
    is_number = np.array([text.isdigit() for text in session.texts], bool)
    if is_cancellation.any() and counts[is_number].sum() >= _MIN_NUMBER_SHARE * counts.sum():
        is_return |= np.append(is_cancellation, False)[session.codes]
    return is_purchase & is_return


def _prices(shop_table: ShopTable, price: np.ndarray | None, is_return: np.ndarray) -> np.ndarray:
    """The prices, float64 (N,), without negative ones; the rows in `is_return` are counted elsewhere."""
    if price is None:
        return np.full(shop_table.size, np.nan)
    with np.errstate(invalid="ignore"):
        is_negative = (price < 0) & ~is_return
    column = shop_table.match.fields["price"]
    reason = "value dropped: price is negative"
    shop_table.report.add_rows(
        "value", reason, shop_table.table, np.flatnonzero(is_negative), column, field_name="price"
    )
    return np.where(is_negative, np.nan, price)
