"""How many candidates codes have to tell, measured on the rows themselves.

Codes estimate products (`segments.py`). How well they tell vectors from each other depends on these.
"""

from dataclasses import dataclass

import faiss
import numpy as np

_LEAST, _TIMES = 1000, 3.0
_WANTED = 0.995
_QUERIES = 64
_COUNTS = (100, 400)
_DEEPEST, _EQUAL = 16_384, 1e-6
_PAGE = 1 << 16


@dataclass(frozen=True)
class Depth:
    """So many `times` as are asked for are compared by their vectors, and at `least` so many.

    The least is what items that are nearly one need, for they have nearly one code.
    """

    least: int = _LEAST
    times: float = _TIMES

    def of(self, count: int) -> int:
        """How many candidates are compared where `count` are asked for."""
        return max(int(self.times * count), self.least)


UNMEASURED = Depth()


def calibrated(codes: faiss.Index, vectors: np.ndarray) -> Depth:
    """What it takes that of the 100 and of the 400 nearest, on average, .995 are among the candidates.

    All rows, where not so many are among the first sixteen thousand: such codes are not worth their reading.
    Of rows of `vectors`, float (N, D), and of means of three, which lie far from everything, as people's
    interests do. `codes` are those of all rows.
    """
    random, count = np.random.default_rng(0), len(vectors)
    some = np.sort(random.choice(count, min(_QUERIES, count), replace=False))
    groups = np.stack(
        [vectors[np.sort(random.integers(0, count, 3))].astype(np.float32).mean(0) for _ in some]
    )
    needed = dict.fromkeys(_COUNTS, 0)
    for queries in (vectors[some].astype(np.float32), groups):
        told = codes.search(queries, min(_DEEPEST, count))[1]
        scores, nearest = _nearest(vectors, queries, min(max(_COUNTS), count))
        for counted in _COUNTS:
            last = scores[:, :counted][:, -1:]
            nearer = scores[:, :counted] > last + _EQUAL  # of equal ones, any will do
            ranks = [
                _ranks(mine, near[:counted][which])
                for mine, near, which in zip(told, nearest, nearer, strict=True)
            ]
            if nearer.any():
                deep = int(np.quantile(np.concatenate(ranks), _WANTED, method="higher")) + 1
                needed[counted] = max(needed[counted], deep if deep <= told.shape[1] else count)
    few, many = _COUNTS
    return Depth(max(_LEAST, needed[few]), max(_TIMES, needed[many] / many))


def _nearest(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and rows int64 (Q, count) of the nearest, best first."""
    heap = faiss.ResultHeap(len(queries), count, keep_max=True)
    for start in range(0, len(vectors), _PAGE):
        page = np.ascontiguousarray(vectors[start : start + _PAGE], np.float32)
        scores, rows = faiss.knn(queries, page, min(count, len(page)), faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, rows + start)
    heap.finalize()
    return heap.D, heap.I


def _ranks(told: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """At which place of `told`, rows int64 (K,), each wanted row stands; K for one that is not there."""
    order = np.argsort(told)
    at = np.minimum(np.searchsorted(told, wanted, sorter=order), len(told) - 1)
    return np.where(told[order[at]] == wanted, order[at], len(told))
