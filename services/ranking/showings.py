"""How often items were shown for exploring, in memory, as of any place in the log.

Follows the log as it is asked. Arrays are replaced, never changed, so readers need no lock.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from services.ranking.graph import find
from services.ranking.served import ServedLog

_DAY = 86_400_000_000
_FOLLOW_EVERY = 0.25
# Who reads on with a page token sees what was so at most this long ago.
_REMEMBERED_DAYS = 31


@dataclass(frozen=True)
class _Chunk:
    """Some rows of the log, in its order, int64 (N,); `scenario` by its code, `day` since 1970."""

    sequence: np.ndarray
    number: np.ndarray
    scenario: np.ndarray
    day: np.ndarray


@dataclass(frozen=True)
class _Counted:
    """Counts of items by number, rising, int64 (E,); slots by scenario and day; the latest rows."""

    sequence: int
    numbers: np.ndarray
    counts: np.ndarray
    days: Mapping[tuple[int, int], int]
    latest: tuple[_Chunk, ...]


class Showings:
    """The counts over a log."""

    def __init__(self, log: ServedLog) -> None:
        self._log, self._lock = log, threading.Lock()
        self._counted = _Counted(0, np.empty(0, np.int64), np.empty(0, np.int64), {}, ())
        self._codes: dict[str, int] = {}
        self._followed = 0.0

    def follow(self, at_least: int = 0) -> int:
        """Count what was logged until a moment ago, and at least up to a place in the log; the last place."""
        with self._lock:
            now = time.monotonic()
            if now - self._followed >= _FOLLOW_EVERY or self._counted.sequence < at_least:
                self._counted = self._read(self._counted)
                self._followed = now
            return self._counted.sequence

    def of(self, numbers: np.ndarray, upto: int) -> np.ndarray:
        """How often each item, by number int64 (M,), was shown up to a place in the log, int64 (M,)."""
        counted = self._counted
        found = _looked_up(numbers, counted.numbers, counted.counts)
        if later := _later(counted, upto):
            gone, many = np.unique(np.concatenate([chunk.number for chunk in later]), return_counts=True)
            found -= _looked_up(numbers, gone, many)
        return found

    def slots(self, scenario: str, day: int, upto: int) -> int:
        """How many slots a scenario explored on a day since 1970, up to a place in the log."""
        counted, code = self._counted, self._codes.get(scenario, -1)
        later = ((chunk.scenario == code) & (chunk.day == day) for chunk in _later(counted, upto))
        return counted.days.get((code, day), 0) - sum(int(mine.sum()) for mine in later)

    def _read(self, before: _Counted) -> _Counted:
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
        numbers, many = np.unique(chunk.number, return_counts=True)
        every = np.union1d(before.numbers, numbers)
        counts = _looked_up(every, before.numbers, before.counts) + _looked_up(every, numbers, many)
        days = Counter(before.days)
        days.update(zip(codes, chunk.day.tolist(), strict=True))
        oldest = int(chunk.day[-1]) - _REMEMBERED_DAYS
        latest = (*(known for known in before.latest if known.day[-1] >= oldest), chunk)
        return _Counted(int(chunk.sequence[-1]), every, counts, days, latest)


def _later(counted: _Counted, upto: int) -> list[_Chunk]:
    """What was logged after a place, the last first."""
    found = []
    for chunk in reversed(counted.latest):
        start = int(np.searchsorted(chunk.sequence, upto, side="right"))
        if start == len(chunk.sequence):
            break
        found.append(_Chunk(*(values[start:] for values in vars(chunk).values())))
    return found


def _looked_up(numbers: np.ndarray, known: np.ndarray, counts: np.ndarray) -> np.ndarray:
    at = find(known, numbers)
    return np.where(at >= 0, counts[at] if len(counts) else 0, 0).astype(np.int64)
