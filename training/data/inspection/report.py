"""`vitrine inspect`: show what a shop's files hold and how they are read, as tables or as JSON.

Trains nothing. `verdict.py` decides whether training may use the files.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from services.catalog.markup import plain_text
from training.core.base_models import unknown_share
from training.data.column_match import FIELDS, similar_columns
from training.data.dataset import ShopData, survey_shop
from training.data.inspection.verdict import assess_shop, events_by_day
from training.data.table_report import TableReport
from training.data.values.values import as_json_texts

_SAMPLES = 3
_SAMPLE_LENGTH = 32
_MIN_WIDTH = 110
_MAX_BARS = 60
_BAR_WIDTH = 40
_BARS = " ▁▂▃▄▅▆▇█"


def inspect_shop(directory: Path, settings_file: Path | None, until: datetime | None) -> dict[str, Any]:
    """How a shop directory is read, as values of JSON.

    Raises:
        FailedPrecondition: a file is missing or unreadable.
        InvalidArgument: shop.toml is wrong.
    """
    shop = survey_shop(directory, settings_file, until)
    verdict = assess_shop(shop)
    titles = [plain_text(item.title) for item in shop.items]
    days, counts = events_by_day(shop)
    return {
        "files": {name: _file(name, report, shop.tables[name].rows) for name, report in shop.reports.items()},
        "images": {
            "summary": shop.images.report.summary,
            "files": shop.images.report.files,
            "items": len(shop.images.report.matching.of_item),
            "unmatched": list(shop.images.report.matching.unmatched),
        },
        "events_by_type": _by_type(shop),
        "events_by_day": {
            _date(day): count for day, count in zip(days.tolist(), counts.tolist(), strict=True)
        },
        "events_by_day_and_type": _by_day_and_type(shop, days),
        "unknown_tokens": unknown_share(shop.settings.text.base, titles),
        "verdict": {
            "refused": bool(verdict.reasons),
            "reasons": verdict.reasons,
            "warnings": verdict.warnings,
        },
    }


def print_inspection(inspection: Mapping[str, Any], *, as_json: bool) -> None:
    """Print an inspection: JSON, or tables and plots."""
    if as_json:
        json.dump(inspection, sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
        return
    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, _MIN_WIDTH))
    for file in inspection["files"].values():
        _print_file(console, file)
    console.print(
        f"[bold]Images[/bold]  {escape(inspection['images']['summary'].removeprefix('images: '))}\n"
    )
    _print_events(console, inspection)
    _print_verdict(console, inspection)


def _file(name: str, report: TableReport, rows: pa.Table) -> dict[str, Any]:
    match = report.match
    assert match is not None  # noqa: S101 - every table is matched
    columns = [(field, column) for field, column in match.fields.items()]
    columns += [(f"attribute {field}", column) for field, column in match.attributes.items()]
    filled = {column: _value_count(rows[column]) for _, column in columns}
    empty = [field for field in FIELDS[name] if field not in match.fields]
    suggestions = {
        column: field for field in empty for column in similar_columns(field, field, match.unused)[:1]
    }
    return {
        "file": report.file,
        "fields": {
            field: {
                "column": column,
                "filled": report.value_counts.get(field, filled[column]) / max(rows.num_rows, 1),
                "format": report.formats.get(field, ""),
                "samples": _samples(rows[column]),
            }
            for field, column in columns
        },
        "unused_columns": {
            column: {"samples": _samples(rows[column]), "may_be": suggestions.get(column, "")}
            for column in match.unused
        },
        "problems": report.problems,
        **report.to_dict(),
    }


def _value_count(column: pa.ChunkedArray) -> int:
    return int(len(column) - column.null_count)


def _samples(column: pa.ChunkedArray) -> list[str]:
    values = as_json_texts(column.slice(0, 1000)).drop_null().to_pylist()
    return list(dict.fromkeys(map(str, values)))[:_SAMPLES]


def _by_type(shop: ShopData) -> dict[str, int]:
    types = list(shop.settings.event_types)
    counts = np.bincount(shop.events.kind, minlength=len(types)).tolist()
    return dict(zip(types, counts, strict=True))


def _by_day_and_type(shop: ShopData, days: np.ndarray) -> dict[str, list[int]]:
    """The events of each of the days, by type."""
    if not len(days):
        return {}
    day = shop.events.time // 86_400_000_000 - days[0]
    return {
        name: np.bincount(day[shop.events.kind == kind], minlength=len(days)).tolist()
        for kind, name in enumerate(shop.settings.event_types)
    }


def _date(day: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)).date().isoformat()


def _print_file(console: Console, file: Mapping[str, Any]) -> None:
    loss = file["read"] - file["kept"]
    console.print(
        f"[bold]{escape(file['file'])}[/bold]  {file['read']:,} rows read, {file['kept']:,} used"
        + (f", [yellow]{loss:,} not[/yellow]" if loss else "")
    )
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("field", "column", "filled", "read as", "samples"):
        grid.add_column(name, justify="right" if name == "filled" else "left", overflow="fold")
    for field, values in file["fields"].items():
        samples = " · ".join(_shorten(sample) for sample in values["samples"])
        cells = values["column"], f"{values['filled']:.0%}", values["format"], samples
        grid.add_row(field, *map(escape, cells))
    console.print(grid)
    for column, values in file["unused_columns"].items():
        samples = " · ".join(_shorten(sample) for sample in values["samples"])
        may_be = f"  [yellow]is it {values['may_be']}?[/yellow]" if values["may_be"] else ""
        console.print(f"  unused column [bold]{escape(column)}[/bold]{may_be}  [dim]{escape(samples)}[/dim]")
    for reason, count in file["reasons"].items():
        parts = (", ".join(file[name].get(reason, ())) for name in ("examples", "samples"))
        details = escape("; ".join(part for part in parts if part))
        shown = f"  [dim]({details})[/dim]" if details else ""
        console.print(f"  {count:>9,}  {escape(reason)}{shown}")
    for note in file["notes"]:
        console.print(f"  [dim]{escape(note)}[/dim]")
    console.print()


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SAMPLE_LENGTH else f"{flat[: _SAMPLE_LENGTH - 1]}…"


def _print_events(console: Console, inspection: Mapping[str, Any]) -> None:
    by_type, by_day = inspection["events_by_type"], inspection["events_by_day"]
    if not by_day:
        return
    span = f"{min(by_day)} to {max(by_day)}, {len(by_day):,} days"
    console.print(f"[bold]Events by day[/bold]  {span}")
    width = max(len(name) for name in [*by_type, "all"])
    plots = {"all": list(by_day.values()), **inspection["events_by_day_and_type"]}
    for name, counts in plots.items():
        top = max(counts)
        console.print(f"  {escape(name):<{width}} │{_bars(counts)}│ at most {top:,} a day")
    console.print("\n[bold]Events by type[/bold]")
    top = max(by_type.values())
    for name, count in by_type.items():
        bar = "█" * round(_BAR_WIDTH * count / max(top, 1))
        share = count / max(sum(by_type.values()), 1)
        console.print(f"  {escape(name):<{width}} {count:>12,} {share:>6.1%} {bar}")
    console.print()


def _bars(counts: Sequence[int]) -> str:
    """A bar for each day, or for several days where there are more than 60; no bar is exactly zero."""
    step = -(-len(counts) // _MAX_BARS)
    sums = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    top = max(*sums, 1)
    return "".join(_BARS[0 if not value else max(1, round((len(_BARS) - 1) * value / top))] for value in sums)


def _print_verdict(console: Console, inspection: Mapping[str, Any]) -> None:
    verdict, unknown = inspection["verdict"], inspection["unknown_tokens"]
    if unknown is not None:
        console.print(f"[bold]Titles[/bold]  the text base does not know {unknown:.1%} of their tokens\n")
    for warning in verdict["warnings"]:
        console.print(f"[yellow]warning[/yellow]  {escape(warning)}")
    for reason in verdict["reasons"]:
        console.print(f"[red]refused[/red]  {escape(reason)}")
    if not verdict["reasons"]:
        console.print("[green]Training would use these files.[/green]")
