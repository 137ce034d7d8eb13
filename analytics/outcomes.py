"""Pages of the impression log with their outcomes: the events whose attribution tokens name the page.

The state may be in use by a service.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from vitrine.catalog.v1 import served_pb2

from services.catalog.items import item_hash
from services.core.errors import FailedPrecondition, InvalidArgument
from services.gateway.recommend.signed_tokens import SignedTokens
from services.ranking.events import tables

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ANY_AGE = timedelta(days=36_500)
_MICROSECOND = timedelta(microseconds=1)
_FETCH_ROWS = 1000


@dataclass(frozen=True)
class PageOutcome:
    """A page, its user, and by item hash the types of its events and its revenue."""

    user: str
    page: served_pb2.ServedPage
    events: Mapping[int, frozenset[str]]
    revenue: Mapping[int, float]

    @property
    def item_hashes(self) -> list[int]:
        """The hashes of the page's items, in their order."""
        return [item_hash(item_id) for item_id in self.page.item_ids]


@dataclass
class ItemOutcomes:
    """The event types and the revenue of a response's items, by item hash."""

    events: dict[int, set[str]] = field(default_factory=dict)
    revenue: dict[int, float] = field(default_factory=dict)


def pages(
    engine: sa.Engine, since: datetime | None = None, until: datetime | None = None
) -> Iterator[tuple[str, served_pb2.ServedPage]]:
    """The user and the page of each response from `since` to `until`, exclusive, in the order of the log.

    Raises:
        FailedPrecondition: the state has no impression log.
    """
    if not sa.inspect(engine).has_table(tables.served.name):
        raise FailedPrecondition("the state has no impression log: an earlier version wrote it")
    columns = tables.served.c
    query = tables.served.select().order_by(columns.sequence)
    if since is not None:
        query = query.where(columns.at >= (since - _EPOCH) // _MICROSECOND)
    if until is not None:
        query = query.where(columns.at < (until - _EPOCH) // _MICROSECOND)
    with engine.connect() as connection:
        for row in connection.execution_options(yield_per=_FETCH_ROWS).execute(query):
            page = served_pb2.ServedPage.FromString(row.content)
            yield row.user_id or row.visitor_id or page.session_id or page.request_id, page


def page_outcomes(
    engine: sa.Engine,
    secret: bytes,
    since: datetime | None,
    until: datetime | None,
    purchase_type: str = "purchase",
) -> Iterator[PageOutcome]:
    """The pages of a time with their outcomes; revenue is that of events of `purchase_type`."""
    none = ItemOutcomes()
    with engine.connect() as connection:
        by_response = _outcomes(connection, secret, purchase_type)
    for user, page in pages(engine, since, until):
        outcomes = none if page.shadow else by_response.get((page.request_id, page.scenario), none)
        events = {item: frozenset(types) for item, types in outcomes.events.items()}
        yield PageOutcome(user, page, events, outcomes.revenue)


def token_content(tokens: SignedTokens, token: str) -> dict[str, Any] | None:
    """The content of an attribution token of any age; None if another secret signed it."""
    try:
        return tokens.read("shown", token, _EPOCH - _ANY_AGE, "attribution_token")
    except InvalidArgument:
        return None


def _outcomes(
    connection: sa.Connection, secret: bytes, purchase_type: str
) -> dict[tuple[str, str], ItemOutcomes]:
    """The outcomes of each response, by its request id and scenario."""
    events, items = tables.events.c, tables.event_items.c
    query = (
        sa.select(events.attribution_token, events.type, items.number, items.quantity, items.price)
        .join(tables.event_items, items.sequence == events.sequence)
        .where(events.attribution_token != "")
    )
    tokens, responses = SignedTokens(secret), dict[str, tuple[str, str] | None]()
    outcomes: dict[tuple[str, str], ItemOutcomes] = {}
    for row in connection.execution_options(yield_per=_FETCH_ROWS).execute(query):
        token = row.attribution_token
        if token not in responses:
            content = token_content(tokens, token)
            responses[token] = (content["r"], content["s"]) if content else None
        if (response := responses[token]) is None:
            continue
        outcome = outcomes.setdefault(response, ItemOutcomes())
        outcome.events.setdefault(row.number, set()).add(row.type)
        if row.type == purchase_type and row.price is not None:
            outcome.revenue[row.number] = outcome.revenue.get(row.number, 0.0) + row.price * row.quantity
    return outcomes
