"""Identities: the key of a user, by the ids of users and visitors, in SQL.

A visitor id belongs to the first user of its device; for every other user it is a foreign id.
`EventState.keys_of` is the same in memory.
"""

from collections.abc import Iterable

import sqlalchemy as sa

from services.ranking.events import tables
from services.ranking.events.impression_log import UserIds


def keys_of(connection: sa.Connection, user_id: str, visitor_id: str) -> set[int]:
    """The keys of a user; the key of a visitor who belongs to another user is left out."""
    return IdentityBatch(connection, [(user_id, visitor_id)]).keys_of(user_id, visitor_id)


def ids_by_kind(connection: sa.Connection, user_id: str, visitor_id: str) -> dict[str, list[str]]:
    """Every id of the user with either of these, sorted, by "user" and "visitor"."""
    return _ids_under(connection, keys_of(connection, user_id, visitor_id))


def all_ids(connection: sa.Connection, user_id: str, visitor_id: str) -> UserIds:
    """Every id of a user, including ids without any event."""
    batch = IdentityBatch(connection, [(user_id, visitor_id)])
    stored = _ids_under(connection, batch.keys_of(user_id, visitor_id))
    own_visitor = visitor_id and not batch.is_foreign(user_id, visitor_id)
    visitors = {*stored["visitor"], *([visitor_id] if own_visitor else [])}
    return UserIds(frozenset({*stored["user"], *([user_id] if user_id else [])}), frozenset(visitors))


class IdentityBatch:
    """The ids of many users: read at once, changed in memory by `join`, written at once by `save`.

    `users` are pairs of a user id and a visitor id, either of which may be empty.
    """

    def __init__(self, connection: sa.Connection, users: Iterable[tuple[str, str]]) -> None:
        pairs = set(users)
        self._users = _read(connection, "user", {user for user, _ in pairs if user})
        self._visitors = _read(connection, "visitor", {visitor for _, visitor in pairs if visitor})
        # The keys with a user id.
        self._user_keys = {*self._users.values(), *_keys_of_users(connection, set(self._visitors.values()))}
        self._new: list[dict[str, object]] = []
        self._merges: list[dict[str, int]] = []

    def is_foreign(self, user_id: str, visitor_id: str) -> bool:
        """Whether the visitor belongs to another user."""
        visitor = self._visitors.get(visitor_id)
        return bool(user_id) and visitor in self._user_keys and self._users.get(user_id) != visitor

    def keys_of(self, user_id: str, visitor_id: str) -> set[int]:
        """The keys of a user; the key of a visitor who belongs to another user is left out."""
        keys = {self._users.get(user_id), self._visitors.get(visitor_id)}
        if self.is_foreign(user_id, visitor_id):
            keys = {self._users.get(user_id)}
        return {key for key in keys if key is not None}

    def join(self, user_id: str, visitor_id: str, new_key: int) -> int:
        """The key for these ids, `new_key` for a new user; both ids map to it from now on.

        The events of an anonymous visitor become those of the user; a visitor of another user stays with
        that user.
        """
        foreign = self.is_foreign(user_id, visitor_id)
        visitor = None if foreign else self._visitors.get(visitor_id)
        key = self._users.get(user_id, new_key if visitor is None else visitor)
        for kind, identifier, keys in (
            ("user", user_id, self._users),
            ("visitor", visitor_id, self._visitors),
        ):
            if identifier and identifier not in keys:
                keys[identifier] = key
                self._new.append({"kind": kind, "id": identifier, "user_key": key})
        if user_id:
            self._user_keys.add(key)
        if visitor is not None and visitor != key:
            self._merges.append({"old_key": visitor, "new_key": key})
            for other, other_key in self._visitors.items():
                if other_key == visitor:
                    self._visitors[other] = key
        return key

    def save(self, connection: sa.Connection) -> None:
        """Write the joined ids; after the events of these users, whose keys it may change."""
        if self._new:
            connection.execute(tables.identities.insert(), self._new)
        for table in (tables.identities, tables.events) if self._merges else ():
            update = table.update().where(table.c.user_key == sa.bindparam("old_key"))
            connection.execute(update.values(user_key=sa.bindparam("new_key")), self._merges)


def _read(connection: sa.Connection, kind: str, ids: set[str]) -> dict[str, int]:
    """The keys of ids of one kind; ids without a key are left out."""
    if not ids:
        return {}
    column = tables.identities.c
    query = sa.select(column.id, column.user_key).where(column.kind == kind, column.id.in_(ids))
    return {row.id: row.user_key for row in connection.execute(query)}


def _keys_of_users(connection: sa.Connection, keys: set[int]) -> Iterable[int]:
    """Those of some keys that have a user id."""
    if not keys:
        return ()
    column = tables.identities.c
    query = sa.select(column.user_key).where(column.user_key.in_(keys), column.kind == "user")
    return connection.scalars(query).all()


def _ids_under(connection: sa.Connection, keys: set[int]) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {"user": [], "visitor": []}
    column = tables.identities.c
    query = tables.identities.select().where(column.user_key.in_(keys)).order_by(column.id)
    for row in connection.execute(query):
        ids[row.kind].append(row.id)
    return ids
