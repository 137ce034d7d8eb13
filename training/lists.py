"""Lists to put in order, as the models that learn an order read them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

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

    @staticmethod
    def joined(parts: Sequence["Lists"]) -> "Lists":
        """All lists of some parts, one part after the other."""
        return Lists(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Lists)))

    def group(self) -> np.ndarray:
        """The list of each row, int64 (N,)."""
        return np.repeat(np.arange(len(self.size)), self.size)
