"""The event store: events, the users they belong to, and counts per item, in SQL.

An event, its key and its counters are written in one transaction: a retry never counts twice, and a crash
never counts half. Knows nothing of models or transport.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakSet

import numpy as np
import sqlalchemy as sa

from services.core.errors import InvalidArgument, VitrineError
from services.ranking.events import erasure, event_writer, identities, impression_log, retention_clock, tables
from services.ranking.events.erasure import ErasedUser, ExpiredEvents
from services.ranking.events.event_writer import SEQUENCE, DatedEvent, micros, rows_of
from services.ranking.events.events import Event, EventItem, RecordResult, validate
from services.ranking.events.impression_log import ImpressionStore, StoredPage
from services.ranking.events.retention_clock import TrustedTime
from services.storage import store
from services.storage.write_health import WriteHealth

BATCH_ROWS = store.GROUP_ROWS // 2
"""The approximate rows of one caller in a group commit; the other half of the group is for other callers."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_RETENTION = "upkeep"
_KEYS_PER_QUERY = 5000
_EXPORTED_ITEMS = 20_000
_MAX_REFUSALS = 5
_SCRUBS, _SCRUB_INTERVAL, _SCRUB_MILLIS = 50, 0.1, 250
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredEvent:
    """A stored event, without the ids of its user: these belong to the user."""

    sequence: int
    recorded: datetime
    event: Event


@dataclass(frozen=True)
class HistoryRow:
    """One item of one event of a user, as stored."""

    sequence: int
    item_hash: int
    item_id: str
    type: str
    session_id: str
    quantity: int
    price: float | None
    occurred: datetime
    recorded: datetime


@dataclass(frozen=True)
class EventItemRows:
    """Items of events in columns of one length.

    `user`, `item_hash`, `sequence` int64; `occurred` and `recorded` int64, microseconds since
    1970; `price` of one, float64, NaN for unknown; `quantity` int64.
    """

    user: np.ndarray
    item_hash: np.ndarray
    type: list[str]
    channel: list[str]
    occurred: np.ndarray
    recorded: np.ndarray
    price: np.ndarray
    quantity: np.ndarray
    sequence: np.ndarray


@dataclass
class ImportCounts:
    """The numbers of recorded, duplicate and refused events of an import; the first reasons of refusals."""

    recorded: int = 0
    duplicates: int = 0
    refused: int = 0
    refusals: list[str] = field(default_factory=list)


class EventStore:
    """Events in SQL, written by one thread.

    `event_types` are those of the shop; `clock` gives the time at which an event is recorded.
    """

    def __init__(
        self, engine: sa.Engine, event_types: Collection[str], clock: Callable[[], datetime]
    ) -> None:
        self._engine, self._clock = engine, clock
        self.types = frozenset(event_types)
        self.readers: WeakSet[Any] = WeakSet()
        """Services with a state in memory, which must apply every deletion."""
        own = [tables.events, tables.event_items, tables.identities, tables.counters, tables.retention_clock]
        store.create(engine, own, SEQUENCE)
        self._writer = store.Writer(engine)
        self.served = ImpressionStore(engine, self._writer)

    def close(self) -> None:
        """Commit the queued writes and stop."""
        self._writer.close()

    @property
    def health(self) -> WriteHealth:
        """Whether the database accepts writes."""
        return self._writer.health

    @property
    def sequence(self) -> int:
        """The sequence number of the last committed event."""
        with self._engine.connect() as connection:
            return store.current_sequence(connection, SEQUENCE)

    def write(self, event: Event) -> Future[RecordResult]:
        """Check and commit one event.

        Raises:
            InvalidArgument: at once; it names every wrong field, relative to the event.

        The future raises:
            AlreadyExists: the store has an event of this event_id with other content.
        """
        now = self._clock()
        validate(event, self.types, now)

        def record(connection: sa.Connection) -> RecordResult:
            [outcome] = event_writer.record(connection, [DatedEvent(event, now)])
            if isinstance(outcome, VitrineError):
                raise outcome
            return outcome

        return self._writer.submit(record, rows=rows_of(event))

    def write_batch(
        self, events: Sequence[Event | VitrineError], caller: Hashable
    ) -> Future[list[RecordResult | VitrineError]]:
        """Check and commit one batch of `in_batches` in one transaction.

        The future gives an outcome for each event: an error in `events` stays as it is, a new error is
        InvalidArgument or AlreadyExists, relative to the event. The batches of one caller are committed in
        their order.
        """
        now = self._clock()
        checked = [self._check(event, now) for event in events]
        valid = [DatedEvent(event, now) for event in checked if isinstance(event, Event)]

        def record(connection: sa.Connection) -> list[RecordResult | VitrineError]:
            recorded = iter(event_writer.record(connection, valid))
            return [event if isinstance(event, VitrineError) else next(recorded) for event in checked]

        rows = sum(rows_of(dated.event) for dated in valid)
        return self._writer.submit(record, caller=caller, rows=max(rows, 1))

    def _check(self, event: Event | VitrineError, now: datetime) -> Event | VitrineError:
        if isinstance(event, VitrineError):
            return event
        try:
            validate(event, self.types, now)
        except InvalidArgument as error:
            return error
        return event

    def load(self, events: Iterable[Event]) -> Future[ImportCounts]:
        """Import events of the past in one transaction; their time of recording is that of the event.

        An event with the event_id of a stored one is skipped, whatever its content; an invalid event is
        refused, as by `write`. A request as of a past time reads the imported events before it.
        """
        now = self._clock()

        def load(connection: sa.Connection) -> ImportCounts:
            counts = ImportCounts()

            def valid() -> Iterator[DatedEvent]:
                for event in events:
                    checked = self._check(event, now)
                    if isinstance(checked, Event):
                        yield DatedEvent(checked, checked.occurred or _EPOCH)
                    else:
                        counts.refused += 1
                        if counts.refused <= _MAX_REFUSALS:
                            counts.refusals.append(f"event {event.event_id!r}: {checked}")

            counts.recorded, counts.duplicates = event_writer.load(connection, valid())
            return counts

        return self._writer.submit(load)

    def forget(self, user_id: str, visitor_id: str) -> Future[ErasedUser]:
        """Delete all data of a user: events, keys, counts, pages, and every id."""
        caller = object()

        def forget(connection: sa.Connection) -> ErasedUser:
            erased = erasure.forget(connection, user_id, visitor_id)
            # Before the commit: its group may have pages that follow it.
            self.served.block(caller, erased.user, micros(self._clock()))
            return erased

        def done(future: Future[ErasedUser]) -> None:  # on the writer's thread, before the next group
            if future.cancelled() or future.exception() is not None:
                self.served.unblock(caller)

        future = self._writer.submit(forget, caller=caller)
        future.add_done_callback(done)
        return future

    def expire(self, before: datetime, limit: int) -> Future[ExpiredEvents]:
        """Delete at most `limit` events that happened before a time, the oldest first."""
        cutoff = micros(before)
        return self._writer.submit(lambda c: erasure.expire(c, cutoff, limit), caller=_RETENTION)

    def expire_pages(self, before: datetime, limit: int) -> Future[int]:
        """Delete at most `limit` pages answered before a time, the oldest first; gives their number."""
        cutoff = micros(before)
        return self._writer.submit(lambda c: impression_log.expire(c, cutoff, limit), caller=_RETENTION)

    def expire_explored(self, before: datetime, limit: int) -> Future[int]:
        """Delete at most `limit` exploration impressions before a time; gives their number."""
        cutoff = micros(before)
        return self._writer.submit(
            lambda c: impression_log.expire_explored(c, cutoff, limit), caller=_RETENTION
        )

    def observe_clock(self, now: datetime, elapsed: timedelta) -> Future[TrustedTime]:
        """The time that retention trusts when the process clock says `now`; see `retention_clock`."""
        return self._writer.submit(lambda c: retention_clock.observe(c, now, elapsed), caller=_RETENTION)

    def user_ids(self, user_id: str, visitor_id: str) -> dict[str, list[str]]:
        """Every id of the user with either of these, sorted, by "user" and "visitor"."""
        with self._engine.connect() as connection:
            return identities.ids_by_kind(connection, user_id, visitor_id)

    def export(self, user_id: str, visitor_id: str, after: int, limit: int) -> list[StoredEvent]:
        """The next events of a user after a sequence number, in commit order.

        At most `limit`, with at most 20,000 items together, but at least one.
        """
        with self._snapshot() as connection:
            of_user = tables.events.c.user_key.in_(identities.keys_of(connection, user_id, visitor_id))
            query = (
                sa.select(tables.events)
                .where(of_user, tables.events.c.sequence > after)
                .order_by(tables.events.c.sequence)
                .limit(limit)
            )
            event_rows = connection.execute(query).all()
            sequences = [row.sequence for row in event_rows]
            event_rows = event_rows[: erasure.fitting(connection, sequences, _EXPORTED_ITEMS)]
            of_events = tables.event_items.c.sequence.in_([row.sequence for row in event_rows])
            ordered = tables.event_items.select().where(of_events).order_by(tables.event_items.c.row)
            items: dict[int, list[EventItem]] = {}
            for row in connection.execute(ordered):
                item = EventItem(row.item_id, row.quantity, row.price, row.position)
                items.setdefault(row.sequence, []).append(item)
        return [
            StoredEvent(
                sequence=row.sequence,
                recorded=_EPOCH + row.recorded * _MICROSECOND,
                event=Event(
                    event_id=row.event_id,
                    type=row.type,
                    items=tuple(items[row.sequence]),
                    session_id=row.session_id,
                    occurred=_EPOCH + row.occurred * _MICROSECOND,
                    attribution_token=row.attribution_token,
                    channel=row.channel,
                ),
            )
            for row in event_rows
        ]

    def export_pages(self, user_id: str, visitor_id: str, after: int, limit: int) -> list[StoredPage]:
        """The pages of a user, after a position in the impression log."""
        with self._engine.connect() as connection:
            user = identities.all_ids(connection, user_id, visitor_id)
        return self.served.export(user, after, limit)

    def rows(self, after: int, limit: int) -> EventItemRows:
        """The items of whole events committed after a sequence number, in commit order.

        At least `limit` rows if there are so many; the last event may exceed it.
        """
        with self._snapshot() as connection:
            return _read(connection, after, limit)

    def identities(self) -> dict[tuple[str, str], int]:
        """("user" or "visitor", id) to user key."""
        with self._snapshot() as connection:
            return _identities(connection, None)

    def changes(self, after: int, limit: int) -> tuple[EventItemRows, dict[tuple[str, str], int]]:
        """`rows`, and the `identities` of their users, from one snapshot."""
        with self._snapshot() as connection:
            rows = _read(connection, after, limit)
            return rows, _identities(connection, sorted(set(rows.user.tolist())))

    @contextmanager
    def _snapshot(self) -> Iterator[sa.Connection]:
        """A connection to one snapshot, without later commits."""
        with self._engine.connect() as connection:
            if self._engine.dialect.name == "sqlite":  # reads a snapshot by default
                yield connection
            else:
                yield connection.execution_options(isolation_level="REPEATABLE READ")

    def scrub(self) -> None:
        """Erase deleted rows from the write-ahead log of SQLite; waits for readers."""
        if self._engine.dialect.name != "sqlite":
            return
        raw = self._engine.raw_connection()
        try:
            cursor = raw.cursor()
            cursor.execute(f"PRAGMA busy_timeout={_SCRUB_MILLIS}")  # writes wait for it
            for _ in range(_SCRUBS):
                with self._writer.exclusive():
                    busy, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if not busy:
                    return
                time.sleep(_SCRUB_INTERVAL)
            reason = "a reader uses it"
        except sqlite3.OperationalError as error:  # a checkpoint needs room in the file
            reason = str(error)
        finally:
            raw.invalidate()  # its timeout is not that of other connections
            raw.close()
        _log.warning(
            "deleted rows stay in the write-ahead log of the database until it is written again: %s", reason
        )

    def history(self, user_id: str, visitor_id: str, before: datetime, limit: int) -> list[HistoryRow]:
        """The history of a user, newest first: events recorded strictly before a time."""
        columns = tables.events.c
        with self._snapshot() as connection:
            of_user = columns.user_key.in_(identities.keys_of(connection, user_id, visitor_id))
            query = (
                sa.select(tables.events, tables.event_items)
                .join(tables.event_items, tables.event_items.c.sequence == columns.sequence)
                .where(of_user, columns.recorded < micros(before))
                .order_by(columns.occurred.desc(), columns.sequence.desc(), tables.event_items.c.row)
                .limit(limit)
            )
            return [
                HistoryRow(
                    sequence=row.sequence,
                    item_hash=row.number,
                    item_id=row.item_id,
                    type=row.type,
                    session_id=row.session_id,
                    quantity=row.quantity,
                    price=row.price,
                    occurred=_EPOCH + row.occurred * _MICROSECOND,
                    recorded=_EPOCH + row.recorded * _MICROSECOND,
                )
                for row in connection.execute(query)
            ]

    def counts(self) -> dict[tuple[int, str], int]:
        """(item hash, event type) to the number of event items, without their quantities."""
        with self._engine.connect() as connection:
            rows = connection.execute(tables.counters.select())
            return {(row.number, row.type): row.events for row in rows}

    def recount(self) -> dict[tuple[int, str], int]:
        """The same as `counts`, computed from the events: the oracle of tests."""
        query = (
            sa.select(tables.event_items.c.number, tables.events.c.type, sa.func.count().label("events"))
            .join(tables.events, tables.events.c.sequence == tables.event_items.c.sequence)
            .group_by(tables.event_items.c.number, tables.events.c.type)
        )
        with self._engine.connect() as connection:
            return {(row.number, row.type): row.events for row in connection.execute(query)}


def _read(connection: sa.Connection, after: int, limit: int) -> EventItemRows:
    events, items = tables.events.c, tables.event_items.c
    later = sa.select(items.sequence).where(items.sequence > after).order_by(items.sequence, items.row)
    last = connection.scalar(later.offset(limit - 1).limit(1))
    query = (
        sa.select(
            events.user_key,
            items.number,
            events.type,
            events.channel,
            events.occurred,
            events.recorded,
            items.price,
            items.quantity,
            events.sequence,
        )
        .join_from(tables.events, tables.event_items, items.sequence == events.sequence)
        .where(events.sequence > after, *([events.sequence <= last] if last is not None else []))
        .order_by(events.sequence, items.row)
    )
    rows = connection.execute(query).all()
    user, item_hash, types, channels, occurred, recorded, price, quantity, sequence = (
        zip(*rows, strict=True) if rows else [()] * 9
    )
    return EventItemRows(
        user=np.array(user, np.int64),
        item_hash=np.array(item_hash, np.int64),
        type=list(types),
        channel=list(channels),
        occurred=np.array(occurred, np.int64),
        recorded=np.array(recorded, np.int64),
        price=np.array(price, np.float64),  # None becomes NaN
        quantity=np.array(quantity, np.int64),
        sequence=np.array(sequence, np.int64),
    )


def _identities(connection: sa.Connection, keys: Sequence[int] | None) -> dict[tuple[str, str], int]:
    columns = tables.identities.c
    if keys is None:
        conditions: list[sa.ColumnElement[bool]] = [sa.true()]
    else:
        starts = range(0, len(keys), _KEYS_PER_QUERY)
        conditions = [columns.user_key.in_(keys[start : start + _KEYS_PER_QUERY]) for start in starts]
    users: dict[tuple[str, str], int] = {}
    for where in conditions:
        for row in connection.execute(tables.identities.select().where(where)):
            users[row.kind, row.id] = row.user_key
    return users


def in_batches(events: Sequence[Event | VitrineError]) -> Iterator[list[Event | VitrineError]]:
    """Events in batches for `EventStore.write_batch`, in their order."""
    batch: list[Event | VitrineError] = []
    rows = 0
    for event in events:
        event_rows = rows_of(event) if isinstance(event, Event) else 1
        if batch and rows + event_rows > BATCH_ROWS:
            yield batch
            batch, rows = [], 0
        batch.append(event)
        rows += event_rows
    if batch:
        yield batch
