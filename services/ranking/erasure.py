"""Leaves nothing of a person, or of what is too old, in the tables of behaviour."""

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from services.ranking import identities, served, tables


@dataclass(frozen=True)
class Expired:
    """The sequences of events that were deleted, and the keys of people of whom nothing is left."""

    sequences: list[int]
    user_keys: frozenset[int]


@dataclass(frozen=True)
class Forgotten:
    """The keys and ids a person had, and how many events, ids and pages were deleted."""

    user_keys: frozenset[int]
    events: int
    ids: int
    pages: int
    person: served.Person


def forget(connection: sa.Connection, user_id: str, visitor_id: str) -> Forgotten:
    """Delete a person who has either id."""
    keys = frozenset(identities.keys_of(connection, user_id, visitor_id))
    person = identities.person(connection, user_id, visitor_id)
    pages = served.forget(connection, person)
    events = _delete(connection, tables.events.c.user_key.in_(keys))
    theirs = tables.identities.delete().where(tables.identities.c.user_key.in_(keys))
    return Forgotten(keys, len(events), connection.execute(theirs).rowcount, pages, person)


def expire(connection: sa.Connection, before: int, limit: int) -> Expired:
    """Delete at most `limit` events before a moment, the oldest first, and ids that nothing is left of."""
    oldest = (
        sa.select(tables.events.c.sequence, tables.events.c.user_key)
        .where(tables.events.c.occurred < before)
        .order_by(tables.events.c.occurred, tables.events.c.sequence)
        .limit(limit)
    )
    found = connection.execute(oldest).all()
    deleted = _delete(connection, tables.events.c.sequence.in_([row.sequence for row in found]))
    touched = {row.user_key for row in found}
    mine = tables.events.c.user_key.in_(touched)
    left = set(connection.scalars(sa.select(tables.events.c.user_key).where(mine).distinct()))
    gone = frozenset(touched - left)
    connection.execute(tables.identities.delete().where(tables.identities.c.user_key.in_(gone)))
    return Expired(deleted, gone)


def _delete(connection: sa.Connection, which: sa.ColumnElement[bool]) -> list[int]:
    """Delete events, their items and what they counted; the events' sequences."""
    chosen = sa.select(tables.events.c.sequence).where(which)
    items = tables.event_items
    counted = (
        sa.select(items.c.number, tables.events.c.type, sa.func.count().label("many"))
        .join(tables.events, tables.events.c.sequence == items.c.sequence)
        .where(which)
        .group_by(items.c.number, tables.events.c.type)
    )
    for row in connection.execute(counted).all():
        tables.count(connection, row.number, row.type, -row.many)
    connection.execute(tables.counters.delete().where(tables.counters.c.events <= 0))
    connection.execute(items.delete().where(items.c.sequence.in_(chosen)))
    sequences: Collection[int] = connection.scalars(chosen).all()
    connection.execute(tables.events.delete().where(which))
    return list(sequences)
