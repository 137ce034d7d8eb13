"""Small synthetic shops in the formats of real exports and data sets.

`BUILDERS` maps the name of a case to a function that writes its shop into an empty directory. Unless the case
says otherwise, a shop has 120 items and 840 events over 28 days.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.support.field_exports import (
    FEED_TOML,
    merchant_feed,
    online_retail_writer,
    write_merchant_xml,
    write_movielens,
    write_rees46,
    write_retailrocket,
    write_shopify,
    write_styles,
    write_taobao,
)
from tests.support.field_shops import (
    ITEMS,
    TYPES,
    csv_text,
    event_rows,
    event_time,
    event_type,
    image_bytes,
    item_price,
    item_rows,
    rename_columns,
    unquoted_csv,
    write_shop,
)

Builder = Callable[[Path], None]


def _times(write: Callable[[int], object]) -> Builder:
    return lambda directory: write_shop(directory, None, csv_text(event_rows(time=write)))


def _utf16(directory: Path) -> None:
    write_shop(directory, csv_text(item_rows(), "\t").encode("utf-16"))


def _zipped(directory: Path) -> None:
    write_shop(directory, None, "")
    with zipfile.ZipFile(directory / "events.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("events.csv", csv_text(event_rows()))


def _jsonl(directory: Path) -> None:
    rows = item_rows(title=lambda n: "Blue hat 5\ud83d" if n == 5 else f"Hat {n}")
    write_shop(
        directory, "".join(json.dumps(row) + "\n" for row in rows), names=("items.jsonl", "events.csv")
    )


def _array(directory: Path) -> None:
    write_shop(directory, json.dumps(item_rows(), indent=1), names=("items.jsonl", "events.csv"))


def _long_attribute(directory: Path) -> None:
    tags = ", ".join(f"keyword {n} for search" for n in range(20))
    rows = item_rows(tags=lambda n: "cotton" if n % 3 else tags)
    write_shop(directory, csv_text(rows), None, f'[items]\ntext_attributes = ["tags"]\n{TYPES}')


def _parquet_folder(directory: Path) -> None:
    write_shop(directory, "", "")
    pq.write_table(pa.Table.from_pylist(item_rows(price=item_price)), directory / "items.parquet")
    folder = directory / "events.parquet"
    folder.mkdir()
    for part in range(3):
        rows = pa.Table.from_pylist(event_rows()[part::3])
        pq.write_table(rows, folder / f"part-0000{part}-abc.snappy.parquet", compression="snappy")
    (folder / "_SUCCESS").touch()


def _parquet_binary(directory: Path) -> None:
    write_shop(directory, "", "")
    for name, rows in (("items", item_rows()), ("events", event_rows())):
        table = pa.Table.from_pylist(rows)
        table = table.cast(pa.schema([(column, pa.binary()) for column in table.column_names]))
        pq.write_table(table, directory / f"{name}.parquet")


def _images(file_of: Callable[[int], Sequence[tuple[str, bytes]]]) -> Builder:
    def build(directory: Path) -> None:
        write_shop(directory)
        (directory / "images").mkdir()
        for n in range(ITEMS):
            for name, data in file_of(n):
                (directory / "images" / name).write_bytes(data)

    return build


def _packed_images(directory: Path) -> None:
    write_shop(directory)
    (directory / "images").mkdir()
    with tarfile.open(directory / "images" / "all.tar.gz", "w:gz") as archive:
        for n in range(ITEMS):
            member = tarfile.TarInfo(f"sku-{n:04}.jpg")
            member.size = len(_JPEG)
            archive.addfile(member, io.BytesIO(_JPEG))


_JPEG, _AVIF, _HEIC = (image_bytes(form) for form in ("JPEG", "AVIF", "HEIF"))
_GREY16 = io.BytesIO()
Image.fromarray(np.full((48, 48), 0x8000, np.uint16)).save(_GREY16, "PNG")
_PAGE = b"<html>403</html>"


BUILDERS: dict[str, Builder] = {
    "A02-shopify-sku": write_shopify,
    "A04-rees46-utc-suffix": write_rees46,
    "A06-merchant-tsv": lambda to: write_shop(
        to,
        csv_text(merchant_feed(), "\t"),
        None,
        f'[items]\nfile = "feed.tsv"\n{FEED_TOML}',
        ("feed.tsv", "events.csv"),
    ),
    "A07-merchant-csv-price": lambda to: write_shop(
        to, csv_text(merchant_feed()), None, f"[items]\n{FEED_TOML}"
    ),
    "A08-merchant-xml": write_merchant_xml,
    "A09-retailrocket-ms": write_retailrocket,
    "A12-yyyymmdd": _times(lambda n: f"{event_time(n):%Y%m%d}"),
    "A14-dd-mm-yyyy": _times(lambda n: f"{event_time(n):%d/%m/%Y %H:%M}"),
    "A15-online-retail-latin1": online_retail_writer("latin-1", "%m/%d/%Y %H:%M"),
    "A16-online-retail-utf8": online_retail_writer("utf-8", "%Y-%m-%d %H:%M:%S"),
    "A17-semicolon-csv": lambda to: write_shop(
        to, unquoted_csv(item_rows(price=lambda n: f"{item_price(n)}".replace(".", ",")), ";")
    ),
    "A19-price-currency-sign": lambda to: write_shop(
        to,
        csv_text(
            item_rows(
                price=lambda n: (
                    f"${item_price(n)}",
                    f"€{item_price(n):.0f}",
                    f"1,{item_price(n):06.2f}",
                    "—",
                )[n % 4]
            )
        ),
    ),
    "A22-movielens-dat": write_movielens,
    "A24-taobao-no-header": write_taobao,
    "A25-one-future-date": _times(
        lambda n: "2037-05-01T00:00:00+00:00" if n == 400 else event_time(n).isoformat()
    ),
    "A27-one-ms-among-seconds": _times(
        lambda n: int(event_time(n).timestamp()) * (1000 if n % 168 == 7 else 1)
    ),
    "A30-utf16": _utf16,
    "A32-one-bad-byte": lambda to: write_shop(
        to, csv_text(item_rows()).encode().replace(b"Blue hat 0", b"Blue hat\x92s 0")
    ),
    "A33-events-zip": _zipped,
    "A35-duplicate-header": lambda to: write_shop(
        to, csv_text(rename_columns(item_rows(sale=lambda _: 9.99), sale="price ")).replace("price ", "price")
    ),
    "A37-header-spaces": lambda to: write_shop(to, unquoted_csv(item_rows()).replace(",", ", ", 5)),
    "A40-null-words": lambda to: write_shop(
        to,
        csv_text(
            item_rows(
                title=lambda n: f"Hat {n}" if n % 10 else "nan",
                price=lambda n: item_price(n) if n % 3 else "NULL",
            )
        ),
        csv_text(event_rows(user_id=lambda n: ("NULL", "\\N")[n % 2] if n % 3 == 0 else f"u{n % 60}")),
    ),
    "A41-float-ids": lambda to: write_shop(
        to, csv_text(item_rows(lambda n: 100 + n)), csv_text(event_rows(lambda n: f"{100 + n}.0"))
    ),
    "A43-ids-with-spaces": lambda to: write_shop(
        to, csv_text(item_rows("sku {:04}".format)), csv_text(event_rows("sku {:04}".format))
    ),
    "A44-some-ids-with-spaces": lambda to: write_shop(
        to, csv_text(item_rows(_third)), csv_text(event_rows(_third))
    ),
    "A45-types-case": lambda to: write_shop(
        to,
        None,
        csv_text(
            event_rows(type=lambda n: {"view": "View", "cart": "Cart", "purchase": "PURCHASE"}[event_type(n)])
        ),
    ),
    "A46-no-shop-toml-types": lambda to: write_shop(to, toml=""),
    "A49-huge-html-3mb": lambda to: write_shop(
        to, csv_text(item_rows(description=lambda n: "<p>A hat</p>" * 262_144 if n == 3 else "A hat"))
    ),
    "A50-unclosed-quote": lambda to: write_shop(
        to, unquoted_csv(item_rows(title=lambda n: {4: '"19 monitor', 5: '19" monitor'}.get(n, f"Hat {n}")))
    ),
    "A51-styles-commas": write_styles,
    "A52-lone-surrogate": _jsonl,
    "A53-json-array": _array,
    "A59-no-events-file": lambda to: write_shop(to, None, ""),
    "A65-long-attribute": _long_attribute,
    "A74-parquet-folder": _parquet_folder,
    "A77-parquet-binary-ids": _parquet_binary,
    "A80-images-suffix": _images(lambda n: [(f"sku-{n:04}_1.jpg", _JPEG), (f"sku-{n:04}_2.jpg", _JPEG)]),
    "A84-images-avif-heic-ext": _images(
        lambda n: [(f"sku-{n:04}.avif", _AVIF) if n % 2 else (f"sku-{n:04}.heic", _HEIC)]
    ),
    "A86-images-all-broken": _images(lambda n: [(f"sku-{n:04}.jpg", _PAGE)]),
    "A87-images-html-third": _images(lambda n: [(f"sku-{n:04}.jpg", _JPEG if n % 3 else _PAGE)]),
    "A88-images-tar-gz": _packed_images,
    "A94-optional-columns-missing": lambda to: write_shop(
        to,
        csv_text(
            [
                {k: v for k, v in row.items() if k not in ("colour", "type")}
                for row in rename_columns(item_rows(), title="name", price="Price")
            ]
        ),
        None,
        TYPES,
    ),
    "A96-type-column-missing": lambda to: write_shop(
        to, None, csv_text(rename_columns(event_rows(), type="event_type"))
    ),
    "A105-image-16bit": _images(lambda n: [(f"sku-{n:04}.png", _GREY16.getvalue())]),
}
"""The writer of the shop of each case."""


def _third(n: int) -> str:
    return f"sku {n:04}" if n % 3 == 0 else f"sku-{n:04}"
