"""Who a person is: a key that ids of users and visitors lead to, in SQL.

The first user of a device keeps its visitor's id; to every other user that visitor is a stranger.
`BehaviourState.keys_of` is the same in memory.
"""

import sqlalchemy as sa

from services.ranking import tables
from services.ranking.served import Person


def keys_of(connection: sa.Connection, user_id: str, visitor_id: str) -> set[int]:
    """The keys of a person; a visitor's who is another user's is not among them."""
    found = _known(connection, user_id, visitor_id)
    if not _is_theirs(connection, user_id, found):
        del found["visitor"]
    return set(found.values())


def known_ids(connection: sa.Connection, user_id: str, visitor_id: str) -> dict[str, list[str]]:
    """Every id of a person who has either of these, sorted, by "user" and "visitor"."""
    found: dict[str, list[str]] = {"user": [], "visitor": []}
    mine = tables.identities.c.user_key.in_(keys_of(connection, user_id, visitor_id))
    for row in connection.execute(tables.identities.select().where(mine).order_by(tables.identities.c.id)):
        found[row.kind].append(row.id)
    return found


def person(connection: sa.Connection, user_id: str, visitor_id: str) -> Person:
    """Every id of a person, those of whom no event tells among them."""
    known = known_ids(connection, user_id, visitor_id)
    theirs = _is_theirs(connection, user_id, _known(connection, user_id, visitor_id))
    visitors = {*known["visitor"], *([visitor_id] if visitor_id and theirs else [])}
    return Person(frozenset({*known["user"], *([user_id] if user_id else [])}), frozenset(visitors))


def join(connection: sa.Connection, user_id: str, visitor_id: str, new_key: int) -> int:
    """The key of who has these ids, `new_key` for somebody new; both ids lead to it from now on.

    What a visitor did who was nobody's yet becomes the user's; one who was another user's stays that user's.
    """
    found = _known(connection, user_id, visitor_id)
    visitor = found.get("visitor") if _is_theirs(connection, user_id, found) else None
    key: int = found.get("user", new_key if visitor is None else visitor)
    for kind, identifier in _named(user_id, visitor_id):
        if kind not in found:
            connection.execute(tables.identities.insert().values(kind=kind, id=identifier, user_key=key))
    if visitor not in (None, key):
        for table in (tables.identities, tables.events):
            connection.execute(table.update().where(table.c.user_key == visitor).values(user_key=key))
    return key


def _named(user_id: str, visitor_id: str) -> list[tuple[str, str]]:
    """The ids that are not empty, with their kinds."""
    return [(kind, i) for kind, i in (("user", user_id), ("visitor", visitor_id)) if i]


def _known(connection: sa.Connection, user_id: str, visitor_id: str) -> dict[str, int]:
    """The keys that the ids lead to, by kind."""
    ids = tables.identities.c
    which = ((ids.kind == kind) & (ids.id == i) for kind, i in _named(user_id, visitor_id))
    query = tables.identities.select().where(sa.or_(sa.false(), *which))
    return {row.kind: row.user_key for row in connection.execute(query)}


def _is_theirs(connection: sa.Connection, user_id: str, found: dict[str, int]) -> bool:
    """Whether a visitor, if there is one, is not another user's."""
    visitor = found.get("visitor")
    if not user_id or visitor is None or found.get("user") == visitor:
        return True
    ids = tables.identities.c
    users = sa.select(ids.id).where(ids.user_key == visitor, ids.kind == "user").limit(1)
    return connection.execute(users).first() is None
