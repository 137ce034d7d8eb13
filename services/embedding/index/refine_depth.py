"""How many candidates of the PQ codes to rerank, calibrated on the rows of a segment.

PQ codes estimate inner products (`segment.py`). Their accuracy depends on the vectors.
"""

from dataclasses import dataclass

import faiss
import numpy as np

from services.embedding.index.exact_scan import nearest

_MIN_DEPTH, _MIN_FACTOR = 1000, 3.0
_TARGET_RECALL = 0.995
_QUERIES = 64
_COUNTS = (100, 400)
_MAX_DEPTH, _TIE_TOLERANCE = 16_384, 1e-6


@dataclass(frozen=True)
class RefineDepth:
    """Rerank `times` as many candidates as requested hits, and at `least` this many.

    The minimum serves near duplicates, which have nearly equal codes.
    """

    least: int = _MIN_DEPTH
    times: float = _MIN_FACTOR

    def of(self, count: int) -> int:
        """How many candidates to rerank for `count` requested hits."""
        return max(int(self.times * count), self.least)


UNMEASURED = RefineDepth()


def calibrate(pq_codes: faiss.Index, vectors: np.ndarray) -> RefineDepth:
    """The depth at which 99.5% of the 100 and of the 400 nearest rows are among the candidates.

    The depth is all rows if the first 16,384 candidates do not suffice; such codes are not worth scanning.
    The queries are rows of `vectors`, float (N, D), and means of three rows, which lie far from all rows,
    like query vectors of users. `pq_codes` are the codes of all rows.
    """
    random, count = np.random.default_rng(0), len(vectors)
    sample = np.sort(random.choice(count, min(_QUERIES, count), replace=False))
    groups = np.stack(
        [vectors[np.sort(random.integers(0, count, 3))].astype(np.float32).mean(0) for _ in sample]
    )
    depths = dict.fromkeys(_COUNTS, 0)
    for queries in (vectors[sample].astype(np.float32), groups):
        candidates = pq_codes.search(queries, min(_MAX_DEPTH, count))[1]
        scores, rows = nearest(vectors.__getitem__, count, queries, min(max(_COUNTS), count))
        for nearest_count in _COUNTS:
            last = scores[:, :nearest_count][:, -1:]
            nearer = scores[:, :nearest_count] > last + _TIE_TOLERANCE  # ties at the end are interchangeable
            ranks = [
                _ranks(row_candidates, row_nearest[:nearest_count][mask])
                for row_candidates, row_nearest, mask in zip(candidates, rows, nearer, strict=True)
            ]
            if nearer.any():
                depth = int(np.quantile(np.concatenate(ranks), _TARGET_RECALL, method="higher")) + 1
                depth = depth if depth <= candidates.shape[1] else count
                depths[nearest_count] = max(depths[nearest_count], depth)
    few, many = _COUNTS
    return RefineDepth(max(_MIN_DEPTH, depths[few]), max(_MIN_FACTOR, depths[many] / many))


def _ranks(candidates: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rank of each row in `candidates`, rows int64 (K,); K for a row that is missing."""
    order = np.argsort(candidates)
    positions = np.minimum(np.searchsorted(candidates, rows, sorter=order), len(candidates) - 1)
    return np.where(candidates[order[positions]] == rows, order[positions], len(candidates))
