"""The statistics of the items at the time of a request, computed for it or prepared before it."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from services.catalog.item_table import ItemTable
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import ItemStats, StatsGrowth, Ticks, item_stats
from services.ranking.state.tick_cache import prepare

_log = logging.getLogger(__name__)
_MAX_NEW_ITEMS = 2000
_MAX_TICKS = 2


@dataclass
class _Entry:
    stats: ItemStats
    growth: StatsGrowth = field(default_factory=StatsGrowth)


class StatsByTick:
    """Statistics over the events of `state` and the rows of `table`; any thread may use it.

    The first request that finds the next tick due has its statistics prepared by another thread, once, with
    all that is derived from the present ones. A request waits where nothing is prepared, and after the
    catalog has grown by an eighth.
    """

    def __init__(self, state: EventState, table: ItemTable, ticks: Ticks) -> None:
        self._state, self._table, self._ticks = state, table, ticks
        self._entries: dict[int, _Entry] = {}  # the last one used is the last
        self._latest_prepared = 0  # or being prepared, or failed
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "statistics")

    def close(self) -> None:
        """Stop."""
        self._thread.shutdown(cancel_futures=True)

    def at(self, time: int) -> ItemStats:
        """The statistics that hold at a time, microseconds since 1970."""
        tick = self._ticks.at(time)
        with self._lock:
            entry = self._entries.pop(tick, None)
            if entry is None or self._outgrown(entry.stats):
                entry = _Entry(item_stats(self._state, self._table, tick))
            entry.stats = stats = entry.growth.extended(entry.stats, self._table)
            self._forget_before(time, tick)
            self._entries[tick] = entry
            upcoming = self._ticks.upcoming(time)
            if upcoming is not None and upcoming > self._latest_prepared:
                self._latest_prepared = upcoming
                self._thread.submit(self._prepare, upcoming, stats, self._entries)
            return stats

    def clear(self) -> None:
        """Forget all statistics, after events were deleted."""
        with self._lock:
            self._entries = {}  # a new one: what is being prepared goes into the other
            self._latest_prepared = 0

    def _prepare(self, tick: int, present: ItemStats, entries: dict[int, _Entry]) -> None:
        try:
            stats = item_stats(self._state, self._table, tick)
            prepare(stats, present)
            with self._lock:
                entries.setdefault(tick, _Entry(stats))
        except Exception:
            if entries is self._entries:  # otherwise a deletion has interrupted it
                _log.exception("the next statistics of the items cannot be prepared: a request will wait")

    def _outgrown(self, stats: ItemStats) -> bool:
        """Whether so many items are new that scanning them costs more than computing the statistics."""
        return self._table.length > stats.counted * 9 // 8 + _MAX_NEW_ITEMS

    def _forget_before(self, time: int, tick: int) -> None:
        """Make room for a tick; that before it stays while requests that began in it may be running."""
        for earlier in [t for t in self._entries if t < tick and self._ticks.is_over(t, time)]:
            del self._entries[earlier]
        while len(self._entries) >= _MAX_TICKS:
            del self._entries[next(iter(self._entries))]
