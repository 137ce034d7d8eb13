"""The unit of a machine: the CPU time of a fixed loop of what a recommender does, without any of our code.

CPU times of services divided by it are comparable between machines and between hours: it gets slower with a
processor whose caches or cores are shared.
"""

import time

import faiss
import numpy as np
from threadpoolctl import threadpool_limits

# Of the kind that a page is: mostly small arrays and Python, little that streams through memory.
_ROWS, _DIMENSION, _QUERIES = 4_000, 128, 2
_CANDIDATES, _COLUMNS = 300, 96
_LISTS = 5


class ReferenceLoop:
    """A scan by FAISS, small arrays, a matrix product, sorts and loops over a dictionary, on one thread."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._vectors = random.standard_normal((_ROWS, _DIMENSION), np.float32)
        self._index = faiss.IndexFlatIP(_DIMENSION)
        self._index.add(self._vectors)
        self._queries = self._vectors[:_QUERIES]
        self._weights = random.standard_normal((_COLUMNS, _COLUMNS), np.float32)
        self._matrix = random.standard_normal((_CANDIDATES, _COLUMNS), np.float32)

    def run(self) -> float:
        """One round; the result depends on all of it."""
        faiss.omp_set_num_threads(1)
        scores, rows = self._index.search(self._queries, 100)
        candidates = np.unique(np.concatenate([rows.ravel(), np.arange(0, _ROWS, _ROWS // _CANDIDATES)]))
        columns = [self._vectors[candidates] @ query for query in self._queries]
        for column in self._matrix.T:  # as features are made: one small array after the other
            scaled = (np.log1p(np.abs(column)) - column.mean()) / column.std()
            columns.append(np.resize(np.where(scaled > 0, scaled, 0), len(candidates)))
        matrix = np.stack(columns[-_COLUMNS:], axis=1)
        hidden = np.maximum(matrix @ self._weights, 0) @ self._weights
        fused: dict[int, float] = {}
        for _ in range(_LISTS):
            for rank, row in enumerate(np.argsort(-hidden[:, 0]).tolist()):
                fused[row] = fused.get(row, 0.0) + 1 / (60 + rank)
        return float(scores[0, 0]) + max(fused.values())

    def milliseconds(self, seconds: float = 0.3) -> float:
        """The CPU time of a round, over so many seconds of CPU time."""
        with threadpool_limits(1):
            self.run()
            rounds, start = 0, time.process_time()
            while (spent := time.process_time() - start) < seconds:
                self.run()
                rounds += 1
        return 1e3 * spent / rounds
