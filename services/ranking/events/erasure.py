"""Erases users, and expires old events, in the tables of events."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import sqlalchemy as sa

from services.ranking.events import identities, impression_log, tables

_EXPIRED_ITEMS = 20_000


@dataclass(frozen=True)
class ExpiredEvents:
    """The sequences of deleted events, and the keys of users without any remaining event."""

    sequences: list[int]
    user_keys: frozenset[int]


@dataclass(frozen=True)
class ErasedUser:
    """The keys and ids of an erased user, and the numbers of deleted events, ids and pages."""

    user_keys: frozenset[int]
    events: int
    ids: int
    pages: int
    user: impression_log.UserIds


def forget(connection: sa.Connection, user_id: str, visitor_id: str) -> ErasedUser:
    """Delete the user with either id."""
    keys = frozenset(identities.keys_of(connection, user_id, visitor_id))
    user = identities.all_ids(connection, user_id, visitor_id)
    pages = impression_log.forget(connection, user)
    events = _delete(connection, tables.events.c.user_key.in_(keys))
    identities_of_user = tables.identities.delete().where(tables.identities.c.user_key.in_(keys))
    return ErasedUser(keys, len(events), connection.execute(identities_of_user).rowcount, pages, user)


def expire(connection: sa.Connection, before: int, limit: int) -> ExpiredEvents:
    """Delete at most `limit` events before a time, the oldest first, and the ids of users without events.

    The events have at most 20,000 items together; at least one is deleted.
    """
    oldest = (
        sa.select(tables.events.c.sequence, tables.events.c.user_key)
        .where(tables.events.c.occurred < before)
        .order_by(tables.events.c.occurred, tables.events.c.sequence)
        .limit(limit)
    )
    oldest_events = connection.execute(oldest).all()
    oldest_events = oldest_events[
        : fitting(connection, [row.sequence for row in oldest_events], _EXPIRED_ITEMS)
    ]
    deleted = _delete(connection, tables.events.c.sequence.in_([row.sequence for row in oldest_events]))
    user_keys = {row.user_key for row in oldest_events}
    of_users = tables.events.c.user_key.in_(user_keys)
    remaining = set(connection.scalars(sa.select(tables.events.c.user_key).where(of_users).distinct()))
    erased_keys = frozenset(user_keys - remaining)
    connection.execute(tables.identities.delete().where(tables.identities.c.user_key.in_(erased_keys)))
    return ExpiredEvents(deleted, erased_keys)


def fitting(connection: sa.Connection, sequences: Sequence[int], limit: int) -> int:
    """How many events, from the first on, have at most `limit` items together; at least 1."""
    items = tables.event_items.c
    query = sa.select(items.sequence, sa.func.count().label("item_count")).where(
        items.sequence.in_(sequences)
    )
    sizes: dict[int, int] = {
        row.sequence: row.item_count for row in connection.execute(query.group_by(items.sequence))
    }
    ends = accumulate(sizes[sequence] for sequence in sequences)
    return max(sum(end <= limit for end in ends), 1)


def _delete(connection: sa.Connection, which: sa.ColumnElement[bool]) -> list[int]:
    """Delete events, their items and their counts; returns the sequences of the events."""
    sequences_query = sa.select(tables.events.c.sequence).where(which)
    items = tables.event_items
    counts = (
        sa.select(items.c.number, tables.events.c.type, sa.func.count().label("item_count"))
        .join(tables.events, tables.events.c.sequence == items.c.sequence)
        .where(which)
        .group_by(items.c.number, tables.events.c.type)
    )
    changes = {(row.number, row.type): -row.item_count for row in connection.execute(counts)}
    tables.count(connection, changes)
    connection.execute(items.delete().where(items.c.sequence.in_(sequences_query)))
    sequences: Collection[int] = connection.scalars(sequences_query).all()
    connection.execute(tables.events.delete().where(which))
    return list(sequences)
