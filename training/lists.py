"""Lists to put in order, as the models that learn an order read them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np


@dataclass(frozen=True)
class Lists:
    """Q lists to put in order, one after the other.

    `matrix` float32 (N, K); `grade` float32 (N,), what is gained by a row; `weight` float32 (N,);
    `size` int64 (Q,) rows of each list, `when` int64 (Q,) its moment, microseconds since 1970.
    """

    matrix: np.ndarray
    grade: np.ndarray
    weight: np.ndarray
    size: np.ndarray
    when: np.ndarray

    def take(self, chosen: np.ndarray) -> "Lists":
        """Some of the lists, `chosen` bool (Q,)."""
        rows = np.repeat(chosen, self.size)
        return Lists(
            self.matrix[rows], self.grade[rows], self.weight[rows], self.size[chosen], self.when[chosen]
        )

    def only(self, columns: np.ndarray) -> "Lists":
        """The same lists with some columns, bool (K,)."""
        return replace(self, matrix=self.matrix[:, columns])

    @staticmethod
    def joined(parts: Sequence["Lists"]) -> "Lists":
        """All lists of some parts, one part after the other."""
        return Lists(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Lists)))

    def ndcg(self, score: np.ndarray, k: int) -> np.ndarray:
        """nDCG@k of each list that has a grade, in the order of scores (N,): float64 (G,).

        Normalised discounted cumulative gain (Järvelin and Kekäläinen, 2002). A row that weighs w stands
        for as many in the ranks of those below it. Ties fall as at random.
        """
        drawn = np.random.default_rng(0).random(len(score))
        group, start = self.group(), np.cumsum(self.size) - self.size
        gain = []
        for key in (-score, -self.grade):
            order = np.lexsort((drawn, key, group))
            above = np.cumsum(self.weight[order], dtype=np.float64) - self.weight[order]
            rank = above - above[start[group]] + 1
            worth = np.where(rank <= k, self.grade[order] / np.log2(1 + rank), 0)
            gain.append(np.bincount(group, worth, len(self.size)))
        graded = gain[1] > 0
        return np.asarray(gain[0][graded] / gain[1][graded])

    def group(self) -> np.ndarray:
        """The list of each row, int64 (N,)."""
        return np.repeat(np.arange(len(self.size)), self.size)
