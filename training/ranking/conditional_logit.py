"""Fits the conditional logit: the probability of each row of a group, from a weighted sum of columns."""

import logging
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.scaler import FeatureScaler
from training.examples.ranking_groups import RankingGroups

PENALTY = 1e-3
_FLAT = 1e-2
_SCALE_ROWS = 200_000
_log = logging.getLogger(__name__)


def fit_choice(
    groups: RankingGroups, columns: Sequence[str], penalty: np.ndarray | float = PENALTY
) -> ConditionalLogit:
    """The maximum-likelihood weights with a ridge `penalty`, of each column or of all.

    A row counts as often as its grade.

    Softmax cross-entropy over each group (McFadden, 1974). A sampled row counts in the softmax's sum as often
    as its weight, for the rows that it represents. Groups without a grade are dropped. A column that is
    missing everywhere gets no weight. The loss is convex; a trust-region Newton method minimizes it.

    Raises:
        ValueError: a row's weight is not positive.
    """
    if not (groups.weight > 0).all():
        raise ValueError("the weight of a row must be positive")
    graded = groups.take(np.bincount(groups.group(), groups.grade, len(groups.size)) > 0)
    if not len(graded.size):
        zeros = [0.0] * len(columns)
        return ConditionalLogit(list(columns), FeatureScaler.plain(len(columns)), zeros)
    start, group_of, grade = (
        np.cumsum(graded.size) - graded.size,
        graded.group(),
        graded.grade.astype(np.float64),
    )
    sample = np.random.default_rng(0).permutation(len(grade))[:_SCALE_ROWS]
    scales = FeatureScaler.of(graded.matrix[sample])
    rows = scales.apply(graded.matrix)
    # Subtract the mean of the group: a constant within a group does not change the choice.
    rows -= (np.add.reduceat(rows, start, axis=0) / graded.size.astype(np.float32)[:, None])[group_of]
    group_grade, log_weight = np.add.reduceat(grade, start), np.log(graded.weight.astype(np.float64))
    total_grade = float(group_grade.sum())

    def likelihood(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        score = rows @ weight.astype(np.float32) + log_weight
        score -= np.maximum.reduceat(score, start)[group_of]
        negative_log = np.log(np.add.reduceat(np.exp(score), start))[group_of] - score
        return np.exp(-negative_log), negative_log

    def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
        probability, negative_log = likelihood(weight)
        gradient = (group_grade[group_of] * probability - grade).astype(np.float32) @ rows
        cost = float(grade @ negative_log) / total_grade + float(penalty * weight @ weight) / 2
        return cost, gradient / total_grade + penalty * weight

    def hessian(weight: np.ndarray) -> np.ndarray:
        probability, _ = likelihood(weight)
        mean_row = np.add.reduceat(rows * probability.astype(np.float32)[:, None], start)
        mean_row *= np.sqrt(group_grade).astype(np.float32)[:, None]
        scaled = rows * np.sqrt(group_grade[group_of] * probability).astype(np.float32)[:, None]
        variance = (scaled.T @ scaled - mean_row.T @ mean_row) / total_grade
        return np.asarray(variance + penalty * np.eye(len(weight)))

    options = {"gtol": 1e-4, "maxiter": 50}  # float32 rows allow no finer gradient
    result = minimize(
        loss, np.zeros(len(columns)), jac=True, hess=hessian, method="trust-exact", options=options
    )
    # Near the optimum, float32 rows predict no improvement any more.
    if not result.success and np.linalg.norm(result.jac) > _FLAT:
        _log.warning("the fit of the choice model did not converge: %s", result.message)
    return ConditionalLogit(list(columns), scales, result.x.tolist())
