"""What is new or little shown, and may be tried in some slots of a page.

Each item is tried so often in all, and each scenario tries so much in a day. Of more items than a page can
weigh half are those nearest to the person, the rest a fair draw by the request's seed, the same in every
process.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.item_table import ItemTable
from services.ranking.moment import DAY, WINDOWS, Moment
from services.ranking.showings import Showings

_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


@dataclass(frozen=True)
class Explore:
    """What is asked for: at most `limit` items, each shown for exploring less than `showings` times.

    `max_age_days` 0 is any age; `per_day` and `max_engagements`, in all, by weight, None no bound. What was
    shown counts `upto` a place in the served log, None for now.
    """

    scenario: str
    limit: int
    seed: int
    max_age_days: int
    showings: int
    per_day: int | None = None
    max_engagements: float | None = None
    upto: int | None = None


@dataclass(frozen=True)
class Explorable:
    """Items in columns, by number: int64 (E,); `upto` is the place in the log that was counted to.

    `showings` int64 (E,), for exploring so far; `engagements` float32 (E,), of the last 30 days.
    """

    numbers: np.ndarray
    showings: np.ndarray
    engagements: np.ndarray
    upto: int


def explorable(
    asked: Explore,
    allowed: np.ndarray,
    now: Moment,
    table: ItemTable,
    shown: Showings,
    before: int,
    nearest: Callable[[np.ndarray, int], np.ndarray],
) -> Explorable:
    """Of rows that are `allowed`, bool (N,), those to try at `before`, microseconds since 1970.

    `nearest` gives at most so many rows of a mask, int64, the nearest to the person first.
    """
    upto = shown.follow() if asked.upto is None else asked.upto
    shown.follow(upto)
    young = np.ones(len(allowed), bool)
    if asked.max_age_days:
        young = table.came[: len(allowed)] >= before - asked.max_age_days * DAY
    if asked.per_day is not None and shown.slots(asked.scenario, before // DAY, upto) >= asked.per_day:
        young[:] = False
    if asked.max_engagements is not None:
        young &= now.popular[: len(young), -1] <= asked.max_engagements
    rows = np.flatnonzero(allowed & young)
    fresh = rows[shown.of(table.item_numbers[rows], upto) < asked.showings]
    drawn = fresh
    if len(fresh) > asked.limit:
        mask = np.zeros(len(allowed), bool)
        mask[fresh] = True
        near = nearest(mask, asked.limit // 2)
        mask[near] = False
        others = np.flatnonzero(mask)
        lots = _lots(table.item_numbers[others], asked.seed)
        more = asked.limit - len(near)
        drawn = np.concatenate([near, others[np.argpartition(lots, more - 1)[:more]]])
    drawn = drawn[np.argsort(table.item_numbers[drawn])]
    numbers = table.item_numbers[drawn]
    engagements = now.popular[drawn, len(WINDOWS) - 1]
    return Explorable(numbers, shown.of(numbers, upto), engagements, upto)


def _lots(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A lot for each number, uint64 (N,): SplitMix64 (Steele et al., 2014) of both."""
    lots = numbers.astype(np.uint64) + np.uint64(seed)
    for odd, shift in zip(_ODD, _SHIFTS, strict=False):
        lots = (lots ^ (lots >> shift)) * odd
    return np.asarray(lots ^ (lots >> _SHIFTS[2]))
