"""The order of items by score: the best first, ties by item hash."""

import numpy as np

from services.core.kernels import array, kernel


def best_first(scores: np.ndarray, item_hashes: np.ndarray) -> np.ndarray:
    """The indices of items, int64 (N,), by their scores, float (N,), without NaN, and hashes int64 (N,).

    Ties do not go by row: processes differ in the rows of items.
    """
    return _order(-np.asarray(scores, np.float64), np.ascontiguousarray(item_hashes, np.int64))


def best_allowed(
    rows: np.ndarray, scores: np.ndarray, allowed: np.ndarray, item_hashes: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `limit` of rows, int64 (K,), by their scores, float (K,), in the order of `best_first`.

    Rows that the mask `allowed`, bool (N,), lacks or forbids are left out, and rows without a score above 0.
    `item_hashes` int64 (N,) are those of all rows. Returns rows, and scores float64.
    """
    return _best(
        np.ascontiguousarray(rows, np.int64),
        np.ascontiguousarray(scores, np.float64),
        np.ascontiguousarray(allowed),
        item_hashes,
        limit,
    )


@kernel(array(np.float64), array(np.int64))
def _order(keys: np.ndarray, item_hashes: np.ndarray) -> np.ndarray:
    """The indices of keys, the lowest first, ties by item hash: int64 (N,)."""
    result, start = np.argsort(keys), 0
    for end in range(1, len(keys) + 1):
        if end == len(keys) or keys[result[end]] != keys[result[start]]:
            if end - start > 1:
                tied = result[start:end].copy()
                result[start:end] = tied[np.argsort(item_hashes[tied])]
            start = end
    return result


@kernel(array(np.int64), array(np.float64), array(np.bool_), array(np.int64), np.int64)
def _best(
    rows: np.ndarray, scores: np.ndarray, allowed: np.ndarray, hashes: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `limit` allowed rows with a score above 0, ties by item hash, and their scores."""
    usable, negative, count = np.empty(len(rows), np.int64), np.empty(len(rows)), 0
    for index in range(len(rows)):
        if scores[index] > 0 and rows[index] < len(allowed) and allowed[rows[index]]:
            usable[count], negative[count] = rows[index], -scores[index]
            count += 1
    if count > limit:
        threshold = np.partition(negative[:count], limit - 1)[limit - 1]
        every, count = count, 0
        for index in range(every):
            if negative[index] <= threshold:
                usable[count], negative[count] = usable[index], negative[index]
                count += 1
    ranked = _order(negative[:count], hashes[usable[:count]])[:limit]
    return usable[ranked], -negative[ranked]
