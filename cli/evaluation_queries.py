"""The queries of `vitrine evaluate`: from a file of the shop, or made of the events after a bundle's time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from services.catalog.bundle import Bundle
from services.core.errors import FailedPrecondition
from services.gateway.recommend.request_parser import MAX_SESSION
from training.core.plural import plural
from training.data.dataset import ShopData
from training.data.settings_file import read_settings
from training.examples.queries import DAY, make_eval_queries

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_DAYS = 50
_FORM = '{"user_id": "u1", "date": "2026-11-30", "session": ["i1"], "targets": ["i2"]}'


@dataclass(frozen=True)
class EvalQuery:
    """A user on a day, the items of the session so far, and the items that followed.

    `types` are the event types of the session's items, or empty; `excluded` items are no candidates.
    """

    user_id: str
    session: tuple[str, ...]
    targets: tuple[str, ...]
    day: datetime
    types: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


def read_queries(
    data: Path, shop_file: Path | None, split: str, *, several_days: bool = False
) -> tuple[datetime, list[EvalQuery]]:
    """The first day and the queries of a split, in the order of the file that shop.toml names.

    Raises:
        FailedPrecondition: there is no such file, a line is not as expected, or the queries are of several
            days where one is needed.
    """
    default = data / "shop.toml"
    settings = read_settings(shop_file or (default if default.is_file() else None))
    name = settings.task.queries.get(split)  # type: ignore[call-overload]
    if name is None:
        raise FailedPrecondition(
            f"shop.toml names no queries of {split!r} under task.queries: name a file there, or leave out "
            "--split to evaluate on the events after the bundle's time"
        )
    if not (data / name).is_file():
        raise FailedPrecondition(f"{data / name}, which shop.toml names under task.queries, does not exist")
    queries = [
        _query(f"{name}, line {number}", line)
        for number, line in enumerate((data / name).read_text().splitlines(), 1)
    ]
    days = {query.day for query in queries}
    if not days:
        raise FailedPrecondition(f"{name} holds no query; a line is {_FORM}")
    if len(days) > 1 and not several_days:
        raise FailedPrecondition(f"{name} holds queries of {len(days)} days, one is needed")
    return min(days), queries


def held_out_queries(shop: ShopData, bundle: Bundle, limit: int) -> tuple[list[EvalQuery], list[str]]:
    """Queries of the events after the bundle's time, at most `limit` of at most 50 days, at random.

    The second part of the result says what is left out.

    A basket that makes a query is one as in training: its first half is the session, the target types of the
    rest are the targets.

    Raises:
        FailedPrecondition: no basket came after that time.
    """
    since = time_of(bundle)
    events, settings = shop.events, shop.settings
    ids = dict(zip(events.number.tolist(), events.item.tolist(), strict=True))
    first_day = -(-micros(since) // DAY) * DAY
    weights, targets = dict(settings.event_types), tuple(settings.targets)
    queries = make_eval_queries(events, weights, targets, first_day)
    if not queries:
        raise FailedPrecondition(
            f"no basket of {'/'.join(targets)} came after {since:%Y-%m-%d}, up to which the bundle "
            "was trained: train with an earlier --until, or add later events"
        )
    generator = np.random.default_rng(0)
    day_of = np.array([query.as_of // DAY for query in queries])
    days = np.unique(day_of)
    sampled_days = generator.permutation(days)[:_MAX_DAYS]  # each day starts the services anew
    usable = np.flatnonzero(np.isin(day_of, sampled_days))
    selected = [queries[index] for index in np.sort(generator.permutation(usable)[:limit])]
    notes = []
    if len(selected) < len(queries):
        notes.append(
            f"a random sample: {len(selected):,} of {plural(len(queries), 'basket')}, from "
            f"{len(sampled_days):,} of {plural(len(days), 'day')}"
        )
    if long := sum(len(query.session) > MAX_SESSION for query in selected):
        notes.append(
            f"{plural(long, 'session')} cut to the last {MAX_SESSION} items, which a request may have"
        )
    return [
        EvalQuery(
            query.user_id,
            tuple(events.item_ids[ids[item]] for item, _ in query.session[-MAX_SESSION:]),
            tuple(events.item_ids[ids[item]] for item in query.targets.tolist()),
            _EPOCH + timedelta(microseconds=query.as_of - query.as_of % DAY),
            tuple(kind for _, kind in query.session[-MAX_SESSION:]),
        )
        for query in selected
    ], notes


def time_of(bundle: Bundle) -> datetime:
    """The time up to which a bundle was trained.

    Raises:
        FailedPrecondition: it was trained on all events, so that none is left to evaluate it on.
    """
    if bundle.until is None:
        raise FailedPrecondition(
            f"bundle {bundle.version} was trained on all events, so that none is left to evaluate it on: "
            "train again with --until DAY, some days before the last event, and evaluate that bundle"
        )
    return bundle.until


def micros(time: datetime) -> int:
    """Microseconds since 1970, as the times of events."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def by_day(queries: Sequence[EvalQuery]) -> Mapping[datetime, list[int]]:
    """The indices of the queries of each day, the earliest first."""
    days: dict[datetime, list[int]] = {}
    for index in sorted(range(len(queries)), key=lambda index: queries[index].day):
        days.setdefault(queries[index].day, []).append(index)
    return days


def _query(place: str, line: str) -> EvalQuery:
    try:
        row = json.loads(line)
        session = [_session_item(item) for item in row.get("session", [])]
        types = tuple(kind for _, kind in session)
        if not isinstance(row["targets"], list) or not row["targets"]:
            raise ValueError("targets has to be a list of item ids, not empty")
        return EvalQuery(
            str(row["user_id"]),
            tuple(item for item, _ in session),
            tuple(map(str, row["targets"])),
            datetime.combine(date.fromisoformat(row["date"]), datetime.min.time(), UTC),
            types if any(types) else (),
            tuple(map(str, row.get("excluded_item_ids", []))),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FailedPrecondition(f"{place}: {reason}; a line is {_FORM}") from None


def _session_item(item: Any) -> tuple[str, str]:
    """The id and the event type, if there is one, of an item: "i1" or {"item_id": "i1", "type": "view"}."""
    return (str(item["item_id"]), str(item.get("type", ""))) if isinstance(item, dict) else (str(item), "")
