"""The truth about behaviour: events, who they belong to, and counts per item, in SQL.

An event, its key and the counters it moves are one transaction, so a retry never
counts twice and a crash never counts half. Knows nothing of models or transport.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any
from weakref import WeakSet

import numpy as np
import sqlalchemy as sa

from services import store
from services.catalog import MAX_PRICE, PRICE_PROBLEM, identifier_problem, item_number
from services.errors import AlreadyExists, FieldViolation, InvalidArgument
from services.ranking import erasure, identities, served, tables
from services.ranking.erasure import Expired, Forgotten
from services.ranking.served import Kept, ServedLog

MAX_EVENT_ITEMS = 500
MAX_TOKEN_LENGTH = 4096
_SEQUENCE = "events"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_MAX_QUANTITY = 2**31 - 1
_KEYS_AT_ONCE = 5000
_SCRUBS, _BETWEEN_SCRUBS = 50, 0.1
_log = logging.getLogger(__name__)


class Outcome(IntEnum):
    """What became of an event; values are the contract's EventOutcomeCode."""

    RECORDED = 1
    DUPLICATE = 2


@dataclass(frozen=True)
class EventItem:
    """One item of an event; `position` is 1 for the first of a page, None when not shown on one."""

    item_id: str
    quantity: int = 1
    price: float | None = None
    position: int | None = None


@dataclass(frozen=True)
class Event:
    """Something a person did or was shown; `occurred` is aware, None means now."""

    event_id: str
    type: str
    items: tuple[EventItem, ...]
    user_id: str = ""
    visitor_id: str = ""
    session_id: str = ""
    occurred: datetime | None = None
    attribution_token: str = ""
    channel: str = ""


@dataclass(frozen=True)
class Recorded:
    """The outcome of one event and the sequence number it is committed under."""

    outcome: Outcome
    sequence: int


@dataclass(frozen=True)
class Stored:
    """An event as it is kept, without ids of the person: those are the person's, not the event's."""

    sequence: int
    recorded: datetime
    event: Event


@dataclass(frozen=True)
class HistoryRow:
    """One item of one event of a person, as stored."""

    sequence: int
    number: int
    item_id: str
    type: str
    session_id: str
    quantity: int
    price: float | None
    occurred: datetime
    recorded: datetime


@dataclass(frozen=True)
class Rows:
    """Items of events in columns of one length.

    `user`, `number`, `sequence` int64; `occurred` and `recorded` int64, microseconds since
    1970; `price` of one, float64, NaN for unknown; `quantity` int64.
    """

    user: np.ndarray
    number: np.ndarray
    type: list[str]
    channel: list[str]
    occurred: np.ndarray
    recorded: np.ndarray
    price: np.ndarray
    quantity: np.ndarray
    sequence: np.ndarray


class BehaviourStore:
    """Events in SQL, written by one thread.

    `event_types` are the shop's; `clock` gives the time an event is recorded at.
    """

    def __init__(
        self, engine: sa.Engine, event_types: Collection[str], clock: Callable[[], datetime]
    ) -> None:
        self._engine, self._clock = engine, clock
        self.types = frozenset(event_types)
        self.readers: WeakSet[Any] = WeakSet()
        """Who keeps what it read in memory, and must lose what is deleted here."""
        store.create(
            engine, [tables.events, tables.event_items, tables.identities, tables.counters], _SEQUENCE
        )
        self._writer = store.Writer(engine)
        self.served = ServedLog(engine, self._writer)

    def close(self) -> None:
        """Commit what is waiting and stop."""
        self._writer.close()

    @property
    def sequence(self) -> int:
        """The last committed event."""
        with self._engine.connect() as connection:
            return store.current_sequence(connection, _SEQUENCE)

    def write(self, event: Event) -> Future[Recorded]:
        """Check and commit one event.

        Raises:
            InvalidArgument: at once; every wrong field is named, relative to the event.

        The future raises:
            AlreadyExists: the event_id is taken by an event with other content.
        """
        now = self._clock()
        validate(event, self.types, now)
        return self._writer.submit(lambda connection: _write(connection, event, now))

    def load(self, events: Iterable[Event]) -> Future[int]:
        """Commit valid events of the past in one transaction, recorded when they happened.

        For imports: one whose event_id is known is passed over, whatever it holds. The future
        gives the number committed.
        """
        return self._writer.submit(lambda connection: _load(connection, events))

    def forget(self, user_id: str, visitor_id: str) -> Future[Forgotten]:
        """Delete all that is known of a person: events, keys, what they counted, pages, and every id."""

        def forget(connection: sa.Connection) -> Forgotten:
            forgotten = erasure.forget(connection, user_id, visitor_id)
            self.served.forgot(forgotten.person, _micros(self._clock()))
            return forgotten

        return self._writer.submit(forget)

    def expire(self, before: datetime, limit: int) -> Future[Expired]:
        """Delete at most `limit` events that happened before a time, the oldest first."""
        at = _micros(before)
        return self._writer.submit(lambda connection: erasure.expire(connection, at, limit))

    def expire_pages(self, before: datetime, limit: int) -> Future[int]:
        """Delete at most `limit` pages that were answered before a time, the oldest first; how many."""
        at = _micros(before)
        return self._writer.submit(lambda connection: served.expire(connection, at, limit))

    def expire_explored(self, before: datetime, limit: int) -> Future[int]:
        """Forget of at most `limit` showings before a time that they were for exploring; of how many."""
        at = _micros(before)
        return self._writer.submit(lambda connection: served.expire_explored(connection, at, limit))

    def known_ids(self, user_id: str, visitor_id: str) -> dict[str, list[str]]:
        """Every id of a person who has either of these, sorted, by "user" and "visitor"."""
        with self._engine.connect() as connection:
            return identities.known_ids(connection, user_id, visitor_id)

    def exported(self, user_id: str, visitor_id: str, after: int, limit: int) -> list[Stored]:
        """A person's events after a sequence number, in commit order."""
        with self._snapshot() as connection:
            mine = tables.events.c.user_key.in_(identities.keys_of(connection, user_id, visitor_id))
            query = (
                sa.select(tables.events)
                .where(mine, tables.events.c.sequence > after)
                .order_by(tables.events.c.sequence)
                .limit(limit)
            )
            found = connection.execute(query).all()
            within = tables.event_items.c.sequence.in_([row.sequence for row in found])
            ordered = tables.event_items.select().where(within).order_by(tables.event_items.c.row)
            items: dict[int, list[EventItem]] = {}
            for row in connection.execute(ordered):
                item = EventItem(row.item_id, row.quantity, row.price, row.position)
                items.setdefault(row.sequence, []).append(item)
        return [
            Stored(
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
            for row in found
        ]

    def exported_pages(self, user_id: str, visitor_id: str, after: int, limit: int) -> list[Kept]:
        """The pages a person was answered, after a place in the log."""
        with self._engine.connect() as connection:
            person = identities.person(connection, user_id, visitor_id)
        return self.served.exported(person, after, limit)

    def rows(self, after: int, limit: int) -> Rows:
        """The items of up to `limit` events committed after a sequence number, in commit order."""
        with self._snapshot() as connection:
            return _read(connection, after, limit)

    def identities(self) -> dict[tuple[str, str], int]:
        """("user" or "visitor", id) to user key."""
        with self._snapshot() as connection:
            return _people(connection, None)

    def changes(self, after: int, limit: int) -> tuple[Rows, dict[tuple[str, str], int]]:
        """`rows`, and `identities` of the people in them, as they were at one moment."""
        with self._snapshot() as connection:
            found = _read(connection, after, limit)
            return found, _people(connection, set(found.user.tolist()))

    @contextmanager
    def _snapshot(self) -> Iterator[sa.Connection]:
        """A connection that sees one moment, whatever is committed meanwhile."""
        with self._engine.connect() as connection:
            if self._engine.dialect.name == "sqlite":  # sees one by itself
                yield connection
            else:
                yield connection.execution_options(isolation_level="REPEATABLE READ")

    def scrub(self) -> None:
        """Leave nothing of what was deleted in SQLite's log beside its file; waits for readers."""
        if self._engine.dialect.name != "sqlite":
            return
        raw = self._engine.raw_connection()
        try:
            for _ in range(_SCRUBS):
                busy, *_ = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if not busy:
                    return
                time.sleep(_BETWEEN_SCRUBS)
            _log.warning("what was deleted stays in the log of the database until it is written again")
        finally:
            raw.close()

    def history(self, user_id: str, visitor_id: str, before: datetime, limit: int) -> list[HistoryRow]:
        """What a person did, newest first, of events recorded strictly before a time."""
        columns = tables.events.c
        with self._snapshot() as connection:
            mine = columns.user_key.in_(identities.keys_of(connection, user_id, visitor_id))
            query = (
                sa.select(tables.events, tables.event_items)
                .join(tables.event_items, tables.event_items.c.sequence == columns.sequence)
                .where(mine, columns.recorded < _micros(before))
                .order_by(columns.occurred.desc(), columns.sequence.desc(), tables.event_items.c.row)
                .limit(limit)
            )
            return [
                HistoryRow(
                    sequence=row.sequence,
                    number=row.number,
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
        """(item number, event type) to how often it happened, quantities not multiplied."""
        with self._engine.connect() as connection:
            found = connection.execute(tables.counters.select())
            return {(row.number, row.type): row.events for row in found}

    def recount(self) -> dict[tuple[int, str], int]:
        """The same as `counts`, from the events themselves: the oracle."""
        query = (
            sa.select(tables.event_items.c.number, tables.events.c.type, sa.func.count().label("events"))
            .join(tables.events, tables.events.c.sequence == tables.event_items.c.sequence)
            .group_by(tables.event_items.c.number, tables.events.c.type)
        )
        with self._engine.connect() as connection:
            return {(row.number, row.type): row.events for row in connection.execute(query)}


def validate(event: Event, event_types: Collection[str], now: datetime) -> None:
    """Check one event against the contract; InvalidArgument names every wrong field."""
    wrong = [
        FieldViolation(name, problem)
        for name, problem in (
            ("event_id", identifier_problem(event.event_id)),
            ("type", "" if event.type in event_types else f"is none of {', '.join(sorted(event_types))}"),
            ("user_id", "" if event.user_id or event.visitor_id else "or visitor_id is required"),
            ("user_id", identifier_problem(event.user_id) if event.user_id else ""),
            ("visitor_id", identifier_problem(event.visitor_id) if event.visitor_id else ""),
            ("session_id", identifier_problem(event.session_id) if event.session_id else ""),
            ("channel", identifier_problem(event.channel) if event.channel else ""),
            (
                "items",
                "" if 1 <= len(event.items) <= MAX_EVENT_ITEMS else f"1 to {MAX_EVENT_ITEMS} are allowed",
            ),
            ("occurred_at", _time_problem(event.occurred, now)),
            ("attribution_token", "is too long" if len(event.attribution_token) > MAX_TOKEN_LENGTH else ""),
            ("attribution_token", "" if "\0" not in event.attribution_token else "holds a NUL character"),
        )
        if problem
    ]
    for index, item in enumerate(event.items[:MAX_EVENT_ITEMS]):
        wrong += [FieldViolation(f"items[{index}].{name}", problem) for name, problem in _item_problems(item)]
    if wrong:
        raise InvalidArgument(wrong)


def _time_problem(occurred: datetime | None, now: datetime) -> str:
    if occurred is None:
        return ""
    if occurred < _EPOCH:
        return "is before 1970"
    return "is more than a day ahead of now" if occurred > now + timedelta(days=1) else ""


def _item_problems(item: EventItem) -> Iterator[tuple[str, str]]:
    if problem := identifier_problem(item.item_id):
        yield "item_id", problem
    if not 1 <= item.quantity <= _MAX_QUANTITY:
        yield "quantity", "must be at least 1 and fit 31 bits"
    if item.price is not None and not 0 <= item.price <= MAX_PRICE:
        yield "price", PRICE_PROBLEM
    if item.position is not None and not 1 <= item.position <= _MAX_QUANTITY:
        yield "position", "must be at least 1 and fit 31 bits"


def _read(connection: sa.Connection, after: int, limit: int) -> Rows:
    query = (
        sa.select(tables.events, tables.event_items)
        .join(tables.event_items, tables.event_items.c.sequence == tables.events.c.sequence)
        .where(tables.events.c.sequence > after, tables.events.c.sequence <= after + limit)
        .order_by(tables.events.c.sequence, tables.event_items.c.row)
    )
    found = connection.execute(query).all()
    return Rows(
        user=np.array([r.user_key for r in found], np.int64),
        number=np.array([r.number for r in found], np.int64),
        type=[r.type for r in found],
        channel=[r.channel for r in found],
        occurred=np.array([r.occurred for r in found], np.int64),
        recorded=np.array([r.recorded for r in found], np.int64),
        price=np.array([np.nan if r.price is None else r.price for r in found], np.float64),
        quantity=np.array([r.quantity for r in found], np.int64),
        sequence=np.array([r.sequence for r in found], np.int64),
    )


def _people(connection: sa.Connection, keys: Collection[int] | None) -> dict[tuple[str, str], int]:
    query = tables.identities.select()
    if keys is not None and len(keys) <= _KEYS_AT_ONCE:
        query = query.where(tables.identities.c.user_key.in_(keys))
    return {(row.kind, row.id): row.user_key for row in connection.execute(query)}


def _write(connection: sa.Connection, event: Event, now: datetime) -> Recorded:
    content_hash = _content_hash(event)
    same = tables.events.c.event_id == event.event_id
    known = connection.execute(
        sa.select(tables.events.c.sequence, tables.events.c.content_hash).where(same)
    ).first()
    if known is not None:
        if bytes(known.content_hash) != content_hash:
            message = f"event_id {event.event_id!r} is taken by an event with other content"
            raise AlreadyExists("event", event.event_id, message)
        return Recorded(Outcome.DUPLICATE, known.sequence)
    sequence = store.take_sequence(connection, _SEQUENCE)
    key = identities.join(connection, event.user_id, event.visitor_id, sequence)
    connection.execute(tables.events.insert().values(_event_row(event, sequence, key, now)))
    rows = _item_rows(event, sequence)
    connection.execute(tables.event_items.insert(), rows)
    for row in rows:
        tables.count(connection, row["number"], event.type)
    return Recorded(Outcome.RECORDED, sequence)


_CHUNK = 5000


def _load(connection: sa.Connection, events: Iterable[Event]) -> int:
    known = set(connection.scalars(sa.select(tables.events.c.event_id)))
    new = []
    for event in events:
        if event.event_id not in known:
            known.add(event.event_id)
            new.append(event)
    first = store.take_sequence(connection, _SEQUENCE, len(new)) - len(new) + 1
    keys: dict[tuple[str, str], int] = {}
    for sequence, event in enumerate(new, first):
        person = (event.user_id, event.visitor_id)
        if person not in keys:
            keys[person] = identities.join(connection, event.user_id, event.visitor_id, sequence)
    if any(visitor for _, visitor in keys):  # a later event may have joined two
        for user_id, visitor_id in keys:
            mine = identities.keys_of(connection, user_id, "" if user_id else visitor_id)
            [keys[user_id, visitor_id]] = mine
    event_rows: list[dict[str, object]] = []
    item_rows: list[dict[str, object]] = []
    for sequence, event in enumerate(new, first):
        # An import was recorded when it happened, so that what is asked as of then sees it.
        when = event.occurred or _EPOCH
        key = keys[event.user_id, event.visitor_id]
        event_rows.append(_event_row(event, sequence, key, when))
        item_rows += _item_rows(event, sequence)
    for table, rows in ((tables.events, event_rows), (tables.event_items, item_rows)):
        for start in range(0, len(rows), _CHUNK):
            connection.execute(table.insert(), rows[start : start + _CHUNK])
    counts = Counter((item_number(item.item_id), event.type) for event in new for item in event.items)
    for (number, event_type), count in counts.items():
        tables.count(connection, number, event_type, count)
    return len(new)


def _event_row(event: Event, sequence: int, user_key: int, recorded: datetime) -> dict[str, object]:
    return {
        "sequence": sequence,
        "event_id": event.event_id,
        "content_hash": _content_hash(event),
        "user_key": user_key,
        "type": event.type,
        "session_id": event.session_id,
        "attribution_token": event.attribution_token,
        "channel": event.channel,
        "occurred": _micros(event.occurred or recorded),
        "recorded": _micros(recorded),
    }


def _item_rows(event: Event, sequence: int) -> list[dict[str, object]]:
    return [
        {
            "sequence": sequence,
            "row": row,
            "number": item_number(item.item_id),
            "item_id": item.item_id,
            "quantity": item.quantity,
            "price": item.price,
            "position": item.position,
        }
        for row, item in enumerate(event.items)
    ]


def _content_hash(event: Event) -> bytes:
    return hashlib.blake2b(repr(event).encode(), digest_size=32).digest()


def _micros(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND
