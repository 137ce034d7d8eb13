"""The events of the ranking service, and their validation.

Knows nothing of storage or transport. The limits are those in the field comments of
`protos/vitrine/catalog/v1/event.proto`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum

from services.catalog.items import MAX_PRICE, PRICE_PROBLEM, identifier_problem
from services.core.errors import FieldViolation, InvalidArgument

MAX_EVENT_ITEMS = 5_000
"""Items of one event: an order between businesses has hundreds of lines, rarely thousands."""
MAX_CALL_ITEMS = 250_000
"""Items of all events of one WriteEvents; they are written in seconds."""
MAX_TOKEN_LENGTH = 4096
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_QUANTITY = 2**31 - 1
_MAX_AHEAD = timedelta(days=1)
_MAX_VIOLATIONS = 100


class EventOutcome(IntEnum):
    """The outcome of an event; the values are those of EventOutcomeCode in the contract."""

    RECORDED = 1
    DUPLICATE = 2


@dataclass(frozen=True)
class EventItem:
    """One item of an event; `position` is 1 for the first of a page, None when not shown on one."""

    item_id: str
    quantity: int = 1
    price: float | None = None
    position: int | None = None


@dataclass(frozen=True)
class Event:
    """An interaction or impression of a user; `occurred` is timezone-aware, None means now."""

    event_id: str
    type: str
    items: tuple[EventItem, ...]
    user_id: str = ""
    visitor_id: str = ""
    session_id: str = ""
    occurred: datetime | None = None
    attribution_token: str = ""
    channel: str = ""


@dataclass(frozen=True)
class RecordResult:
    """The outcome of one event, and its sequence number."""

    outcome: EventOutcome
    sequence: int


def validate(event: Event, event_types: Collection[str], now: datetime) -> None:
    """Check one event against the contract.

    Raises:
        InvalidArgument: names every wrong field, relative to the event; of items the first 100.
    """
    count = len(event.items)
    violations = [
        FieldViolation(name, problem)
        for name, problem in (
            ("event_id", identifier_problem(event.event_id)),
            ("type", "" if event.type in event_types else f"is none of {', '.join(sorted(event_types))}"),
            ("user_id", "" if event.user_id or event.visitor_id else "or visitor_id is required"),
            ("user_id", identifier_problem(event.user_id) if event.user_id else ""),
            ("visitor_id", identifier_problem(event.visitor_id) if event.visitor_id else ""),
            ("session_id", identifier_problem(event.session_id) if event.session_id else ""),
            ("channel", identifier_problem(event.channel) if event.channel else ""),
            (
                "items",
                "" if 1 <= count <= MAX_EVENT_ITEMS else f"has {count}, 1 to {MAX_EVENT_ITEMS} are allowed",
            ),
            ("occurred_at", _time_problem(event.occurred, now)),
            ("attribution_token", "is too long" if len(event.attribution_token) > MAX_TOKEN_LENGTH else ""),
            ("attribution_token", "" if "\0" not in event.attribution_token else "holds a NUL character"),
        )
        if problem
    ]
    if count <= MAX_EVENT_ITEMS:
        violations += _item_violations(event.items)
    if violations:
        raise InvalidArgument(violations)


def _time_problem(occurred: datetime | None, now: datetime) -> str:
    if occurred is None:
        return ""
    if occurred < _EPOCH:
        return f"is {occurred.isoformat()}, before 1970"
    return f"is {occurred.isoformat()}, more than a day ahead of now" if occurred > now + _MAX_AHEAD else ""


def _item_violations(items: tuple[EventItem, ...]) -> list[FieldViolation]:
    violations: list[FieldViolation] = []
    for index, item in enumerate(items):
        violations += [
            FieldViolation(f"items[{index}].{name}", problem) for name, problem in _item_problems(item)
        ]
        if len(violations) >= _MAX_VIOLATIONS:
            break
    return violations


def _item_problems(item: EventItem) -> Iterator[tuple[str, str]]:
    if problem := identifier_problem(item.item_id):
        yield "item_id", problem
    if not 1 <= item.quantity <= _MAX_QUANTITY:
        yield "quantity", "must be at least 1 and fit 31 bits"
    if item.price is not None and not 0 <= item.price <= MAX_PRICE:
        yield "price", PRICE_PROBLEM
    if item.position is not None and not 1 <= item.position <= _MAX_QUANTITY:
        yield "position", "must be at least 1 and fit 31 bits"
