"""Statistics of every item as of a point in time: popularity, age and price.

Only events recorded before that time count. The time is a tick of the shop's granularity: training and
serving use the same ticks.
"""

import threading
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.growing_array import appended
from services.core.sorted_arrays import find
from services.ranking.state.event_columns import EventState

_MINUTE = 60_000_000
HOUR = 60 * _MINUTE
DAY = 24 * HOUR
WINDOWS = (1, 3, 7, 30)
ITEM_COLUMNS = (
    *(f"popular_{days}d" for days in WINDOWS),
    "popular_ever",
    "rising",
    "age_days",
    "idle_days",
)
"""The columns of an item that need no user: see `item_columns`."""
RECENT_HOURS = (1, 6, 24)
_SHARE_HOURS = (6, 24)
RECENT_COLUMNS = (
    "popular_1h",
    "popular_6h",
    *(f"shown_{hours}h" for hours in RECENT_HOURS),
    *(f"engaged_share_{hours}h" for hours in _SHARE_HOURS),
    "listed_hours",
)
"""The columns of what happened to an item in the last hours, and of its arrival: see `recent_columns`."""
# Impressions with the mean share of engagements, added to those of an item.
_SHARE_PRIOR = 10.0


@dataclass(frozen=True)
class Ticks:
    """The times of statistics, every `length` microseconds.

    The statistics of a tick hold from `delay` microseconds after it. Meanwhile they can be prepared, once
    every event that was recorded before the tick is in memory, so that no request has to wait for them.
    """

    length: int
    delay: int = 0

    def at(self, time: int) -> int:
        """The tick whose statistics hold at a time; both in microseconds since 1970."""
        return self._last(time - self.delay)

    def upcoming(self, time: int) -> int | None:
        """The tick whose statistics can be prepared at a time; None if there is none."""
        latest = self._last(time - _COMMIT_TIME)
        return latest if latest > self.at(time) else None

    def is_over(self, tick: int, time: int) -> bool:
        """Whether no request at a time or shortly before it uses the statistics of a tick."""
        return time >= tick + self.length + self.delay + _COMMIT_TIME

    def _last(self, time: int) -> int:
        return time - time % self.length


# By that time after a tick, an event that was recorded before it is committed and in memory.
_COMMIT_TIME = _MINUTE
# With days, nothing of the same day counts: midnight is a time like any other there, and queries begin at it.
TICKS = {
    "10min": Ticks(10 * _MINUTE, 2 * _MINUTE),
    "hour": Ticks(HOUR, 5 * _MINUTE),
    "day": Ticks(DAY),
}


class Derived:
    """What is derived from statistics, by the cache that computes it; `lock` is for who adds to it."""

    def __init__(self) -> None:
        self.by_cache, self.lock = dict[Any, Any](), threading.RLock()


@dataclass(frozen=True)
class ItemStats:
    """Columns over the N rows of an item table, float32, NaN for unknown.

    `tick` is the time, microseconds since 1970; `counted` rows were there when they were computed, the others
    are new. `popular` (N, 5): weight of the interactions in the last 1,
    3, 7 and 30 days and ever; `age` and `idle` (N,): days since the first and the last interaction; `price`
    (N,): the last one paid, else the list price; `highest` (N,): the highest one paid; `channels` (N, K):
    weight of the interactions of the last 30 days in each of the shop's channels; `recent` (N, 3) and
    `shown` (N, 3): weight of the interactions and number of the impressions in the last 1, 6 and 24 hours;
    `share` (N, 2): interactions by impression in the last 6 and 24 hours, drawn to the mean of all items,
    NaN for an item without impressions; `listed` (N,): hours since it arrived in the shop. Statistics with
    rows for new items share `derived` with those that they extend.
    """

    tick: int
    counted: int
    popular: np.ndarray
    age: np.ndarray
    idle: np.ndarray
    price: np.ndarray
    highest: np.ndarray
    channels: np.ndarray
    recent: np.ndarray
    shown: np.ndarray
    share: np.ndarray
    listed: np.ndarray
    derived: Derived = field(default_factory=Derived, repr=False)

    @property
    def length(self) -> int:
        """The number of rows."""
        return len(self.age)


def item_columns(rows: np.ndarray, stats: ItemStats) -> list[np.ndarray]:
    """The columns `ITEM_COLUMNS` of table rows, int64 (C,): each float32 (C,), NaN for unknown."""
    popular = stats.popular[rows]
    rising = (popular[:, 0] + 1) / (popular[:, 2] / 7 + 1)
    return [*popular.T, rising, stats.age[rows], stats.idle[rows]]


def recent_columns(rows: np.ndarray, stats: ItemStats) -> list[np.ndarray]:
    """The columns `RECENT_COLUMNS` of table rows, int64 (C,): each float32 (C,), NaN for unknown."""
    # Interactions of the last day are a column already.
    return [*stats.recent[rows, :-1].T, *stats.shown[rows].T, *stats.share[rows].T, stats.listed[rows]]


class StatsGrowth:
    """Extends the statistics of one tick by rows for new items; one thread at a time may use it.

    The columns keep room for more items, so that a new one costs no copy of them.
    """

    def __init__(self) -> None:
        self._derived: Derived | None = None
        self._columns: dict[str, np.ndarray] = {}

    def extended(self, stats: ItemStats, table: ItemTable) -> ItemStats:
        """The same statistics with rows for the items that the table got since they were computed."""
        length, more = stats.length, table.length - stats.length
        if more <= 0:
            return stats
        if self._derived is not stats.derived:
            self._derived = stats.derived
            self._columns = {name: getattr(stats, name) for name in _COLUMNS}
        list_price = table.numbers("price")
        price = np.full(more, np.nan) if list_price is None else list_price[length : length + more, 0]
        unknown = np.full(more, np.nan, np.float32)
        new = {
            "popular": np.zeros((more, stats.popular.shape[1]), np.float32),
            "age": unknown,
            "idle": unknown,
            "price": price.astype(np.float32),
            "highest": unknown,
            "channels": np.zeros((more, stats.channels.shape[1]), np.float32),
            "recent": np.zeros((more, stats.recent.shape[1]), np.float32),
            "shown": np.zeros((more, stats.shown.shape[1]), np.float32),
            "share": np.full((more, stats.share.shape[1]), np.nan, np.float32),
            "listed": _listed(table.arrivals_of(np.arange(length, length + more)), stats.tick),
        }
        for name, rows in new.items():
            self._columns[name] = appended(self._columns[name], length, rows)
        columns = {name: values[: length + more] for name, values in self._columns.items()}
        return ItemStats(stats.tick, stats.counted, derived=stats.derived, **columns)


_COLUMNS = tuple(f.name for f in fields(ItemStats) if f.name not in ("tick", "counted", "derived"))


def item_stats(state: EventState, table: ItemTable, tick: int) -> ItemStats:
    """The statistics as of `tick`, microseconds since 1970."""
    events = state.all()
    weights = np.where(events.kind >= 0, state.weights[np.maximum(events.kind, 0)], 0)
    count = table.length  # the change feed may add items meanwhile
    hashes = table.item_hashes[:count]
    order = np.argsort(hashes)
    is_shown = (events.kind >= 0) & (weights == 0) & (events.recorded >= tick - RECENT_HOURS[-1] * HOUR)
    impressions = events.take(np.flatnonzero(is_shown & (events.recorded < tick)))
    shown_rows = order[(position := find(hashes[order], impressions.item_hash))[position >= 0]]
    shown = _by_hours(shown_rows, impressions.recorded[position >= 0], np.ones(len(shown_rows)), tick, count)
    counted = np.flatnonzero((events.recorded < tick) & (weights > 0))
    events, weights = events.take(counted), weights[counted]
    position = find(hashes[order], events.item_hash)
    valid = position >= 0
    events, weights, rows = events.take(np.flatnonzero(valid)), weights[valid], order[position[valid]]
    popular = np.zeros((count, len(WINDOWS) + 1), np.float32)
    for column, days in enumerate((*WINDOWS, None)):
        recent = slice(None) if days is None else events.recorded >= tick - days * DAY
        popular[:, column] = np.bincount(rows[recent], weights[recent], count)
    first, last = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(first, rows, events.recorded)
    np.maximum.at(last, rows, events.recorded)
    price = _price(table, count, rows, events.price)
    highest = _highest(count, rows, events.price)
    recent_channel = (events.channel >= 0) & (events.recorded >= tick - WINDOWS[-1] * DAY)
    channels = np.zeros((count, len(state.channels)), np.float32)
    np.add.at(channels, (rows[recent_channel], events.channel[recent_channel]), weights[recent_channel])
    recent = _by_hours(rows, events.recorded, weights, tick, count)
    return ItemStats(
        tick=tick,
        counted=count,
        popular=popular,
        age=_days(tick - first),
        idle=_days(tick - last),
        price=price,
        highest=highest,
        channels=channels,
        recent=recent,
        shown=shown,
        share=_share(recent, shown),
        listed=_listed(table.arrivals[:count], tick),
    )


def _by_hours(
    rows: np.ndarray, recorded: np.ndarray, weights: np.ndarray, tick: int, count: int
) -> np.ndarray:
    """The weight of events of each of `count` rows in the last 1, 6 and 24 hours, float32 (N, 3)."""
    sums = np.zeros((count, len(RECENT_HOURS)), np.float32)
    for column, hours in enumerate(RECENT_HOURS):
        late = recorded >= tick - hours * HOUR
        sums[:, column] = np.bincount(rows[late], weights[late], count)
    return sums


def _share(recent: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Interactions by impression in each of `_SHARE_HOURS`, float32 (N, 2), NaN without an impression."""
    columns = [RECENT_HOURS.index(hours) for hours in _SHARE_HOURS]
    engaged, shown = recent[:, columns], shown[:, columns]
    # Items that were not shown count for no mean: some interactions have no impression.
    mean = np.where(shown > 0, engaged, 0).sum(0) / np.maximum(shown.sum(0), 1)
    share = (engaged + _SHARE_PRIOR * mean) / (shown + _SHARE_PRIOR)
    return np.where(shown > 0, share, np.nan).astype(np.float32)


def _listed(arrivals: np.ndarray, tick: int) -> np.ndarray:
    """Hours since arrivals, microseconds since 1970, at a tick: float32 (N,), NaN for unknown ones."""
    return np.where(arrivals > 0, np.maximum(tick - arrivals, 0) / HOUR, np.nan).astype(np.float32)


def _days(span: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(span), span / DAY, np.nan).astype(np.float32)


def _price(table: ItemTable, count: int, rows: np.ndarray, paid: np.ndarray) -> np.ndarray:
    list_price = table.numbers("price")
    price = np.full(count, np.nan) if list_price is None else list_price[:count, 0].copy()
    valid = ~np.isnan(paid)
    price[rows[valid]] = paid[valid]  # rows are in time order: the last one stays
    return price.astype(np.float32)


def _highest(count: int, rows: np.ndarray, paid: np.ndarray) -> np.ndarray:
    highest = np.full(count, np.nan)
    np.fmax.at(highest, rows, np.where(paid > 0, paid, np.nan))
    return highest.astype(np.float32)
