"""What behaviour says of a person: affinities, prices, activity, and where they stand among buyers.

As of a moment: only what was recorded before it. Knows no models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from services.item_table import ItemTable
from services.ranking.moment import DAY, Moment
from services.ranking.state import BehaviourState, Columns

_HALF_LIFE_DAYS = 30.0
_VALUES = 10
# So many engagements as in the whole shop are added to a person's own.
_PRIOR = 2.0
_ACTIVE_DAYS = 30
_BANDS = ("low", "middle", "high")
_FIFTHS = 5


@dataclass(frozen=True)
class Affinity:
    """A value of an attribute: its share of what the person engaged with, and how much more that is."""

    attribute: str
    text: str
    share: float
    lift: float


@dataclass(frozen=True)
class Price:
    """The mean paid, where that stands among the catalogue's prices, 0 to 1, and the third it is in."""

    mean: float
    percentile: float
    band: str


@dataclass(frozen=True)
class Activity:
    """What was done of one type: how many items, and when first and last, microseconds since 1970."""

    type: str
    items: int
    first: int
    last: int


@dataclass(frozen=True)
class Rfm:
    """Recency in days, frequency in days with a purchase, money, and the fifth of each, 5 the best."""

    recency: float
    frequency: int
    monetary: float
    scores: tuple[int, int, int]


@dataclass(frozen=True)
class UserProfile:
    """A person as of a moment; see `vitrine.catalog.v1.UserProfile`. `propensity` maps days to a chance."""

    affinities: Sequence[Affinity]
    price: Price | None
    activity: Sequence[Activity]
    active_days: int
    rfm: Rfm | None
    segment: str
    channels: Mapping[str, float]
    propensity: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Buyers:
    """Everybody who bought before a moment, (P,): `keys` int64, `last` int64, microseconds since 1970.

    `frequency` float64 in days with a purchase, `monetary` float64 what was paid as far as prices are known.
    """

    keys: np.ndarray
    last: np.ndarray
    frequency: np.ndarray
    monetary: np.ndarray

    @classmethod
    def of(cls, columns: Columns, targets: np.ndarray, before: int) -> "Buyers":
        """From rows of events whose kinds are among `targets`."""
        bought = np.flatnonzero(np.isin(columns.kind, targets) & (columns.recorded < before))
        keys, person = np.unique(columns.user[bought], return_inverse=True)
        count = len(keys)
        last = np.full(count, np.iinfo(np.int64).min)
        np.maximum.at(last, person, columns.occurred[bought])
        days = np.unique(np.stack([person, columns.occurred[bought] // DAY]), axis=1)
        paid = np.nan_to_num(columns.price[bought]) * columns.quantity[bought]
        frequency = np.bincount(days[0], minlength=count).astype(np.float64)
        return cls(keys, last, frequency, np.bincount(person, paid, count))

    def others(self, keys: np.ndarray) -> "Buyers":
        """Without those of some keys."""
        kept = ~np.isin(self.keys, keys)
        return Buyers(self.keys[kept], self.last[kept], self.frequency[kept], self.monetary[kept])


def profile(
    past: Columns,
    state: BehaviourState,
    table: ItemTable,
    moment: Moment,
    before: int,
    attributes: Sequence[str],
    targets: np.ndarray,
    buyers: Buyers,
) -> UserProfile:
    """The profile of who did `past`, as of `before`, microseconds since 1970, among `buyers`."""
    kinds = past.kind >= 0
    past = past.take(np.flatnonzero(kinds))
    ages = np.maximum(before - past.occurred, 0) / DAY
    weights = state.weights[past.kind] * np.exp2(-ages / _HALF_LIFE_DAYS)
    rows = table.rows(past.number)
    known = (rows >= 0) & (rows < len(moment.age)) & (weights > 0)
    rows, worth = rows[known], weights[known]
    rfm = _rfm(past, targets, before, buyers)
    return UserProfile(
        affinities=[a for name in attributes for a in _affinities(name, rows, worth, table, moment)],
        price=_price(rows, worth, past.price[known], moment),
        activity=_activity(past, list(state.event_types)),
        active_days=len(np.unique(past.occurred[ages < _ACTIVE_DAYS] // DAY)),
        rfm=rfm,
        segment=segment(rfm, seen=bool(len(past.kind))),
        channels=_channels(past.channel, weights, list(state.channels)),
    )


def segment(rfm: Rfm | None, *, seen: bool) -> str:
    """The name of where somebody stands, by the fifths of recency and frequency."""
    if rfm is None:
        return "prospect" if seen else "stranger"
    recency, frequency, _ = rfm.scores
    late, often = 4, 4
    if recency >= late:
        return "champion" if frequency >= often else "new" if rfm.frequency == 1 else "loyal"
    if recency == late - 1:
        return "loyal" if frequency >= often - 1 else "promising"
    if frequency >= often - 1:
        return "cannot_lose" if frequency > often else "at_risk"
    return "sleeping" if recency == late - 2 else "lost"


def _affinities(
    name: str, rows: np.ndarray, worth: np.ndarray, table: ItemTable, moment: Moment
) -> list[Affinity]:
    column = table.texts(name)
    if column is None or not len(rows):
        return []
    codes, vocabulary = column[0][: len(moment.age)], column[1]
    size = len(vocabulary)
    mine = _by_value(codes[rows], worth, size)
    shop = _by_value(codes, moment.popular[:, -1].astype(np.float64), size)
    total, all_of_it = mine.sum(), shop.sum()
    if not total:
        return []
    usual = (shop + 1) / (all_of_it + size)
    lift = (mine + _PRIOR * usual) / (total + _PRIOR) / usual
    texts = list(vocabulary)
    best = np.lexsort((np.arange(size), -mine))[:_VALUES]
    return [
        Affinity(name, texts[v], float(mine[v] / total), float(lift[v])) for v in best.tolist() if mine[v] > 0
    ]


def _by_value(codes: np.ndarray, worth: np.ndarray, size: int) -> np.ndarray:
    """What each value has of the worth of rows (N, W), one with several giving each a part: float64 (V,)."""
    held = codes >= 0
    part = worth / np.maximum(held.sum(1), 1)
    found: np.ndarray = np.bincount(codes[held], np.broadcast_to(part[:, None], codes.shape)[held], size)
    return found


def _price(rows: np.ndarray, worth: np.ndarray, paid: np.ndarray, moment: Moment) -> Price | None:
    prices = np.where(np.isnan(paid), moment.price[rows], paid)
    known = ~np.isnan(prices)
    if not known.any():
        return None
    mean = float(np.average(prices[known], weights=worth[known]))
    every = np.sort(moment.price[~np.isnan(moment.price)])
    at = (np.searchsorted(every, mean, "left") + np.searchsorted(every, mean, "right")) / 2
    percentile = float(at / max(len(every), 1))
    return Price(mean, percentile, _BANDS[min(int(percentile * len(_BANDS)), len(_BANDS) - 1)])


def _activity(past: Columns, types: Sequence[str]) -> list[Activity]:
    found = []
    for kind in np.unique(past.kind).tolist():
        when = past.occurred[past.kind == kind]
        found.append(Activity(types[kind], len(when), int(when.min()), int(when.max())))
    return found


def _rfm(past: Columns, targets: np.ndarray, before: int, buyers: Buyers) -> Rfm | None:
    mine = Buyers.of(replace(past, user=np.zeros(len(past.kind), np.int64)), targets, before)
    if not len(mine.keys):
        return None
    # The others may be as of an hour ago: so they are compared by when, and not by how long ago.
    others = buyers.others(np.unique(past.user))
    return Rfm(
        max(before - int(mine.last[0]), 0) / DAY,
        int(mine.frequency[0]),
        float(mine.monetary[0]),
        (
            _fifth(others.last, mine.last[0]),
            _fifth(others.frequency, mine.frequency[0]),
            _fifth(others.monetary, mine.monetary[0]),
        ),
    )


def _fifth(others: np.ndarray, value: float) -> int:
    """Which fifth a value is in, 1 the lowest: by who is below it, and half of those equal, oneself too."""
    below = np.count_nonzero(others < value) + (np.count_nonzero(others == value) + 1) / 2
    return min(int(_FIFTHS * below / (len(others) + 1)), _FIFTHS - 1) + 1


def _channels(channels: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    known = channels >= 0
    total = np.bincount(channels[known], weights[known], len(names))
    if not total.sum():
        return {}
    return {names[at]: float(total[at] / total.sum()) for at in np.argsort(-total) if total[at] > 0}
