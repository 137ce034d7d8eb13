"""Exports of known shop systems and data sets as the tables that `shop.toml` describes by default.

A preset finds the files of an export, and turns them into items with the columns id, title, description
and so on, and into events with user_id, item_id, type, time and so on. Every further column of the items is a
text attribute. A preset does not check values: that is the same for every shop.
"""

from training.data.presets import logs, ratings, shops
from training.data.presets.preset import Preset

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        shops.SHOPIFY,
        shops.WOOCOMMERCE,
        shops.MAGENTO,
        shops.MERCHANT,
        logs.GA4,
        logs.RETAILROCKET,
        logs.REES46,
        logs.TAOBAO,
        logs.ONLINE_RETAIL,
        ratings.MOVIELENS,
    )
}
"""Every preset by its name in shop.toml's `[source] preset`."""


def suggestion(columns: list[str]) -> str:
    """The name of the preset whose export has these columns, or ""."""
    present = set(columns)
    return next((name for name, preset in PRESETS.items() if preset.signature <= present), "")


def suggestion_without_header(file: str) -> str:
    """The name of the preset whose export has a file without a header under this name, or ""."""
    for name, preset in PRESETS.items():
        if any(part.dialect.columns and part.fits(file) for part in (*preset.items, *preset.events)):
            return name
    return ""


__all__ = ["PRESETS", "Preset", "suggestion", "suggestion_without_header"]
