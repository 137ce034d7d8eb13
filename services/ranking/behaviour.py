"""The truth about behaviour: events, who they belong to, and counts per item, in SQL.

An event, its key and the counters it moves are one transaction, so a retry never
counts twice and a crash never counts half. Knows nothing of models or transport.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum

import numpy as np
import sqlalchemy as sa

from services import store
from services.catalog import identifier_problem, item_number
from services.errors import AlreadyExists, FieldViolation, InvalidArgument

MAX_EVENT_ITEMS = 500
MAX_TOKEN_LENGTH = 4096
_SEQUENCE = "events"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_MAX_QUANTITY = 2**31 - 1


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
    1970; `price` float64, NaN for unknown.
    """

    user: np.ndarray
    number: np.ndarray
    type: list[str]
    channel: list[str]
    occurred: np.ndarray
    recorded: np.ndarray
    price: np.ndarray
    sequence: np.ndarray


_events = sa.Table(
    "events",
    store.metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("event_id", sa.Text, nullable=False, unique=True),
    sa.Column("content_hash", sa.LargeBinary, nullable=False),
    sa.Column("user_key", sa.BigInteger, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("attribution_token", sa.Text, nullable=False),
    sa.Column("channel", sa.Text, nullable=False),
    sa.Column("occurred", sa.BigInteger, nullable=False),
    sa.Column("recorded", sa.BigInteger, nullable=False),
)
sa.Index("events_by_user", _events.c.user_key, _events.c.occurred)
_event_items = sa.Table(
    "event_items",
    store.metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("row", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("item_id", sa.Text, nullable=False),
    sa.Column("quantity", sa.Integer, nullable=False),
    sa.Column("price", sa.Double),
    sa.Column("position", sa.Integer),
)
_identities = sa.Table(
    "identities",
    store.metadata,
    sa.Column("kind", sa.String(8), primary_key=True),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_key", sa.BigInteger, nullable=False, index=True),
)
_counters = sa.Table(
    "item_counters",
    store.metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("type", sa.Text, primary_key=True),
    sa.Column("events", sa.BigInteger, nullable=False),
)


class BehaviourStore:
    """Events in SQL, written by one thread.

    `event_types` are the shop's; `clock` gives the time an event is recorded at.
    """

    def __init__(
        self, engine: sa.Engine, event_types: Collection[str], clock: Callable[[], datetime]
    ) -> None:
        self._engine, self._clock = engine, clock
        self.types = frozenset(event_types)
        store.create(engine, [_events, _event_items, _identities, _counters], _SEQUENCE)
        self._writer = store.Writer(engine)

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

    def rows(self, after: int, limit: int) -> Rows:
        """The items of up to `limit` events committed after a sequence number, in commit order."""
        query = (
            sa.select(_events, _event_items)
            .join(_event_items, _event_items.c.sequence == _events.c.sequence)
            .where(_events.c.sequence > after, _events.c.sequence <= after + limit)
            .order_by(_events.c.sequence, _event_items.c.row)
        )
        with self._engine.connect() as connection:
            found = connection.execute(query).all()
        return Rows(
            user=np.array([r.user_key for r in found], np.int64),
            number=np.array([r.number for r in found], np.int64),
            type=[r.type for r in found],
            channel=[r.channel for r in found],
            occurred=np.array([r.occurred for r in found], np.int64),
            recorded=np.array([r.recorded for r in found], np.int64),
            price=np.array([np.nan if r.price is None else r.price for r in found], np.float64),
            sequence=np.array([r.sequence for r in found], np.int64),
        )

    def identities(self, user_keys: Collection[int] | None = None) -> dict[tuple[str, str], int]:
        """("user" or "visitor", id) to user key: of these keys, or all."""
        query = _identities.select()
        if user_keys is not None:
            query = query.where(_identities.c.user_key.in_(user_keys))
        with self._engine.connect() as connection:
            return {(row.kind, row.id): row.user_key for row in connection.execute(query)}

    def history(self, user_id: str, visitor_id: str, before: datetime, limit: int) -> list[HistoryRow]:
        """What a person did, newest first, of events recorded strictly before a time."""
        query = (
            sa.select(_events, _event_items)
            .join(_event_items, _event_items.c.sequence == _events.c.sequence)
            .join(_identities, _identities.c.user_key == _events.c.user_key)
            .where(_is_person(user_id, visitor_id), _events.c.recorded < _micros(before))
            .order_by(_events.c.occurred.desc(), _events.c.sequence.desc(), _event_items.c.row)
            .limit(limit)
        )
        with self._engine.connect() as connection:
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
            return {(row.number, row.type): row.events for row in connection.execute(_counters.select())}

    def recount(self) -> dict[tuple[int, str], int]:
        """The same as `counts`, from the events themselves: the oracle."""
        query = (
            sa.select(_event_items.c.number, _events.c.type, sa.func.count().label("events"))
            .join(_events, _events.c.sequence == _event_items.c.sequence)
            .group_by(_event_items.c.number, _events.c.type)
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
    if item.price is not None and not 0 <= item.price < math.inf:
        yield "price", "must be finite and not negative"
    if item.position is not None and not 1 <= item.position <= _MAX_QUANTITY:
        yield "position", "must be at least 1 and fit 31 bits"


def _write(connection: sa.Connection, event: Event, now: datetime) -> Recorded:
    content_hash = _content_hash(event)
    known = connection.execute(
        sa.select(_events.c.sequence, _events.c.content_hash).where(_events.c.event_id == event.event_id)
    ).first()
    if known is not None:
        if bytes(known.content_hash) != content_hash:
            message = f"event_id {event.event_id!r} is taken by an event with other content"
            raise AlreadyExists("event", event.event_id, message)
        return Recorded(Outcome.DUPLICATE, known.sequence)
    sequence = store.take_sequence(connection, _SEQUENCE)
    key = _user_key(connection, event, sequence)
    connection.execute(_events.insert().values(_event_row(event, sequence, key, now)))
    rows = _item_rows(event, sequence)
    connection.execute(_event_items.insert(), rows)
    for row in rows:
        _count(connection, row["number"], event.type)
    return Recorded(Outcome.RECORDED, sequence)


_CHUNK = 5000


def _load(connection: sa.Connection, events: Iterable[Event]) -> int:
    known = set(connection.scalars(sa.select(_events.c.event_id)))
    new = []
    for event in events:
        if event.event_id not in known:
            known.add(event.event_id)
            new.append(event)
    first = store.take_sequence(connection, _SEQUENCE, len(new)) - len(new) + 1
    event_rows: list[dict[str, object]] = []
    item_rows: list[dict[str, object]] = []
    keys: dict[tuple[str, str], int] = {}
    for sequence, event in enumerate(new, first):
        person = (event.user_id, event.visitor_id)
        if person not in keys:
            keys[person] = _user_key(connection, event, sequence)
        # An import was recorded when it happened, so that what is asked as of then sees it.
        when = event.occurred or _EPOCH
        event_rows.append(_event_row(event, sequence, keys[person], when))
        item_rows += _item_rows(event, sequence)
    for table, rows in ((_events, event_rows), (_event_items, item_rows)):
        for start in range(0, len(rows), _CHUNK):
            connection.execute(table.insert(), rows[start : start + _CHUNK])
    counts = Counter((item_number(item.item_id), event.type) for event in new for item in event.items)
    for (number, event_type), count in counts.items():
        _count(connection, number, event_type, count)
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


def _count(connection: sa.Connection, number: object, event_type: str, by: int = 1) -> None:
    mine = (_counters.c.number == number) & (_counters.c.type == event_type)
    if not connection.execute(_counters.update().where(mine).values(events=_counters.c.events + by)).rowcount:
        connection.execute(_counters.insert().values(number=number, type=event_type, events=by))


def _user_key(connection: sa.Connection, event: Event, sequence: int) -> int:
    """The person's key: the first event's sequence. An event with both ids joins the two."""
    query = _identities.select().where(_is_person(event.user_id, event.visitor_id))
    keys = {row.kind: row.user_key for row in connection.execute(query)}
    key: int = keys.get("user", keys.get("visitor", sequence))
    for kind, identifier in (("user", event.user_id), ("visitor", event.visitor_id)):
        if identifier and kind not in keys:
            connection.execute(_identities.insert().values(kind=kind, id=identifier, user_key=key))
    return key


def _is_person(user_id: str, visitor_id: str) -> sa.ColumnElement[bool]:
    known = (("user", user_id), ("visitor", visitor_id))
    return sa.or_(sa.false(), *((_identities.c.kind == k) & (_identities.c.id == i) for k, i in known if i))


def _micros(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND
