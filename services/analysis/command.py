"""What `vitrine analyze` tells, as a table for people or as JSON."""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.analysis import comparison, off_policy, traffic
from services.analysis.estimates import Estimate
from services.analysis.outcomes import Shown, shown
from services.errors import FailedPrecondition, InvalidArgument
from services.ranking import tables

_WIDE = 240


@dataclass(frozen=True)
class Told:
    """A table's head and lines, notes below it, and the same as JSON has it."""

    head: list[str]
    lines: list[list[str]]
    json: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def show(told: Told, *, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print(json.dumps(_finite(told.json), indent=1))  # noqa: T201 - a command's answer
        return
    table = Table(*told.head)
    for line in told.lines:
        table.add_row(*map(Text, line))  # a name may look like markup
    # In a file or a pipe no line is folded.
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    for note in told.notes:
        print(note)  # noqa: T201


def check_types(engine: sa.Engine, asked: Mapping[str, str]) -> None:
    """Refuse a type that no event is of, where there are any; InvalidArgument names the option."""
    with engine.connect() as connection:
        known = set(connection.scalars(sa.select(tables.events.c.type).distinct()))
    for option, event_type in asked.items():
        if known and event_type not in known:
            listed = ", ".join(sorted(known))
            raise InvalidArgument.of(option, f"is {event_type!r}; there are events of {listed}")


def of_traffic(engine: sa.Engine, secret: bytes, by: str, **options: Any) -> Told:
    """What pages led to, by something: see `traffic.traffic`."""
    found = traffic.traffic(engine, secret, by, **options)
    head, lines = traffic.lines(found)
    what = (
        (found.unreadable, "items of events have a token that is not of this secret"),
        (found.unshown, "deeds have a token without an impression of that item"),
    )
    notes = [f"{many} {of}; they are not counted" for many, of in what if many]
    return Told(head, lines, traffic.told(found), notes)


def of_experiment(
    engine: sa.Engine,
    secret: bytes,
    name: str,
    event_type: str,
    since: datetime | None,
    until: datetime | None,
    bought_as: str = "purchase",
) -> Told:
    """How the arms of an experiment did."""
    found = comparison.compared(shown(engine, secret, since, until, bought_as), name, event_type)
    head, lines = comparison.lines(found, event_type)
    arms = {
        arm: {
            "people": len(mine.people),
            "pages": mine.pages,
            "items": mine.items,
            "done": sum(mine.done.values()),
            "revenue": round(sum(mine.paid.values()), 2),
        }
        | ({"alike": mine.alike / max(mine.shown, 1)} if mine.shadow else {})
        for arm, mine in found.arms.items()
    }
    told: dict[str, Any] = {"experiment": name, "on": event_type, "arms": arms}
    notes = []
    if found.wins or found.ties:
        score = {arm: found.wins[arm] for arm in found.arms}
        chance = comparison.sign_test(max(score.values()), min(score.values()) if len(score) > 1 else 0)
        told |= {"wins": score, "ties": found.ties, "sign_test": chance}
        won = ", ".join(f"{arm} has the better of {many} pages" for arm, many in score.items())
        notes.append(f"{won}; {found.ties} are ties; so uneven by chance alone: {chance:.3g}")
    else:
        first, *others = [(arm, mine) for arm, mine in found.arms.items() if not mine.shadow]
        told["more_than_the_first"] = {
            arm: asdict(comparison.difference(first[1], mine)) for arm, mine in others
        }
    return Told(head, lines, told, notes)


def of_policies(
    engine: sa.Engine, secret: bytes, event_type: str, since: datetime | None, until: datetime | None
) -> Told:
    """What each way to explore would have led to, a slot.

    Raises:
        FailedPrecondition: nothing was explored.
    """
    draws = _draws(shown(engine, secret, since, until), event_type)
    if not len(draws.drawn):
        raise FailedPrecondition("the served log has no slot that was explored in that time")
    served = off_policy.logged(draws)
    lines = [["as served", _text(served), "", "", str(len(draws.drawn))]]
    told: dict[str, Any] = {
        "on": event_type,
        "slots": len(draws.drawn),
        "as_served": asdict(served),
        "policies": {},
    }
    for name, policy in off_policy.POLICIES.items():
        found = off_policy.judged(draws, policy)
        told["policies"][name] = {"worth": found.worth} | {
            kind: asdict(one) for kind, one in found.estimates.items()
        }
        estimates = [_text(found.estimates[kind]) for kind in ("ips", "snips", "dr")]
        lines.append([name, *estimates, f"{found.worth:.0f}"])
    head = [f"{event_type} a slot", "ips", "snips", "doubly robust", "worth draws"]
    return Told(head, lines, told)


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draws(pages: Iterable[Shown], event_type: str) -> off_policy.Draws:
    relevances, possible, drawn, propensities, rewards = [], [], [], [], []
    for one in pages:
        pool = one.page.exploring
        relevance = np.array(pool.relevances, np.float64)
        for draw in () if one.page.shadow else pool.draws:
            mask = np.ones(len(relevance), bool)
            mask[list(draw.left_out)] = False
            relevances.append(relevance)
            possible.append(mask)
            drawn.append(draw.drawn)
            propensities.append(draw.propensity)
            rewards.append(event_type in one.done.get(pool.item_numbers[draw.drawn], ()))
    return off_policy.Draws(
        relevances,
        possible,
        np.array(drawn, np.int64),
        np.array(propensities, np.float64),
        np.array(rewards, np.float64),
    )


def _text(estimate: Estimate) -> str:
    if not math.isfinite(estimate.low):
        return f"{estimate.mean:.2%}"
    return f"{estimate.mean:.2%} [{estimate.low:.2%}, {estimate.high:.2%}]"
