"""Read a shop directory: items, events, images, and a report on each table.

A bad row does not stop the run: it is dropped and counted with its reason. `verdict.py` judges the losses.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from services.core.errors import FailedPrecondition
from training.data.config import ShopConfig
from training.data.events import Events
from training.data.events_file import read_events
from training.data.images import ShopImages
from training.data.items_file import read_items
from training.data.presets import PRESETS
from training.data.settings_file import read_settings
from training.data.shop import ShopData
from training.data.shop_tables import ShopTable, open_table
from training.data.table_report import TableReport

_MAY_HOLD_EVENTS = re.compile(r"\.(csv|tsv|jsonl?|ndjson|parquet|xlsx|dat)(\.\w+)?$", re.IGNORECASE)

__all__ = ["Events", "ShopData", "TableReport", "read_catalog", "read_shop", "survey_shop"]


def read_shop(directory: Path, settings_file: Path | None = None, until: datetime | None = None) -> ShopData:
    """Read a shop directory, with the events before `until`.

    Raises:
        FailedPrecondition: a file is missing, unreadable or empty, lacks a column, or has no usable row.
        InvalidArgument: shop.toml is wrong.
    """
    shop = survey_shop(directory, settings_file, until)
    for report in shop.reports.values():
        if report.problems:
            raise FailedPrecondition("; ".join(report.problems))
    for report in shop.reports.values():
        if not report.rows_used:
            reasons = "; ".join(entry.describe(reason) for reason, entry in report.entries.items())
            raise FailedPrecondition(
                f"{report.file} has no usable row: {reasons or 'no row is before --until'}"
            )
    return shop


def survey_shop(
    directory: Path, settings_file: Path | None = None, until: datetime | None = None
) -> ShopData:
    """Read a shop directory for a report on it: a table with problems has no rows here and raises no error.

    Raises:
        FailedPrecondition: a file is missing or unreadable.
        InvalidArgument: shop.toml is wrong.
    """
    settings, images, items_table = _open_items(directory, settings_file, "")
    preset, tables = settings.source.preset, {"items": items_table}
    if _has_events(directory, settings, items_table.table.paths):
        types = list(dict.fromkeys((settings.default_type, *settings.event_types)))
        tables["events"] = open_table(directory, "events", settings.events, types, preset)
    items = [] if items_table.report.problems else read_items(items_table, images)
    events = Events.none()
    if (events_table := tables.get("events")) and not events_table.report.problems:
        events = read_events(events_table, settings, until, {item.id for item in items})
    reports = {name: table.report for name, table in tables.items()}
    return ShopData(settings, items, events, images, reports, {n: t.table for n, t in tables.items()})


def read_catalog(directory: Path, settings_file: Path | None = None, file: str = "") -> ShopData:
    """A shop directory's items and images, without events; the items come from `file` if it is not empty.

    Raises:
        FailedPrecondition: the items file is missing, unreadable or empty, or lacks a column.
        InvalidArgument: shop.toml is wrong.
    """
    settings, images, items_table = _open_items(directory, settings_file, file)
    if items_table.report.problems:
        raise FailedPrecondition("; ".join(items_table.report.problems))
    items = read_items(items_table, images)
    return ShopData(
        settings, items, Events.none(), images, {"items": items_table.report}, {"items": items_table.table}
    )


def _open_items(
    directory: Path, settings_file: Path | None, file: str
) -> tuple[ShopConfig, ShopImages, ShopTable]:
    default = directory / "shop.toml"
    settings = read_settings(settings_file or (default if default.is_file() else None))
    columns = settings.items.model_copy(update={"file": file}) if file else settings.items
    items_table = open_table(directory, "items", columns, preset=settings.source.preset)
    settings = settings.model_copy(update={"items": items_table.columns})
    return settings, ShopImages(directory / "images"), items_table


def _has_events(directory: Path, settings: ShopConfig, items: Sequence[Path]) -> bool:
    """Whether the directory has an events file, or any file that may be one.

    Only a directory without such a file counts as a shop without events.
    """
    preset = PRESETS.get(settings.source.preset)
    if settings.events.file or (preset and any(part.find(directory) for part in preset.events)):
        return True
    other_files = {path.name for path in items} | {settings.items.file, *settings.task.queries.values()}
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")} - other_files
    return any(name.startswith("events") or _MAY_HOLD_EVENTS.search(name) for name in names)
