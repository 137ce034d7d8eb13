"""Pages that were answered, in SQL, and how often what was shown for exploring.

A page is kept as whoever answered it wrote it, under the ids it was asked with. Nothing is read from here on
the way of a request, but what was explored, from memory.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import sqlalchemy as sa

from services import store
from services.ranking import tables

_SEQUENCE = "served"
_MINUTE = 60_000_000
# How long a page may be on its way here, at most, when its person is forgotten.
_ON_ITS_WAY = 5 * _MINUTE


@dataclass(frozen=True)
class Served:
    """A page answered at `at`, microseconds since 1970.

    `key` names it, so that one that is sent twice is kept once; `content` is the writer's own, empty where
    only what was `explored`, numbers of items that were drawn, is to be counted.
    """

    key: str
    user_id: str
    visitor_id: str
    scenario: str
    at: int
    content: bytes
    explored: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kept:
    """A page's place in the log, rising, and its content."""

    sequence: int
    content: bytes


@dataclass(frozen=True)
class Person:
    """All ids of a person."""

    users: frozenset[str]
    visitors: frozenset[str]

    def has(self, user_id: str, visitor_id: str) -> bool:
        """Whether a page that was asked for with these ids is theirs: a user's own id decides."""
        return user_id in self.users if user_id else visitor_id in self.visitors


class ServedLog:
    """The log over `engine`, written by the one thread of `writer`."""

    def __init__(self, engine: sa.Engine, writer: store.Writer) -> None:
        self._engine, self._writer = engine, writer
        store.create(engine, [tables.served, tables.explored], _SEQUENCE)
        self._forgotten: dict[Person, int] = {}

    def write(self, pages: Sequence[Served]) -> Future[int]:
        """Keep pages, but those of somebody who was forgotten since and those that are kept; how many."""
        # In its turn: who is forgotten before it is known by then.
        return self._writer.submit(lambda connection: _write(connection, self._of_the_known(pages)))

    def forgot(self, person: Person, at: int) -> None:
        """Keep no page of a person that was answered before a moment, should it still arrive."""
        self._forgotten[person] = at
        self._prune(at)

    def exported(self, person: Person, after: int, limit: int) -> list[Kept]:
        """A person's pages after a place in the log, in its order."""
        columns = tables.served.c
        query = (
            sa.select(columns.sequence, columns.content)
            .where(_theirs(person), columns.sequence > after)
            .order_by(columns.sequence)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [Kept(row.sequence, row.content) for row in connection.execute(query)]

    def explored(self, after: int) -> Sequence[sa.Row[tuple[int, int, str, int]]]:
        """What was explored after a place in the log: sequence, number, scenario, at."""
        columns = tables.explored.c
        query = tables.explored.select().where(columns.sequence > after).order_by(columns.sequence)
        with self._engine.connect() as connection:
            return connection.execute(query).all()

    def _of_the_known(self, pages: Sequence[Served]) -> list[Served]:
        kept = []
        for page in pages:
            late = [person for person, at in self._forgotten.items() if page.at <= at]
            if any(person.has(page.user_id, page.visitor_id) for person in late):
                continue
            # A device may have been theirs before it was this user's.
            old = any(page.visitor_id in person.visitors for person in late)
            kept.append(replace(page, visitor_id="") if old else page)
        self._prune(max((page.at for page in pages), default=0))
        return kept

    def _prune(self, now: int) -> None:
        kept = {person: at for person, at in self._forgotten.items() if at > now - _ON_ITS_WAY}
        self._forgotten = kept


def forget(connection: sa.Connection, person: Person) -> int:
    """Delete a person's pages, and their visitors' ids from those of others; how many pages."""
    visitor = tables.served.c.visitor_id
    gone = connection.execute(tables.served.delete().where(_theirs(person))).rowcount
    others = tables.served.update().where(visitor.in_(person.visitors))
    connection.execute(others.values(visitor_id=""))
    return gone


def expire(connection: sa.Connection, before: int, limit: int) -> int:
    """Delete at most `limit` pages answered before a moment; how many."""
    return _expire(connection, tables.served, before, limit)


def expire_explored(connection: sa.Connection, before: int, limit: int) -> int:
    """Forget of at most `limit` showings before a moment that they were for exploring; of how many."""
    return _expire(connection, tables.explored, before, limit)


def _expire(connection: sa.Connection, table: sa.Table, before: int, limit: int) -> int:
    columns = table.c
    oldest = sa.select(columns.sequence).where(columns.at < before).order_by(columns.at).limit(limit)
    wanted = connection.scalars(oldest).all()
    return connection.execute(table.delete().where(columns.sequence.in_(wanted))).rowcount


def _theirs(person: Person) -> sa.ColumnElement[bool]:
    user, visitor = tables.served.c.user_id, tables.served.c.visitor_id
    return user.in_(person.users) | ((user == "") & visitor.in_(person.visitors))


def _write(connection: sa.Connection, pages: Sequence[Served]) -> int:
    column = tables.served.c.page_key
    known = set(connection.scalars(sa.select(column).where(column.in_([page.key for page in pages]))))
    new = list({page.key: page for page in pages if page.key not in known}.values())
    if not new:
        return 0
    first = store.take_sequence(connection, _SEQUENCE, len(new)) - len(new) + 1
    rows = [
        {
            "sequence": sequence,
            "page_key": page.key,
            "user_id": page.user_id,
            "visitor_id": page.visitor_id,
            "at": page.at,
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


def _explored(pages: Iterable[Served], first: int) -> Iterable[dict[str, object]]:
    for sequence, page in enumerate(pages, first):
        for number in page.explored:
            yield {"sequence": sequence, "number": number, "scenario": page.scenario, "at": page.at}
