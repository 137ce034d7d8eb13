"""What pages led to: of what was shown how much was clicked and bought, by where, when and what.

Read from the events of a state, which may be served meanwhile. An item of an answer counts once as shown and
once as each thing that was done with it, whatever is sent twice; of which answer its attribution token says.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from services.analysis.estimates import WIDTH_95
from services.analysis.outcomes import content_of, pages
from services.catalog import item_number
from services.errors import InvalidArgument
from services.gateway.tokens import Tokens
from services.ranking import tables

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HEAD, _MID = 0.5, 0.8
_READ_AT_ONCE = 5000
BY = ("scenario", "bundle", "arm", "day", "channel", "position", "band", "source")
"""What a table may be by; the band of an item is head, mid or tail by how much of all events it has.

An item counts for each of its sources, as the served log tells them, and for the arm that it came from.
"""


@dataclass
class Group:
    """One line: items shown, items on which something was done, by event type, and what was paid."""

    shown: int = 0
    done: dict[str, int] = field(default_factory=dict)
    revenue: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """Lines by name; items of events with tokens that are none of ours, and deeds without an impression."""

    groups: Mapping[str, Group]
    unreadable: int
    unshown: int


def interval(done: int, shown: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927); of nothing shown (0, 1)."""
    if not shown:
        return 0.0, 1.0
    share, square = done / shown, WIDTH_95**2
    centre = (share + square / (2 * shown)) / (1 + square / shown)
    half = (
        WIDTH_95
        / (1 + square / shown)
        * math.sqrt(share * (1 - share) / shown + square / (4 * shown * shown))
    )
    return max(centre - half, 0.0), min(centre + half, 1.0)


def traffic(
    engine: sa.Engine,
    secret: bytes,
    by: str,
    *,
    shown_as: str = "impression",
    bought_as: str = "purchase",
    since: datetime | None = None,
    until: datetime | None = None,
) -> Traffic:
    """The table of `by` over events that happened from `since` to `until`, exclusive.

    Raises:
        InvalidArgument: `by` is none of `BY`.
    """
    if by not in BY:
        raise InvalidArgument.of("by", f"is {by!r}, none of {', '.join(BY)}")
    tokens, read = Tokens(secret), dict[str, dict[str, Any] | None]()
    shown: dict[tuple[str, int], tuple[str, ...]] = {}
    done: dict[tuple[str, int], set[str]] = {}
    paid: dict[tuple[str, int], float] = {}
    unreadable = 0
    with engine.connect() as connection:
        band = _bands(connection) if by == "band" else {}
        logged = _logged(engine, by) if by in ("source", "arm") else {}
        for row in _rows(connection, since, until):
            token = row.attribution_token
            if token not in read:
                read[token] = content_of(tokens, token)
            content = read[token]
            if content is None:
                unreadable += 1
                continue
            key = token, row.number
            if row.type == shown_as:
                known = logged.get((content["r"], content["s"], row.number))
                shown.setdefault(key, known or (_name(by, row, content, band),))
            else:
                done.setdefault(key, set()).add(row.type)
            if row.type == bought_as and row.price is not None:
                paid[key] = paid.get(key, 0.0) + row.price * row.quantity
    groups: dict[str, Group] = {}
    for key, names in shown.items():
        for name in names:
            group = groups.setdefault(name, Group())
            group.shown += 1
            group.revenue += paid.get(key, 0.0)
            for event_type in done.get(key, ()):
                group.done[event_type] = group.done.get(event_type, 0) + 1
    ordered = {name: groups[name] for name in sorted(groups, key=_place)}
    return Traffic(ordered, unreadable, sum(len(kinds) for key, kinds in done.items() if key not in shown))


def _place(name: str) -> tuple[int, str]:
    """Positions by their number, all else by name."""
    return int(name) if name.isdecimal() else 0, name


def _rows(connection: sa.Connection, since: datetime | None, until: datetime | None) -> Iterator[Any]:
    events, items = tables.events.c, tables.event_items.c
    query = (
        sa.select(
            events.attribution_token, events.type, events.channel, events.occurred, items.number,
            items.quantity, items.price, items.position,
        )
        .join(tables.event_items, items.sequence == events.sequence)
        .where(events.attribution_token != "")
        .order_by(events.sequence, items.row)
    )  # fmt: skip
    for moment, after in ((since, True), (until, False)):
        if moment is not None:
            at = (moment - _EPOCH) // timedelta(microseconds=1)
            query = query.where(events.occurred >= at if after else events.occurred < at)
    yield from connection.execution_options(yield_per=_READ_AT_ONCE).execute(query)


def _logged(engine: sa.Engine, by: str) -> dict[tuple[str, str, int], tuple[str, ...]]:
    """The sources of each item of each answer, or the arms of those that two arms shared."""
    found: dict[tuple[str, str, int], tuple[str, ...]] = {}
    for _, page in pages(engine):
        if page.shadow or (by == "arm" and not page.item_arms):
            continue
        for at, number in enumerate(map(item_number, page.item_ids)):
            if by == "arm":
                found[page.request_id, page.scenario, number] = (f"{page.experiment}/{page.item_arms[at]}",)
            else:
                bits = page.item_sources[at]
                found[page.request_id, page.scenario, number] = tuple(
                    s for n, s in enumerate(page.sources) if bits >> n & 1
                )
    return found


def _name(by: str, row: Any, content: Mapping[str, Any], band: Mapping[int, str]) -> str:
    match by:
        case "scenario":
            return str(content["s"])
        case "bundle":
            return str(content["b"])
        case "arm":
            return str(content.get("x", "none"))
        case "source":
            return "unknown"
        case "day":
            return (_EPOCH + timedelta(microseconds=row.occurred)).date().isoformat()
        case "channel":
            return row.channel or "unknown"
        case "position":
            return "unknown" if row.position is None else str(row.position)
        case _:
            return band.get(row.number, "tail")


def _bands(connection: sa.Connection) -> dict[int, str]:
    """The band of each item: the head has half of all events, the mid three tenths."""
    counters = tables.counters.c
    many = sa.func.sum(counters.events).label("many")
    found = connection.execute(sa.select(counters.number, many).group_by(counters.number)).all()
    total, before, bands = sum(row.many for row in found), 0, {}
    for row in sorted(found, key=lambda row: (-row.many, row.number)):
        share = before / total
        bands[row.number] = "head" if share < _HEAD else "mid" if share < _MID else "tail"
        before += row.many
    return bands


def told(found: Traffic) -> dict[str, Any]:
    """The same as JSON has it: shares with their 95 % intervals."""
    return {
        "groups": {
            name: {
                "shown": group.shown,
                "revenue": round(group.revenue, 2),
                "done": {
                    kind: {"items": many, "share": many / group.shown, "ci95": interval(many, group.shown)}
                    for kind, many in sorted(group.done.items())
                },
            }
            for name, group in found.groups.items()
        },
        "unreadable_tokens": found.unreadable,
        "without_an_impression": found.unshown,
    }


def lines(found: Traffic) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of a table."""
    kinds = sorted({kind for group in found.groups.values() for kind in group.done})
    head = ["", "shown", *kinds, "revenue"]
    return head, [
        [name, str(group.shown), *_shares(group, kinds), f"{group.revenue:.2f}"]
        for name, group in found.groups.items()
    ]


def _shares(group: Group, kinds: Iterable[str]) -> Iterator[str]:
    for kind in kinds:
        many = group.done.get(kind, 0)
        low, high = interval(many, group.shown)
        yield f"{many / group.shown:.2%} [{low:.2%}, {high:.2%}]"
