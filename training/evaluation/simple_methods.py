"""Simple methods that every shop can have without training: what a bundle has to beat.

Popularity, the cosine of items in users' histories (Linden et al., 2003), and EASE (Steck, 2019): a linear
model of each item from the others, in closed form. All rank every item of the shop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.linalg import lapack

from training.data.config import ShopConfig
from training.data.events import Events

MAX_EASE_ITEMS = 10_000
"""With more items EASE takes too much memory."""
_EASE_PENALTIES = (10.0, 100.0, 1000.0)
_TUNING_USERS = 500
_K = 20


@dataclass(frozen=True)
class SimpleMethods:
    """The engagements of U users with M items, and what follows from them.

    `users` float32 (U, M) sparse holds ones; `popularity` float64 (M,) the weights of all engagements, and
    `popularity_lately` those of the last `days`, with all of them to break ties.
    """

    users: sparse.csr_matrix
    popularity: np.ndarray
    popularity_lately: np.ndarray
    days: int

    @classmethod
    def of(
        cls, events: Events, settings: ShopConfig, items: Mapping[str, int], days: int = 7
    ) -> "SimpleMethods":
        """Read the engagements; `items` has the column of each item id."""
        weights = np.array(list(settings.event_types.values()))[events.kind]
        column = np.array([items.get(item, -1) for item in events.item_ids], np.int64)
        column = column[events.item] if len(events) else np.empty(0, np.int64)
        rows = np.flatnonzero((weights > 0) & (column >= 0))
        shape = len(events.user_ids), len(items)
        ones = np.ones(len(rows), np.float32)
        users = sparse.csr_matrix((ones, (events.user[rows], column[rows])), shape)
        users.data[:] = 1
        since = (int(events.time[-1]) if len(events) else 0) - days * 86_400_000_000
        late = rows[events.time[rows] >= since]
        ever = np.bincount(column[rows], weights[rows], len(items))
        lately = np.bincount(column[late], weights[late], len(items))
        return cls(users, ever, lately + ever / max(float(ever.sum()), 1.0), days)

    def scores(self, profiles: sparse.csr_matrix) -> dict[str, np.ndarray]:
        """Scores float32 (Q, M) by method, for profiles float32 (Q, M) of ones at the items of each query."""
        result = {
            "popular": np.broadcast_to(self.popularity, profiles.shape),
            f"popular, {self.days} days": np.broadcast_to(self.popularity_lately, profiles.shape),
            "cosine": np.asarray((profiles @ self._cosine()).todense()),
        }
        known = np.flatnonzero(np.diff(self.users.tocsc().indptr))
        if 0 < len(known) <= MAX_EASE_ITEMS:
            ease = np.zeros(profiles.shape, np.float32)
            ease[:, known] = profiles[:, known] @ self._ease(self.users[:, known])
            result["EASE"] = ease
        return result

    def _cosine(self) -> sparse.csr_matrix:
        together = (self.users.T @ self.users).tocsr()
        scale = sparse.diags(1 / np.sqrt(np.maximum(together.diagonal(), 1)))
        together.setdiag(0)
        return (scale @ together @ scale).tocsr().astype(np.float32)

    def _ease(self, users: sparse.csr_matrix) -> np.ndarray:
        """The weights float32 (K, K), with the penalty that predicts the second half of some users best."""
        several = np.flatnonzero(np.diff(users.indptr) > 1)
        held_out = np.random.default_rng(0).permutation(several)[: min(_TUNING_USERS, len(several) // 5)]
        if not len(held_out):
            return _ease_weights(users, _EASE_PENALTIES[1])
        rest = users[np.setdiff1d(np.arange(users.shape[0]), held_out)]
        first, second = _halves(users[held_out])
        recall = []
        for penalty in _EASE_PENALTIES:
            scores = first @ _ease_weights(rest, penalty)
            scores[first.nonzero()] = -np.inf
            best = np.argsort(-scores, axis=1)[:, :_K]
            hits = np.take_along_axis(second.toarray(), best, 1).sum(1)
            recall.append(float((hits / second.sum(1).A1).mean()))
        return _ease_weights(users, _EASE_PENALTIES[int(np.argmax(recall))])


def pages(
    scores: np.ndarray, allowed: np.ndarray, excluded: Sequence[np.ndarray], k: int = _K
) -> list[np.ndarray]:
    """The best `k` columns of each query by scores (Q, M), of those `allowed`, bool (M,), not `excluded`."""
    result = []
    for row, left_out in zip(scores, excluded, strict=True):
        score = np.where(allowed, row, -np.inf)
        score[left_out] = -np.inf
        best = np.argsort(-score, kind="stable")[:k]
        result.append(best[np.isfinite(score[best])])
    return result


def _ease_weights(users: sparse.csr_matrix, penalty: float) -> np.ndarray:
    gram = np.asarray((users.T @ users).todense(), np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    factor, _ = lapack.dpotrf(gram, overwrite_a=True, lower=True)
    inverse, _ = lapack.dpotri(factor, overwrite_c=True, lower=True)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return np.asarray(weights, np.float32)


def _halves(users: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Two random halves of the items of each user."""
    generator, parts = np.random.default_rng(0), [users.tolil(), users.tolil()]
    for row in range(users.shape[0]):
        items = generator.permutation(users.indices[users.indptr[row] : users.indptr[row + 1]])
        for part, dropped in zip(parts, (items[len(items) // 2 :], items[: len(items) // 2]), strict=True):
            part[row, dropped] = 0
    return parts[0].tocsr(), parts[1].tocsr()
