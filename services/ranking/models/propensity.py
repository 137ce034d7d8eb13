"""The probability that a user purchases within some days: a logistic model, and the columns it reads.

The columns are recency, frequency and money over the events recorded before a time; they read neither the
items nor the session. One function computes them, for many users in training and for one in serving.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from services.core.errors import FailedPrecondition
from services.ranking.state.event_columns import EventColumns
from services.ranking.state.item_stats import DAY

FILE = "propensity.json"
_WINDOWS = (1, 7, 30)
_PURCHASE_COLUMNS = (
    "never_bought",
    "purchase_recency",
    "purchase_days",
    "purchase_tenure",
    "spent",
    "overdue",
)
_EVENT_COLUMNS = ("recency", "tenure", "active_days")


@dataclass(frozen=True)
class PropensityModel:
    """P(buys within `days`) = sigmoid(bias + weights . (x - mean) / scale); NaN in x counts as the mean.

    x has the `columns`.
    """

    days: int
    columns: Sequence[str]
    mean: Sequence[float]
    scale: Sequence[float]
    weights: Sequence[float]
    bias: float

    def logits(self, matrix: np.ndarray) -> np.ndarray:
        """Logits float64 (P,) of users, from their columns, float64 (P, F)."""
        scaled = np.nan_to_num((matrix - np.array(self.mean)) / np.array(self.scale))
        logits: np.ndarray = scaled @ np.array(self.weights) + self.bias
        return logits


class Propensity:
    """The models of a bundle, one for each number of days.

    Raises:
        FailedPrecondition: a model reads a column that the event types of the shop do not give.
    """

    def __init__(self, directory: Path, event_types: Sequence[str]) -> None:
        models = [PropensityModel(**model) for model in json.loads((directory / FILE).read_text())]
        # By name: the schema of a bundle may have the event types in another order than training.
        index = {name: position for position, name in enumerate(columns_of(event_types))}
        if missing := [name for model in models for name in model.columns if name not in index]:
            raise FailedPrecondition(
                f"the propensity model reads {missing[0]!r}, which no event type here gives"
            )
        self._models = [(model, np.array([index[name] for name in model.columns])) for model in models]
        self._types = len(event_types)

    def of(self, past: EventColumns, targets: np.ndarray, before: int) -> dict[int, float]:
        """Days to P(purchase within them) of the user with the events `past`; empty for no events."""
        if not len(past.kind):
            return {}
        user = np.zeros(len(past.kind), np.int64)
        matrix = describe(past, user, 1, self._types, targets, before)
        return {
            model.days: float(1 / (1 + np.exp(-model.logits(matrix[:, columns])[0])))
            for model, columns in self._models
        }


def write_propensity(directory: Path, models: Sequence[PropensityModel]) -> None:
    """Write the component."""
    text = json.dumps([asdict(model) for model in models], indent=1)
    (directory / FILE).write_text(text + "\n")


def columns_of(event_types: Sequence[str]) -> list[str]:
    """The names of the columns of `describe`, in its order."""
    counts = [f"{name}_{days}d" for name in event_types for days in _WINDOWS]
    return [*_PURCHASE_COLUMNS, *_EVENT_COLUMNS, *counts, *(f"{name}_ever" for name in event_types)]


def describe(
    past: EventColumns, user: np.ndarray, count: int, types: int, targets: np.ndarray, before: int
) -> np.ndarray:
    """The columns of `count` users as of `before`, microseconds since 1970: float64 (P, F).

    `user` int64 (N,) is the index of the user of each row of `past`; each user has at least one row, and all
    rows were recorded before `before` and have one of `types` event types. Counts, days and money are
    logarithms; NaN for unknown.
    """
    ages = np.maximum(before - past.occurred, 0) / DAY
    purchases = np.isin(past.kind, targets)
    columns: Mapping[str, np.ndarray] = {
        **_purchase_columns(past.take(np.flatnonzero(purchases)), user[purchases], ages[purchases], count),
        "recency": np.log1p(_minimum(ages, user, count)),
        "tenure": np.log1p(-_minimum(-ages, user, count)),
        "active_days": np.log1p(_days(past, user, count)),
    }
    bins = user * types + past.kind
    size = count * types
    recent = [np.bincount(bins[ages < days], minlength=size).reshape(count, types) for days in _WINDOWS]
    # By event type, then by window: the order of `columns_of`.
    counts = np.stack(recent, 2).reshape(count, -1)
    ever = np.bincount(bins, minlength=size).reshape(count, types)
    return np.column_stack([*columns.values(), np.log1p(counts), np.log1p(ever)])


def _purchase_columns(
    past: EventColumns, user: np.ndarray, ages: np.ndarray, count: int
) -> dict[str, np.ndarray]:
    """The columns of purchases, by name in the order of `_PURCHASE_COLUMNS`."""
    days = _days(past, user, count)
    never = days == 0
    last = np.where(never, np.nan, _minimum(ages, user, count))
    first = np.where(never, np.nan, -_minimum(-ages, user, count))
    priced = ~np.isnan(past.price)
    paid = np.bincount(user[priced], past.price[priced] * past.quantity[priced], count)
    has_price = np.bincount(user[priced], minlength=count) > 0
    gap = np.where(days > 1, (first - last) / np.maximum(days - 1, 1), np.nan)
    columns = (
        never.astype(np.float64),
        np.log1p(last),
        np.log1p(days),
        np.log1p(first),
        np.where(has_price, np.log1p(paid), np.nan),
        np.log1p(last) - np.log1p(gap),
    )
    return dict(zip(_PURCHASE_COLUMNS, columns, strict=True))


def _days(past: EventColumns, user: np.ndarray, count: int) -> np.ndarray:
    """The number of distinct days with events of each user, float64 (P,)."""
    pairs = np.unique(np.stack([user, past.occurred // DAY]), axis=1)
    return np.bincount(pairs[0], minlength=count).astype(np.float64)


def _minimum(values: np.ndarray, user: np.ndarray, count: int) -> np.ndarray:
    """The minimum value of each user, float64 (P,), infinity for none."""
    minimum = np.full(count, np.inf)
    np.minimum.at(minimum, user, values)
    return minimum
