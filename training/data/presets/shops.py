"""Product exports of shop systems and feeds: Shopify, WooCommerce, Magento, Google Merchant Center.

A product that is a draft, switched off or out of stock stays an item, because its past teaches; it gets
`available_until`, the time the file was written, so that it is not recommended. The next export without that
makes it available again.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from training.data.presets.columns import attribute_name, first, parts_of, rebuild, texts
from training.data.presets.preset import Preset, TableSource
from training.data.readers.reader import Note, Table

_OFF = frozenset({"0", "-1", "false", "no", "draft", "archived", "private", "disabled"})
_SOLD_OUT = frozenset({"out_of_stock", "out of stock", "outofstock"})
_EXAMPLES = 5


def _until(table: Table, rows: Sequence[int], sellable: Sequence[bool]) -> tuple[list[str], list[Note]]:
    """The column `available_until`, and a note of the items that are not recommended because of it."""
    file_time = datetime.fromtimestamp(max(path.stat().st_mtime for path in table.paths), UTC).isoformat()
    off = [row for row, yes in zip(rows, sellable, strict=True) if not yes]
    text = f"switched off or out of stock: not recommended after {file_time}, when the file was written"
    return ["" if yes else file_time for yes in sellable], [_note(table, text, off)] if off else []


def _note(table: Table, text: str, rows: Sequence[int]) -> Note:
    return Note("guess", text, len(rows), tuple(int(table.lines[row]) for row in rows[:_EXAMPLES]))


def _several(cells: Iterable[list[str]]) -> list[str]:
    """Several values of an attribute in a cell, as JSON."""
    return [json.dumps(values, ensure_ascii=False) if values else "" for values in cells]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _fill_from_group(groups: Sequence[str], values: Sequence[str]) -> list[str]:
    """The values; where one is empty, the first of its group that is not."""
    first_values: dict[str, str] = {}
    for group, value in zip(groups, values, strict=True):
        if value:
            first_values.setdefault(group, value)
    return [value or first_values.get(group, "") for group, value in zip(groups, values, strict=True)]


def _by_name(cells: Sequence[dict[str, str]], prefix: str = "") -> dict[str, list[str]]:
    """Columns of attributes that each row names for itself."""
    names = dict.fromkeys(name for row in cells for name in row)
    return {prefix + name: [row.get(name, "") for row in cells] for name in names}


def _shopify(table: Table) -> Table:
    """Read https://help.shopify.com/en/manual/products/import-export: a row is a variant, or a further image.

    The first row of a handle describes the product; rows of further variants leave its columns empty.
    """
    handles, skus = texts(table, "Handle"), texts(table, "Variant SKU")
    prices, options = texts(table, "Variant Price"), _shopify_options(table, handles)

    def product(*names: str) -> list[str]:
        return _fill_from_group(handles, first(table, *names))

    rows = [
        row for row, handle in enumerate(handles) if handle and (skus[row] or prices[row] or options[row])
    ]
    status, published = product("Status"), product("Published")
    stock, policy = texts(table, "Variant Inventory Qty"), texts(table, "Variant Inventory Policy")
    tracked = texts(table, "Variant Inventory Tracker")

    def sellable(row: int) -> bool:
        quantity = _number(stock[row])
        sold_out = tracked[row] and policy[row] == "deny" and quantity is not None and quantity <= 0
        return not sold_out and status[row].lower() not in _OFF and published[row].lower() not in _OFF

    until, notes = _until(table, rows, [sellable(row) for row in rows])
    if without := [row for row in rows if not skus[row]]:
        notes.append(_note(table, "a variant without SKU has its handle and options as id", without))
    columns = {
        "title": product("Title"),
        "description": product("Body (HTML)"),
        "family_id": handles,
        "price": prices,
        "image_url": [
            a or b for a, b in zip(texts(table, "Variant Image"), product("Image Src"), strict=True)
        ],
        "vendor": product("Vendor"),
        "product_type": product("Type", "Custom Product Type", "Standardized Product Type"),
        "tags": _several(parts_of(tags, ",") for tags in product("Tags")),
    }
    ids = [skus[row] or "-".join([handles[row], *options[row].values()]) for row in rows]
    cells = {name: [values[row] for row in rows] for name, values in columns.items()}
    attributes = _by_name([options[row] for row in rows], "option_")
    return rebuild(table, rows, {"id": ids, "available_until": until, **cells, **attributes}, notes)


def _shopify_options(table: Table, handles: Sequence[str]) -> list[dict[str, str]]:
    """The options of each row's variant by name, such as {"size": "L"}."""
    options = [dict[str, str]() for _ in handles]
    for number in ("1", "2", "3"):
        names = _fill_from_group(handles, texts(table, f"Option{number} Name"))
        for row, value in enumerate(texts(table, f"Option{number} Value")):
            # A product without options has one of this name and value.
            if value and (names[row], value) != ("Title", "Default Title"):
                options[row][attribute_name(names[row]) or number] = value
    return options


def _woocommerce(table: Table) -> Table:
    """Read https://woocommerce.com/document/product-csv-importer-exporter: variations name their parent."""
    kinds, ids, skus = texts(table, "Type"), texts(table, "ID"), texts(table, "SKU")
    keys = [sku or item_id for sku, item_id in zip(skus, ids, strict=True)]
    row_of = {f"id:{item_id}": row for row, item_id in enumerate(ids) if item_id}
    row_of |= {sku: row for row, sku in enumerate(skus) if sku}
    parents = [row_of.get(parent) for parent in texts(table, "Parent")]

    def inherited(*names: str) -> list[str]:
        values = first(table, *names)
        return [v or (values[p] if p is not None else "") for v, p in zip(values, parents, strict=True)]

    # Of a product with variations only these are sold, and named by orders.
    has_variations = {parent for parent in parents if parent is not None}
    rows = [row for row, kind in enumerate(kinds) if row not in has_variations and kind != "grouped"]
    stock, published = texts(table, "In stock?"), texts(table, "Published")
    switched_on = [
        published[row] not in _OFF and (parents[row] is None or published[parents[row] or 0] not in _OFF)
        for row in range(len(kinds))
    ]
    sellable = [switched_on[row] and stock[row].lower() not in _OFF for row in rows]
    until, notes = _until(table, rows, sellable)
    if grouped := [row for row, kind in enumerate(kinds) if kind == "grouped"]:
        notes.append(_note(table, "grouped products are no items of their own", grouped))
    sale, regular = texts(table, "Sale price"), inherited("Regular price")
    columns = {
        "id": keys,
        "title": inherited("Name"),
        "description": inherited("Description", "Short description"),
        "family_id": [keys[row if parent is None else parent] for row, parent in enumerate(parents)],
        "price": [a or b for a, b in zip(sale, regular, strict=True)],
        "image_url": [images.partition(",")[0].strip() for images in inherited("Images")],
        "category": _several(parts_of(value, ",") for value in inherited("Categories")),
        "tags": _several(parts_of(value, ",") for value in inherited("Tags")),
    }
    attributes = _woocommerce_attributes(table)
    cells = {name: [values[row] for row in rows] for name, values in columns.items()}
    attribute_columns = _by_name([attributes[row] for row in rows], "attribute_")
    return rebuild(table, rows, {**cells, "available_until": until, **attribute_columns}, notes)


def _woocommerce_attributes(table: Table) -> list[dict[str, str]]:
    attributes = [dict[str, str]() for _ in range(table.rows.num_rows)]
    for column in table.rows.column_names:
        if match := re.fullmatch(r"Attribute (\d+) name", column):
            values = texts(table, f"Attribute {match[1]} value(s)")
            for row, name in enumerate(texts(table, column)):
                if name and values[row]:
                    attributes[row][attribute_name(name)] = _several([parts_of(values[row], ",")])[0]
    return attributes


def _magento(table: Table) -> Table:
    """Read Magento Open Source 2's product export: a configurable product lists its variants by SKU."""
    skus, kinds = texts(table, "sku"), texts(table, "product_type")
    view = texts(table, "store_view_code")
    family: dict[str, int] = {}
    for row, variations in enumerate(texts(table, "configurable_variations")):
        for sku in re.findall(r"(?:^|\|)sku=([^,|]+)", variations):
            family.setdefault(sku, row)
    parents = [family.get(sku) for sku in skus]

    def inherited(*names: str) -> list[str]:
        values = first(table, *names)
        return [v or (values[p] if p is not None else "") for v, p in zip(values, parents, strict=True)]

    sold = [row for row, sku in enumerate(skus) if sku and not view[row]]
    rows = [row for row in sold if kinds[row] not in ("configurable", "grouped", "bundle")]
    online, stock = texts(table, "product_online"), texts(table, "is_in_stock")
    # product_online is 1 for enabled and 2 for disabled.
    sellable = [online[row] != "2" and online[row] not in _OFF and stock[row] not in _OFF for row in rows]
    until, notes = _until(table, rows, sellable)
    if views := [row for row, code in enumerate(view) if code]:
        notes.append(_note(table, "texts of further store views are not read", views))
    if composite := sorted(set(sold) - set(rows)):
        notes.append(
            _note(table, "configurable, grouped and bundle products are no items of their own", composite)
        )
    special, price = texts(table, "special_price"), texts(table, "price")
    columns = {
        "id": skus,
        "title": inherited("name"),
        "description": inherited("description", "short_description"),
        "family_id": [skus[row if parent is None else parent] for row, parent in enumerate(parents)],
        "price": [a or b for a, b in zip(special, price, strict=True)],
        "image": inherited("base_image"),
        "category": _several(parts_of(value, ",") for value in inherited("categories")),
    }
    cells = {name: [values[row] for row in rows] for name, values in columns.items()}
    more = [_pairs(value) for value in texts(table, "additional_attributes")]
    attribute_columns = _by_name([more[row] for row in rows], "attribute_")
    return rebuild(table, rows, {**cells, "available_until": until, **attribute_columns}, notes)


def _pairs(text: str) -> dict[str, str]:
    """The attributes in color=Red,size=M; a comma within a value is part of it."""
    pairs = re.findall(r"(?:^|,)([A-Za-z_][\w]*)=(.*?)(?=,[A-Za-z_]\w*=|$)", text)
    return {attribute_name(name): value for name, value in pairs if value}


def _merchant_name(column: str) -> str:
    return column.removeprefix("g:").replace(" ", "_")


def _merchant(table: Table) -> Table:
    """Read https://support.google.com/merchants/answer/7052112, with or without the prefix "g:"."""
    names = {_merchant_name(name): name for name in table.rows.column_names}

    def column(*aliases: str) -> list[str]:
        return first(table, *(names[name] for name in aliases if name in names))

    rows = [row for row, item_id in enumerate(column("id")) if item_id]
    available = column("availability")
    until, notes = _until(table, rows, [available[row].lower() not in _SOLD_OUT for row in rows])
    sale = column("sale_price")
    columns = {
        "id": column("id"),
        "title": column("title"),
        "description": column("description"),
        "family_id": column("item_group_id"),
        "price": [a or b for a, b in zip(sale, column("price"), strict=True)],
        "image_url": column("image_link"),
        **{name: column(name) for name in ("brand", "color", "size", "material", "gender", "age_group")},
        "category": [
            path.rpartition(">")[2].strip() for path in column("product_type", "google_product_category")
        ],
    }
    cells = {name: [values[row] for row in rows] for name, values in columns.items()}
    return rebuild(table, rows, {**cells, "available_until": until}, notes)


SHOPIFY = Preset(
    "shopify",
    "Shopify's product export, a CSV",
    frozenset({"Handle", "Variant SKU", "Variant Price"}),
    [TableSource(("products_export*", "products*", "items.*"), _shopify, required=(("Handle",), ("Title",)))],
)
WOOCOMMERCE = Preset(
    "woocommerce",
    "WooCommerce's product export, a CSV",
    frozenset({"Type", "SKU", "Name", "Regular price"}),
    [
        TableSource(
            ("wc-product-export*", "products*", "items.*"),
            _woocommerce,
            required=(("Name",), ("SKU", "ID"), ("Type",)),
        )
    ],
)
MAGENTO = Preset(
    "magento",
    "the product export of Magento 2 and Adobe Commerce, a CSV",
    frozenset({"sku", "product_type", "product_online"}),
    [
        TableSource(
            ("export_catalog_product*", "catalog_product*", "products*", "items.*"),
            _magento,
            required=(("sku",), ("name",), ("product_type",)),
        )
    ],
)
MERCHANT = Preset(
    "merchant",
    "a product feed of Google Merchant Center",
    frozenset({"id", "image_link", "availability"}),
    [
        TableSource(
            ("feed*", "products*", "items.*"),
            _merchant,
            required=(("id",), ("title",)),
            spelling=_merchant_name,
        )
    ],
)
