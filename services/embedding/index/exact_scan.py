"""The exact nearest rows: the oracle that approximate searches are measured against."""

from collections.abc import Callable

import faiss
import numpy as np

_PAGE = 1 << 16
Read = Callable[[slice], np.ndarray]
"""Reads the vectors, float (M, D), of adjacent rows."""


def nearest(read: Read, rows: int, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and row numbers int64 (Q, count) of the rows nearest to queries, float32 (Q, D).

    Best first, by inner product; ties in any order. `rows` is the number of rows, at least `count`. They are
    read page by page, so they may be in a file that is larger than memory.
    """
    heap = faiss.ResultHeap(len(queries), count, keep_max=True)
    for start in range(0, rows, _PAGE):
        page = np.ascontiguousarray(read(slice(start, min(start + _PAGE, rows))), np.float32)
        scores, hits = faiss.knn(queries, page, min(count, len(page)), faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, hits + start)
    heap.finalize()
    return heap.D, heap.I
