"""Exports of shop systems become items and events."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from services.core.errors import FailedPrecondition, InvalidArgument
from training.data.dataset import read_shop
from training.data.presets import PRESETS, suggestion
from training.data.presets.conversion import convert
from training.data.readers.reader import Table
from training.data.settings_file import read_settings


@pytest.mark.parametrize("name", PRESETS)
def test_the_settings_of_every_preset_are_a_shop_toml(name: str, tmp_path: Path) -> None:
    (tmp_path / "shop.toml").write_text(f'[source]\npreset = "{name}"\n')
    settings = read_settings(tmp_path / "shop.toml")
    assert settings.default_type in settings.event_types


def _write(path: Path, *rows: dict[str, str], separator: str = ",") -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, delimiter=separator, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _table(name: str, section: str, directory: Path) -> Table:
    table = PRESETS[name].read(section, directory)
    assert table is not None
    assert table.read == table.rows.num_rows + sum(n.count for n in table.notes if n.kind == "loss")
    return table


def _items(name: str, directory: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in _table(name, "items", directory).rows.to_pylist()}


def _events(name: str, directory: Path) -> list[dict[str, Any]]:
    return _table(name, "events", directory).rows.to_pylist()  # type: ignore[no-any-return]


def test_shopify_variants_inherit_from_their_product(tmp_path: Path) -> None:
    mug = {"Handle": "mug", "Title": "Mug", "Body (HTML)": "<p>Holds tea</p>", "Vendor": "Nordlys"}
    mug |= {"Tags": "kitchen, gift", "Option1 Name": "Color", "Image Src": "https://cdn.example.com/mug.jpg"}
    tracked = {"Variant Inventory Tracker": "shopify", "Variant Inventory Policy": "deny"}
    _write(
        tmp_path / "products_export_1.csv",
        mug | tracked | {"Status": "active", "Published": "true", "Option1 Value": "Red"}
        | {"Variant SKU": "M-R", "Variant Price": "9.50", "Variant Inventory Qty": "3"},
        {"Handle": "mug", "Option1 Value": "Blue", "Variant SKU": "M-B", "Variant Price": "9.90"}
        | tracked | {"Variant Inventory Qty": "0"},
        {"Handle": "mug", "Image Src": "https://cdn.example.com/mug-2.jpg"},
        {"Handle": "card", "Title": "Card", "Option1 Name": "Title", "Option1 Value": "Default Title"}
        | {"Variant Price": "2.00", "Status": "draft"},
    )  # fmt: skip
    items = _items("shopify", tmp_path)
    assert items.keys() == {"M-R", "M-B", "card"}
    blue = items["M-B"]
    assert (blue["title"], blue["description"], blue["price"]) == ("Mug", "<p>Holds tea</p>", "9.90")
    assert (blue["family_id"], blue["vendor"], blue["option_color"]) == ("mug", "Nordlys", "Blue")
    assert json.loads(blue["tags"]) == ["kitchen", "gift"]
    assert blue["image_url"] == "https://cdn.example.com/mug.jpg"
    # Out of stock, a draft: not recommended; in stock: open-ended.
    assert [bool(items[i]["available_until"]) for i in ("M-R", "M-B", "card")] == [False, True, True]
    notes = {note.text: note.count for note in _table("shopify", "items", tmp_path).notes}
    assert notes["a variant without SKU has its handle and options as id"] == 1
    assert next(count for text, count in notes.items() if "out of stock" in text) == 2


def test_woocommerce_variations_replace_their_parent(tmp_path: Path) -> None:
    parent = {"ID": "10", "Type": "variable", "SKU": "shirt", "Name": "Shirt", "Published": "1"}
    parent |= {"Description": "Linen", "Categories": "Clothing > Shirts, Sale", "In stock?": "1"}
    _write(
        tmp_path / "wc-product-export-1.csv",
        parent | {"Images": "https://s.example.com/a.jpg, https://s.example.com/b.jpg"},
        {"ID": "11", "Type": "variation", "SKU": "shirt-m", "Parent": "shirt", "Published": "1"}
        | {"Regular price": "30", "Sale price": "25", "In stock?": "1"}
        | {"Attribute 1 name": "Size", "Attribute 1 value(s)": "M"},
        {"ID": "12", "Type": "variation", "Parent": "id:10", "Published": "1", "In stock?": "0"}
        | {"Regular price": "30"},
        {"ID": "20", "Type": "simple", "SKU": "sock", "Name": "Sock", "Published": "0", "Regular price": "5"},
        {"ID": "30", "Type": "grouped", "SKU": "set", "Name": "Set", "Published": "1"},
    )  # fmt: skip
    items = _items("woocommerce", tmp_path)
    assert items.keys() == {"shirt-m", "12", "sock"}
    medium = items["shirt-m"]
    assert (medium["title"], medium["price"], medium["family_id"]) == ("Shirt", "25", "shirt")
    assert json.loads(medium["category"]) == ["Clothing > Shirts", "Sale"]
    assert json.loads(medium["attribute_size"]) == ["M"]
    assert medium["image_url"] == "https://s.example.com/a.jpg"
    assert [bool(items[i]["available_until"]) for i in ("shirt-m", "12", "sock")] == [False, True, True]


def test_magento_variants_take_the_family_of_their_configurable_product(tmp_path: Path) -> None:
    _write(
        tmp_path / "export_catalog_product_20261101.csv",
        {
            "sku": "t",
            "product_type": "configurable",
            "name": "Tee",
            "product_online": "1",
            "categories": "A/B",
        }
        | {"configurable_variations": "sku=t-s,size=S|sku=t-m,size=M"},
        {"sku": "t-s", "product_type": "simple", "name": "Tee S", "product_online": "1", "price": "10"}
        | {"is_in_stock": "1", "additional_attributes": "color=Red, dark,size=S", "base_image": "/t/s.jpg"},
        {"sku": "t-m", "product_type": "simple", "product_online": "2", "price": "10", "special_price": "8"},
        {"sku": "t-s", "product_type": "simple", "store_view_code": "fr", "name": "T-shirt S"},
    )
    items = _items("magento", tmp_path)
    assert items.keys() == {"t-s", "t-m"}
    assert (items["t-m"]["title"], items["t-m"]["family_id"], items["t-m"]["price"]) == ("Tee", "t", "8")
    assert (items["t-s"]["attribute_color"], items["t-s"]["attribute_size"]) == ("Red, dark", "S")
    assert [bool(items[i]["available_until"]) for i in ("t-s", "t-m")] == [False, True]


def test_a_merchant_feed_is_read(tmp_path: Path) -> None:
    _write(
        tmp_path / "feed.tsv",
        {"id": "1", "title": "Hat", "price": "25.19 USD", "availability": "in_stock", "item_group_id": "h"}
        | {
            "image_link": "https://s.example.com/1.jpg",
            "product_type": "Clothing > Hats",
            "brand": "Nordlys",
        },
        {
            "id": "2",
            "title": "Cap",
            "price": "20 USD",
            "sale_price": "15 USD",
            "availability": "out of stock",
        },
        separator="\t",
    )
    items = _items("merchant", tmp_path)
    assert (items["1"]["category"], items["1"]["brand"], items["1"]["family_id"]) == ("Hats", "Nordlys", "h")
    assert items["2"]["price"] == "15 USD"
    assert [bool(items[i]["available_until"]) for i in "12"] == [False, True]


def test_ga4_events_are_one_row_for_each_item(tmp_path: Path) -> None:
    mug = {"item_id": "b", "item_name": "Mug", "price": 9.5, "quantity": 2, "item_brand": "(not set)"}
    session = [{"key": "ga_session_id", "value": {"int_value": "77"}}]
    events = [
        {"event_name": "view_item_list", "event_timestamp": "1794010711000000", "user_pseudo_id": "v1",
         "items": [{"item_id": "a", "item_list_index": "1"}, {"item_id": "b", "item_list_index": "2"}],
         "event_params": session},
        {"event_name": "purchase", "event_timestamp": "1794010712000000", "user_id": "ann",
         "user_pseudo_id": "v1", "event_params": session, "items": [mug]},
        {"event_name": "page_view", "event_timestamp": "1794010713000000", "user_pseudo_id": "v1"},
        {"event_name": "view_item", "event_timestamp": "1794010714000000", "user_pseudo_id": "v2"},
    ]  # fmt: skip
    (tmp_path / "events_20261107.jsonl").write_text("\n".join(json.dumps(event) for event in events))
    rows = _events("ga4", tmp_path)
    assert [(r["user_id"], r["item_id"], r["type"], r["session_id"]) for r in rows] == [
        ("v1", "a", "impression", "v1:77"),
        ("v1", "b", "impression", "v1:77"),
        ("ann", "b", "purchase", "v1:77"),
    ]  # fmt: skip
    assert [row["position"] for row in rows] == ["1", "2", None]
    assert (rows[2]["price"], rows[2]["quantity"]) == ("9.5", "2")
    items = _items("ga4", tmp_path)
    assert (items["b"]["title"], items["b"]["brand"]) == ("Mug", None)


def test_data_sets_with_an_item_property_file_are_read(tmp_path: Path) -> None:
    event = {"timestamp": "1433221332117", "visitorid": "257597", "event": "addtocart", "itemid": "35"}
    _write(tmp_path / "events.csv", event | {"transactionid": ""})
    properties = [("1431226800000", "categoryid", "1"), ("1431831600000", "categoryid", "2"),
                  ("1431226800000", "790", "n15360.000"), ("1431226800000", "888", "66094 n28.800"),
                  ("1431831600000", "available", "0")]  # fmt: skip
    _write(
        tmp_path / "item_properties_part1.csv",
        *({"timestamp": t, "itemid": "35", "property": p, "value": v} for t, p, v in properties),
    )
    assert [(r["type"], r["item_id"]) for r in _events("retailrocket", tmp_path)] == [("cart", "35")]
    item = _items("retailrocket", tmp_path)["35"]
    assert (item["category"], item["price"], item["title"]) == ("2", 15.36, "category 2")
    assert item["available_until"].startswith("2015-05-17")


def test_data_sets_with_items_in_the_event_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "UserBehavior.csv").write_text(
        "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n"
    )
    assert [row["type"] for row in _events("taobao", tmp_path)] == ["view", "purchase"]
    assert _items("taobao", tmp_path)["2268318"]["title"] == "category 2520377"
    _write(
        tmp_path / "2019-Oct.csv",
        {"event_time": "2019-10-01 00:00:00 UTC", "event_type": "view", "product_id": "44600062"}
        | {"category_id": "21", "category_code": "apparel.shoes", "brand": "shiseido", "price": "35.79"}
        | {"user_id": "541312140", "user_session": "72d7"},
    )
    assert _items("rees46", tmp_path)["44600062"]["title"] == "shiseido apparel shoes"
    assert _events("rees46", tmp_path)[0]["time"] == "2019-10-01 00:00:00 UTC"


def test_invoices_need_only_the_name_of_the_preset(tmp_path: Path) -> None:
    """Cancelled invoices buy nothing, a line without a customer is nobody's."""
    line = {"StockCode": "85123A", "Description": "HOLDER", "Quantity": "6", "InvoiceDate": "12/1/2010 8:26"}
    line |= {"UnitPrice": "2.55", "CustomerID": "17850", "Country": "United Kingdom"}
    lines = [{"InvoiceNo": str(n)} | line | {"InvoiceDate": f"12/{n}/2010 8:26"} for n in range(1, 20)]
    lines += [
        {"InvoiceNo": "C536379"} | line | {"Quantity": "-1"},
        {"InvoiceNo": "30"} | line | {"CustomerID": ""},
    ]
    _write(tmp_path / "OnlineRetail.csv", *lines)
    (tmp_path / "shop.toml").write_text('[source]\npreset = "online-retail"\n')
    shop = read_shop(tmp_path)
    assert [(item.id, item.title, item.price) for item in shop.items] == [("85123A", "HOLDER", 2.55)]
    assert [shop.events.session_ids[at] for at in shop.events.session] == [str(n) for n in range(1, 20)]


def test_movielens_is_read_with_and_without_a_header(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    (old / "movies.dat").write_bytes("1::Amélie (2001)::Comedy|Romance\n".encode("latin-1"))
    (old / "ratings.dat").write_text("22::1::5::1794010711\n23::1::2::1794010712\n")
    _write(new / "movies.csv", {"movieId": "1", "title": "Amélie (2001)", "genres": "Comedy|Romance"})
    rating = {"userId": "22", "movieId": "1", "rating": "5.0", "timestamp": "1794010711"}
    _write(new / "ratings.csv", rating, rating | {"userId": "23", "rating": "2.0", "timestamp": "1794010712"})
    for directory in (old, new):
        item = _items("movielens", directory)["1"]
        assert (item["title"], json.loads(item["genres"])) == ("Amélie (2001)", ["Comedy", "Romance"])
        assert [(r["user_id"], r["type"]) for r in _events("movielens", directory)] == [
            ("22", "like"),
            ("23", "view"),
        ]


def test_an_export_becomes_a_shop_directory_that_names_what_is_missing(tmp_path: Path) -> None:
    export, out = tmp_path / "export", tmp_path / "shop"
    export.mkdir()
    with pytest.raises(FailedPrecondition, match=r"no items of a shopify export \(products_export\*"):
        list(convert(PRESETS["shopify"], export, out))
    _write(export / "products.csv", {"Handle": "a", "Title": "A", "Variant SKU": "1", "Variant Price": "2"})
    lines = list(convert(PRESETS["shopify"], export, out))
    assert any("no events" in line and "user_id, item_id, type and time" in line for line in lines)
    assert (out / "items.parquet").is_file()
    with pytest.raises(FailedPrecondition, match=r"a shop\.toml already"):
        list(convert(PRESETS["shopify"], export, out))


def test_shop_toml_overrides_the_settings_of_a_preset(tmp_path: Path) -> None:
    _write(tmp_path / "feed.csv", {"id": "1", "title": "Hat", "price": "25 USD", "brand": "Nordlys"})
    events = [
        {"user_id": "u", "item_id": "1", "type": "purchase", "time": f"2026-11-{d:02}"} for d in range(1, 9)
    ]
    _write(tmp_path / "events.csv", *events)
    (tmp_path / "shop.toml").write_text('[source]\npreset = "merchant"\n')
    shop = read_shop(tmp_path)
    assert "brand" in shop.settings.items.text_attributes
    assert [a.name for a in shop.items[0].attributes] == ["brand"]
    assert len(shop.events) == 8
    (tmp_path / "shop.toml").write_text(
        '[source]\npreset = "merchant"\n[items]\ntext_attributes = ["size"]\n'
    )
    assert read_shop(tmp_path).settings.items.text_attributes == ("size",)
    (tmp_path / "shop.toml").write_text('[source]\npreset = "spotify"\n')
    with pytest.raises(
        InvalidArgument, match=r"source\.preset.*'spotify' is not one of shopify, woocommerce"
    ):
        read_shop(tmp_path)


def test_a_preset_is_suggested_by_its_columns() -> None:
    for name, preset in PRESETS.items():
        assert suggestion([*preset.signature, "more"]) == name
    assert suggestion(["id", "title", "price"]) == ""
