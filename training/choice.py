"""The choice model's fit: which row of a list was chosen, by a weighted sum of its columns."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

from services.ranking.reranker import Choice
from services.ranking.scales import scales, standardised
from training.lists import Lists

_PENALTY = 1e-2
_SCALED_BY = 200_000


def fit_choice(lists: Lists, columns: Sequence[str]) -> Choice:
    """The weights under which what was chosen was likeliest, per unit of grade, less a ridge penalty.

    The listwise likelihood of ListNet (Cao et al., 2007): softmax over a list against its grades. A
    row that stands for others left out stands in the sum as often as it weighs. Lists without a
    grade teach nothing; columns that are unknown everywhere get no weight. The loss is convex; Newton's
    method in a trust region finds its least.
    """
    known = lists.take(np.bincount(lists.group(), lists.grade, len(lists.size)) > 0)
    if not len(known.size):
        zeros = [0.0] * len(columns)
        return Choice(list(columns), zeros, [1.0] * len(columns), zeros)
    start, group, grade = np.cumsum(known.size) - known.size, known.group(), known.grade.astype(np.float64)
    mean, scale = scales(known.matrix[:: max(1, len(grade) // _SCALED_BY)])
    rows = standardised(known.matrix, mean.tolist(), scale.tolist())
    # What is the same for a whole list changes no choice.
    rows -= (np.add.reduceat(rows, start, axis=0) / known.size.astype(np.float32)[:, None])[group]
    total, often = np.add.reduceat(grade, start), np.log(known.weight.astype(np.float64))
    whole = float(total.sum())

    def chances(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        score = rows @ weight.astype(np.float32) + often
        score -= np.maximum.reduceat(score, start)[group]
        missed = np.log(np.add.reduceat(np.exp(score), start))[group] - score
        return np.exp(-missed), missed

    def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
        chance, missed = chances(weight)
        slope = (total[group] * chance - grade).astype(np.float32) @ rows
        cost = float(grade @ missed) / whole + _PENALTY / 2 * float(weight @ weight)
        return cost, slope / whole + _PENALTY * weight

    def curvature(weight: np.ndarray) -> np.ndarray:
        chance, _ = chances(weight)
        usual = np.add.reduceat(rows * chance.astype(np.float32)[:, None], start)
        usual *= np.sqrt(total).astype(np.float32)[:, None]
        spread = rows * np.sqrt(total[group] * chance).astype(np.float32)[:, None]
        bend = (spread.T @ spread - usual.T @ usual) / whole
        return np.asarray(bend + _PENALTY * np.eye(len(weight)))

    found = minimize(loss, np.zeros(len(columns)), jac=True, hess=curvature, method="trust-exact")
    return Choice(list(columns), mean.tolist(), scale.tolist(), found.x.tolist())
