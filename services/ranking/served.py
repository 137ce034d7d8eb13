"""Pages that were answered, in SQL, and how often what was shown for exploring.

A page is kept as whoever answered it wrote it, under the ids it was asked with. Nothing is read from here on
the way of a request, but what was explored.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import sqlalchemy as sa

from services import store
from services.ranking import tables

_SEQUENCE = "served"
_SECOND = 1_000_000
_HOUR, _DAY = 3600 * _SECOND, 86_400 * _SECOND
# How long a page may be on its way here, at most, when its person is forgotten.
_ON_ITS_WAY = 300 * _SECOND


@dataclass(frozen=True)
class Served:
    """A page answered at `at`, microseconds since 1970.

    `content` is the writer's own; `explored` are numbers of items that were drawn.
    """

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


class ServedLog:
    """The log over `engine`, written by the one thread of `writer`."""

    def __init__(self, engine: sa.Engine, writer: store.Writer) -> None:
        self._engine, self._writer = engine, writer
        store.create(engine, [tables.served, tables.explored], _SEQUENCE)
        self._forgotten: dict[Person, int] = {}
        self._explored = _Explored()

    def write(self, pages: Sequence[Served]) -> Future[int]:
        """Keep pages, but those of somebody who was forgotten since; how many."""
        wanted = [page for page in pages if not self._is_forgotten(page)]
        return self._writer.submit(lambda connection: _write(connection, wanted))

    def forgot(self, person: Person, at: int) -> None:
        """Keep no page of a person that was answered before a moment, should it still arrive."""
        kept = {who: when for who, when in self._forgotten.items() if when > at - _ON_ITS_WAY}
        self._forgotten = {**kept, person: at}

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

    def explored(self, scenario: str, before: int) -> tuple[Counter[int], int]:
        """How often each item was explored before a moment, and how many slots of a scenario on that day."""
        with self._explored.lock:
            self._explored.follow(self._engine)
            return self._explored.counts(before), self._explored.today(scenario, before)

    def _is_forgotten(self, page: Served) -> bool:
        for person, at in self._forgotten.items():
            theirs = page.user_id in person.users if page.user_id else page.visitor_id in person.visitors
            if theirs and page.at <= at:
                return True
        return False


class _Explored:
    """What was explored, in memory, as far as it was read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._sequence = 0
        self._all = Counter[int]()
        self._days = Counter[tuple[str, int]]()
        self._latest: list[tuple[int, int, str]] = []  # for moments a little ago

    def follow(self, engine: sa.Engine) -> None:
        columns = tables.explored.c
        query = tables.explored.select().where(columns.sequence > self._sequence).order_by(columns.sequence)
        with engine.connect() as connection:
            new = connection.execute(query).all()
        if not new:
            return
        self._sequence = new[-1].sequence
        self._all.update(row.number for row in new)
        self._days.update((row.scenario, row.at // _DAY) for row in new)
        self._latest += [(row.at, row.number, row.scenario) for row in new]
        self._latest = [row for row in self._latest if row[0] > new[-1].at - _HOUR]

    def counts(self, before: int) -> Counter[int]:
        return self._all - Counter(number for at, number, _ in self._latest if at >= before)

    def today(self, scenario: str, before: int) -> int:
        day = before // _DAY
        later = sum(of == scenario and at >= before and at // _DAY == day for at, _, of in self._latest)
        return self._days[scenario, day] - later


def forget(connection: sa.Connection, person: Person) -> int:
    """Delete a person's pages, and their visitors' ids from those of others; how many pages."""
    visitor = tables.served.c.visitor_id
    gone = connection.execute(tables.served.delete().where(_theirs(person))).rowcount
    others = tables.served.update().where(visitor.in_(person.visitors))
    connection.execute(others.values(visitor_id=""))
    return gone


def expire(connection: sa.Connection, before: int, limit: int) -> int:
    """Delete at most `limit` pages answered before a moment; how many."""
    columns = tables.served.c
    oldest = sa.select(columns.sequence).where(columns.at < before).order_by(columns.at).limit(limit)
    wanted = connection.scalars(oldest).all()
    return connection.execute(tables.served.delete().where(columns.sequence.in_(wanted))).rowcount


def _theirs(person: Person) -> sa.ColumnElement[bool]:
    user, visitor = tables.served.c.user_id, tables.served.c.visitor_id
    return user.in_(person.users) | ((user == "") & visitor.in_(person.visitors))


def _write(connection: sa.Connection, pages: Sequence[Served]) -> int:
    if not pages:
        return 0
    first = store.take_sequence(connection, _SEQUENCE, len(pages)) - len(pages) + 1
    rows = [
        {
            "sequence": sequence,
            "user_id": page.user_id,
            "visitor_id": page.visitor_id,
            "scenario": page.scenario,
            "at": page.at,
            "content": page.content,
        }
        for sequence, page in enumerate(pages, first)
    ]
    connection.execute(tables.served.insert(), rows)
    if explored := list(_explored(pages, first)):
        connection.execute(tables.explored.insert(), explored)
    return len(pages)


def _explored(pages: Iterable[Served], first: int) -> Iterable[dict[str, object]]:
    for sequence, page in enumerate(pages, first):
        for number in page.explored:
            yield {
                "sequence": sequence,
                "number": number,
                "scenario": page.scenario,
                "at": page.at,
            }
