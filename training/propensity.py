"""The chance that a person buys within so many days: learned from past moments, judged on the last one.

A moment is the beginning of a day; what was recorded before it is read, the purchases of the days after it
are the answer. A model that does not beat the base rate of the last window is not published.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from services.ranking.propensity import Model, columns_of, describe, write_propensity
from services.ranking.state import Columns
from training import metrics
from training.ctr import platt
from training.dataset import Shop
from training.queries import DAY
from training.replay import state_of
from training.shop_settings import ShopSettings

FILE, PART = "judged.json", "propensity"
_STEP_DAYS = 7
_PARTS = 4
_RIDGE = 1e-3
# Of fewer people who bought, a logistic model of so many columns says nothing.
_LEAST = 50
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """People at a moment: `matrix` float64 (P, F), `bought` bool (P,) in the days after, `who` int64 (P,)."""

    matrix: np.ndarray
    bought: np.ndarray
    who: np.ndarray


def fit(shop: Shop, settings: ShopSettings, directory: Path) -> None:
    """Fit and judge a model for each number of days; write those worth it, and what was found."""
    found, models = {}, []
    past = _of_some(state_of(shop).all(), settings.propensity.people)
    for days in sorted(set(settings.propensity.days)):
        said, model = _fitted(past, settings, days)
        found[f"{days} days"] = said
        if model is not None:
            models.append(model)
    if models:
        (directory / PART).mkdir()
        write_propensity(directory / PART, models)
    (directory / FILE).write_text(json.dumps(found) + "\n")


def moments(first: int, last: int, days: int, most: int) -> list[int]:
    """At most so many moments, the latest first, microseconds since 1970; empty where the past is too short.

    The days after each are all within the events, from `first` to the day before that of `last`, which may
    be half a day, and as many days lie before it. The first is to be judged by: the days after the others
    end before it begins.
    """
    latest = last // DAY - days
    found = [latest, *range(latest - days, latest - days - _STEP_DAYS * most, -_STEP_DAYS)][:most]
    kept = [day * DAY for day in found if day * DAY - first >= days * DAY]
    return kept if len(kept) > 1 else []


def window(past: Columns, types: int, targets: np.ndarray, moment: int, days: int) -> Window:
    """Everybody who was known at a moment."""
    before = past.take(np.flatnonzero(past.recorded < moment))
    who, person = np.unique(before.user, return_inverse=True)
    after = (past.recorded >= moment) & (past.recorded < moment + days * DAY) & np.isin(past.kind, targets)
    matrix = describe(before, person, len(who), types, targets, moment)
    return Window(matrix, np.isin(who, past.user[after]), who)


def fit_model(windows: Sequence[Window], columns: Sequence[str], days: int) -> Model | None:
    """A calibrated model of windows, the latest first; None where too few bought, or all.

    Calibrated (Platt, 1999) on the latest window by models that did not see its people.
    """
    bought = np.concatenate([w.bought for w in windows])
    if not _LEAST <= bought.sum() <= len(bought) - _LEAST:
        return None
    latest = windows[0]
    logits = np.empty(len(latest.bought))
    for part in range(_PARTS):
        others = _logistic([_rows(w, w.who % _PARTS != part) for w in windows], columns, days)
        mine = latest.who % _PARTS == part
        logits[mine] = others.logits(latest.matrix[mine])
    slope, offset = platt(logits, latest.bought)
    model = _logistic(windows, columns, days)
    weights = [slope * weight for weight in model.weights]
    return replace(model, weights=weights, bias=slope * model.bias + offset)


def judge(model: Model, unseen: Window, usual: float) -> dict[str, Any]:
    """What a model is worth on a window that it did not see, beside always saying `usual`.

    It is `kept` if it beats, by the 95 % interval of the difference in log loss, even the one rate that
    would have been right, which nobody knows beforehand.
    """
    bought = unseen.bought.astype(np.float64)
    chance, right = expit(model.logits(unseen.matrix)), np.full(len(bought), bought.mean())
    gained = metrics.paired_interval(_losses(right, bought), _losses(chance, bought))
    return {
        "rows": len(bought),
        "model": metrics.classification_metrics(chance, bought),
        "base rate": metrics.classification_metrics(np.full(len(bought), usual), bought),
        "gained": gained.to_dict(),
        "kept": gained.low > 0,
    }


def _fitted(past: Columns, settings: ShopSettings, days: int) -> tuple[dict[str, Any], Model | None]:
    """What judging found, or why there is nothing to judge, and the model if it is kept."""
    types = list(settings.event_types)
    columns, targets = columns_of(types), np.array([types.index(name) for name in settings.targets], np.int16)
    most = settings.propensity.windows + 1
    found = moments(int(past.recorded[0]), int(past.recorded[-1]), days, most)
    if not found:
        return {"kept": False, "why": "the events are of too few days"}, None
    unseen, *windows = (window(past, len(types), targets, moment, days) for moment in found)
    model = fit_model(windows, columns, days)
    if model is None:
        return {"kept": False, "why": "too few people bought, or nearly all"}, None
    usual = float(np.clip(windows[0].bought.mean(), 1e-6, 1 - 1e-6))
    said = judge(model, unseen, usual)
    if not said["kept"]:
        _log.warning("who buys within %d days is not foretold better than by the base rate", days)
        return said | {"why": "it does not beat the base rate"}, None
    return said, fit_model([unseen, *windows], columns, days)


def _logistic(windows: Sequence[Window], columns: Sequence[str], days: int) -> Model:
    matrix = np.concatenate([w.matrix for w in windows])
    bought = np.concatenate([w.bought for w in windows]).astype(np.float64)
    known = np.where(np.isnan(matrix), 0, 1).sum(0).clip(min=1)
    mean = np.nansum(matrix, 0) / known
    scale = np.sqrt(np.nansum((matrix - mean) ** 2, 0) / known)
    scale[scale < 1e-9] = 1.0  # noqa: PLR2004 - a column that never differs
    scaled = np.nan_to_num((matrix - mean) / scale)

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        logit = scaled @ at[:-1] + at[-1]
        wrong = expit(logit) - bought
        ridge = _RIDGE * at[:-1]
        entropy = np.mean(np.logaddexp(0, logit) - bought * logit) + ridge @ at[:-1] / 2
        return float(entropy), np.append(scaled.T @ wrong / len(wrong) + ridge, wrong.mean())

    *weights, bias = minimize(loss, np.zeros(len(columns) + 1), jac=True, method="L-BFGS-B").x.tolist()
    return Model(days, list(columns), mean.tolist(), scale.tolist(), weights, bias)


def _of_some(past: Columns, most: int) -> Columns:
    """The rows of at most so many people, drawn at random."""
    people = np.unique(past.user)
    if len(people) <= most:
        return past
    chosen = np.random.default_rng(0).permutation(people)[:most]
    return past.take(np.flatnonzero(np.isin(past.user, chosen)))


def _rows(of: Window, kept: np.ndarray) -> Window:
    return Window(of.matrix[kept], of.bought[kept], of.who[kept])


def _losses(chance: np.ndarray, bought: np.ndarray) -> np.ndarray:
    chance = np.clip(chance, 1e-12, 1 - 1e-12)
    found: np.ndarray = -(bought * np.log(chance) + (1 - bought) * np.log(1 - chance))
    return found
