"""The order of items by score: the best first, ties by item hash."""

import numpy as np

from services.core.kernels import array, kernel


def best_first(scores: np.ndarray, item_hashes: np.ndarray) -> np.ndarray:
    """The indices of items, int64 (N,), by their scores, float (N,), without NaN, and hashes int64 (N,).

    Ties do not go by row: processes differ in the rows of items.
    """
    return order(-np.asarray(scores, np.float64), np.ascontiguousarray(item_hashes, np.int64))


@kernel(array(np.float64), array(np.int64))
def order(keys: np.ndarray, item_hashes: np.ndarray) -> np.ndarray:
    """The indices of keys, the lowest first, ties by item hash: int64 (N,)."""
    result, start = np.argsort(keys), 0
    for end in range(1, len(keys) + 1):
        if end == len(keys) or keys[result[end]] != keys[result[start]]:
            if end - start > 1:
                tied = result[start:end].copy()
                result[start:end] = tied[np.argsort(item_hashes[tied])]
            start = end
    return result
