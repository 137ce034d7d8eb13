"""The reports of `vitrine analyze`, as a table or as JSON."""

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

from analytics import comparison, off_policy, traffic
from analytics.estimates import Estimate
from analytics.outcomes import PageOutcome, page_outcomes
from services.core.errors import FailedPrecondition, InvalidArgument
from services.ranking.events import tables

_PIPE_WIDTH = 240


@dataclass(frozen=True)
class Report:
    """A table's header and rows, the notes below it, and the same content as JSON values."""

    header: list[str]
    rows: list[list[str]]
    json: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def print_report(report: Report, *, as_json: bool) -> None:
    """Print a report."""
    if as_json:
        print(json.dumps(_finite(report.json), indent=1))  # noqa: T201 - the output of a command
        return
    table = Table(*report.header)
    for row in report.rows:
        table.add_row(*map(Text, row))  # a name may look like markup
    # In a file or a pipe lines do not wrap.
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)
    for note in report.notes:
        print(note)  # noqa: T201


def check_event_types(engine: sa.Engine, options: Mapping[str, str]) -> None:
    """InvalidArgument names the option whose event type no event has, unless there are no events at all."""
    with engine.connect() as connection:
        event_types = set(connection.scalars(sa.select(tables.events.c.type).distinct()))
    for option, event_type in options.items():
        if event_types and event_type not in event_types:
            expected = ", ".join(sorted(event_types))
            raise InvalidArgument.of(option, f"is {event_type!r}; the event types are {expected}")


def traffic_report(engine: sa.Engine, secret: bytes, dimension: str, **options: Any) -> Report:
    """The traffic by a dimension; `options` are those of `traffic.measure`."""
    result = traffic.measure(engine, secret, dimension, **options)
    header, rows = traffic.table(result)
    counts = (
        (result.unreadable_tokens, "event items have a token that another secret signed"),
        (result.without_impression, "events have a token without an impression of their item"),
    )
    notes = [f"{count} {problem}; they are not counted" for count, problem in counts if count]
    return Report(header, rows, traffic.to_json(result), notes)


def experiment_report(
    engine: sa.Engine,
    secret: bytes,
    name: str,
    event_type: str,
    since: datetime | None,
    until: datetime | None,
    purchase_type: str = "purchase",
) -> Report:
    """The results of an experiment's arms."""
    outcomes = page_outcomes(engine, secret, since, until, purchase_type)
    result = comparison.compare_arms(outcomes, name, event_type)
    header, rows = comparison.table(result, event_type)
    arms = {
        arm: {
            "users": len(figures.users),
            "pages": figures.pages,
            "items": figures.items,
            "events": sum(figures.events.values()),
            "revenue": round(sum(figures.revenue.values()), 2),
        }
        | ({"overlap": figures.overlap} if figures.shadow else {})
        for arm, figures in result.arms.items()
    }
    content: dict[str, Any] = {"experiment": name, "goal": event_type, "arms": arms}
    notes = []
    if result.wins or result.ties:
        wins = {arm: result.wins[arm] for arm in result.arms}
        p_value = comparison.sign_test(max(wins.values()), min(wins.values()) if len(wins) > 1 else 0)
        content |= {"wins": wins, "ties": result.ties, "sign_test": p_value}
        text = ", ".join(f"{arm} wins {count} pages" for arm, count in wins.items())
        notes.append(f"{text}; {result.ties} are ties; sign test: p = {p_value:.3g}")
    else:
        first, *others = [(arm, figures) for arm, figures in result.arms.items() if not figures.shadow]
        content["difference_to_first"] = {
            arm: asdict(comparison.difference(first[1], figures)) for arm, figures in others
        }
    return Report(header, rows, content, notes)


def policy_report(
    engine: sa.Engine, secret: bytes, event_type: str, since: datetime | None, until: datetime | None
) -> Report:
    """The estimated events per slot of each exploration policy.

    Raises:
        FailedPrecondition: no slot was explored.
    """
    draws = _logged_draws(page_outcomes(engine, secret, since, until), event_type)
    slots = len(draws.actions)
    if not slots:
        raise FailedPrecondition("the impression log has no explored slot in that time")
    logged = off_policy.logged_reward(draws)
    rows = [["logged", _text(logged), "", "", str(slots)]]
    policies: dict[str, Any] = {}
    for name, policy in off_policy.POLICIES.items():
        result = off_policy.evaluate_policy(draws, policy)
        policies[name] = {"effective_draws": result.effective_draws} | {
            estimator: asdict(estimate) for estimator, estimate in result.estimates.items()
        }
        estimates = [_text(result.estimates[estimator]) for estimator in ("ips", "snips", "dr")]
        rows.append([name, *estimates, f"{result.effective_draws:.0f}"])
    header = [f"{event_type} per slot", "ips", "snips", "doubly robust", "effective draws"]
    content = {"goal": event_type, "slots": slots, "logged": asdict(logged), "policies": policies}
    return Report(header, rows, content)


def _finite(value: Any) -> Any:
    """The same value with None for infinite numbers, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _logged_draws(outcomes: Iterable[PageOutcome], event_type: str) -> off_policy.LoggedDraws:
    relevances, available, actions, propensities, rewards = [], [], [], [], []
    for outcome in outcomes:
        pool = outcome.page.exploring
        relevance = np.array(pool.relevances, np.float64)
        for draw in () if outcome.page.shadow else pool.draws:
            mask = np.ones(len(relevance), bool)
            mask[list(draw.excluded_indices)] = False
            relevances.append(relevance)
            available.append(mask)
            actions.append(draw.item_index)
            propensities.append(draw.propensity)
            rewards.append(event_type in outcome.events.get(pool.item_hashes[draw.item_index], ()))
    return off_policy.LoggedDraws(
        relevances,
        available,
        np.array(actions, np.int64),
        np.array(propensities, np.float64),
        np.array(rewards, np.float64),
    )


def _text(estimate: Estimate) -> str:
    if not math.isfinite(estimate.low):
        return f"{estimate.mean:.2%}"
    return f"{estimate.mean:.2%} [{estimate.low:.2%}, {estimate.high:.2%}]"
