"""Groups of rows to rank, the input of the learning-to-rank models."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np


@dataclass(frozen=True)
class RankingGroups:
    """Q groups of rows to rank, one group after the other.

    `matrix` float32 (N, K); `grade` float32 (N,) the gain of a row; `weight` float32 (N,); `size` int64 (Q,)
    rows of each group; `time` int64 (Q,) time of each group, microseconds since 1970.
    """

    matrix: np.ndarray
    grade: np.ndarray
    weight: np.ndarray
    size: np.ndarray
    time: np.ndarray

    def take(self, selected: np.ndarray) -> "RankingGroups":
        """Some of the groups, `selected` bool (Q,)."""
        rows = np.repeat(selected, self.size)
        return RankingGroups(
            self.matrix[rows], self.grade[rows], self.weight[rows], self.size[selected], self.time[selected]
        )

    def select_columns(self, columns: np.ndarray) -> "RankingGroups":
        """The same groups with some columns, bool (K,)."""
        return replace(self, matrix=self.matrix[:, columns])

    @staticmethod
    def concatenate(parts: Sequence["RankingGroups"]) -> "RankingGroups":
        """The groups of all `parts`, one part after the other."""
        return RankingGroups(
            *(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(RankingGroups))
        )

    def ndcg(self, score: np.ndarray, k: int) -> np.ndarray:
        """nDCG@k by scores (N,) of each group that has a grade: float64 (G,).

        Normalized discounted cumulative gain (Järvelin and Kekäläinen, 2002). A row of weight w counts as w
        rows in the ranks of the rows below it. Ties are broken at random.
        """
        tie_breaker = np.random.default_rng(0).random(len(score))
        group, start = self.group(), np.cumsum(self.size) - self.size
        gain = []
        for key in (-score, -self.grade):
            order = np.lexsort((tie_breaker, key, group))
            above = np.cumsum(self.weight[order], dtype=np.float64) - self.weight[order]
            rank = above - above[start[group]] + 1
            discounted = np.where(rank <= k, self.grade[order] / np.log2(1 + rank), 0)
            gain.append(np.bincount(group, discounted, len(self.size)))
        graded = gain[1] > 0
        return np.asarray(gain[0][graded] / gain[1][graded])

    def group(self) -> np.ndarray:
        """The group of each row, int64 (N,)."""
        return np.repeat(np.arange(len(self.size)), self.size)
