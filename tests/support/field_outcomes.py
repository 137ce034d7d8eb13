"""Expected outcomes of the shops of `field_cases`, before and after the owner follows the advice."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.support.field_shops import EVENTS, ITEMS, item_price
from training.data.dataset import ShopData
from training.encoders.image_cache import decoded_images, unreadable_files

_RETURNS = EVENTS // 40


def _standard_prices(n: int) -> float | None:
    return item_price(n)


@dataclass(frozen=True)
class Outcome:
    """The expected outcome of a case.

    `errors`, `warnings` and `notes` are substrings of the messages; every warning contains one of `warnings`.
    `check` is a condition on the shop. Event times are those of the synthetic shop, rounded down to `step`
    seconds.
    """

    items: int = ITEMS
    events: int = EVENTS
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    check: Callable[[ShopData], bool] = lambda _: True
    prices: Callable[[int], float | None] | None = _standard_prices
    step: int = 1


def _type_counts(shop: ShopData) -> dict[str, int]:
    names = list(shop.settings.event_types)
    return {names[kind]: count for kind, count in Counter(shop.events.kind.tolist()).items()}


def _attributes(*names: str) -> Callable[[ShopData], bool]:
    return lambda shop: {a.name for one in shop.items for a in one.attributes} == set(names)


def _images(shop: ShopData) -> bool:
    """Whether every item has an image; decodes four of them."""
    ids = [one.id for one in shop.items]
    return all(item_id in shop.images for item_id in ids) and not unreadable_files(shop.images, ids[:4])


def _is_gray(shop: ShopData) -> bool:
    ((picture,),) = decoded_images(shop.images, ["sku-0000"], lambda picture: picture, 48)
    assert isinstance(picture, Image.Image)
    return set(np.asarray(picture).ravel().tolist()) <= {127, 128, 129}


def _variants_inherit(shop: ShopData) -> bool:
    """Whether a variant inherits the missing values of its row from the first row of its product."""
    titles = {one.id: one.title for one in shop.items}
    families = {one.family_id for one in shop.items}
    return titles["SKU-005"] == titles["SKU-006"] == "Sample jacket 4" and len(families) == 19


def _mixed_prices(n: int) -> float | None:
    """Prices of which one in four each is in dollars, in whole euros, above a thousand, and missing."""
    return (item_price(n), round(item_price(n)), 1000 + item_price(n), None)[n % 4]


_TYPE_COUNTS = {"view": 504, "cart": 168, "purchase": 168}
_NO_HEADER = ("seems to have no header", "Name its columns in shop.toml", "columns = [")
_RETAIL = Outcome(
    events=EVENTS - EVENTS // 4 - _RETURNS,
    warnings=(
        "a repeated id: the first row is used: 714",
        "210 of 840 rows are lost: no user",
        "a cancellation or return, not a purchase: 21 (line 8, line 48",
    ),
    check=lambda shop: shop.items[0].title == "SET OF 20000 £ MUGS",
    prices=None,
)

OUTCOMES: dict[str, Outcome] = {
    "A02-shopify-sku": Outcome(
        items=29,
        warnings=("title and description are those of the first row of the family: 10 (line 6, line 7",),
        notes=('preset = "shopify" under [source]',),
        check=_variants_inherit,
        prices=lambda n: 4000,
    ),
    "A04-rees46-utc-suffix": Outcome(warnings=("no event is of type remove_from_cart",)),
    "A06-merchant-tsv": Outcome(notes=('preset = "merchant"',), check=_attributes("brand")),
    "A07-merchant-csv-price": Outcome(
        notes=(
            " USD' (line 2)",
            "that value is read as 5.19",
            'preset = "merchant" under [source] to read all of it',
        ),
        check=_attributes("brand"),
    ),
    "A08-merchant-xml": Outcome(items=0, errors=("no column 'colour'; it has id, title, price",)),
    "A09-retailrocket-ms": Outcome(
        check=lambda shop: _type_counts(shop) == {"view": 504, "addtocart": 168, "transaction": 168}
    ),
    "A12-yyyymmdd": Outcome(step=86_400),
    "A14-dd-mm-yyyy": Outcome(warnings=("day/month/year, the only order", 'write time_format = "%d/%m/%Y')),
    "A15-online-retail-latin1": Outcome(
        events=_RETAIL.events,
        warnings=(*_RETAIL.warnings, "time is read as month/day/year"),
        notes=("not UTF-8, read as cp1252",),
        check=_RETAIL.check,
        prices=None,
    ),
    "A16-online-retail-utf8": _RETAIL,
    "A17-semicolon-csv": Outcome(notes=("cells are separated by ';'",)),
    "A19-price-currency-sign": Outcome(
        warnings=("several currencies", "a placeholder such as NULL is read as an empty cell: 30"),
        prices=_mixed_prices,
    ),
    "A22-movielens-dat": Outcome(errors=(*_NO_HEADER, 'preset = "movielens" under [source]')),
    "A24-taobao-no-header": Outcome(errors=(*_NO_HEADER, "'2520377', 'pv'")),
    "A25-one-future-date": Outcome(
        events=EVENTS - 1,
        warnings=("1 of 840 rows are lost: time before 1990 or after tomorrow: 1 (line 402) such as '2037-",),
        check=lambda shop: int(shop.events.time.max()) < 1_800_000_000 * 10**6,
    ),
    "A27-one-ms-among-seconds": Outcome(warnings=("835 in seconds, 5 in milliseconds",)),
    "A30-utf16": Outcome(check=_attributes("colour", "type")),
    "A32-one-bad-byte": Outcome(
        notes=("not UTF-8, read as cp1252", "line 2"),
        check=lambda shop: shop.items[0].title == "Blue hat’s 0",
    ),
    "A33-events-zip": Outcome(),
    "A35-duplicate-header": Outcome(errors=("2 columns called 'price' (places 4, 7)", "rename or remove")),
    "A37-header-spaces": Outcome(check=_attributes("colour", "type")),
    "A40-null-words": Outcome(
        events=EVENTS * 2 // 3,
        warnings=(
            "title: a placeholder such as NULL is read as an empty cell: 12",
            "price: a placeholder such as NULL is read as an empty cell: 40",
            "user_id: a placeholder such as NULL is read as an empty cell: 280",
            "280 of 840 rows are lost: no user",
        ),
        check=lambda shop: (
            shop.items[0].title == ""
            and not {"NULL", "\\N"} & {shop.events.user_ids[u] for u in shop.events.user}
        ),
        prices=lambda n: item_price(n) if n % 3 else None,
    ),
    "A41-float-ids": Outcome(
        warnings=("840 rows match an item only if '123.0' and '123' count as the same id",)
    ),
    "A43-ids-with-spaces": Outcome(check=lambda shop: shop.items[7].id == "sku 0007"),
    "A44-some-ids-with-spaces": Outcome(check=lambda shop: shop.items[3].id == "sku 0003"),
    "A45-types-case": Outcome(
        notes=("'PURCHASE' (168 rows) is read as 'purchase'",),
        check=lambda shop: _type_counts(shop) == _TYPE_COUNTS,
    ),
    "A46-no-shop-toml-types": Outcome(
        events=168,
        errors=(
            "672 of 840 rows are lost (80%)",
            "'view' (504), 'cart' (168)",
            "write view = 0.2, cart = 0.5, purchase = 1.0 under [event_types]",
        ),
    ),
    "A49-huge-html-3mb": Outcome(
        notes=("description is cut to 2,097,152 bytes",),
        check=lambda shop: 10_000 < len(shop.items[3].description) < 3 << 20,
    ),
    "A50-unclosed-quote": Outcome(
        notes=("a quotation mark is not closed before the line ends: read as text (line 6",),
        check=lambda shop: [one.title for one in shop.items[4:6]] == ['"19 monitor', '19" monitor'],
    ),
    "A51-styles-commas": Outcome(
        items=ITEMS - 8,
        warnings=("8 of 120 rows are lost: not as many cells as the header", "(line 2, line 17"),
        prices=None,
    ),
    "A52-lone-surrogate": Outcome(
        notes=("replaced by U+FFFD (line 6",), check=lambda shop: shop.items[5].title == "Blue hat 5�"
    ),
    "A53-json-array": Outcome(),
    "A59-no-events-file": Outcome(
        events=0, warnings=("no events file: the bundle uses item contents alone",)
    ),
    "A65-long-attribute": Outcome(
        warnings=("tags: a text is cut to 256 characters: 40", 'write tags = "," under [items.separators]'),
        check=lambda shop: len(shop.items[0].attributes[0].texts[0]) <= 256,
    ),
    "A74-parquet-folder": Outcome(),
    "A77-parquet-binary-ids": Outcome(check=lambda shop: _type_counts(shop) == _TYPE_COUNTS),
    "A80-images-suffix": Outcome(
        check=lambda shop: _images(shop) and len(shop.images.report.matching.further) == ITEMS
    ),
    "A84-images-avif-heic-ext": Outcome(check=_images),
    "A86-images-all-broken": Outcome(errors=("120 of 120 sampled image files are not images: sku-0000.jpg",)),
    "A87-images-html-third": Outcome(
        warnings=("40 of 120 sampled image files are not images: sku-0000.jpg",)
    ),
    "A88-images-tar-gz": Outcome(check=_images),
    "A94-optional-columns-missing": Outcome(
        warnings=(
            "no column 'title': did you mean 'name'? Write title = \"name\" under [items]",
            "items have no title, which text vectors and searches need most",
        ),
        notes=("column 'Price' is read as 'price'",),
    ),
    "A96-type-column-missing": Outcome(
        events=0, errors=("did you mean 'event_type'? Write type = \"event_type\" under [events]",)
    ),
    "A105-image-16bit": Outcome(check=lambda shop: _images(shop) and _is_gray(shop)),
}
"""The expected outcome of each case as it is."""

_RATINGS = 'columns = ["UserID", "MovieID", "Rating", "Timestamp"]\n'
_FORMAT = '[events]\ntime_format = "%d/%m/%Y %H:%M"\n'
ADVICE: dict[str, tuple[str, Callable[[str], str], Outcome]] = {
    "shopify, by its preset": (
        "A02-shopify-sku",
        lambda _: '[source]\npreset = "shopify"\n[event_types]\nview = 0.2\ncart = 0.5\npurchase = 1.0\n',
        Outcome(items=29, check=_variants_inherit, prices=lambda n: 4000),
    ),
    "a feed without attributes": (
        "A08-merchant-xml",
        lambda toml: toml.replace('["colour", "type"]', "[]"),
        Outcome(check=lambda shop: shop.items[3].title == "Hat 3"),
    ),
    "the form of times": ("A14-dd-mm-yyyy", lambda toml: toml + _FORMAT, Outcome()),
    "movielens, columns by name": (
        "A22-movielens-dat",
        lambda toml: toml.replace(
            '"movies.dat"\n', '"movies.dat"\ntitle = "Title"\ncolumns = ["MovieID", "Title", "Genres"]\n'
        ).replace('"ratings.dat"\n', f'"ratings.dat"\n{_RATINGS}'),
        Outcome(check=lambda shop: shop.items[0].title == "Amélie 0 (2001)", prices=None),
    ),
    "movielens, by its preset": (
        "A22-movielens-dat",
        lambda _: '[source]\npreset = "movielens"\n',
        Outcome(check=lambda shop: _type_counts(shop) == {"view": 504, "like": 336}, prices=None),
    ),
    "movielens, by its preset and the names of files": (
        "A22-movielens-dat",
        lambda _: (
            '[source]\npreset = "movielens"\n[items]\nfile = "movies.dat"\n[events]\nfile = "ratings.dat"\n'
        ),
        Outcome(check=_attributes("genres"), prices=None),
    ),
    "taobao, columns by name": (
        "A24-taobao-no-header",
        lambda toml: toml.replace(
            '"UserBehavior.csv"\n',
            '"UserBehavior.csv"\ncolumns = ["user", "item", "category", "behavior", "ts"]\n',
        ),
        Outcome(
            warnings=("no event is of type fav",),
            check=lambda shop: _type_counts(shop) == {"pv": 504, "cart": 168, "buy": 168},
        ),
    ),
    "types by name": (
        "A46-no-shop-toml-types",
        lambda toml: "[event_types]\nview = 0.2\ncart = 0.5\npurchase = 1.0\n",
        Outcome(check=lambda shop: _type_counts(shop) == _TYPE_COUNTS),
    ),
    "separators": (
        "A65-long-attribute",
        lambda toml: toml.replace("[event_types]", '[items.separators]\ntags = ","\n[event_types]'),
        Outcome(check=lambda shop: len(shop.items[0].attributes[0].texts) == 20),
    ),
    "a feed by its preset": (
        "A07-merchant-csv-price",
        lambda toml: (
            f'[source]\npreset = "merchant"\n[items]\nfile = "items.csv"\n{toml[toml.index("[event") :]}'
        ),
        Outcome(warnings=("120 items name their image only by a URL",), check=_attributes("brand")),
    ),
    "invoices by their preset": (
        "A15-online-retail-latin1",
        lambda _: '[source]\npreset = "online-retail"\n',
        Outcome(
            events=_RETAIL.events,
            warnings=(*_RETAIL.warnings[1:], "month/day/year"),
            check=_RETAIL.check,
            prices=None,
        ),
    ),
    "taobao, by its preset": (
        "A24-taobao-no-header",
        lambda _: '[source]\npreset = "taobao"\n',
        Outcome(warnings=("no event is of type wishlist",), check=_attributes("category"), prices=None),
    ),
    "the column of titles": (
        "A94-optional-columns-missing",
        lambda toml: f'[items]\ntitle = "name"\n{toml}',
        Outcome(check=lambda shop: shop.items[0].title == "Blue hat 0"),
    ),
    "the column of types": (
        "A96-type-column-missing",
        lambda toml: f'{toml}[events]\ntype = "event_type"\n',
        Outcome(check=lambda shop: _type_counts(shop) == _TYPE_COUNTS),
    ),
}
"""For each advice: its case, the edit of shop.toml, and the outcome after the edit."""
