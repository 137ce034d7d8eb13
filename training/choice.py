"""The choice model's fit: which row of a list was chosen, by a weighted sum of its columns."""

import logging
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

from services.ranking.reranker import ConditionalLogit
from services.ranking.scales import Scales
from training.lists import Lists

_PENALTY = 1e-3
_SCALE_ROWS = 200_000
_log = logging.getLogger(__name__)


def fit_choice(lists: Lists, columns: Sequence[str]) -> ConditionalLogit:
    """The weights under which what was chosen was likeliest, per unit of grade, less a ridge penalty.

    Softmax cross-entropy over each list (McFadden, 1974), an item counting as often as its grade says. A
    row that stands for others left out stands in the softmax's sum as often as it weighs. Lists
    without a grade teach nothing; columns that are unknown everywhere get no weight. The loss is
    convex; Newton's method in a trust region finds its least.

    Raises:
        ValueError: a row weighs 0, less or no number.
    """
    if not (lists.weight > 0).all():
        raise ValueError("a row of a list must weigh more than 0")
    known = lists.take(np.bincount(lists.group(), lists.grade, len(lists.size)) > 0)
    if not len(known.size):
        zeros = [0.0] * len(columns)
        return ConditionalLogit(list(columns), Scales.plain(len(columns)), zeros)
    start, group, grade = np.cumsum(known.size) - known.size, known.group(), known.grade.astype(np.float64)
    drawn = np.random.default_rng(0).permutation(len(grade))[:_SCALE_ROWS]
    scales = Scales.of(known.matrix[drawn])
    rows = scales.apply(known.matrix)
    # What is the same for a whole list changes no choice.
    rows -= (np.add.reduceat(rows, start, axis=0) / known.size.astype(np.float32)[:, None])[group]
    total, log_weight = np.add.reduceat(grade, start), np.log(known.weight.astype(np.float64))
    whole = float(total.sum())

    def likelihood(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        score = rows @ weight.astype(np.float32) + log_weight
        score -= np.maximum.reduceat(score, start)[group]
        surprise = np.log(np.add.reduceat(np.exp(score), start))[group] - score
        return np.exp(-surprise), surprise

    def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
        chance, surprise = likelihood(weight)
        gradient = (total[group] * chance - grade).astype(np.float32) @ rows
        cost = float(grade @ surprise) / whole + _PENALTY / 2 * float(weight @ weight)
        return cost, gradient / whole + _PENALTY * weight

    def hessian(weight: np.ndarray) -> np.ndarray:
        chance, _ = likelihood(weight)
        mean_row = np.add.reduceat(rows * chance.astype(np.float32)[:, None], start)
        mean_row *= np.sqrt(total).astype(np.float32)[:, None]
        spread = rows * np.sqrt(total[group] * chance).astype(np.float32)[:, None]
        variance = (spread.T @ spread - mean_row.T @ mean_row) / whole
        return np.asarray(variance + _PENALTY * np.eye(len(weight)))

    options = {"gtol": 1e-4, "maxiter": 50}  # float32 rows know no finer gradient
    found = minimize(
        loss, np.zeros(len(columns)), jac=True, hess=hessian, method="trust-exact", options=options
    )
    if not found.success:
        _log.warning("the choice model stopped short of its best weights: %s", found.message)
    return ConditionalLogit(list(columns), scales, found.x.tolist())
