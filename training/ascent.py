"""Coordinate ascent on nDCG: the weights of a sum, moved one at a time while that puts lists in better order.

Of Metzler and Croft (2007), "Linear feature-based models for information retrieval". Likelihood weighs how
every row of a list is placed; a page shows the first few. Where columns do not add up, and there is little to
learn from, the two want different weights.
"""

import logging

import numpy as np

from services.ranking.reranker import ConditionalLogit
from training.lists import Lists

DEPTH = 20
_LISTS = 4000
_PAIRS = 1_500_000
_SWEEPS = 4
# What a weight is multiplied by, and what is added to it, in deviations of the score.
_FACTORS = (0.0, 0.5, 0.8, 1.25, 2.0)
_STEPS = (-0.3, -0.1, -0.03, 0.03, 0.1, 0.3, 1.0)
# A move must gain more than so many standard errors.
_CERTAIN = 2.0
_log = logging.getLogger(__name__)


def ascend(choice: ConditionalLogit, lists: Lists, seed: int = 0) -> ConditionalLogit:
    """The choice model with weights that put more of `lists`' grades among the first 20.

    A weight is moved when the mean nDCG@20 gains more than twice the standard error of the gain over the
    lists, of which at most 4,000, and so many as make 1.5 million pairs, are drawn; at most four rounds over
    the columns, in an order drawn anew.
    """
    generator = np.random.default_rng(seed)
    answers = np.bincount(lists.group(), lists.grade > 0, len(lists.size))
    some = generator.permutation(np.flatnonzero(answers))[:_LISTS]
    drawn = np.zeros(len(lists.size), bool)
    drawn[some[np.cumsum(answers[some] * lists.size[some]) <= _PAIRS]] = True
    mine = lists.take(drawn)
    if len(mine.size) < 2:  # noqa: PLR2004 - one says nothing of chance
        return choice
    order = _Order(mine)
    rows = choice.scales.apply(mine.matrix)
    weight = np.array(choice.weight, np.float64)
    score = rows @ weight.astype(np.float32)
    lead, step = order.lead(score), float(score.std())
    ndcg = before = order.ndcg(lead)
    for _ in range(_SWEEPS):
        moved = False
        for at in generator.permutation(np.flatnonzero(np.ptp(rows, axis=0) > 0)):
            slope = order.lead(rows[:, at])
            if not slope.any():  # the same for a whole list
                continue
            moves = {weight[at] * (factor - 1) for factor in _FACTORS} | {step * s for s in _STEPS}
            best, gained = 0.0, 0.0
            for move in sorted(moves - {0.0}):
                tried = order.ndcg(lead + np.float32(move) * slope)
                gain = tried - ndcg
                error = float(gain.std(ddof=1)) / len(gain) ** 0.5
                if gain.mean() > max(gained, _CERTAIN * error):
                    best, gained = move, float(gain.mean())
            if best:
                weight[at] += best
                lead += np.float32(best) * slope
                ndcg, moved = order.ndcg(lead), True
        if not moved:
            break
    _log.info("coordinate ascent: nDCG@%d from %.4f to %.4f", DEPTH, before.mean(), ndcg.mean())
    return ConditionalLogit(choice.columns, choice.scales, weight.tolist())


class _Order:
    """The pairs of a graded row and another of its list: how far the other leads decides the ranks."""

    def __init__(self, lists: Lists) -> None:
        graded = np.flatnonzero(lists.grade > 0)
        group, start = lists.group(), np.cumsum(lists.size) - lists.size
        self._list, self._grade, self._count = group[graded], lists.grade[graded], len(lists.size)
        many = lists.size[self._list]
        one = np.repeat(np.arange(len(graded)), many)
        other = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many - start[self._list], many)
        apart = other != graded[one]
        self._one, self._graded, self._other = one[apart], graded[one[apart]], other[apart]
        self._weight = lists.weight[self._other].astype(np.float64)
        best = np.lexsort((-lists.grade, group))
        place = np.arange(len(best)) - start[group[best]] + 1
        self._ideal = np.bincount(group, _discounted(lists.grade[best], place), self._count)

    def lead(self, score: np.ndarray) -> np.ndarray:
        """By how much the other row of each pair scores higher: float32 (P,) of scores (N,)."""
        return np.asarray(score[self._other] - score[self._graded], np.float32)

    def ndcg(self, lead: np.ndarray) -> np.ndarray:
        """nDCG@20 of each list, float64 (Q,), as `Lists.ndcg` has it, ties half above and half below."""
        above = self._weight * ((lead > 0) + 0.5 * (lead == 0))
        rank = 1 + np.bincount(self._one, above, len(self._grade))
        return np.asarray(np.bincount(self._list, _discounted(self._grade, rank), self._count) / self._ideal)


def _discounted(grade: np.ndarray, rank: np.ndarray) -> np.ndarray:
    return np.asarray(np.where(rank <= DEPTH, grade / np.log2(1 + rank), 0))
