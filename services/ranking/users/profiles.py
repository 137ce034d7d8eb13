"""The profile of a user from their events: affinities, prices, activity, and RFM among all purchasers.

As of a time: only events recorded before it count. Knows no models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from services.catalog.item_table import ItemTable
from services.ranking.state.event_columns import EventColumns, EventState
from services.ranking.state.item_stats import DAY, ItemStats

_HALF_LIFE_DAYS = 30.0
_VALUES = 10
# Pseudo-counts of the shop's distribution, added to the interactions of a user.
_PRIOR = 2.0
_ACTIVE_DAYS = 30
_BANDS = ("low", "middle", "high")
_QUINTILES = 5


@dataclass(frozen=True)
class Affinity:
    """A value of an attribute: its share in the user's interactions, and the lift over the whole shop."""

    attribute: str
    text: str
    share: float
    lift: float


@dataclass(frozen=True)
class PriceProfile:
    """The mean price paid, its percentile among the prices of the catalog, 0 to 1, and its third."""

    mean: float
    percentile: float
    band: str


@dataclass(frozen=True)
class Activity:
    """The events of one type: the number of items, the first and the last time, microseconds since 1970."""

    type: str
    items: int
    first: int
    last: int


@dataclass(frozen=True)
class Rfm:
    """Recency in days, frequency in days with a purchase, money, and the quintile of each, 5 the best."""

    recency: float
    frequency: int
    monetary: float
    scores: tuple[int, int, int]


@dataclass(frozen=True)
class UserProfile:
    """A user as of a time; see `vitrine.catalog.v1.UserProfile`. `propensity` maps days to P(purchase)."""

    affinities: Sequence[Affinity]
    price: PriceProfile | None
    activity: Sequence[Activity]
    active_days: int
    rfm: Rfm | None
    segment: str
    channels: Mapping[str, float]
    propensity: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RfmReference:
    """All users with a purchase before a time, (P,): `keys` int64, `last` int64, microseconds since 1970.

    `frequency` float64 in days with a purchase, `monetary` float64 the sum of the known prices.
    """

    keys: np.ndarray
    last: np.ndarray
    frequency: np.ndarray
    monetary: np.ndarray

    @classmethod
    def of(cls, columns: EventColumns, targets: np.ndarray, before: int) -> "RfmReference":
        """From the rows of events whose kinds are among `targets`."""
        purchases = np.flatnonzero(np.isin(columns.kind, targets) & (columns.recorded < before))
        keys, user = np.unique(columns.user[purchases], return_inverse=True)
        count = len(keys)
        last = np.full(count, np.iinfo(np.int64).min)
        np.maximum.at(last, user, columns.occurred[purchases])
        days = np.unique(np.stack([user, columns.occurred[purchases] // DAY]), axis=1)
        paid = np.nan_to_num(columns.price[purchases]) * columns.quantity[purchases]
        frequency = np.bincount(days[0], minlength=count).astype(np.float64)
        return cls(keys, last, frequency, np.bincount(user, paid, count))

    def others(self, keys: np.ndarray) -> "RfmReference":
        """The users without those of some keys."""
        mask = ~np.isin(self.keys, keys)
        return RfmReference(self.keys[mask], self.last[mask], self.frequency[mask], self.monetary[mask])


def profile(
    past: EventColumns,
    state: EventState,
    table: ItemTable,
    stats: ItemStats,
    before: int,
    attributes: Sequence[str],
    targets: np.ndarray,
    reference: RfmReference,
) -> UserProfile:
    """The profile of the user with the events `past`, as of `before`, microseconds since 1970."""
    kinds = past.kind >= 0
    past = past.take(np.flatnonzero(kinds))
    ages = np.maximum(before - past.occurred, 0) / DAY
    weights = state.weights[past.kind] * np.exp2(-ages / _HALF_LIFE_DAYS)
    rows = table.rows(past.item_hash)
    valid = (rows >= 0) & (rows < len(stats.age)) & (weights > 0)
    rows, row_weights = rows[valid], weights[valid]
    rfm = _rfm(past, targets, before, reference)
    return UserProfile(
        affinities=[a for name in attributes for a in _affinities(name, rows, row_weights, table, stats)],
        price=_price(rows, row_weights, past.price[valid], stats),
        activity=_activity(past, list(state.event_types)),
        active_days=len(np.unique(past.occurred[ages < _ACTIVE_DAYS] // DAY)),
        rfm=rfm,
        segment=segment(rfm, has_events=bool(len(past.kind))),
        channels=_channels(past.channel, weights, list(state.channels)),
    )


def segment(rfm: Rfm | None, *, has_events: bool) -> str:
    """The name of the segment of a user, by the quintiles of recency and frequency."""
    if rfm is None:
        return "prospect" if has_events else "unknown"
    recency, frequency, _ = rfm.scores
    recent, frequent = 4, 4
    if recency >= recent:
        return "champion" if frequency >= frequent else "new" if rfm.frequency == 1 else "loyal"
    if recency == recent - 1:
        return "loyal" if frequency >= frequent - 1 else "promising"
    if frequency >= frequent - 1:
        return "cannot_lose" if frequency > frequent else "at_risk"
    return "sleeping" if recency == recent - 2 else "lost"


def _affinities(
    name: str, rows: np.ndarray, row_weights: np.ndarray, table: ItemTable, stats: ItemStats
) -> list[Affinity]:
    column = table.texts(name)
    if column is None or not len(rows):
        return []
    codes, vocabulary = column[0][: len(stats.age)], column[1]
    size = len(vocabulary)
    own = _by_value(codes[rows], row_weights, size)
    shop = _by_value(codes, stats.popular[:, -1].astype(np.float64), size)
    total, shop_total = own.sum(), shop.sum()
    if not total:
        return []
    shop_share = (shop + 1) / (shop_total + size)
    lift = (own + _PRIOR * shop_share) / (total + _PRIOR) / shop_share
    texts = list(vocabulary)
    best = np.lexsort((np.arange(size), -own))[:_VALUES]
    return [
        Affinity(name, texts[v], float(own[v] / total), float(lift[v])) for v in best.tolist() if own[v] > 0
    ]


def _by_value(codes: np.ndarray, row_weights: np.ndarray, size: int) -> np.ndarray:
    """The weight of each value over rows (N, W), whose values share the weight of the row: float64 (V,)."""
    valid = codes >= 0
    share = row_weights / np.maximum(valid.sum(1), 1)
    total: np.ndarray = np.bincount(codes[valid], np.broadcast_to(share[:, None], codes.shape)[valid], size)
    return total


def _price(
    rows: np.ndarray, row_weights: np.ndarray, paid: np.ndarray, stats: ItemStats
) -> PriceProfile | None:
    prices = np.where(np.isnan(paid), stats.price[rows], paid)
    valid = ~np.isnan(prices)
    if not valid.any():
        return None
    mean = float(np.average(prices[valid], weights=row_weights[valid]))
    sorted_prices = np.sort(stats.price[~np.isnan(stats.price)])
    rank = (np.searchsorted(sorted_prices, mean, "left") + np.searchsorted(sorted_prices, mean, "right")) / 2
    percentile = float(rank / max(len(sorted_prices), 1))
    return PriceProfile(mean, percentile, _BANDS[min(int(percentile * len(_BANDS)), len(_BANDS) - 1)])


def _activity(past: EventColumns, types: Sequence[str]) -> list[Activity]:
    activity = []
    for kind in np.unique(past.kind).tolist():
        times = past.occurred[past.kind == kind]
        activity.append(Activity(types[kind], len(times), int(times.min()), int(times.max())))
    return activity


def _rfm(past: EventColumns, targets: np.ndarray, before: int, reference: RfmReference) -> Rfm | None:
    own = RfmReference.of(replace(past, user=np.zeros(len(past.kind), np.int64)), targets, before)
    if not len(own.keys):
        return None
    # The reference may be as of an hour ago: compare times of purchases, not their ages.
    others = reference.others(np.unique(past.user))
    return Rfm(
        max(before - int(own.last[0]), 0) / DAY,
        int(own.frequency[0]),
        float(own.monetary[0]),
        (
            _quintile(others.last, own.last[0]),
            _quintile(others.frequency, own.frequency[0]),
            _quintile(others.monetary, own.monetary[0]),
        ),
    )


def _quintile(others: np.ndarray, value: float) -> int:
    """The quintile of a value, 1 the lowest, by the values below and half of the equal ones and itself."""
    below = np.count_nonzero(others < value) + (np.count_nonzero(others == value) + 1) / 2
    return min(int(_QUINTILES * below / (len(others) + 1)), _QUINTILES - 1) + 1


def _channels(channels: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    valid = channels >= 0
    total = np.bincount(channels[valid], weights[valid], len(names))
    if not total.sum():
        return {}
    return {names[c]: float(total[c] / total.sum()) for c in np.argsort(-total) if total[c] > 0}
