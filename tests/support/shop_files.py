"""The files of a small shop, and what training says of them."""

import csv
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.core.errors import FailedPrecondition
from training.data.dataset import ShopData, survey_shop
from training.data.inspection.verdict import Verdict, assess_shop

Row = dict[str, Any]
TOML = '[items]\ntext_attributes = ["colour"]\n[event_types]\nview = 0.2\ncart = 0.5\npurchase = 1.0\n'
LAST = datetime(2026, 11, 27, 20, tzinfo=UTC)


def items(count: int = 40) -> list[Row]:
    return [
        {"id": f"sku-{n:03}", "title": f"Hat {n}", "price": f"{n + 1}.50", "colour": "red"}
        for n in range(count)
    ]


def events(count: int = 1200, **columns: Callable[[int], object]) -> list[Row]:
    rows = []
    for n in range(count):
        row: Row = {
            "user_id": f"u{n % 50}",
            "item_id": f"sku-{n * 7 % 40:03}",
            "type": ("view", "view", "cart", "purchase")[n % 4],
            "time": (LAST - timedelta(minutes=20 * (count - n))).isoformat(),
        }
        rows.append(row | {name: of(n) for name, of in columns.items()})
    return rows


def write(directory: Path, items: list[Row], events: list[Row] | None, toml: str | None = TOML) -> Path:
    for name, rows in (("items", items), ("events", events)):
        if rows is not None:
            with (directory / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    if toml is not None:
        (directory / "shop.toml").write_text(toml)
    return directory


def judge(directory: Path) -> tuple[ShopData, Verdict]:
    shop = survey_shop(directory)
    return shop, assess_shop(shop)


def refusal(directory: Path) -> str:
    with pytest.raises(FailedPrecondition) as caught:
        assess_shop(survey_shop(directory)).require(allow_losses=False)
    return str(caught.value)


def rename_column(rows: list[Row], old: str, new: str) -> list[Row]:
    return [{new if name == old else name: value for name, value in row.items()} for row in rows]
