"""Coordinate ascent on nDCG: moves one weight of a sum at a time while that improves the ranking.

After Metzler and Croft (2007), "Linear feature-based models for information retrieval". Likelihood values
the position of every row of a group, but a page shows only the first few. If a weighted sum fits poorly or
training data are few, the best weights for the two differ.
"""

import logging

import numpy as np

from services.ranking.models.linear import ConditionalLogit
from training.examples.ranking_groups import RankingGroups

DEPTH = 20
_MAX_GROUPS = 4000
_MAX_PAIRS = 1_500_000
_SWEEPS = 4
# The factors of a weight, and the steps added to it, in standard deviations of the score.
_FACTORS = (0.0, 0.5, 0.8, 1.25, 2.0)
_STEPS = (-0.3, -0.1, -0.03, 0.03, 0.1, 0.3, 1.0)
# The least gain of a move, in standard errors.
_MIN_STANDARD_ERRORS = 2.0
_log = logging.getLogger(__name__)


def ascend(choice: ConditionalLogit, groups: RankingGroups, seed: int = 0) -> ConditionalLogit:
    """The choice model with weights that rank more of the grades of `groups` among the first 20.

    A weight is moved if the mean nDCG@20 improves by more than two standard errors of the gain over the
    groups. At most 4,000 groups are sampled, and at most so many that they make 1.5 million pairs. At most
    four rounds go over the columns, each in a new random order.
    """
    generator = np.random.default_rng(seed)
    target_count = np.bincount(groups.group(), groups.grade > 0, len(groups.size))
    sample = generator.permutation(np.flatnonzero(target_count))[:_MAX_GROUPS]
    selected = np.zeros(len(groups.size), bool)
    selected[sample[np.cumsum(target_count[sample] * groups.size[sample]) <= _MAX_PAIRS]] = True
    training = groups.take(selected)
    if len(training.size) < 2:  # noqa: PLR2004 - one group has no standard error
        return choice
    pairs = _RankPairs(training)
    rows = choice.scales.apply(training.matrix)
    weight = np.array(choice.weight, np.float64)
    score = rows @ weight.astype(np.float32)
    lead, step = pairs.lead(score), float(score.std())
    ndcg = before = pairs.ndcg(lead)
    for _ in range(_SWEEPS):
        improved = False
        for column in generator.permutation(np.flatnonzero(np.ptp(rows, axis=0) > 0)):
            slope = pairs.lead(rows[:, column])
            if not slope.any():  # constant within each group
                continue
            moves = {weight[column] * (factor - 1) for factor in _FACTORS} | {step * s for s in _STEPS}
            best, best_gain = 0.0, 0.0
            for move in sorted(moves - {0.0}):
                trial_ndcg = pairs.ndcg(lead + np.float32(move) * slope)
                gain = trial_ndcg - ndcg
                error = float(gain.std(ddof=1)) / len(gain) ** 0.5
                if gain.mean() > max(best_gain, _MIN_STANDARD_ERRORS * error):
                    best, best_gain = move, float(gain.mean())
            if best:
                weight[column] += best
                lead += np.float32(best) * slope
                ndcg, improved = pairs.ndcg(lead), True
        if not improved:
            break
    _log.debug("coordinate ascent: nDCG@%d from %.4f to %.4f", DEPTH, before.mean(), ndcg.mean())
    return ConditionalLogit(choice.columns, choice.scales, weight.tolist())


class _RankPairs:
    """Pairs of a graded row and another row of its group; the score differences determine the ranks."""

    def __init__(self, groups: RankingGroups) -> None:
        graded = np.flatnonzero(groups.grade > 0)
        group_of, start = groups.group(), np.cumsum(groups.size) - groups.size
        self._group, self._grade, self._count = group_of[graded], groups.grade[graded], len(groups.size)
        group_size = groups.size[self._group]
        graded_index = np.repeat(np.arange(len(graded)), group_size)
        other_row = np.arange(group_size.sum()) - np.repeat(
            np.cumsum(group_size) - group_size - start[self._group], group_size
        )
        distinct = other_row != graded[graded_index]
        self._graded_index, self._graded_row, self._other_row = (
            graded_index[distinct],
            graded[graded_index[distinct]],
            other_row[distinct],
        )
        self._weight = groups.weight[self._other_row].astype(np.float64)
        order = np.lexsort((-groups.grade, group_of))
        rank = np.arange(len(order)) - start[group_of[order]] + 1
        self._ideal = np.bincount(group_of, _discounted_gain(groups.grade[order], rank), self._count)

    def lead(self, score: np.ndarray) -> np.ndarray:
        """The score of the other row minus that of the graded row: float32 (P,), from scores (N,)."""
        return np.asarray(score[self._other_row] - score[self._graded_row], np.float32)

    def ndcg(self, lead: np.ndarray) -> np.ndarray:
        """nDCG@20 of each group, float64 (Q,), as `RankingGroups.ndcg`; ties count half above, half below."""
        above = self._weight * ((lead > 0) + 0.5 * (lead == 0))
        rank = 1 + np.bincount(self._graded_index, above, len(self._grade))
        return np.asarray(
            np.bincount(self._group, _discounted_gain(self._grade, rank), self._count) / self._ideal
        )


def _discounted_gain(grade: np.ndarray, rank: np.ndarray) -> np.ndarray:
    return np.asarray(np.where(rank <= DEPTH, grade / np.log2(1 + rank), 0))
