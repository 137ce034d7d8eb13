"""`vitrine import-shop`: an export of a known kind becomes a shop directory to read and to correct."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from services.core.errors import FailedPrecondition
from training.data.presets.preset import Preset
from training.data.readers.reader import Table

STANDARD_COLUMNS = frozenset(
    (
        "id",
        "title",
        "description",
        "family_id",
        "price",
        "image",
        "image_url",
        "available_from",
        "available_until",
    )
)
"""Columns of items with a meaning of their own; every further column is a text attribute."""


def attributes(table: Table) -> list[str]:
    """The text attributes of items in the standard form."""
    return [name for name in table.rows.column_names if name not in STANDARD_COLUMNS]


def convert(preset: Preset, directory: Path, out: Path) -> Iterator[str]:
    """Write the export in `directory` as a shop directory `out`; lines that say what was read and written.

    Raises:
        FailedPrecondition: the export has no items, or `out` holds a shop already.
    """
    if (out / "shop.toml").exists():
        raise FailedPrecondition(f"{out} holds a shop.toml already: choose another --out, or remove it")
    items, events = preset.read("items", directory), preset.read("events", directory)
    assert items is not None  # noqa: S101 - an export without items is refused
    out.mkdir(parents=True, exist_ok=True)
    for stem, table in (("items", items), ("events", events)):
        if table is not None:
            pq.write_table(table.rows, out / f"{stem}.parquet")
            yield f"{table.name}: {table.rows.num_rows} rows written to {out / stem}.parquet"
            yield from (f"  {note}" for note in table.notes)
    if events is None:
        yield (
            f"an export of {preset.name} has no events: put them into {out}/events.csv with the columns "
            "user_id, item_id, type and time"
        )
    (out / "shop.toml").write_text("\n".join(_settings(preset, items)) + "\n", encoding="utf-8")
    yield f"settings written to {out / 'shop.toml'}: `vitrine inspect --data {out}` shows what training reads"


def _settings(preset: Preset, items: Table) -> Iterator[str]:
    """The lines of a shop.toml, in which JSON's texts, numbers and lists are TOML's."""
    yield f"# Made from {preset.description}."
    yield "[items]"
    yield f"text_attributes = {_toml(attributes(items))}"
    for name in ("image", "image_url"):
        if name in items.rows.column_names:
            yield f"{name} = {_toml(name)}"
    for section, values in preset.settings.items():
        yield f"\n[{section}]"
        for name, value in values.items():
            yield f"{_toml(name)} = {_toml(value)}"


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
