"""The recall of an approximate index, measured on a sample of its own rows.

Recall is relative to the vectors as the index stores them: the loss of a lossy storage is not in it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from services.embedding.index.exact_scan import Read, nearest

LOW_RECALL = 0.9
HITS = 100
"""Recall is of that many nearest rows."""
_MAX_QUERIES, _MIN_QUERIES = 200, 20
_MAX_OPERATIONS = 60e9
"""The limit of multiplications and additions of the exact scan: six seconds of a core (decision 0049)."""
_TIE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class RecallSample:
    """Rows as queries, float32 (Q, D), and the scores of their nearest rows by an exact scan.

    `thresholds`, float32 (Q,), are the scores of the `count`-th nearest rows. A hit with that score or a
    higher one is one of the nearest, because rows with equal scores are interchangeable.
    """

    queries: np.ndarray
    thresholds: np.ndarray
    count: int

    @classmethod
    def of(cls, read: Read, rows: int, dimension: int) -> "RecallSample | None":
        """A sample of the vectors that `read` returns; None if there are none, or too many for the limit."""
        affordable = int(_MAX_OPERATIONS // (2 * max(rows, 1) * dimension))
        if not rows or affordable < _MIN_QUERIES:
            return None
        count = min(HITS, rows)
        sample = np.random.default_rng(0).choice(rows, min(_MAX_QUERIES, affordable, rows), replace=False)
        queries = np.concatenate([read(slice(row, row + 1)) for row in np.sort(sample).tolist()])
        queries = np.ascontiguousarray(queries, np.float32)
        scores, _ = nearest(read, rows, queries, count)
        return cls(queries, scores[:, -1], count)

    def recall(self, scores: Iterable[np.ndarray]) -> float:
        """The mean share of the nearest rows among the hits, from the exact scores of each query's hits."""
        counts = [
            min(int(np.count_nonzero(hits >= threshold - _TIE_TOLERANCE)), self.count)
            for hits, threshold in zip(scores, self.thresholds, strict=True)
        ]
        return float(np.mean(counts)) / self.count
