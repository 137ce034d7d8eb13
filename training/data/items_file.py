"""Read the items file into items; too long texts are cut, invalid rows and values dropped and counted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from services.catalog import items as catalog
from services.catalog.items import Attribute, Item
from services.core.errors import InvalidArgument
from training.data.column_match import similar_columns
from training.data.config import ItemColumns
from training.data.images import ShopImages
from training.data.shop_tables import ShopTable
from training.data.values.times import NO_TIME, to_datetime
from training.data.values.values import cut_to_bytes, to_text, to_texts

REPEATED = "note: a repeated id: the first row is used"
CONFLICTING = "note: a repeated id with another title or price: the first row is used"
_Reader = Callable[[int], object]


def read_items(shop_table: ShopTable, images: ShopImages) -> list[Item]:
    """The items of a table, in its order; the report counts what is dropped."""
    rows = _Rows(shop_table)
    images.assign(*rows.images())
    items: list[Item] = []
    by_id, first_of = dict[str, Item](), dict[str, Item]()
    advice = _title_advice(shop_table)
    for row in range(shop_table.size):
        item = rows.item(row)
        if item.family_id and not (item.title or item.description):
            item = rows.as_family(item, first_of.get(item.family_id), row)
        if first := by_id.get(item.id):
            is_equal = (first.title, first.price) == (item.title, item.price)
            rows.add("note", REPEATED if is_equal else CONFLICTING, row, item.id)
            continue
        try:
            # An item may have an image alone.
            catalog.validate(replace(item, image_hash=b"there is one") if item.id in images else item)
        except InvalidArgument as error:
            rows.add("row", str(error), row, item.id or item.title, advice)
            continue
        by_id[item.id] = item
        first_of.setdefault(item.family_id, item)
        items.append(item)
    shop_table.report.rows_used = len(items)
    return items


def _title_advice(shop_table: ShopTable) -> str:
    """Advice on the title column, for items without a title."""
    if "title" in shop_table.match.fields:
        return ""
    candidates = similar_columns("title", "title", shop_table.match.unused)
    return (
        f'no title column: if {candidates[0]!r} is the title, write title = "{candidates[0]}" under [items]'
        if candidates
        else ""
    )


@dataclass
class _Texts:
    """A text attribute: its name among attributes, its cells, and the separator of the texts in one cell."""

    name: str
    cells: list[object]
    separator: str


class _Rows:
    """The rows of the table as items, before they are checked."""

    def __init__(self, shop_table: ShopTable) -> None:
        assert isinstance(shop_table.columns, ItemColumns)  # noqa: S101 - the items' table
        self._shop_table, self._report = shop_table, shop_table.report
        columns: ItemColumns = shop_table.columns
        names = [(name, name) for name in columns.text_attributes]
        names += [(f"_{name}", name) for name in columns.filter_only]
        self._texts = [
            _Texts(attribute, self._cells(name, attribute=True), columns.separators.get(name, ""))
            for attribute, name in names
        ]
        number_columns = (
            (name, shop_table.amounts(name, attribute=True)) for name in columns.number_attributes
        )
        self._numbers = [(name, values) for name, values in number_columns if values is not None]
        self._plain = {name: self._cells(name) for name in ("id", "title", "description", "family_id")}
        self._price = self._prices()
        self._times = {name: self._read_times(name) for name in ("available_from", "available_until")}

    def item(self, row: int) -> Item:
        """The item of a row."""
        return Item(
            id=to_text(self._plain["id"][row]),
            title=self._cut("title", row, catalog.MAX_TITLE_BYTES),
            description=self._cut("description", row, catalog.MAX_DESCRIPTION_BYTES),
            attributes=self._attributes(row),
            family_id=to_text(self._plain["family_id"][row]),
            price=None if np.isnan(self._price[row]) else float(self._price[row]),
            available_from=self._time("available_from", row),
            available_until=self._time("available_until", row),
        )

    def images(self) -> list[list[Any]]:
        """The ids of all rows and, of each column that names images, its cells."""
        ids = [to_text(value) for value in self._plain["id"]]
        names = [name for name in ("image", "image_url") if name in self._shop_table.match.fields]
        return [ids, *(self._cells(name) for name in names)]

    def as_family(self, item: Item, first: Item | None, row: int) -> Item:
        """A variant without title and description, with those of the first row of its family."""
        if first is None:
            return item
        self.add("note", "note: title and description are those of the first row of the family", row, item.id)
        return replace(item, title=first.title, description=first.description)

    def add(self, kind: str, reason: str, row: int, sample: object, remedy: str = "") -> None:
        """Count a row under a reason."""
        place = self._shop_table.table.place(row)
        self._report.add(kind, reason, 1, [place], [sample], remedy)  # type: ignore[arg-type]

    def _cells(self, field: str, *, attribute: bool = False) -> list[object]:
        cells = self._shop_table.cells(field, attribute)
        return [None] * self._shop_table.size if cells is None else list(cells.to_pylist())

    def _prices(self) -> np.ndarray:
        price, shop_table = self._shop_table.amounts("price"), self._shop_table
        if price is None:
            return np.full(shop_table.size, np.nan)
        column = shop_table.match.fields["price"]
        with np.errstate(invalid="ignore"):
            is_invalid = (price < 0) | (price > catalog.MAX_PRICE)
            free = np.flatnonzero(price == 0)
        reason = f"value dropped: price {catalog.PRICE_PROBLEM}"
        self._report.add_rows(
            "value", reason, shop_table.table, np.flatnonzero(is_invalid), column, field_name="price"
        )
        self._report.add_rows("note", "note: price is 0", shop_table.table, free)
        return np.where(is_invalid, np.nan, price)

    def _read_times(self, field: str) -> np.ndarray:
        shop_table = self._shop_table
        times = shop_table.times(field)
        if times is None:
            return np.full(shop_table.size, NO_TIME)
        column = shop_table.match.fields[field]
        invalid = shop_table.has_value(field) & (times.micros == NO_TIME)
        for reason, rows, remedy in shop_table.time_losses(field, times, invalid):
            shop_table.report.add_rows(
                "value",
                f"value dropped: {reason}",
                shop_table.table,
                np.flatnonzero(rows),
                column,
                remedy,
                field,
            )
        return times.micros

    def _time(self, field: str, row: int) -> datetime | None:
        micros = int(self._times[field][row])
        try:
            return None if micros == NO_TIME else to_datetime(micros)
        except OverflowError:
            self.add("value", f"value dropped: {field} is outside the years 1 to 9999", row, micros)
            return None

    def _cut(self, field: str, row: int, limit: int) -> str:
        text = to_text(self._plain[field][row])
        if len(text.encode()) <= limit:
            return text
        self.add("note", f"note: {field} is cut to {limit:,} bytes", row, text)
        return cut_to_bytes(text, limit)

    def _attributes(self, row: int) -> tuple[Attribute, ...]:
        attributes = []
        for attribute in self._texts:
            if texts := self._texts_within_limits(attribute, row):
                attributes.append(Attribute(attribute.name, texts))
        for name, values in self._numbers:
            if np.isfinite(values[row]):
                attributes.append(Attribute(name, numbers=(float(values[row]),)))
        return tuple(attributes)

    def _texts_within_limits(self, attribute: _Texts, row: int) -> tuple[str, ...]:
        """The texts of an attribute, cut to the limits of the contract."""
        texts = to_texts(attribute.cells[row], attribute.separator)
        max_length, max_texts = catalog.MAX_ATTRIBUTE_TEXT_LENGTH, catalog.MAX_ATTRIBUTE_VALUES
        if any(len(text) > max_length for text in texts):
            mark = next((mark for mark in ("|", ";", ",") if mark in str(attribute.cells[row])), "")
            name = attribute.name.removeprefix("_")
            advice = f'if it holds several, write {name} = "{mark}" under [items.separators]' if mark else ""
            reason = f"note: {name}: a text is cut to {max_length} characters"
            self.add("note", reason, row, attribute.cells[row], "" if attribute.separator else advice)
            texts = tuple(dict.fromkeys(text[:max_length].strip() for text in texts))
        if len(texts) > max_texts:
            self.add(
                "note", f"note: {attribute.name}: only the first {max_texts} texts are used", row, len(texts)
            )
        return texts[:max_texts]
