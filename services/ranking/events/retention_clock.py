"""The time by which retention deletes: the process clock, if it can be trusted.

A process clock that is years ahead would make retention delete everything. Therefore SQL has the last
trusted time. A clock that differs much from it is trusted only after the process has run for some time, by
its monotonic clock: the larger the difference, the longer. Until then the trusted time advances with the
monotonic clock.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from services.ranking.events import tables
from services.ranking.events.event_writer import micros

MAX_JUMP = timedelta(days=2)
"""The allowed distance of the clock from the expected time: a process may be down over a weekend."""
CATCH_UP = 24
"""A jump is trusted after its length divided by this: a jump of a day after an hour."""
MAX_WAIT = timedelta(days=30)
EARLIEST = datetime(2025, 1, 1, tzinfo=UTC)
"""A clock before this time was never set: it is ignored."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrustedTime:
    """The last trusted time, and for how long the process clock has been far from it."""

    time: datetime
    waited: timedelta = timedelta(0)


def advance(trusted: TrustedTime, now: datetime, elapsed: timedelta) -> TrustedTime:
    """The trusted time after the process has run for `elapsed`, with its clock at `now`."""
    expected = trusted.time + elapsed
    jump = abs(now - expected)
    if jump <= MAX_JUMP:
        return TrustedTime(now)
    waited = trusted.waited + elapsed
    if waited >= min(jump / CATCH_UP, MAX_WAIT):
        return TrustedTime(now)
    return TrustedTime(expected, waited)


def observe(connection: sa.Connection, now: datetime, elapsed: timedelta) -> TrustedTime:
    """`advance` the time in SQL; at first the time of the newest event or page is trusted."""
    columns = tables.retention_clock.c
    row = connection.execute(tables.retention_clock.select()).first()
    if row is None:
        before = TrustedTime(_newest(connection) or now)
        connection.execute(tables.retention_clock.insert().values(id=0, time=0, waited=0))
    else:
        before = TrustedTime(_EPOCH + timedelta(microseconds=row.time), timedelta(microseconds=row.waited))
    after = advance(before, now, elapsed)
    values = {columns.time: micros(after.time), columns.waited: after.waited // timedelta(microseconds=1)}
    connection.execute(tables.retention_clock.update().values(values))
    return after


def _newest(connection: sa.Connection) -> datetime | None:
    times = (tables.events.c.occurred, tables.served.c.at)
    newest = [at for time in times if (at := connection.scalar(sa.select(sa.func.max(time)))) is not None]
    return _EPOCH + timedelta(microseconds=max(newest)) if newest else None


Observe = Callable[[datetime, timedelta], Future[TrustedTime]]


class RetentionClock:
    """The time by which to delete; logs once when the process clock is not trusted.

    `clock` is the process clock, `observe` runs the function above on the thread of the store.
    """

    def __init__(
        self, clock: Callable[[], datetime], observe: Observe, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._observe, self._monotonic = clock, observe, monotonic
        self.read_at = monotonic()
        """The time of the last reading of the clocks, by `monotonic`."""
        self._doubted = False
        self.offset = 0.0
        """Seconds by which the process clock is ahead of the trusted time; 0 if they are equal."""

    async def time(self) -> datetime:
        """The earlier of the process clock and the trusted time."""
        now, read_at = self._clock(), self._monotonic()
        elapsed = timedelta(seconds=read_at - self.read_at)
        if now < EARLIEST:
            self.read_at = read_at
            self._doubt(now, EARLIEST, "no time before 2025 is trusted")
            return now
        trusted = await asyncio.wrap_future(self._observe(now, elapsed))
        self.read_at = read_at  # only now: if storing fails, the next reading covers the time
        if trusted.time == now:
            self._believe(now)
        else:
            wait = min(abs(now - trusted.time) / CATCH_UP, MAX_WAIT) - trusted.waited
            hours = max(wait / timedelta(hours=1), 0)
            self._doubt(now, trusted.time, f"it is trusted after {hours:.1f} more hours of running")
        return min(now, trusted.time)

    def _doubt(self, now: datetime, expected: datetime, until: str) -> None:
        self.offset = (now - expected).total_seconds()
        if not self._doubted:
            _log.warning(
                "the clock says %s, but %s is expected after the last run or the newest event; retention "
                "deletes by the earlier one: if the clock is wrong, correct it; otherwise %s",
                now.isoformat(timespec="seconds"),
                expected.isoformat(timespec="seconds"),
                until,
            )
        self._doubted = True

    def _believe(self, now: datetime) -> None:
        if self._doubted:
            _log.warning("retention deletes by the clock again, %s", now.isoformat(timespec="seconds"))
        self.offset, self._doubted = 0.0, False
