"""What an experiment shows: arms side by side, pages that two arms shared, and shadows.

People are what was assigned, so a split is judged by what each person did, not by what each page led to.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from services.analysis.estimates import Estimate
from services.analysis.outcomes import Shown
from services.errors import NotFound


@dataclass
class ArmFigures:
    """People of an arm, their pages and items, how often each did what is asked for, and what each paid.

    Of a shadow, that nobody is shown, `alike` counts the items of the `shown` ones that it has too. The arm's
    `place` is that among all.
    """

    place: int = 0
    shadow: bool = False
    people: set[str] = field(default_factory=set)
    pages: int = 0
    items: int = 0
    done: Counter[str] = field(default_factory=Counter)
    paid: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    alike: int = 0
    shown: int = 0


@dataclass(frozen=True)
class Compared:
    """An experiment's arms by name, the first one first; of interleaved pages who won how many."""

    arms: dict[str, ArmFigures]
    wins: Counter[str]
    ties: int


def compared(pages: Iterable[Shown], experiment: str, event_type: str) -> Compared:
    """The figures of an experiment; NotFound where no page took part in it."""
    arms: dict[str, ArmFigures] = {}
    wins, ties = Counter[str](), 0
    served: dict[tuple[str, int], frozenset[str]] = {}
    for one in pages:
        page = one.page
        if page.experiment != experiment:
            continue
        if page.item_arms:
            best = _shared(one, event_type, arms).most_common(2)
            # Where one arm had nothing to show there was no contest.
            if len(best) > 1 and best[0][1] > best[1][1]:
                wins[best[0][0]] += 1
            else:
                ties += 1
        elif page.shadow:
            _shadow(one, served.get((page.request_id, page.start)), arms)
        else:
            served[page.request_id, page.start] = frozenset(page.item_ids)
            _alone(one, event_type, arms)
    if not arms:
        raise NotFound("experiment", experiment)
    return Compared(dict(sorted(arms.items(), key=lambda arm: (arm[1].place, arm[0]))), wins, ties)


def _alone(one: Shown, event_type: str, arms: dict[str, ArmFigures]) -> None:
    mine = arms.setdefault(one.page.arm, ArmFigures(one.page.arm_place))
    mine.people.add(one.person)
    mine.pages += 1
    numbers = one.numbers
    mine.items += len(numbers)
    mine.done[one.person] += sum(event_type in one.done.get(number, ()) for number in numbers)
    mine.paid[one.person] += sum(one.paid.get(number, 0.0) for number in numbers)


def _shared(one: Shown, event_type: str, arms: dict[str, ArmFigures]) -> Counter[str]:
    points = Counter[str]()
    for number, arm in zip(one.numbers, one.page.item_arms, strict=True):
        mine = arms.setdefault(arm, ArmFigures())
        mine.people.add(one.person)
        mine.items += 1
        mine.paid[one.person] += one.paid.get(number, 0.0)
        points[arm] += event_type in one.done.get(number, ())
    for arm, many in points.items():
        arms[arm].pages += 1
        arms[arm].done[one.person] += many
    return points


def _shadow(one: Shown, shown: frozenset[str] | None, arms: dict[str, ArmFigures]) -> None:
    mine = arms.setdefault(one.page.arm, ArmFigures(one.page.arm_place, shadow=True))
    mine.people.add(one.person)
    mine.pages += 1
    mine.items += len(one.page.item_ids)
    if shown is not None:
        mine.alike += len(shown.intersection(one.page.item_ids))
        mine.shown += len(shown)


def difference(first: ArmFigures, other: ArmFigures) -> Estimate:
    """How much more each person of `other` did than each of `first` (Welch, 1947)."""
    means, errors = [], 0.0
    for arm in (first, other):
        each = [arm.done[person] for person in arm.people]
        mean = sum(each) / len(each)
        variance = sum((many - mean) ** 2 for many in each) / max(len(each) - 1, 1)
        means.append(mean)
        errors += variance / len(each)
    return Estimate.of(means[1] - means[0], math.sqrt(errors))


def sign_test(wins: int, losses: int) -> float:
    """How likely so uneven a score would be if both arms were alike: the exact two-sided sign test."""
    from scipy.stats import binomtest  # noqa: PLC0415 - half a second, for this alone

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def lines(found: Compared, event_type: str) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of a table."""
    head = ["arm", "people", "pages", "items", event_type, "a person", "more than the first", "revenue"]
    return head, list(_lines(found))


def _lines(found: Compared) -> Iterator[list[str]]:
    judged = [name for name, arm in found.arms.items() if not arm.shadow]
    for name, arm in found.arms.items():
        row = [name, str(len(arm.people)), str(arm.pages), str(arm.items)]
        if arm.shadow:
            alike = f"{arm.alike / max(arm.shown, 1):.1%} of the items shown"
            yield [*row, "", "", f"not shown; has {alike}", ""]
            continue
        done = sum(arm.done.values())
        more = ""
        if name != judged[0] and not found.wins:
            step = difference(found.arms[judged[0]], arm)
            more = f"{step.mean:+.4f} [{step.low:+.4f}, {step.high:+.4f}]"
        yield [*row, str(done), f"{done / len(arm.people):.4f}", more, f"{sum(arm.paid.values()):.2f}"]
