"""Which offers to make to a person: what each is worth, and the best choice under a budget.

Knows arrays and no messages. Takes a person's chance of buying as given: what an offer changes about it
(its uplift) is not known here, so that who would have bought anyway counts as much as who would not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum

import numpy as np

from services import filters

SEGMENTS = (
    "champion",
    "loyal",
    "new",
    "promising",
    "cannot_lose",
    "at_risk",
    "sleeping",
    "lost",
    "prospect",
    "stranger",
)
BEST = 3
# All choices of a dozen offers are 4,096.
_WAYS, _FEWEST_WAYS, _WAYS_IN_ALL = 4096, 100, 20_000
_SLACK = 1e-9


class Reason(IntEnum):
    """Why an offer is not made, in this order; values are the contract's OfferReason."""

    OUTSIDE_WINDOW = 1
    ELIGIBILITY_UNKNOWN = 2
    NOT_ELIGIBLE_SEGMENT = 3
    NOT_ELIGIBLE_AUDIENCE = 4
    NO_ITEMS = 5
    NO_PRICE = 6
    OFFER_BUDGET = 7
    NO_VALUE = 8
    BUDGET = 9
    LIMIT = 10


@dataclass(frozen=True)
class Offer:
    """An offer, validated. It takes off a `share` of what is spent, else an `amount`.

    `condition` None applies to all items; `segments` empty is for all; `bought` None is for everybody.
    """

    id: str
    share: float | None
    amount: float
    condition: filters.Filter | None = None
    min_spend: float = 0.0
    segments: frozenset[str] = frozenset()
    bought: bool | None = None
    start: datetime | None = None
    end: datetime | None = None
    budget: float = math.inf
    margin: float = 1.0

    def taken_off(self, spent: float) -> float:
        """The discount on what is spent."""
        return self.share * spent if self.share is not None else min(self.amount, spent)


@dataclass(frozen=True)
class Shopper:
    """The person: `segment` None where it could not be read.

    `basket` is what they usually spend on a day they buy, `chance` P(they buy within `days`), None unknown.
    """

    segment: str | None
    bought: bool
    basket: float | None
    chance: float | None
    days: int


@dataclass(frozen=True)
class Worth:
    """What making an offer is worth: P(it is used), what it then takes off, both expected, and its value."""

    redemption: float
    cost: float
    value: float


def masses(places: np.ndarray) -> np.ndarray:
    """Each item's share of a person's relevance, float64 (N,), adding up to 1.

    `places` int64 (N,) in the person's ranking, from 1, and 0 for what is not in it. Relevance falls with
    the place as its reciprocal (Zipf); what is not ranked shares evenly what the places after the last have.
    """
    ranked = places > 0
    last = int(ranked.sum())
    weights = np.where(ranked, 1 / np.maximum(places, 1), 0.0)
    if last < len(places):
        rest = np.sum(1 / np.arange(last + 1, len(places) + 1))
        weights[~ranked] = rest / (len(places) - last)
    total = weights.sum()
    return weights / total if total else weights


def barred(offer: Offer, shopper: Shopper, now: datetime) -> Reason | None:
    """Why an offer is not for somebody at a moment, whatever it is worth."""
    if (offer.start and now < offer.start) or (offer.end and now >= offer.end):
        return Reason.OUTSIDE_WINDOW
    if shopper.segment is None and (offer.segments or offer.bought is not None):
        return Reason.ELIGIBILITY_UNKNOWN
    if offer.segments and shopper.segment not in offer.segments:
        return Reason.NOT_ELIGIBLE_SEGMENT
    if offer.bought is not None and offer.bought != shopper.bought:
        return Reason.NOT_ELIGIBLE_AUDIENCE
    return None


def worth(
    offer: Offer, shopper: Shopper, mass: np.ndarray, prices: np.ndarray, now: datetime
) -> Worth | Reason:
    """What an offer is worth, or why it is worth nothing.

    `mass` float64 (K,) and `prices` float64 (K,), NaN unknown, are of the items it applies to.

    P(used) = P(buys while it holds) * the share of relevance it covers * P(spends the least it asks for).
    What is spent on a day is taken to be exponential around the usual, which leaves the usual beyond any
    least amount. Where no chance of buying is known it counts as 1, for what an offer costs whenever it ends,
    which orders offers all the same.
    """
    if not len(mass):
        return Reason.NO_ITEMS
    usual = shopper.basket if shopper.basket else _usual_price(mass, prices)
    if not usual:
        return Reason.NO_PRICE
    spent = offer.min_spend + usual
    off = offer.taken_off(spent)
    if off > offer.budget * (1 + _SLACK):
        return Reason.OFFER_BUDGET
    gain = offer.margin * spent - off
    reach = min(float(mass.sum()), 1.0) * math.exp(-offer.min_spend / usual)
    used = _in_time(offer, shopper, now) * reach
    if gain * used <= 0:
        return Reason.NO_VALUE
    return Worth(used, (reach if shopper.chance is None else used) * off, used * gain)


def choose(
    values: Sequence[float], costs: Sequence[float], budget: float, limit: int
) -> tuple[list[int], dict[int, Reason]]:
    """The places of at most `limit` offers of most value whose costs are within a budget, best first.

    And why each of the others is not among them. Ties go to the earlier. A 0/1 knapsack by its undominated
    choices (Nemhauser and Ullmann, 1969), those of each number of offers apart where the limit counts. It is
    exact for a dozen offers, and for more until some thousands of choices are each dearer and worth more than
    the one before; then those alike in cost are merged: still within the budget, it may miss a little value.
    """
    order = sorted(range(len(values)), key=lambda at: (-values[at], at))
    first = best = order[:limit]
    if sum(costs[at] for at in first) > budget * (1 + _SLACK):
        worth_it, cost = np.array(values)[order], np.array(costs)[order]
        picked = _knapsack(worth_it, cost, budget, None)
        if picked.sum() > limit:
            picked = _knapsack(worth_it, cost, budget, limit)
        best = [order[step] for step in np.flatnonzero(picked)]
    reached = len(best) >= limit
    left = {
        at: Reason.LIMIT if reached and at not in first else Reason.BUDGET for at in order if at not in best
    }
    return best, left


@dataclass(frozen=True)
class _Choices:
    """Sets of offers by rising `cost` and `value`, float64 (S,); `picks` bool (S, N) says of which."""

    cost: np.ndarray
    value: np.ndarray
    picks: np.ndarray

    def with_offer(self, at: int, value: float, cost: float, budget: float) -> "_Choices":
        """The same with one more offer each, those that the budget allows."""
        fits = self.cost + cost <= budget
        picks = self.picks[fits]
        picks[:, at] = True
        return _Choices(self.cost[fits] + cost, self.value[fits] + value, picks)

    def or_of(self, other: "_Choices", most: int) -> "_Choices":
        """Of both those than which none is cheaper and worth as much; of more than `most` some."""
        cost, value = np.append(self.cost, other.cost), np.append(self.value, other.value)
        if not len(cost):
            return self
        rising = np.lexsort((-value, cost))
        highest = np.maximum.accumulate(value[rising])
        kept = rising[np.append(True, highest[1:] > highest[:-1])]
        if len(kept) > most:
            # Of a cell of like costs the last is worth most.
            cell = np.floor(cost[kept] / cost[kept[-1]] * (most - 1))
            kept = kept[np.append(cell[1:] != cell[:-1], True)]
        return _Choices(cost[kept], value[kept], np.concatenate([self.picks, other.picks])[kept])


def _knapsack(values: np.ndarray, costs: np.ndarray, budget: float, limit: int | None) -> np.ndarray:
    """Which offers, bool (N,), are worth most together within a budget, at most `limit` if there is one."""
    budget, count = budget * (1 + _SLACK), len(values)
    nothing = _Choices(np.zeros(1), np.zeros(1), np.zeros((1, count), bool))
    none = _Choices(np.empty(0), np.empty(0), np.empty((0, count), bool))
    # By the number of offers in them, or all in one where that does not matter.
    choices = [nothing, *[none] * (limit or 0)]
    most = max(_FEWEST_WAYS, min(_WAYS, _WAYS_IN_ALL // len(choices)))
    for at in np.flatnonzero(costs <= budget).tolist():
        for into in range(limit, 0, -1) if limit else [0]:
            before = choices[into - 1 if limit else 0]
            more = before.with_offer(at, values[at], costs[at], budget)
            choices[into] = choices[into].or_of(more, most)
    best = max((of for of in choices if len(of.value)), key=lambda of: of.value[-1])
    picked: np.ndarray = best.picks[-1]
    return picked


def _usual_price(mass: np.ndarray, prices: np.ndarray) -> float | None:
    """The mean price of items by their relevance, None when no price is known."""
    known = ~np.isnan(prices) & (mass > 0)
    return float(np.average(prices[known], weights=mass[known])) if known.any() else None


def _in_time(offer: Offer, shopper: Shopper, now: datetime) -> float:
    """P(the person buys within the days, while the offer holds): less where it ends earlier.

    The chance is taken to be spread evenly over the days: not to buy in a part of them has the chance
    (1 - chance) to the power of that part. Where it is unknown, the part stands for it.
    """
    part = 1.0 if offer.end is None else min((offer.end - now) / timedelta(days=shopper.days), 1.0)
    return part if shopper.chance is None else float(1 - (1 - shopper.chance) ** part)
