"""The rows of each user in the event columns, in the order of their time.

One thread writes, any thread reads: rows of a user are appended in place, and every other change replaces
the array. A reader takes the rows before the columns, and then the columns have all of these rows.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_FIRST_BLOCK = 512
_NO_ROWS: "array[int]" = array("q")


class RowRange(NamedTuple):
    """A snapshot of the rows of a user, ordered by time and then by row."""

    rows: "array[int]"
    length: int

    def all(self) -> np.ndarray:
        """Every row, int64 (N,)."""
        return np.frombuffer(self.rows[: self.length], np.int64)

    def newest(self, keep: Callable[[np.ndarray], np.ndarray], limit: int) -> np.ndarray:
        """Rows for which `keep` is true, int64 (N,): at least the newest `limit` of them.

        Reads blocks from the end, each twice as long as the one before, until it has enough.
        """
        blocks = [np.empty(0, np.int64)]
        count, end, size = 0, self.length, _FIRST_BLOCK
        while end > 0 and count < limit:
            start = max(end - size, 0)
            block = np.frombuffer(self.rows[start:end], np.int64)
            blocks.append(block[keep(block)])
            count += len(blocks[-1])
            end, size = start, 2 * size
        return np.concatenate(blocks)

    def since(self, time: int, occurred: np.ndarray) -> np.ndarray:
        """The rows of `time` or later, int64 (N,); `occurred` has the time of every row."""
        start = bisect_left(self.rows, time, hi=self.length, key=lambda row: int(occurred[row]))
        return np.frombuffer(self.rows[start : self.length], np.int64)


class UserRows:
    """The rows of each user, by key. `occurred` is the column with the time of every row."""

    def __init__(self) -> None:
        self._rows: dict[int, array[int]] = {}

    def of(self, user: int) -> RowRange:
        """The rows of a user, none for an unknown key."""
        rows = self._rows.get(user, _NO_ROWS)
        return RowRange(rows, len(rows))

    def add(self, users: np.ndarray, first: int, occurred: np.ndarray) -> None:
        """Add the rows from `first` on, those of `users`, int64 (N,)."""
        times = occurred[first : first + len(users)]
        order = np.lexsort((times, users))  # by user, then by time, then by row
        by_user, by_time = users[order], times[order]
        starts = np.flatnonzero(np.diff(by_user, prepend=by_user[:1] - 1))
        ends = np.append(starts[1:], len(users))[: len(starts)]
        rows = array("q", (first + order).tobytes())
        parts = by_user[starts], by_time[starts], starts, ends
        for user, time, start, end in zip(*(part.tolist() for part in parts), strict=True):
            own = self._rows.get(user)
            if not own:  # an unknown user, or one without rows
                self._rows[user] = rows[start:end]
            elif occurred[own[-1]] <= time:
                own.extend(rows[start:end])
            else:
                self._rows[user] = _ordered(np.append(self.of(user).all(), rows[start:end]), occurred)

    def copy(self, user: int, other: int, occurred: np.ndarray) -> None:
        """Add the rows of a user to another user."""
        rows = np.append(self.of(user).all(), self.of(other).all())
        self._rows[other] = _ordered(rows, occurred)

    def pop(self, user: int) -> np.ndarray:
        """Remove a user; returns the rows, int64 (N,)."""
        rows = self.of(user).all()
        self._rows.pop(user, None)
        return rows

    def drop(self, user: int, dropped: np.ndarray) -> None:
        """Remove some rows of a user."""
        if user in self._rows:
            rows = self.of(user).all()
            self._rows[user] = array("q", rows[~np.isin(rows, dropped)].tobytes())


def _ordered(rows: np.ndarray, occurred: np.ndarray) -> "array[int]":
    unique = np.unique(rows)
    return array("q", unique[np.argsort(occurred[unique], kind="stable")].tobytes())
