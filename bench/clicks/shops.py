"""Writes a log of pages as a shop directory: items, reads and clicks as events, pages as impressions.

A page is a session of its own, so that a click belongs to the page on which it happened: it is logged a
second after the page. The order of items on a page is unknown (MIND's is shuffled): there are no positions.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.clicks.logs import ClickLog, Page, Read, by_rising_id

_SHOP = """
[items]
{items}
[event_types]
click = 1.0
impression = 0.0
[text]
{text}
[time]
granularity = "10min"
[graph]
trials = 0
[sequence]
epochs = {epochs}
[ranking]
ranking_days = {days}
max_queries = 500
max_pages = 100000
"""
_ITEMS = {
    "mind": 'text_attributes = ["category"]',
    "ebnerd": 'text_attributes = ["premium"]\nnumber_attributes = ["article_length"]',
}
_TEXT = {
    "mind": 'mode = "frozen"\nmax_tokens = 32',
    "ebnerd": 'mode = "frozen"\nmax_tokens = 4\nprojection_steps = 0',
}
# A sequence model of EB-NeRD would know ids alone.
_EPOCHS = {"mind": 12, "ebnerd": 0}
_CLICK_DELAY = timedelta(seconds=1)
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("user_id", "item_id", "session_id", "type")]
    + [("time", pa.timestamp("us", "UTC"))]
)
_Event = tuple[str, str, str | None, str, datetime]


def write_shop(
    name: str, log: ClickLog, start: datetime, directory: Path, without: Sequence[str] = ()
) -> None:
    """Write what a shop knows at `start` as a directory that `vitrine train` reads.

    `without` leaves out parts: "history" the reads before the log, "freshness" the times of publication.
    """
    directory.mkdir(parents=True, exist_ok=True)
    published = {} if "freshness" in without else log.published()
    if name == "ebnerd":
        published = by_rising_id(published)
    ids = sorted(log.published())
    # An item without a title has its number as a title, as catalogs without texts do.
    rows = [{"id": i, "title": i, **log.items.get(i, {}), "available_from": published.get(i)} for i in ids]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    items = pa.table({column: [row.get(column) for row in rows] for column in columns})
    pq.write_table(items, directory / "items.parquet")
    reads = [] if "history" in without else [read for read in log.reads if read.time < start]
    write_events(directory / "events.parquet", reads, [page for page in log.pages if page.time < start])
    first = log.pages[0].time.date()
    days = max(2, (start - timedelta(microseconds=1)).date().toordinal() - first.toordinal() + 1)
    (directory / "shop.toml").write_text(
        _SHOP.format(items=_ITEMS[name], text=_TEXT[name], days=days, epochs=_EPOCHS[name])
    )


def write_events(path: Path, reads: Sequence[Read], pages: Sequence[Page]) -> None:
    """Write reads, pages and clicks as an events file."""
    events = sorted(_events(reads, pages), key=lambda event: event[-1])
    columns = zip(*events, strict=True) if events else [()] * len(_SCHEMA)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
    pq.write_table(pa.table(arrays, schema=_SCHEMA), path)


def _events(reads: Sequence[Read], pages: Sequence[Page]) -> Iterator[_Event]:
    for read in reads:
        yield read.user, read.item, None, "click", read.time
    for page in pages:
        for item in page.shown:
            yield page.user, item, page.id, "impression", page.time
            if item in page.clicked:
                yield page.user, item, page.id, "click", page.time + _CLICK_DELAY
