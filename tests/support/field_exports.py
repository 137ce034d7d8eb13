"""Shops in the export formats of shop systems and public data sets."""

from collections.abc import Callable
from pathlib import Path

from tests.support.field_shops import (
    EVENTS,
    ITEMS,
    TOML,
    TYPES,
    Row,
    csv_text,
    event_rows,
    event_time,
    event_type,
    item_of_event,
    item_price,
    item_rows,
    rename_columns,
    unquoted_csv,
    write_shop,
)


def merchant_feed() -> list[Row]:
    """A product feed of Google Merchant Center."""
    return [
        {
            "id": f"sku-{n:04}",
            "title": f"Hat {n}",
            "description": "For every day",
            "link": "https://s.example/p",
        }
        | {
            "image_link": f"https://s.example/i/{n}.jpg",
            "availability": "in_stock",
            "price": f"{item_price(n)} USD",
        }
        | {"sale_price": "", "brand": "Nordlys", "item_group_id": f"g{n}"}
        for n in range(ITEMS)
    ]


FEED_TOML = f'family_id = "item_group_id"\ntext_attributes = ["brand"]\n{TYPES}'


def write_shopify(directory: Path) -> None:
    """Nineteen products of 29 variants, where only the first variant of a product has a title and a text."""
    rows: list[Row] = []
    variants = {4: 3, 12: 9}
    for product in range(1, 20):
        for variant in range(variants.get(product, 1)):
            first = not variant
            row = {"Handle": f"product-{product:02}", "Title": f"Sample jacket {product}" if first else ""}
            row |= {"Body (HTML)": f"<p>Text of {product}.</p>" if first else "", "Vendor": "Example"}
            row |= {"Tags": "made up", "Option1 Name": "Size", "Option1 Value": f"S{variant}"}
            row |= {"Variant SKU": f"SKU-{len(rows) + 1:03}", "Variant Price": "4000"}
            rows.append(row)
    log = event_rows(lambda n: f"SKU-{n % 29 + 1:03}")
    toml = (
        '[items]\nfile = "products_export.csv"\nid = "Variant SKU"\ntitle = "Title"\nfamily_id = "Handle"\n'
    )
    toml += 'description = "Body (HTML)"\nprice = "Variant Price"\ntext_attributes = ["Vendor", "Tags"]\n'
    write_shop(directory, csv_text(rows), csv_text(log), toml + TYPES, ("products_export.csv", "events.csv"))


def write_rees46(directory: Path) -> None:
    """Event times such as '2025-11-01 00:00:00 UTC'."""
    log = event_rows(
        time=lambda n: f"{event_time(n):%Y-%m-%d %H:%M:%S} UTC", user_session=lambda n: f"s{n // 4}"
    )
    log = rename_columns(log, item_id="product_id", type="event_type", time="event_time")
    toml = '[events]\nitem_id = "product_id"\ntype = "event_type"\ntime = "event_time"\n'
    write_shop(
        directory, None, csv_text(log), f'{toml}session_id = "user_session"\n{TOML}remove_from_cart = 0.0\n'
    )


def write_merchant_xml(directory: Path) -> None:
    """A product feed of Google Merchant Center as RSS."""
    rows = (
        f"<item><g:id>sku-{n:04}</g:id><g:title>Hat {n}</g:title>"
        f"<g:price>{item_price(n)} TRY</g:price></item>"
        for n in range(ITEMS)
    )
    feed = '<?xml version="1.0"?><rss xmlns:g="http://base.google.com/ns/1.0" version="2.0"><channel>'
    write_shop(directory, f"{feed}{''.join(rows)}</channel></rss>", names=("items.xml", "events.csv"))


def write_retailrocket(directory: Path) -> None:
    """Event times in milliseconds."""
    names = {"view": "view", "cart": "addtocart", "purchase": "transaction"}
    log = event_rows(
        type=lambda n: names[event_type(n)], time=lambda n: int(event_time(n).timestamp() * 1000)
    )
    log = rename_columns(log, user_id="visitorid", item_id="itemid", type="event", time="timestamp")
    toml = '[events]\nuser_id = "visitorid"\nitem_id = "itemid"\ntype = "event"\ntime = "timestamp"\n'
    toml += 'default_type = "view"\n'
    types = "[event_types]\nview = 0.2\naddtocart = 0.5\ntransaction = 1.0\n"
    write_shop(directory, None, csv_text(log), TOML.replace(TYPES, toml + types))


def online_retail_writer(encoding: str, form: str) -> Callable[[Path], None]:
    """Every 40th row is a return, and every fourth has no customer."""

    def build(directory: Path) -> None:
        rows = []
        for n in range(EVENTS):
            returned, code = n % 40 == 6, 20_000 + item_of_event(n)
            row: Row = {"InvoiceNo": f"{'C' if returned else ''}{536_000 + n // 4}", "StockCode": code}
            row |= {"Description": f"SET OF {code} £ MUGS", "Quantity": -3 if returned else n % 11 + 1}
            row |= {
                "InvoiceDate": event_time(n).strftime(form),
                "UnitPrice": 0 if n % 300 == 5 else item_price(item_of_event(n)),
            }
            row |= {"CustomerID": "" if n % 4 == 1 else 12_000 + n % 60, "Country": "United Kingdom"}
            rows.append(row)
        of = 'file = "OnlineRetail.csv"\n'
        toml = f'[items]\n{of}id = "StockCode"\ntitle = "Description"\nprice = "UnitPrice"\n[events]\n{of}'
        toml += (
            'user_id = "CustomerID"\nitem_id = "StockCode"\ntime = "InvoiceDate"\nsession_id = "InvoiceNo"\n'
        )
        toml += 'price = "UnitPrice"\n'
        write_shop(directory, csv_text(rows).encode(encoding), "", toml, ("OnlineRetail.csv", ""))

    return build


def write_movielens(directory: Path) -> None:
    """Latin-1 files without a header, with '::' as the separator."""
    movies = "".join(f"{n + 1}::Amélie {n} (2001)::Comedy|Romance\n" for n in range(ITEMS))
    ratings = "".join(
        f"{n % 60 + 1}::{item_of_event(n) + 1}::{n % 5 + 1}::{int(event_time(n).timestamp())}\n"
        for n in range(EVENTS)
    )
    toml = (
        '[items]\nfile = "movies.dat"\nid = "MovieID"\n[events]\nfile = "ratings.dat"\nuser_id = "UserID"\n'
    )
    toml += 'item_id = "MovieID"\ntime = "Timestamp"\n'
    files = movies.encode("latin-1"), ratings.encode()
    write_shop(directory, *files, toml, ("movies.dat", "ratings.dat"))


def write_taobao(directory: Path) -> None:
    """Events without a header."""
    names = {"view": "pv", "cart": "cart", "purchase": "buy"}
    rows = [
        {
            "u": n % 60,
            "i": item_of_event(n) + 1,
            "c": 2520377,
            "b": names[event_type(n)],
            "t": int(event_time(n).timestamp()),
        }
        for n in range(EVENTS)
    ]
    toml = '[events]\nfile = "UserBehavior.csv"\nuser_id = "user"\nitem_id = "item"\n'
    toml += 'type = "behavior"\ntime = "ts"\n'
    toml += 'default_type = "pv"\n[event_types]\npv = 0.2\nfav = 0.4\ncart = 0.5\nbuy = 1.0\n'
    files = csv_text(item_rows(lambda n: n + 1)), csv_text(rows, header=False)
    write_shop(directory, *files, TOML.replace(TYPES, toml), ("items.csv", "UserBehavior.csv"))


def write_styles(directory: Path) -> None:
    """Every 15th name contains unquoted commas."""
    rows = rename_columns(item_rows(), title="productDisplayName", type="masterCategory", colour="baseColour")
    rows = [row | {"season": "Fall"} for row in rows]
    for n in range(0, ITEMS, 15):
        rows[n]["productDisplayName"] += ", with, commas"
    toml = '[items]\nfile = "styles.csv"\ntitle = "productDisplayName"\n'
    toml += f'text_attributes = ["masterCategory", "baseColour"]\n{TYPES}'
    write_shop(directory, unquoted_csv(rows), None, toml, ("styles.csv", "events.csv"))
