"""A linear autoencoder of users' items as a relation of the item graph: EASE, with item vectors beside.

EASE (Steck, 2019) predicts each item of a user from the others by one matrix of weights with an empty
diagonal, in closed form. Item vectors count as further users of the items (CEASE: Jeunen et al., 2020), so
that items with few users borrow from those with similar texts.
"""

from dataclasses import dataclass

import numpy as np
from scipy import linalg, sparse

_MAX_EDGES = 100


@dataclass(frozen=True)
class LinearSettings:
    """The ridge penalty, and the weight of the vectors: their cosine adds `content` common users."""

    penalty: float
    content: float = 0.0


def user_incidence(users: np.ndarray, items: np.ndarray, count: int, limit: int = 500) -> sparse.csr_matrix:
    """Which user has which of `count` items: float32 (U, count) of ones, the latest `limit` items of a user.

    `users` and `items` are int64 (N,) in the order of time.
    """
    pairs, last = np.unique(np.stack([users[::-1], items[::-1]], 1), axis=0, return_index=True)
    order = np.lexsort((last, pairs[:, 0]))
    codes = np.unique(pairs[order, 0], return_inverse=True)[1]
    first = np.searchsorted(codes, codes)
    kept = np.arange(len(codes)) - first < limit
    ones = np.ones(int(kept.sum()), np.float32)
    shape = int(codes.max(initial=-1)) + 1, count
    return sparse.csr_matrix((ones, (codes[kept], pairs[order, 1][kept])), shape=shape)


def linear_weights(
    incidence: sparse.csr_matrix, vectors: np.ndarray | None, settings: LinearSettings, max_items: int
) -> sparse.csr_matrix:
    """Positive weights float32 (M, M), at most 100 out of an item, scaled to the mean of the cosine.

    `incidence` (U, M) says which user has which item; `vectors` float32 (M, D) are of unit length, zeros for
    an item without one. Only the `max_items` items with the most users have edges, because the time grows
    with the third power of their number.
    """
    degree = np.asarray(incidence.sum(0), np.float64).ravel()
    items = np.sort(np.argsort(-degree, kind="stable")[:max_items])
    items = items[degree[items] > 0]
    if not len(items):
        return sparse.csr_matrix((len(degree),) * 2, dtype=np.float32)
    columns = incidence[:, items]
    gram = np.asarray((columns.T @ columns).todense(), np.float32, order="F")
    cosine = _mean_cosine(gram)
    if vectors is not None and settings.content:
        gram += np.float32(settings.content) * (vectors[items] @ vectors[items].T)
    gram[np.diag_indices(len(items))] += np.float32(settings.penalty)
    weights = _autoencoder(gram)
    count = min(_MAX_EDGES, len(items) - 1)
    heaviest = (
        np.argpartition(-weights, count - 1, axis=1)[:, :count] if count else np.empty((len(items), 0), int)
    )
    values = np.take_along_axis(weights, heaviest, 1)
    rows, places = np.nonzero(values > 0)
    values = values[rows, places]
    if len(values):
        values *= np.float32(cosine / values.mean())
    parts = values, (items[rows], items[heaviest[rows, places]])
    return sparse.csr_matrix(parts, shape=(len(degree),) * 2, dtype=np.float32)


def _mean_cosine(gram: np.ndarray) -> float:
    """The mean cosine of the pairs of items that have common users, 0 without any."""
    degree = np.sqrt(np.diag(gram))
    total, pairs = 0.0, 0
    for row in range(len(gram)):
        common = gram[row] > 0
        common[row] = False
        total += float((gram[row, common] / degree[common]).sum() / degree[row])
        pairs += int(common.sum())
    return total / pairs if pairs else 0.0


def _autoencoder(gram: np.ndarray) -> np.ndarray:
    """The weights of EASE from a positive definite matrix, which is overwritten: float32 (M, M)."""
    factor, info = linalg.lapack.spotrf(gram, lower=1, overwrite_a=1)
    inverse, failed = linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
    if info or failed:
        raise ValueError("the matrix of common users is not positive definite; raise the penalty")
    inverse = np.tril(inverse)
    inverse += np.tril(inverse, -1).T
    weights: np.ndarray = -inverse / np.diag(inverse)
    weights[np.diag_indices(len(weights))] = 0
    return weights
