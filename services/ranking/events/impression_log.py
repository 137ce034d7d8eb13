"""The impression log: answered pages in SQL, and the exploration impressions of items.

A page is stored as its gateway wrote it, under the ids of its request. Requests read only exploration counts,
which are in memory.
"""

from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import sqlalchemy as sa

from services.ranking.events import tables
from services.storage import store

_SEQUENCE = "served"
_MINUTE = 60_000_000
# The longest time a page may take to arrive here, when its user is erased.
_MAX_DELAY = 5 * _MINUTE


@dataclass(frozen=True)
class LoggedPage:
    """A page answered at `served_at`, microseconds since 1970.

    A page that arrives twice with the same `key` is stored once. `content` is in the format of the writer;
    it is empty if only the exploration impressions count. `explored` are the hashes of drawn items.
    """

    key: str
    user_id: str
    visitor_id: str
    scenario: str
    served_at: int
    content: bytes
    explored: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredPage:
    """The position of a page in the log, ascending, and its content."""

    sequence: int
    content: bytes


@dataclass(frozen=True)
class UserIds:
    """All ids of a user."""

    users: frozenset[str]
    visitors: frozenset[str]

    def has(self, user_id: str, visitor_id: str) -> bool:
        """Whether a page of a request with these ids is of this user: a user id, if given, decides."""
        return user_id in self.users if user_id else visitor_id in self.visitors


class ImpressionStore:
    """The log over `engine`, written by the thread of `writer`."""

    def __init__(self, engine: sa.Engine, writer: store.Writer) -> None:
        self._engine, self._writer = engine, writer
        store.create(engine, [tables.served, tables.explored], _SEQUENCE)
        self._blocked: dict[Hashable, tuple[UserIds, int]] = {}

    def write(self, pages: Sequence[LoggedPage]) -> Future[int]:
        """Store new pages, without those of users erased since; gives their number."""
        # The check runs on the thread of the writer: it knows of every earlier erasure.
        rows = len(pages) + sum(len(page.explored) for page in pages)
        return self._writer.submit(
            lambda connection: _write(connection, self._without_erased(pages)), caller=object(), rows=rows
        )

    def block(self, caller: Hashable, user: UserIds, time: int) -> None:
        """Store no page of an erased user that was answered before a time, if it still arrives."""
        self._blocked[caller] = user, time
        self._prune(time)

    def unblock(self, caller: Hashable) -> None:
        """Undo `block`: the erasure was not committed."""
        self._blocked.pop(caller, None)

    def export(self, user: UserIds, after: int, limit: int) -> list[StoredPage]:
        """The pages of a user after a position in the log, in its order."""
        columns = tables.served.c
        query = (
            sa.select(columns.sequence, columns.content)
            .where(_of_user(user), columns.sequence > after)
            .order_by(columns.sequence)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [StoredPage(row.sequence, row.content) for row in connection.execute(query)]

    def explored(self, after: int) -> Sequence[sa.Row[tuple[int, int, str, int]]]:
        """The exploration impressions after a position in the log: sequence, number, scenario, at."""
        columns = tables.explored.c
        query = tables.explored.select().where(columns.sequence > after).order_by(columns.sequence)
        with self._engine.connect() as connection:
            return connection.execute(query).all()

    def _without_erased(self, pages: Sequence[LoggedPage]) -> list[LoggedPage]:
        remaining = []
        for page in pages:
            erased = [user for user, time in self._blocked.values() if page.served_at <= time]
            if any(user.has(page.user_id, page.visitor_id) for user in erased):
                continue
            # The device may have been that of an erased user before.
            foreign = any(page.visitor_id in user.visitors for user in erased)
            remaining.append(replace(page, visitor_id="") if foreign else page)
        self._prune(max((page.served_at for page in pages), default=0))
        return remaining

    def _prune(self, now: int) -> None:
        entries = self._blocked.items()
        self._blocked = {caller: (user, time) for caller, (user, time) in entries if time > now - _MAX_DELAY}


def forget(connection: sa.Connection, user: UserIds) -> int:
    """Delete the pages of a user, and their visitor ids from pages of others; returns the number of pages."""
    visitor = tables.served.c.visitor_id
    deleted = connection.execute(tables.served.delete().where(_of_user(user))).rowcount
    others = tables.served.update().where(visitor.in_(user.visitors))
    connection.execute(others.values(visitor_id=""))
    return deleted


def expire(connection: sa.Connection, before: int, limit: int) -> int:
    """Delete at most `limit` pages answered before a time; returns their number."""
    return _expire(connection, tables.served, before, limit)


def expire_explored(connection: sa.Connection, before: int, limit: int) -> int:
    """Delete at most `limit` exploration impressions before a time; returns their number."""
    return _expire(connection, tables.explored, before, limit)


def _expire(connection: sa.Connection, table: sa.Table, before: int, limit: int) -> int:
    columns = table.c
    oldest = sa.select(columns.sequence).where(columns.at < before).order_by(columns.at).limit(limit)
    sequences = connection.scalars(oldest).all()
    return connection.execute(table.delete().where(columns.sequence.in_(sequences))).rowcount


def _of_user(ids: UserIds) -> sa.ColumnElement[bool]:
    user, visitor = tables.served.c.user_id, tables.served.c.visitor_id
    return user.in_(ids.users) | ((user == "") & visitor.in_(ids.visitors))


def _write(connection: sa.Connection, pages: Sequence[LoggedPage]) -> int:
    column = tables.served.c.page_key
    stored_keys = set(connection.scalars(sa.select(column).where(column.in_([page.key for page in pages]))))
    new = list({page.key: page for page in pages if page.key not in stored_keys}.values())
    if not new:
        return 0
    first = store.take_sequence(connection, _SEQUENCE, len(new)) - len(new) + 1
    rows = [
        {
            "sequence": sequence,
            "page_key": page.key,
            "user_id": page.user_id,
            "visitor_id": page.visitor_id,
            "at": page.served_at,
            "content": page.content,
        }
        for sequence, page in enumerate(new, first)
        if page.content
    ]
    if rows:
        connection.execute(tables.served.insert(), rows)
    if explored := list(_explored(new, first)):
        connection.execute(tables.explored.insert(), explored)
    return len(new)


def _explored(pages: Iterable[LoggedPage], first: int) -> Iterable[dict[str, object]]:
    for sequence, page in enumerate(pages, first):
        for item_hash in page.explored:
            yield {"sequence": sequence, "number": item_hash, "scenario": page.scenario, "at": page.served_at}
