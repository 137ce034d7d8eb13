"""Every preset makes a shop that training reads, and other files are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from services.core.errors import FailedPrecondition
from training.data.dataset import survey_shop
from training.data.presets import PRESETS
from training.data.presets.conversion import convert


def lines(*rows: str) -> str:
    return "\n".join(rows) + "\n"


def ga4(name: str, second: int, *items: object) -> str:
    event = {"event_name": name, "event_timestamp": f"17940107{second:02}000000", "user_pseudo_id": "v1"}
    session = [None, {"key": "ga_session_id", "value": {"int_value": "7"}}]
    return json.dumps(event | {"items": list(items), "event_params": session})


MUG, CUP = ({"item_id": name, "item_name": name.title()} for name in ("mug", "cup"))
EVENTS = lines(
    "user_id,item_id,type,time", *(f"u{n},{item},purchase,2026-11-{n:02}" for n in (1, 2) for item in "ab")
)
EXPORTS: dict[str, dict[str, str]] = {
    "shopify": {
        "products_export.csv": "Handle,Title,Variant SKU,Variant Price,Image Src\n"
        "mug,Mug,a,9.5,https://s.example.com/a.jpg\ncup,Cup,b,8,\n",
        "events.csv": EVENTS,
    },
    "woocommerce": {
        "wc-product-export.csv": "ID,Type,SKU,Name,Published,Regular price\n"
        "1,simple,a,Mug,1,9\n2,simple,b,Cup,1,8\n",
        "events.csv": EVENTS,
    },
    "magento": {
        "export_catalog_product.csv": "sku,product_type,name,product_online,price\n"
        "a,simple,Mug,1,9\nb,simple,Cup,1,8\n",
        "events.csv": EVENTS,
    },
    "merchant": {"feed.csv": "g:id,g:title,g:price\na,Mug,9 EUR\nb,Cup,8 EUR\n", "events.csv": EVENTS},
    "ga4": {
        "events_20261107.jsonl": lines(
            ga4("view_item_list", 1, MUG, CUP), ga4("purchase", 2, MUG, None), ga4("view_item", 3, CUP)
        )
    },
    "retailrocket": {
        "events.csv": "timestamp,visitorid,event,itemid\n"
        "1433221332117,1,view,a\n1433221332118,1,addtocart,a\n1433221332119,1,transaction,b\n"
        "1433221332120,2,view,b\n",
        "item_properties_part1.csv": "timestamp,itemid,property,value\n"
        "1431226800000,a,categoryid,1\n1431226800000,b,categoryid,2\n",
    },
    "rees46": {
        "2019-Oct.csv": "event_time,event_type,product_id,category_id,category_code,brand,price,user_id\n"
        "2019-10-01 00:00:00 UTC,view,a,1,home.mug,nord,9,1\n"
        "2019-10-01 00:00:01 UTC,purchase,a,1,home.mug,nord,9,1\n"
        "2019-10-01 00:00:02 UTC,cart,b,1,home.cup,nord,8,2\n"
        "2019-10-01 00:00:03 UTC,remove_from_cart,b,1,,,8,2\n"
    },
    "taobao": {
        "UserBehavior.csv": "1,a,7,pv,1511544070\n1,a,7,buy,1511544071\n"
        "2,b,7,fav,1511544072\n2,b,7,cart,1511544073\n"
    },
    "online-retail": {
        "OnlineRetail.csv": "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID\n"
        "1,a,MUG,1,2010-12-01 08:26,9,1\n1,b,CUP,1,2010-12-01 08:26,8,1\n2,a,MUG,1,2010-12-02 08:26,9,2\n"
        "2,b,CUP,1,2010-12-02 08:26,8,2\n"
    },
    "movielens": {
        "movies.csv": "movieId,title,genres\na,Mug (2001),Comedy|Drama\nb,Cup (2002),Drama\n",
        "ratings.csv": "userId,movieId,rating,timestamp\n1,a,5.0,1794010711\n1,b,2.0,1794010712\n"
        "2,a,4.0,1794010713\n2,b,1.0,1794010714\n",
    },
}  # fmt: skip


def export(directory: Path, files: dict[str, str]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def of_preset(directory: Path, name: str, tmp_path: Path) -> Path:
    (directory / "shop.toml").write_text(f'[source]\npreset = "{name}"\n')
    return directory


def import_shop(directory: Path, name: str, tmp_path: Path) -> Path:
    list(convert(PRESETS[name], directory, tmp_path / "shop"))
    if "events.csv" in EXPORTS[name] and not PRESETS[name].events:
        (tmp_path / "shop" / "events.csv").write_text(EXPORTS[name]["events.csv"])
    return tmp_path / "shop"


@pytest.mark.parametrize("way", [of_preset, import_shop])
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_makes_a_shop(name: str, way: Callable[[Path, str, Path], Path], tmp_path: Path) -> None:
    shop = survey_shop(way(export(tmp_path / "export", EXPORTS[name]), name, tmp_path))
    assert {report.rows_lost for report in shop.reports.values()} == {0}
    assert not [problem for report in shop.reports.values() for problem in report.problems]
    assert (len(shop.items), len(shop.events)) == (2, 4)
    assert all(item.title for item in shop.items)
    assert {shop.events.item_ids[at] for at in shop.events.item} == {item.id for item in shop.items}
    named_images = shop.images.report.matching.addresses
    assert bool(named_images) == ("https://" in "".join(EXPORTS[name].values()))


@pytest.mark.parametrize("name", list(PRESETS))
def test_files_of_another_layout_are_refused_with_missing_and_present_columns(
    name: str, tmp_path: Path
) -> None:
    files = {
        file: '{"alpha": "1", "beta": "2"}\n' if file.endswith("jsonl") else "alpha,beta\n1,2\n"
        for file in EXPORTS[name]
    }
    directory = of_preset(export(tmp_path / "export", files), name, tmp_path)
    with pytest.raises(FailedPrecondition) as caught:
        survey_shop(directory)
    assert "alpha" in str(caught.value)
    assert "beta" in str(caught.value)
    for part in PRESETS[name].items[0].required:
        assert " or ".join(part) in str(caught.value)


def test_a_translated_export_is_refused_with_advice(tmp_path: Path) -> None:
    files = {"products.csv": "ID,Typ,Artikelnummer,Name\n1,simple,a,Tasse\n"}
    directory = of_preset(export(tmp_path / "export", files), "woocommerce", tmp_path)
    with pytest.raises(FailedPrecondition, match=r"no column Type; it has ID, Typ.* export it in English"):
        survey_shop(directory)


@pytest.mark.parametrize(
    ("name", "file", "row", "reason"),
    [
        ("retailrocket", "item_properties_part1.csv", "abc,c,categoryid,5\n", "timestamp is no number"),
        ("retailrocket", "item_properties_part1.csv", ",c,categoryid,5\n", "timestamp is no number"),
        ("movielens", "ratings.csv", "1,a,good,1794010711\n", "rating is no number"),
        ("movielens", "ratings.csv", "1,a,,1794010711\n", "rating is no number"),
    ],
)
def test_an_unreadable_value_loses_its_row(
    name: str, file: str, row: str, reason: str, tmp_path: Path
) -> None:
    directory = of_preset(export(tmp_path / "export", EXPORTS[name]), name, tmp_path)
    with (directory / file).open("a") as stream:
        stream.write(row)
    shop = survey_shop(directory)
    losses = {text: count for report in shop.reports.values() for text, count in report.reasons.items()}
    assert [count for text, count in losses.items() if reason in text] == [1]
    assert (len(shop.items), len(shop.events)) == (2, 4)


def test_invalid_items_of_an_event_are_counted(tmp_path: Path) -> None:
    directory = of_preset(export(tmp_path / "export", EXPORTS["ga4"]), "ga4", tmp_path)
    notes = survey_shop(directory).reports["events"].notes
    assert any("values among their items that are no objects" in note for note in notes)
