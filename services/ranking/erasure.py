"""Leaves nothing of a person, or of what is too old, in the tables of behaviour."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.ranking import tables


@dataclass(frozen=True)
class Forgotten:
    """The keys a person had, and how many events and ids were deleted."""

    user_keys: frozenset[int]
    events: int
    ids: int


def is_person(user_id: str, visitor_id: str) -> sa.ColumnElement[bool]:
    """Which identities are of either id; an empty one is nobody's."""
    known, ids = (("user", user_id), ("visitor", visitor_id)), tables.identities.c
    return sa.or_(sa.false(), *((ids.kind == k) & (ids.id == i) for k, i in known if i))


def keys_of(user_id: str, visitor_id: str) -> sa.Select[Any]:
    """The keys of a person who has either id."""
    return sa.select(tables.identities.c.user_key).where(is_person(user_id, visitor_id))


def known_ids(connection: sa.Connection, user_id: str, visitor_id: str) -> dict[str, list[str]]:
    """Every id of a person who has either of these, sorted, by "user" and "visitor"."""
    found: dict[str, list[str]] = {"user": [], "visitor": []}
    mine = tables.identities.c.user_key.in_(keys_of(user_id, visitor_id))
    for row in connection.execute(tables.identities.select().where(mine).order_by(tables.identities.c.id)):
        found[row.kind].append(row.id)
    return found


def forget(connection: sa.Connection, user_id: str, visitor_id: str) -> Forgotten:
    """Delete a person who has either id."""
    keys = frozenset(connection.scalars(keys_of(user_id, visitor_id)).all())
    events = _delete(connection, tables.events.c.user_key.in_(keys))
    theirs = tables.identities.delete().where(tables.identities.c.user_key.in_(keys))
    return Forgotten(keys, len(events), connection.execute(theirs).rowcount)


def expire(connection: sa.Connection, before: int, limit: int) -> list[int]:
    """Delete at most `limit` events before a moment, the oldest first, and ids that nothing is left of."""
    oldest = (
        sa.select(tables.events.c.sequence, tables.events.c.user_key)
        .where(tables.events.c.occurred < before)
        .order_by(tables.events.c.occurred, tables.events.c.sequence)
        .limit(limit)
    )
    found = connection.execute(oldest).all()
    deleted = _delete(connection, tables.events.c.sequence.in_([row.sequence for row in found]))
    left = sa.select(tables.events.c.user_key)
    touched = tables.identities.c.user_key.in_({row.user_key for row in found})
    gone = tables.identities.delete().where(touched, tables.identities.c.user_key.not_in(left))
    connection.execute(gone)
    return deleted


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
