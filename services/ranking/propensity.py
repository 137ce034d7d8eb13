"""The chance that a person buys within so many days: what is read of them, and a logistic model over it.

Reads how lately, how often and how much, of everything recorded before a moment; not which items, and
nothing of the session. The one function describes many people for training and one for serving.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from services.errors import FailedPrecondition
from services.ranking.moment import DAY
from services.ranking.state import Columns

FILE = "propensity.json"
_WINDOWS = (1, 7, 30)
_OF_PURCHASES = (
    "never_bought",
    "purchase_recency",
    "purchase_days",
    "purchase_tenure",
    "spent",
    "overdue",
)
_OF_ALL = ("recency", "tenure", "active_days")


@dataclass(frozen=True)
class Model:
    """P(buys within `days`) = sigmoid(bias + weights . (x - mean) / scale); NaN in x stands for the mean.

    x are the `columns`.
    """

    days: int
    columns: Sequence[str]
    mean: Sequence[float]
    scale: Sequence[float]
    weights: Sequence[float]
    bias: float

    def logits(self, matrix: np.ndarray) -> np.ndarray:
        """Logits float64 (P,) of people described by the columns, float64 (P, F)."""
        scaled = np.nan_to_num((matrix - np.array(self.mean)) / np.array(self.scale))
        found: np.ndarray = scaled @ np.array(self.weights) + self.bias
        return found


class Propensity:
    """The models that training left, one for each number of days.

    Raises:
        FailedPrecondition: a model reads a column that this shop's event types do not give.
    """

    def __init__(self, directory: Path, event_types: Sequence[str]) -> None:
        models = [Model(**model) for model in json.loads((directory / FILE).read_text())]
        # By name: a bundle's profile has the event types in another order than training had.
        place = {name: at for at, name in enumerate(columns_of(event_types))}
        if missing := [name for model in models for name in model.columns if name not in place]:
            raise FailedPrecondition(f"the propensity model reads {missing[0]!r}, which nothing here gives")
        self._models = [(model, np.array([place[name] for name in model.columns])) for model in models]
        self._types = len(event_types)

    def of(self, past: Columns, targets: np.ndarray, before: int) -> dict[int, float]:
        """Days to the chance of buying within them, of who did `past`; of whom nothing is known, nothing."""
        if not len(past.kind):
            return {}
        one = np.zeros(len(past.kind), np.int64)
        matrix = describe(past, one, 1, self._types, targets, before)
        return {m.days: float(1 / (1 + np.exp(-m.logits(matrix[:, at])[0]))) for m, at in self._models}


def write_propensity(directory: Path, models: Sequence[Model]) -> None:
    """Write the component."""
    text = json.dumps([asdict(model) for model in models], indent=1)
    (directory / FILE).write_text(text + "\n")


def columns_of(event_types: Sequence[str]) -> list[str]:
    """The names of what `describe` gives, in its order."""
    counts = [f"{name}_{days}d" for name in event_types for days in _WINDOWS]
    return [*_OF_PURCHASES, *_OF_ALL, *counts, *(f"{name}_ever" for name in event_types)]


def describe(
    past: Columns, person: np.ndarray, count: int, types: int, targets: np.ndarray, before: int
) -> np.ndarray:
    """What `past` says of `count` people as of `before`, microseconds since 1970: float64 (P, F).

    `person` int64 (N,) is whose each row is, from 0; every one has a row at least, all recorded before
    `before` and of one of so many `types`. Counts, days and money are logarithms; NaN for unknown.
    """
    ages = np.maximum(before - past.occurred, 0) / DAY
    bought = np.isin(past.kind, targets)
    columns: Mapping[str, np.ndarray] = {
        **_of_purchases(past.take(np.flatnonzero(bought)), person[bought], ages[bought], count),
        "recency": np.log1p(_least(ages, person, count)),
        "tenure": np.log1p(-_least(-ages, person, count)),
        "active_days": np.log1p(_days(past, person, count)),
    }
    at = person * types + past.kind
    size = count * types
    lately = [np.bincount(at[ages < days], minlength=size).reshape(count, types) for days in _WINDOWS]
    # By type, and within it by window, as `columns_of` names them.
    counts = np.stack(lately, 2).reshape(count, -1)
    ever = np.bincount(at, minlength=size).reshape(count, types)
    return np.column_stack([*columns.values(), np.log1p(counts), np.log1p(ever)])


def _of_purchases(past: Columns, person: np.ndarray, ages: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The columns of purchases, by name in the order of `_OF_PURCHASES`."""
    days = _days(past, person, count)
    never = days == 0
    last = np.where(never, np.nan, _least(ages, person, count))
    first = np.where(never, np.nan, -_least(-ages, person, count))
    priced = ~np.isnan(past.price)
    paid = np.bincount(person[priced], past.price[priced] * past.quantity[priced], count)
    known = np.bincount(person[priced], minlength=count) > 0
    gap = np.where(days > 1, (first - last) / np.maximum(days - 1, 1), np.nan)
    found = (
        never.astype(np.float64),
        np.log1p(last),
        np.log1p(days),
        np.log1p(first),
        np.where(known, np.log1p(paid), np.nan),
        np.log1p(last) - np.log1p(gap),
    )
    return dict(zip(_OF_PURCHASES, found, strict=True))


def _days(past: Columns, person: np.ndarray, count: int) -> np.ndarray:
    """On how many different days each person did something, float64 (P,)."""
    pairs = np.unique(np.stack([person, past.occurred // DAY]), axis=1)
    return np.bincount(pairs[0], minlength=count).astype(np.float64)


def _least(values: np.ndarray, person: np.ndarray, count: int) -> np.ndarray:
    """The least value of each person, float64 (P,), infinity for none."""
    found = np.full(count, np.inf)
    np.minimum.at(found, person, values)
    return found
