"""Maps item hashes to rows."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class IdMap:
    """The items of N rows: `hashes` int64 (N,), all different."""

    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.hashes)

    @cached_property
    def _sorted(self) -> np.ndarray:
        ordered: np.ndarray = self.hashes[self._order]
        return ordered

    def rows(self, hashes: np.ndarray) -> np.ndarray:
        """The row of each item hash, int64 (M,); -1 for an unknown hash."""
        if not len(self.hashes):
            return np.full(len(hashes), -1, np.int64)
        positions = np.minimum(np.searchsorted(self._sorted, hashes), len(self.hashes) - 1)
        return np.where(self._sorted[positions] == hashes, self._order[positions], -1)
