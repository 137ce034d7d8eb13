"""Reads the MIND sample and the EB-NeRD demo into one form: items, reads before the log, pages with clicks.

What the files do not say is filled in like this:

* **MIND, times of reads.** A user's history has an order and no times. It is spread evenly over the four
  weeks before the log, the last read a day before it.
* **Publication.** Neither data set says when an article appeared. It counts as published when it was
  first read or shown. The ids of EB-NeRD rise with time, so an article is no younger than any with a higher
  id. Nothing of this uses what is later than the first time that an article was seen: on any page, its age
  follows from earlier pages and from that page.
* **Items of the future.** The catalog holds the items of the whole log, those of held-out days too.
* **EB-NeRD** has no texts: an item is its length and whether it is for subscribers. Read times and scroll
  depths are outcomes and are not read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

_WEEKS = timedelta(weeks=4)
_DAY = timedelta(days=1)
_MIND_START = datetime(2019, 11, 9, tzinfo=UTC)
_MIND_TIME = "%m/%d/%Y %I:%M:%S %p"
_ARTICLE_FILES = {"article_length": "article_length.parquet", "premium": "premium_articles.parquet"}


@dataclass(frozen=True)
class Read:
    """A user read an item, on a page that the log does not have."""

    user: str
    item: str
    time: datetime


@dataclass(frozen=True)
class Page:
    """The items that a user was shown at a time, and which of them were clicked."""

    id: str
    user: str
    time: datetime
    shown: tuple[str, ...]
    clicked: frozenset[str]


@dataclass(frozen=True)
class Period:
    """A split: models are trained on what was before `start`, and pages from then to `end` are scored."""

    start: datetime
    end: datetime


@dataclass(frozen=True)
class ClickLog:
    """The items by id, each with its columns; pages in the order of time; splits by name.

    `reads` are known in training, `later_reads` only when pages of the test split are scored.
    """

    items: Mapping[str, Mapping[str, Any]]
    reads: Sequence[Read]
    later_reads: Sequence[Read]
    pages: Sequence[Page]
    periods: Mapping[str, Period]

    def published(self) -> dict[str, datetime]:
        """When each item was first read or shown; those that never were are missing."""
        first: dict[str, datetime] = {}
        seen = [(read.item, read.time) for read in (*self.reads, *self.later_reads)]
        seen += [(item, page.time) for page in self.pages for item in page.shown]
        for item, time in seen:
            first[item] = min(time, first.get(item, time))
        return first


def read_mind(directory: Path) -> ClickLog:
    """The MIND sample; val is 11-13, test 11-14."""
    items = {}
    for line in _lines(directory / "news.tsv", 1):
        item, category, _, title, *_ = line.split("\t")
        items[item] = {"title": title, "category": category}
    histories: dict[str, list[str]] = {}
    pages = []
    for line in _lines(directory / "behaviors.tsv"):
        number, user, text, history, shown = line.split("\t")
        time = datetime.strptime(text, _MIND_TIME).replace(tzinfo=UTC)
        histories[user] = history.split()
        entries = [entry.rpartition("-") for entry in shown.split()]
        clicked = frozenset(item for item, _, label in entries if label == "1")
        pages.append(Page(number, user, time, tuple(item for item, _, _ in entries), clicked))
    reads = [read for user, history in histories.items() for read in _spread(user, history)]
    days = [datetime(2019, 11, day, tzinfo=UTC) for day in (13, 14, 15)]
    periods = {"val": Period(days[0], days[1]), "test": Period(days[1], days[2])}
    return ClickLog(items, reads, [], sorted(pages, key=lambda page: page.time), periods)


def read_ebnerd(directory: Path) -> ClickLog:
    """The EB-NeRD demo; val is the last day of its training part, test its validation part."""
    items: dict[str, dict[str, Any]] = {}
    for column, file in _ARTICLE_FILES.items():
        for row in pq.read_table(directory / file).to_pylist():
            value = row[column]
            items.setdefault(str(row["article_id"]), {})[column] = (
                ("yes" if value else "no") if column == "premium" else value
            )
    reads = {part: _ebnerd_reads(directory / part / "history.parquet") for part in ("train", "validation")}
    pages = {part: _ebnerd_pages(directory / part / "behaviors.parquet") for part in reads}
    days = [datetime(2023, 5, 24, 7, tzinfo=UTC), datetime(2023, 5, 25, 7, tzinfo=UTC)]
    periods = {"val": Period(*days), "test": Period(days[1], datetime(2023, 6, 2, tzinfo=UTC))}
    # Clicks of training pages are in the later histories as well.
    known = {(read.user, read.item) for read in reads["train"]}
    known |= {(page.user, item) for page in pages["train"] for item in page.clicked}
    later = [read for read in reads["validation"] if (read.user, read.item) not in known]
    return ClickLog(items, reads["train"], later, [*pages["train"], *pages["validation"]], periods)


def by_rising_id(published: Mapping[str, datetime]) -> dict[str, datetime]:
    """Times of publication for ids that rise with time: no item is younger than one with a higher id."""
    earliest, times = None, {}
    for item in sorted(published, key=int, reverse=True):
        earliest = published[item] if earliest is None else min(earliest, published[item])
        times[item] = earliest
    return times


def _ebnerd_reads(path: Path) -> list[Read]:
    columns = ["user_id", "article_id_fixed", "impression_time_fixed"]
    return [
        Read(str(row["user_id"]), str(item), time.replace(tzinfo=UTC))
        for row in pq.read_table(path, columns=columns).to_pylist()
        for item, time in zip(row["article_id_fixed"], row["impression_time_fixed"], strict=True)
    ]


def _ebnerd_pages(path: Path) -> list[Page]:
    columns = ["impression_id", "user_id", "impression_time", "article_ids_inview", "article_ids_clicked"]
    pages = [
        Page(
            str(row["impression_id"]),
            str(row["user_id"]),
            row["impression_time"].replace(tzinfo=UTC),
            tuple(map(str, row["article_ids_inview"])),
            frozenset(map(str, row["article_ids_clicked"])),
        )
        for row in pq.read_table(path, columns=columns).to_pylist()
    ]
    return sorted(pages, key=lambda page: page.time)


def _spread(user: str, history: Sequence[str]) -> Iterable[Read]:
    step = (_WEEKS - _DAY) / max(len(history), 1)
    for place, item in enumerate(reversed(history)):
        yield Read(user, item, _MIND_START - _DAY - place * step)


def _lines(path: Path, skip: int = 0) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")[skip:]


READERS = {"mind": read_mind, "ebnerd": read_ebnerd}
FOLDERS = {"mind": "mind_sample", "ebnerd": "ebnerd_demo"}
