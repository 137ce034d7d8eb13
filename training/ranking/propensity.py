"""The probability that a user buys within some days: trained on past cutoffs, evaluated on the last one.

A cutoff is the start of a day. The input is the events recorded before it; the label is a purchase in the
days after it. A model that does not beat the base rate of the last cutoff is not published.
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

from services.ranking.models.propensity import PropensityModel, columns_of, describe, write_propensity
from services.ranking.state.event_columns import EventColumns
from training.core import metrics
from training.data.config import ShopConfig
from training.data.shop import ShopData
from training.examples.queries import DAY
from training.examples.shop_state import state_of
from training.ranking.platt import platt

FILE, PART = "evaluation.json", "propensity"
_STEP_DAYS = 7
_PARTS = 4
_RIDGE = 1e-3
# A logistic model of so many columns needs at least this many purchases.
_MIN_PURCHASES = 50
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PropensityExamples:
    """Users at a cutoff: `matrix` float64 (P, F), `purchased` bool (P,), `users` int64 (P,)."""

    matrix: np.ndarray
    purchased: np.ndarray
    users: np.ndarray


def fit(directory: Path, shop: ShopData, settings: ShopConfig) -> None:
    """Fit and evaluate a model for each number of days; write the useful ones and the evaluation."""
    results, models = {}, []
    past = _sample_users(state_of(shop).all(), settings.propensity.users)
    for days in sorted(set(settings.propensity.days)):
        if not len(shop.events):
            results[f"{days} days"] = {"published": False, "reason": "there are no events"}
            continue
        result, model = _fit_horizon(past, settings, days)
        results[f"{days} days"] = result
        if model is not None:
            models.append(model)
    if models:
        (directory / PART).mkdir()
        write_propensity(directory / PART, models)
    (directory / FILE).write_text(json.dumps(results) + "\n")


def cutoffs(first: int, last: int, days: int, limit: int) -> list[int]:
    """At most `limit` cutoffs, latest first, microseconds since 1970; empty if the history is too short.

    The events run from `first` to `last`, whose day may be incomplete. The `days` days after a cutoff and the
    same number before it lie within the events. The latest cutoff is for evaluation: the days after the
    others end before it.
    """
    latest = last // DAY - days
    candidates = [latest, *range(latest - days, latest - days - _STEP_DAYS * limit, -_STEP_DAYS)][:limit]
    usable = [day * DAY for day in candidates if day * DAY - first >= days * DAY]
    return usable if len(usable) > 1 else []


def examples_at(
    past: EventColumns, types: int, targets: np.ndarray, cutoff: int, days: int
) -> PropensityExamples:
    """All users with events before a cutoff."""
    before = past.take(np.flatnonzero(past.recorded < cutoff))
    users, user_index = np.unique(before.user, return_inverse=True)
    after = (past.recorded >= cutoff) & (past.recorded < cutoff + days * DAY) & np.isin(past.kind, targets)
    matrix = describe(before, user_index, len(users), types, targets, cutoff)
    return PropensityExamples(matrix, np.isin(users, past.user[after]), users)


def fit_model(
    windows: Sequence[PropensityExamples], columns: Sequence[str], days: int
) -> PropensityModel | None:
    """A calibrated model of the examples of some cutoffs, latest first; None if too few users bought, or all.

    Calibrated (Platt, 1999) on the latest cutoff by models fitted without its users.
    """
    purchased = np.concatenate([w.purchased for w in windows])
    if not _MIN_PURCHASES <= purchased.sum() <= len(purchased) - _MIN_PURCHASES:
        return None
    latest = windows[0]
    logits = np.empty(len(latest.purchased))
    for part in range(_PARTS):
        model_without = _logistic([_select(w, w.users % _PARTS != part) for w in windows], columns, days)
        in_part = latest.users % _PARTS == part
        logits[in_part] = model_without.logits(latest.matrix[in_part])
    slope, offset = platt(logits, latest.purchased)
    model = _logistic(windows, columns, days)
    weights = [slope * weight for weight in model.weights]
    return replace(model, weights=weights, bias=slope * model.bias + offset)


def evaluate(model: PropensityModel, examples: PropensityExamples, base_rate: float) -> dict[str, Any]:
    """Evaluate a model on new `examples`, against the constant prediction `base_rate`.

    `published` is true if the 95 % interval of the difference in log loss shows that the model beats even the
    true rate of the examples, which is unknown in advance.
    """
    purchased = examples.purchased.astype(np.float64)
    probability, true_rate = expit(model.logits(examples.matrix)), np.full(len(purchased), purchased.mean())
    gain = metrics.paired_interval(_losses(true_rate, purchased), _losses(probability, purchased))
    return {
        "rows": len(purchased),
        "model": metrics.classification_metrics(probability, purchased),
        "base rate": metrics.classification_metrics(np.full(len(purchased), base_rate), purchased),
        "gained": gain.to_dict(),
        "published": gain.low > 0,
    }


def _fit_horizon(
    past: EventColumns, settings: ShopConfig, days: int
) -> tuple[dict[str, Any], PropensityModel | None]:
    """The evaluation, or the reason for its absence, and the model if it is published."""
    types = list(settings.event_types)
    columns, targets = columns_of(types), np.array([types.index(name) for name in settings.targets], np.int16)
    limit = settings.propensity.windows + 1
    times = cutoffs(int(past.recorded[0]), int(past.recorded[-1]), days, limit)
    if not times:
        return {"published": False, "reason": "the events cover too few days"}, None
    newest, *windows = (examples_at(past, len(types), targets, time, days) for time in times)
    model = fit_model(windows, columns, days)
    if model is None:
        return {"published": False, "reason": "too few users bought, or nearly all"}, None
    base_rate = float(np.clip(windows[0].purchased.mean(), 1e-6, 1 - 1e-6))
    result = evaluate(model, newest, base_rate)
    if not result["published"]:
        _log.warning("the model of purchases within %d days does not beat the base rate", days)
        return result | {"reason": "it does not beat the base rate"}, None
    return result, fit_model([newest, *windows], columns, days)


def _logistic(windows: Sequence[PropensityExamples], columns: Sequence[str], days: int) -> PropensityModel:
    matrix = np.concatenate([w.matrix for w in windows])
    purchased = np.concatenate([w.purchased for w in windows]).astype(np.float64)
    present = np.where(np.isnan(matrix), 0, 1).sum(0).clip(min=1)
    mean = np.nansum(matrix, 0) / present
    scale = np.sqrt(np.nansum((matrix - mean) ** 2, 0) / present)
    scale[scale < 1e-9] = 1.0  # noqa: PLR2004 - a column that never differs
    scaled = np.nan_to_num((matrix - mean) / scale)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logit = scaled @ parameters[:-1] + parameters[-1]
        residual = expit(logit) - purchased
        ridge = _RIDGE * parameters[:-1]
        entropy = np.mean(np.logaddexp(0, logit) - purchased * logit) + ridge @ parameters[:-1] / 2
        return float(entropy), np.append(scaled.T @ residual / len(residual) + ridge, residual.mean())

    *weights, bias = minimize(loss, np.zeros(len(columns) + 1), jac=True, method="L-BFGS-B").x.tolist()
    return PropensityModel(days, list(columns), mean.tolist(), scale.tolist(), weights, bias)


def _sample_users(past: EventColumns, limit: int) -> EventColumns:
    """The rows of a random sample of at most `limit` users."""
    users = np.unique(past.user)
    if len(users) <= limit:
        return past
    selected = np.random.default_rng(0).permutation(users)[:limit]
    return past.take(np.flatnonzero(np.isin(past.user, selected)))


def _select(examples: PropensityExamples, mask: np.ndarray) -> PropensityExamples:
    return PropensityExamples(examples.matrix[mask], examples.purchased[mask], examples.users[mask])


def _losses(probability: np.ndarray, purchased: np.ndarray) -> np.ndarray:
    probability = np.clip(probability, 1e-12, 1 - 1e-12)
    losses: np.ndarray = -(purchased * np.log(probability) + (1 - purchased) * np.log(1 - probability))
    return losses
