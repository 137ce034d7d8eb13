"""Traffic of recommendations: impressions, events per impression and revenue, by scenario, day, position etc.

It reads the events of a state that may be in use. An item of a response counts once as an impression and once
per event type, even if events repeat. The attribution token of an event names the response.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from analytics.estimates import Z_95
from analytics.outcomes import pages, token_content
from services.catalog.items import item_hash
from services.core.errors import InvalidArgument
from services.gateway.recommend.signed_tokens import SignedTokens
from services.ranking.events import tables

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HEAD, _MID = 0.5, 0.8
_FETCH_ROWS = 5000
DIMENSIONS = ("scenario", "bundle", "arm", "day", "channel", "position", "band", "source")
"""The dimensions of a table. The band of an item is head, mid or tail, by its share of all events.

An item counts for each of its sources and for its arm, which the impression log has.
"""


@dataclass
class Group:
    """One row: impressions of items, how many of them led to an event, by event type, and revenue."""

    impressions: int = 0
    events: dict[str, int] = field(default_factory=dict)
    revenue: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """Rows by name, and counts of events that are in no row: with a bad token or without an impression."""

    groups: Mapping[str, Group]
    unreadable_tokens: int
    without_impression: int


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of the share count / total (Wilson, 1927); (0, 1) if `total` is 0."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, Z_95**2
    center = (share + square / (2 * total)) / (1 + square / total)
    half = Z_95 / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(center - half, 0.0), min(center + half, 1.0)


def measure(
    engine: sa.Engine,
    secret: bytes,
    dimension: str,
    *,
    impression_type: str = "impression",
    purchase_type: str = "purchase",
    since: datetime | None = None,
    until: datetime | None = None,
) -> Traffic:
    """The traffic by `dimension`, from events that occurred from `since` to `until`, exclusive.

    Raises:
        InvalidArgument: `dimension` is not one of `DIMENSIONS`.
    """
    if dimension not in DIMENSIONS:
        raise InvalidArgument.of("by", f"is {dimension!r}, not one of {', '.join(DIMENSIONS)}")
    tokens, contents = SignedTokens(secret), dict[str, dict[str, Any] | None]()
    # By token and item hash: the groups of each impression, its event types and its revenue.
    groups_of: dict[tuple[str, int], tuple[str, ...]] = {}
    events: dict[tuple[str, int], set[str]] = {}
    revenue: dict[tuple[str, int], float] = {}
    unreadable_tokens = 0
    with engine.connect() as connection:
        bands = _bands(connection) if dimension == "band" else {}
        logged = _logged_groups(engine, dimension) if dimension in ("source", "arm") else {}
        for row in _event_items(connection, since, until):
            token = row.attribution_token
            if token not in contents:
                contents[token] = token_content(tokens, token)
            content = contents[token]
            if content is None:
                unreadable_tokens += 1
                continue
            key = token, row.number
            if row.type == impression_type:
                names = logged.get((content["r"], content["s"], row.number))
                groups_of.setdefault(key, names or (_group(dimension, row, content, bands),))
            else:
                events.setdefault(key, set()).add(row.type)
            if row.type == purchase_type and row.price is not None:
                revenue[key] = revenue.get(key, 0.0) + row.price * row.quantity
    groups: dict[str, Group] = {}
    for key, names in groups_of.items():
        for name in names:
            group = groups.setdefault(name, Group())
            group.impressions += 1
            group.revenue += revenue.get(key, 0.0)
            for event_type in events.get(key, ()):
                group.events[event_type] = group.events.get(event_type, 0) + 1
    return Traffic(
        {name: groups[name] for name in sorted(groups, key=_sort_key)},
        unreadable_tokens,
        sum(len(types) for key, types in events.items() if key not in groups_of),
    )


def _sort_key(name: str) -> tuple[int, str]:
    """Positions in numeric order, all else by name."""
    return int(name) if name.isdecimal() else 0, name


def _event_items(connection: sa.Connection, since: datetime | None, until: datetime | None) -> Iterator[Any]:
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
    if since is not None:
        query = query.where(events.occurred >= (since - _EPOCH) // timedelta(microseconds=1))
    if until is not None:
        query = query.where(events.occurred < (until - _EPOCH) // timedelta(microseconds=1))
    yield from connection.execution_options(yield_per=_FETCH_ROWS).execute(query)


def _logged_groups(engine: sa.Engine, dimension: str) -> dict[tuple[str, str, int], tuple[str, ...]]:
    """The sources of each item of each response, or the arms of the items of interleaved pages."""
    groups: dict[tuple[str, str, int], tuple[str, ...]] = {}
    for _, page in pages(engine):
        if page.shadow or (dimension == "arm" and not page.item_arms):
            continue
        for index, item in enumerate(map(item_hash, page.item_ids)):
            if dimension == "arm":
                names: tuple[str, ...] = (f"{page.experiment}/{page.item_arms[index]}",)
            else:
                bits = page.item_sources[index]
                names = tuple(source for bit, source in enumerate(page.sources) if bits >> bit & 1)
            groups[page.request_id, page.scenario, item] = names
    return groups


def _group(dimension: str, row: Any, content: Mapping[str, Any], bands: Mapping[int, str]) -> str:
    match dimension:
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
            return bands.get(row.number, "tail")


def _bands(connection: sa.Connection) -> dict[int, str]:
    """The band of each item, by hash: head has half of all events, mid the next three tenths."""
    counters = tables.counters.c
    event_count = sa.func.sum(counters.events).label("event_count")
    rows = connection.execute(sa.select(counters.number, event_count).group_by(counters.number)).all()
    total, cumulative, bands = sum(row.event_count for row in rows), 0, {}
    for row in sorted(rows, key=lambda row: (-row.event_count, row.number)):
        share = cumulative / total
        bands[row.number] = "head" if share < _HEAD else "mid" if share < _MID else "tail"
        cumulative += row.event_count
    return bands


def to_json(traffic: Traffic) -> dict[str, Any]:
    """The traffic as JSON values, each share with its 95 % interval."""
    return {
        "groups": {
            name: {
                "impressions": group.impressions,
                "revenue": round(group.revenue, 2),
                "events": {
                    event_type: {
                        "items": count,
                        "share": count / group.impressions,
                        "ci95": wilson_interval(count, group.impressions),
                    }
                    for event_type, count in sorted(group.events.items())
                },
            }
            for name, group in traffic.groups.items()
        },
        "unreadable_tokens": traffic.unreadable_tokens,
        "without_impression": traffic.without_impression,
    }


def table(traffic: Traffic) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table."""
    event_types = sorted({event_type for group in traffic.groups.values() for event_type in group.events})
    header = ["", "impressions", *event_types, "revenue"]
    return header, [
        [name, str(group.impressions), *_shares(group, event_types), f"{group.revenue:.2f}"]
        for name, group in traffic.groups.items()
    ]


def _shares(group: Group, event_types: Iterable[str]) -> Iterator[str]:
    for event_type in event_types:
        count = group.events.get(event_type, 0)
        low, high = wilson_interval(count, group.impressions)
        yield f"{count / group.impressions:.2%} [{low:.2%}, {high:.2%}]"
