"""Pages of the served log with what came of them, joined to events by what their tokens name.

Read from a state that may be served meanwhile.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from vitrine.catalog.v1 import served_pb2

from services.catalog import item_number
from services.errors import FailedPrecondition, InvalidArgument
from services.gateway.tokens import Tokens
from services.ranking import tables

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FAR = timedelta(days=36_500)
_MICROSECOND = timedelta(microseconds=1)
_READ_AT_ONCE = 1000


@dataclass(frozen=True)
class Shown:
    """A page, who it was for, and what was done with its items: types of events by item number."""

    person: str
    page: served_pb2.ServedPage
    done: Mapping[int, frozenset[str]]
    paid: Mapping[int, float]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the page's items, in their order."""
        return [item_number(item_id) for item_id in self.page.item_ids]


@dataclass
class Done:
    """What was done with the items of an answer."""

    done: dict[int, set[str]] = field(default_factory=dict)
    paid: dict[int, float] = field(default_factory=dict)


def pages(
    engine: sa.Engine, since: datetime | None = None, until: datetime | None = None
) -> Iterator[tuple[str, served_pb2.ServedPage]]:
    """Pages answered from `since` to `until`, exclusive, and who for, in the order of the log.

    Raises:
        FailedPrecondition: the state has no served log.
    """
    if not sa.inspect(engine).has_table(tables.served.name):
        raise FailedPrecondition("the state has no served log: it is of an earlier version")
    columns = tables.served.c
    query = tables.served.select().order_by(columns.sequence)
    for moment, after in ((since, True), (until, False)):
        if moment is not None:
            at = (moment - _EPOCH) // _MICROSECOND
            query = query.where(columns.at >= at if after else columns.at < at)
    with engine.connect() as connection:
        for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query):
            page = served_pb2.ServedPage.FromString(row.content)
            yield row.user_id or row.visitor_id or page.session_id or page.request_id, page


def shown(
    engine: sa.Engine,
    secret: bytes,
    since: datetime | None,
    until: datetime | None,
    bought_as: str = "purchase",
) -> Iterator[Shown]:
    """The same with what came of them; what was paid is that of events of the type `bought_as`."""
    nothing = Done()
    with engine.connect() as connection:
        outcomes = _outcomes(connection, secret, bought_as)
    for person, page in pages(engine, since, until):
        came = nothing if page.shadow else outcomes.get((page.request_id, page.scenario), nothing)
        done = {number: frozenset(kinds) for number, kinds in came.done.items()}
        yield Shown(person, page, done, came.paid)


def content_of(tokens: Tokens, token: str) -> dict[str, Any] | None:
    """What an attribution token holds, an old one as well; None for one that is none of this secret."""
    try:
        return tokens.read("shown", token, _EPOCH - _FAR, "attribution_token")
    except InvalidArgument:
        return None


def _outcomes(connection: sa.Connection, secret: bytes, bought_as: str) -> dict[tuple[str, str], Done]:
    events, items = tables.events.c, tables.event_items.c
    query = (
        sa.select(events.attribution_token, events.type, items.number, items.quantity, items.price)
        .join(tables.event_items, items.sequence == events.sequence)
        .where(events.attribution_token != "")
    )
    tokens, read = Tokens(secret), dict[str, tuple[str, str] | None]()
    found: dict[tuple[str, str], Done] = {}
    for row in connection.execution_options(yield_per=_READ_AT_ONCE).execute(query):
        token = row.attribution_token
        if token not in read:
            content = content_of(tokens, token)
            read[token] = (content["r"], content["s"]) if content else None
        if (answer := read[token]) is None:
            continue
        mine = found.setdefault(answer, Done())
        mine.done.setdefault(row.number, set()).add(row.type)
        if row.type == bought_as and row.price is not None:
            mine.paid[row.number] = mine.paid.get(row.number, 0.0) + row.price * row.quantity
    return found
