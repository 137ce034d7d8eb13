"""Results of an experiment: the arms of a split, interleaved pages, and shadow pages.

A split assigns users, so its arms are compared by events per user, not per page.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from analytics.estimates import Estimate
from analytics.outcomes import PageOutcome
from services.core.errors import NotFound


@dataclass
class ArmFigures:
    """An arm's users, pages and items, and per user its events of the goal type and its revenue.

    A shadow arm is computed and not shown: `common_items` counts its items that are among the `served_items`
    too. `position` is the arm's position in the experiment.
    """

    position: int = 0
    shadow: bool = False
    users: set[str] = field(default_factory=set)
    pages: int = 0
    items: int = 0
    events: Counter[str] = field(default_factory=Counter)
    revenue: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    common_items: int = 0
    served_items: int = 0

    @property
    def overlap(self) -> float:
        """The share of the served items that a shadow arm has too."""
        return self.common_items / max(self.served_items, 1)


@dataclass(frozen=True)
class ExperimentResult:
    """An experiment's arms by name, in their order, and the wins and ties of interleaved pages."""

    arms: dict[str, ArmFigures]
    wins: Counter[str]
    ties: int


def compare_arms(outcomes: Iterable[PageOutcome], experiment: str, event_type: str) -> ExperimentResult:
    """The result of an experiment; NotFound if no page took part in it."""
    arms: dict[str, ArmFigures] = {}
    wins, ties = Counter[str](), 0
    served: dict[tuple[str, int], frozenset[str]] = {}
    for outcome in outcomes:
        page = outcome.page
        if page.experiment != experiment:
            continue
        if page.item_arms:
            best = _add_interleaved(outcome, event_type, arms).most_common(2)
            # A page with items of one arm alone counts as a tie.
            if len(best) > 1 and best[0][1] > best[1][1]:
                wins[best[0][0]] += 1
            else:
                ties += 1
        elif page.shadow:
            _add_shadow(outcome, served.get((page.request_id, page.start)), arms)
        else:
            served[page.request_id, page.start] = frozenset(page.item_ids)
            _add_page(outcome, event_type, arms)
    if not arms:
        raise NotFound("experiment", experiment)
    ordered = sorted(arms.items(), key=lambda arm: (arm[1].position, arm[0]))
    return ExperimentResult(dict(ordered), wins, ties)


def _add_page(outcome: PageOutcome, event_type: str, arms: dict[str, ArmFigures]) -> None:
    arm = arms.setdefault(outcome.page.arm, ArmFigures(outcome.page.arm_index))
    arm.users.add(outcome.user)
    arm.pages += 1
    items = outcome.item_hashes
    arm.items += len(items)
    arm.events[outcome.user] += sum(event_type in outcome.events.get(item, ()) for item in items)
    arm.revenue[outcome.user] += sum(outcome.revenue.get(item, 0.0) for item in items)


def _add_interleaved(outcome: PageOutcome, event_type: str, arms: dict[str, ArmFigures]) -> Counter[str]:
    """Add an interleaved page; the result is the number of events of each arm."""
    counts = Counter[str]()
    for item, name in zip(outcome.item_hashes, outcome.page.item_arms, strict=True):
        arm = arms.setdefault(name, ArmFigures())
        arm.users.add(outcome.user)
        arm.items += 1
        arm.revenue[outcome.user] += outcome.revenue.get(item, 0.0)
        counts[name] += event_type in outcome.events.get(item, ())
    for name, count in counts.items():
        arms[name].pages += 1
        arms[name].events[outcome.user] += count
    return counts


def _add_shadow(outcome: PageOutcome, served: frozenset[str] | None, arms: dict[str, ArmFigures]) -> None:
    arm = arms.setdefault(outcome.page.arm, ArmFigures(outcome.page.arm_index, shadow=True))
    arm.users.add(outcome.user)
    arm.pages += 1
    arm.items += len(outcome.page.item_ids)
    if served is not None:
        arm.common_items += len(served.intersection(outcome.page.item_ids))
        arm.served_items += len(served)


def difference(first: ArmFigures, other: ArmFigures) -> Estimate:
    """The events per user of `other` minus those of `first` (Welch, 1947)."""
    means, variance_of_difference = [], 0.0
    for arm in (first, other):
        counts = [arm.events[user] for user in arm.users]
        mean = sum(counts) / len(counts)
        variance = sum((count - mean) ** 2 for count in counts) / max(len(counts) - 1, 1)
        means.append(mean)
        variance_of_difference += variance / len(counts)
    return Estimate.of(means[1] - means[0], math.sqrt(variance_of_difference))


def sign_test(wins: int, losses: int) -> float:
    """The p-value of the exact two-sided sign test."""
    from scipy.stats import binomtest  # noqa: PLC0415 - takes half a second, needed only here

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def table(result: ExperimentResult, event_type: str) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table."""
    header = ["arm", "users", "pages", "items", event_type, "per user", "difference to first arm", "revenue"]
    return header, list(_rows(result))


def _rows(result: ExperimentResult) -> Iterator[list[str]]:
    served = [name for name, arm in result.arms.items() if not arm.shadow]
    for name, arm in result.arms.items():
        row = [name, str(len(arm.users)), str(arm.pages), str(arm.items)]
        if arm.shadow:
            yield [*row, "", "", f"shadow; has {arm.overlap:.1%} of the served items", ""]
            continue
        events = sum(arm.events.values())
        text = ""
        if name != served[0] and not result.wins:
            estimate = difference(result.arms[served[0]], arm)
            text = f"{estimate.mean:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"
        yield [*row, str(events), f"{events / len(arm.users):.4f}", text, f"{sum(arm.revenue.values()):.2f}"]
