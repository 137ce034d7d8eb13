"""Rows that stand for items, found by the items' numbers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Numbered:
    """Rows of the items `numbers`, int64 (N,), all different."""

    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.numbers)

    @cached_property
    def _sorted(self) -> np.ndarray:
        ordered: np.ndarray = self.numbers[self._order]
        return ordered

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The row of each number, int64 (M,); -1 where it has none."""
        if not len(self.numbers):
            return np.full(len(numbers), -1, np.int64)
        at = np.minimum(np.searchsorted(self._sorted, numbers), len(self.numbers) - 1)
        return np.where(self._sorted[at] == numbers, self._order[at], -1)
