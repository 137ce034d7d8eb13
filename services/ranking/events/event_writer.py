"""Writes batches of events into the tables, with one statement per table.

An event, its key and its counters are in one transaction, that of the caller.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import NamedTuple

import sqlalchemy as sa

from services.catalog.items import item_hash
from services.core.errors import AlreadyExists
from services.ranking.events import tables
from services.ranking.events.events import Event, EventOutcome, RecordResult
from services.ranking.events.identities import IdentityBatch
from services.storage import store

SEQUENCE = "events"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LOADED_AT_ONCE = 5_000


@dataclass(frozen=True)
class DatedEvent:
    """An event and when it is recorded."""

    event: Event
    recorded: datetime


class _New(NamedTuple):
    sequence: int
    content_hash: bytes
    dated: DatedEvent


def micros(time: datetime) -> int:
    """Microseconds since 1970 of an aware time."""
    return (time - _EPOCH) // _MICROSECOND


def rows_of(event: Event) -> int:
    """The number of rows of an event: one for each item, and its own."""
    return 1 + len(event.items)


def record(connection: sa.Connection, batch: Sequence[DatedEvent]) -> list[RecordResult | AlreadyExists]:
    """Write events in their order; the outcome is AlreadyExists if the id has an event with other content."""
    stored = _known_events(connection, [dated.event.event_id for dated in batch])
    next_sequence = _take_sequences(
        connection, len({dated.event.event_id for dated in batch} - stored.keys())
    )
    outcomes: list[RecordResult | AlreadyExists] = []
    new: list[_New] = []
    for dated in batch:
        event_id, content_hash = dated.event.event_id, _content_hash(dated.event)
        if event_id not in stored:
            stored[event_id] = next_sequence, content_hash
            new.append(_New(next_sequence, content_hash, dated))
            outcomes.append(RecordResult(EventOutcome.RECORDED, next_sequence))
            next_sequence += 1
        elif stored[event_id][1] == content_hash:
            outcomes.append(RecordResult(EventOutcome.DUPLICATE, stored[event_id][0]))
        else:
            message = f"event_id {event_id!r} is taken by an event with other content"
            outcomes.append(AlreadyExists("event", event_id, message))
    _insert(connection, new)
    return outcomes


def load(connection: sa.Connection, events: Iterable[DatedEvent]) -> tuple[int, int]:
    """Write the events with new ids and skip the others; returns the number of each."""
    remaining, written, duplicates = iter(events), 0, 0
    while chunk := list(islice(remaining, _LOADED_AT_ONCE)):
        first_of = {dated.event.event_id: dated for dated in reversed(chunk)}
        for event_id in _known_events(connection, first_of):
            del first_of[event_id]
        new_events = [dated for dated in chunk if first_of.get(dated.event.event_id) is dated]
        first = _take_sequences(connection, len(new_events))
        _insert(connection, [_New(n, _content_hash(d.event), d) for n, d in enumerate(new_events, first)])
        written += len(new_events)
        duplicates += len(chunk) - len(new_events)
    return written, duplicates


def _take_sequences(connection: sa.Connection, count: int) -> int:
    """Take `count` sequence numbers; returns the first."""
    return store.take_sequence(connection, SEQUENCE, count) - count + 1 if count else 0


def _known_events(connection: sa.Connection, ids: Iterable[str]) -> dict[str, tuple[int, bytes]]:
    """The sequence and content hash of each stored event, by its id."""
    column = tables.events.c
    query = sa.select(column.event_id, column.sequence, column.content_hash).where(column.event_id.in_(ids))
    return {row.event_id: (row.sequence, bytes(row.content_hash)) for row in connection.execute(query)}


def _insert(connection: sa.Connection, new: Sequence[_New]) -> None:
    if not new:
        return
    events = [new_event.dated.event for new_event in new]
    users = IdentityBatch(connection, [(event.user_id, event.visitor_id) for event in events])
    event_rows: list[dict[str, object]] = []
    item_rows: list[dict[str, object]] = []
    counts = Counter[tuple[int, str]]()
    for new_event, event in zip(new, events, strict=True):
        key = users.join(event.user_id, event.visitor_id, new_event.sequence)
        event_rows.append(_event_row(new_event, key))
        for row, item in enumerate(event.items):
            hashed = item_hash(item.item_id)
            counts[hashed, event.type] += 1
            item_rows.append(
                {
                    "sequence": new_event.sequence,
                    "row": row,
                    "number": hashed,
                    "item_id": item.item_id,
                    "quantity": item.quantity,
                    "price": item.price,
                    "position": item.position,
                }
            )
    connection.execute(tables.events.insert(), event_rows)
    connection.execute(tables.event_items.insert(), item_rows)
    users.save(connection)
    tables.count(connection, counts)


def _event_row(new: _New, user_key: int) -> dict[str, object]:
    event = new.dated.event
    return {
        "sequence": new.sequence,
        "event_id": event.event_id,
        "content_hash": new.content_hash,
        "user_key": user_key,
        "type": event.type,
        "session_id": event.session_id,
        "attribution_token": event.attribution_token,
        "channel": event.channel,
        "occurred": micros(event.occurred or new.dated.recorded),
        "recorded": micros(new.dated.recorded),
    }


def _content_hash(event: Event) -> bytes:
    return hashlib.blake2b(repr(event).encode(), digest_size=32).digest()
