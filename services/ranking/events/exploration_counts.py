"""The exploration impressions of items, in memory, as of any position in the impression log.

Reads the log on request. Arrays are replaced, never changed: readers need no lock.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from services.core.sorted_arrays import find
from services.ranking.events.impression_log import ImpressionStore

_DAY = 86_400_000_000
_FOLLOW_INTERVAL = 0.25
# A page token may ask for the counts of at most this long ago.
_HISTORY_DAYS = 31


@dataclass(frozen=True)
class _Chunk:
    """Some rows of the log, in its order, int64 (N,); `scenario` by its code, `day` since 1970."""

    sequence: np.ndarray
    item_hash: np.ndarray
    scenario: np.ndarray
    day: np.ndarray


@dataclass(frozen=True)
class _Snapshot:
    """Counts by ascending item hash, int64 (E,); slots by scenario and day; the latest rows."""

    sequence: int
    item_hashes: np.ndarray
    counts: np.ndarray
    days: Mapping[tuple[int, int], int]
    latest: tuple[_Chunk, ...]


class ExplorationCounts:
    """The counts of a log."""

    def __init__(self, log: ImpressionStore) -> None:
        self._log, self._lock = log, threading.Lock()
        self._snapshot = _Snapshot(0, np.empty(0, np.int64), np.empty(0, np.int64), {}, ())
        self._codes: dict[str, int] = {}
        self._last_read = 0.0

    def follow(self, at_least: int = 0) -> int:
        """Read the log, at most every 0.25 s unless it must reach a position; returns the last position."""
        with self._lock:
            now = time.monotonic()
            if now - self._last_read >= _FOLLOW_INTERVAL or self._snapshot.sequence < at_least:
                self._snapshot = self._read(self._snapshot)
                self._last_read = now
            return self._snapshot.sequence

    def of(self, item_hashes: np.ndarray, log_position: int) -> np.ndarray:
        """The impressions of items, by hash int64 (M,), up to a position in the log: int64 (M,)."""
        snapshot = self._snapshot
        impressions = _counts_of(item_hashes, snapshot.item_hashes, snapshot.counts)
        if later := _later(snapshot, log_position):
            later_hashes = np.concatenate([chunk.item_hash for chunk in later])
            impressions -= _counts_of(item_hashes, *np.unique(later_hashes, return_counts=True))
        return impressions

    def slots(self, scenario: str, day: int, log_position: int) -> int:
        """The exploration slots of a scenario on a day since 1970, up to a position in the log."""
        snapshot, code = self._snapshot, self._codes.get(scenario, -1)
        later = ((chunk.scenario == code) & (chunk.day == day) for chunk in _later(snapshot, log_position))
        return snapshot.days.get((code, day), 0) - sum(int(mask.sum()) for mask in later)

    def _read(self, before: _Snapshot) -> _Snapshot:
        rows = self._log.explored(before.sequence)
        if not rows:
            return before
        codes = [self._codes.setdefault(row.scenario, len(self._codes)) for row in rows]
        chunk = _Chunk(
            np.array([row.sequence for row in rows], np.int64),
            np.array([row.number for row in rows], np.int64),
            np.array(codes, np.int64),
            np.array([row.at // _DAY for row in rows], np.int64),
        )
        hashes, counts = np.unique(chunk.item_hash, return_counts=True)
        every = np.union1d(before.item_hashes, hashes)
        total = _counts_of(every, before.item_hashes, before.counts) + _counts_of(every, hashes, counts)
        days = Counter(before.days)
        days.update(zip(codes, chunk.day.tolist(), strict=True))
        oldest = int(chunk.day[-1]) - _HISTORY_DAYS
        latest = (*(old for old in before.latest if old.day[-1] >= oldest), chunk)
        return _Snapshot(int(chunk.sequence[-1]), every, total, days, latest)


def _later(snapshot: _Snapshot, log_position: int) -> list[_Chunk]:
    """The rows of the log after a position, the last chunk first."""
    later = []
    for chunk in reversed(snapshot.latest):
        start = int(np.searchsorted(chunk.sequence, log_position, side="right"))
        if start == len(chunk.sequence):
            break
        later.append(_Chunk(*(values[start:] for values in vars(chunk).values())))
    return later


def _counts_of(item_hashes: np.ndarray, counted_hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The counts of items, int64 (M,), 0 for an item without a count."""
    position = find(counted_hashes, item_hashes)
    return np.where(position >= 0, counts[position] if len(counts) else 0, 0).astype(np.int64)
