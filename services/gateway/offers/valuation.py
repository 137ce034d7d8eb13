"""The value of each offer to a user, and the best selection under a budget.

Knows arrays and no messages. It takes the user's purchase probability as given and does not estimate uplift:
a user who would buy without the offer counts as much as one who would not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum

import numpy as np

from services.catalog import filters

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
    "unknown",
)
BEST_ITEMS = 3
# A dozen offers have 4,096 subsets.
_MAX_SETS, _MIN_SETS, _MAX_TOTAL_SETS = 4096, 100, 20_000
_TOLERANCE = 1e-9


class OfferReason(IntEnum):
    """Why an offer is rejected, by priority; the values are those of the contract's OfferReason."""

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
    """A validated offer. Its discount is a `share` of the spend, or an `amount` if `share` is None.

    `condition` None applies to all items; empty `segments` means all users. `for_buyers` is True for users
    with purchases, False for users without, None for both.
    """

    id: str
    share: float | None
    amount: float
    condition: filters.Filter | None = None
    min_spend: float = 0.0
    segments: frozenset[str] = frozenset()
    for_buyers: bool | None = None
    start: datetime | None = None
    end: datetime | None = None
    budget: float = math.inf
    margin: float = 1.0

    def discount(self, spend: float) -> float:
        """The discount on a purchase of `spend`."""
        return self.share * spend if self.share is not None else min(self.amount, spend)


@dataclass(frozen=True)
class Shopper:
    """The user; `segment` is None if the profile could not be read.

    `basket_value` is the usual spend on a day with a purchase, and `purchase_probability` is P(the user buys
    within `days`). None is unknown.
    """

    segment: str | None
    is_buyer: bool
    basket_value: float | None
    purchase_probability: float | None
    days: int


@dataclass(frozen=True)
class OfferValue:
    """The value of an offer: P(it is redeemed), its expected cost, and its expected value."""

    redemption: float
    cost: float
    value: float


def relevance_shares(positions: np.ndarray) -> np.ndarray:
    """Each item's share of a user's relevance, float64 (N,), summing to 1.

    `positions` int64 (N,) are positions in the user's ranking, from 1; 0 is not ranked. Relevance is the
    reciprocal of the position (Zipf). Unranked items share equally what the positions after the last have.
    """
    ranked = positions > 0
    last = int(ranked.sum())
    weights = np.where(ranked, 1 / np.maximum(positions, 1), 0.0)
    if last < len(positions):
        rest = np.sum(1 / np.arange(last + 1, len(positions) + 1))
        weights[~ranked] = rest / (len(positions) - last)
    total = weights.sum()
    return weights / total if total else weights


def ineligibility(offer: Offer, shopper: Shopper, as_of: datetime) -> OfferReason | None:
    """Why a user is not eligible for an offer at a time; None if eligible."""
    if (offer.start and as_of < offer.start) or (offer.end and as_of >= offer.end):
        return OfferReason.OUTSIDE_WINDOW
    if shopper.segment is None and (offer.segments or offer.for_buyers is not None):
        return OfferReason.ELIGIBILITY_UNKNOWN
    if offer.segments and shopper.segment not in offer.segments:
        return OfferReason.NOT_ELIGIBLE_SEGMENT
    if offer.for_buyers is not None and offer.for_buyers != shopper.is_buyer:
        return OfferReason.NOT_ELIGIBLE_AUDIENCE
    return None


def offer_value(
    offer: Offer, shopper: Shopper, relevance: np.ndarray, prices: np.ndarray, as_of: datetime
) -> OfferValue | OfferReason:
    """The value of an offer, or why it has none.

    `relevance` float64 (K,) and `prices` float64 (K,), NaN unknown, are of the items the offer applies to.

    P(redeemed) = P(purchase while the offer is valid) * relevance of its items * P(spend >= minimum spend).
    The spend of a day is assumed to be exponential around its mean, so the expected spend beyond the minimum
    is that mean. An unknown purchase probability counts as 1 in the cost, whenever the offer ends.
    """
    if not len(relevance):
        return OfferReason.NO_ITEMS
    mean_spend = shopper.basket_value if shopper.basket_value else _mean_price(relevance, prices)
    if not mean_spend:
        return OfferReason.NO_PRICE
    spend = offer.min_spend + mean_spend
    discount = offer.discount(spend)
    if discount > offer.budget * (1 + _TOLERANCE):
        return OfferReason.OFFER_BUDGET
    gain = offer.margin * spend - discount
    reach = min(float(relevance.sum()), 1.0) * math.exp(-offer.min_spend / mean_spend)
    redemption = _purchase_probability(offer, shopper, as_of) * reach
    if gain * redemption <= 0:
        return OfferReason.NO_VALUE
    expected_uses = reach if shopper.purchase_probability is None else redemption
    return OfferValue(redemption, expected_uses * discount, redemption * gain)


def select_offers(
    values: Sequence[float], costs: Sequence[float], budget: float, limit: int
) -> tuple[list[int], dict[int, OfferReason]]:
    """The indices of at most `limit` offers of maximum total value within a budget, best first.

    The second result has the reason for each other index. Ties go to the earlier offer.

    This solves a 0/1 knapsack by undominated sets (Nemhauser and Ullmann, 1969), grouped by size if the limit
    binds. It is exact for a dozen offers, and for more until thousands of sets are undominated. Then sets of
    similar cost are merged: the result is within the budget, but may lose a little value.
    """
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    top = selected = order[:limit]
    if sum(costs[index] for index in top) > budget * (1 + _TOLERANCE):
        ordered_values, ordered_costs = np.array(values)[order], np.array(costs)[order]
        mask = _knapsack(ordered_values, ordered_costs, budget, None)
        if mask.sum() > limit:
            mask = _knapsack(ordered_values, ordered_costs, budget, limit)
        selected = [order[index] for index in np.flatnonzero(mask)]
    is_full = len(selected) >= limit
    rejected = {
        index: OfferReason.LIMIT if is_full and index not in top else OfferReason.BUDGET
        for index in order
        if index not in selected
    }
    return selected, rejected


@dataclass(frozen=True)
class _OfferSets:
    """Sets of offers by ascending `cost` and `value`, float64 (S,); `members` bool (S, N)."""

    cost: np.ndarray
    value: np.ndarray
    members: np.ndarray

    def with_offer(self, index: int, value: float, cost: float, budget: float) -> "_OfferSets":
        """The sets with one more offer, those within the budget."""
        affordable = self.cost + cost <= budget
        members = self.members[affordable]
        members[:, index] = True
        return _OfferSets(self.cost[affordable] + cost, self.value[affordable] + value, members)

    def merge(self, other: "_OfferSets", max_sets: int) -> "_OfferSets":
        """The sets of both that no cheaper set equals in value, thinned to at most `max_sets`."""
        cost, value = np.append(self.cost, other.cost), np.append(self.value, other.value)
        if not len(cost):
            return self
        ascending = np.lexsort((-value, cost))
        highest = np.maximum.accumulate(value[ascending])
        undominated = ascending[np.append(True, highest[1:] > highest[:-1])]
        if len(undominated) > max_sets:
            # Among sets of similar cost the last has the highest value.
            costs = cost[undominated]
            bins = np.floor(costs / costs[-1] * (max_sets - 1))
            undominated = undominated[np.append(bins[1:] != bins[:-1], True)]
        members = np.concatenate([self.members, other.members])[undominated]
        return _OfferSets(cost[undominated], value[undominated], members)


def _knapsack(values: np.ndarray, costs: np.ndarray, budget: float, limit: int | None) -> np.ndarray:
    """The set of maximum value within a budget, bool (N,), of at most `limit` offers unless that is None."""
    budget, count = budget * (1 + _TOLERANCE), len(values)
    only_empty_set = _OfferSets(np.zeros(1), np.zeros(1), np.zeros((1, count), bool))
    no_sets = _OfferSets(np.empty(0), np.empty(0), np.empty((0, count), bool))
    # One entry per set size, or a single entry without a limit.
    by_size = [only_empty_set, *[no_sets] * (limit or 0)]
    max_sets = max(_MIN_SETS, min(_MAX_SETS, _MAX_TOTAL_SETS // len(by_size)))
    for index in np.flatnonzero(costs <= budget).tolist():
        for size in range(limit, 0, -1) if limit else [0]:
            smaller = by_size[size - 1 if limit else 0]
            larger = smaller.with_offer(index, values[index], costs[index], budget)
            by_size[size] = by_size[size].merge(larger, max_sets)
    best = max((sets for sets in by_size if len(sets.value)), key=lambda sets: sets.value[-1])
    members: np.ndarray = best.members[-1]
    return members


def _mean_price(relevance: np.ndarray, prices: np.ndarray) -> float | None:
    """The mean price of items, weighted by relevance; None without prices."""
    valid = ~np.isnan(prices) & (relevance > 0)
    return float(np.average(prices[valid], weights=relevance[valid])) if valid.any() else None


def _purchase_probability(offer: Offer, shopper: Shopper, as_of: datetime) -> float:
    """P(the user buys within the days while the offer is valid).

    The probability is spread evenly over the days: P(no purchase in a part of them) = (1 - P) ** part. If the
    probability is unknown, the result is that part.
    """
    part = 1.0 if offer.end is None else min((offer.end - as_of) / timedelta(days=shopper.days), 1.0)
    probability = shopper.purchase_probability
    return part if probability is None else float(1 - (1 - probability) ** part)
