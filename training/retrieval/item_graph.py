"""Fits the item graph: co-occurrence within a basket, and from one basket of a user to the next.

Item-item co-occurrence (Linden et al., 2003), normalized with free exponents as in RP3beta
(Paudel et al., 2016). `graph_tuning.py` selects the exponents for a shop.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from services.ranking.models.co_occurrence import ItemGraph, Relation

BASKET_LIMIT = 100
RELATIONS = ("baskets", "people")
_GAPS = 10


@dataclass(frozen=True)
class Weighting:
    """How counts become the weight of the edge from item i to item j.

    A basket of n items counts n ** -`group`. With known order, a basket that is g baskets later counts
    `decay` ** (g - 1), and an earlier one `back` times that. The sum is divided by
    n_i ** `source` * n_j ** `target` + `shrink`, where n is the number of baskets with the item. The defaults
    give the cosine.
    """

    source: float = 0.5
    target: float = 0.5
    shrink: float = 0.0
    group: float = 0.0
    decay: float = 1.0
    back: float = 1.0


@dataclass(frozen=True)
class Baskets:
    """The baskets of N engagements, sorted by user, then by time.

    `incidence` float32 (G, M) holds ones, at most 100 items a basket; `user` int64 (G,).
    """

    incidence: sparse.csr_matrix
    user: np.ndarray

    @classmethod
    def of(
        cls, users: np.ndarray, baskets: np.ndarray, times: np.ndarray, codes: np.ndarray, count: int
    ) -> "Baskets":
        """The baskets of engagements in columns of one length N; the item codes, int64, are below `count`."""
        if not len(codes):
            return cls(sparse.csr_matrix((0, count), dtype=np.float32), np.empty(0, np.int64))
        _, basket, inverse = np.unique(baskets, return_index=True, return_inverse=True)
        start = np.full(len(basket), np.iinfo(np.int64).max)
        np.minimum.at(start, inverse, times)
        order = np.lexsort((basket, start, users[basket]))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return cls(_incidence(place[inverse], codes, count, BASKET_LIMIT), users[basket][order])

    def counts(self, relation: str, weighting: Weighting) -> sparse.csr_matrix:
        """Weighted counts float32 (M, M) of a relation, "baskets" or "people", with an empty diagonal."""
        size = np.maximum(np.diff(self.incidence.indptr), 1).astype(np.float32)
        scaled = sparse.diags(size**-weighting.group) @ self.incidence
        if relation == "baskets":
            matrix = self.incidence.T @ scaled
        else:
            matrix = sparse.csr_matrix((self.incidence.shape[1],) * 2, dtype=np.float32)
            for gap in range(1, min(_GAPS, len(self.user) - 1) + 1):
                earlier = np.flatnonzero(self.user[:-gap] == self.user[gap:])
                if len(earlier):
                    following = self.incidence[earlier].T @ scaled[earlier + gap]
                    matrix = matrix + np.float32(weighting.decay ** (gap - 1)) * following
            matrix = matrix + np.float32(weighting.back) * matrix.T
        matrix = matrix.tocoo()
        off_diagonal = (matrix.row != matrix.col) & (matrix.data > 0)
        parts = matrix.data[off_diagonal], (matrix.row[off_diagonal], matrix.col[off_diagonal])
        return sparse.csr_matrix(parts, shape=matrix.shape, dtype=np.float32)

    def weights(self, relation: str, weighting: Weighting) -> sparse.csr_matrix:
        """Edge weights float32 (M, M) of a relation, scaled to the mean of the cosine."""
        edges = self.counts(relation, weighting).tocoo()
        degree = np.asarray(self.incidence.sum(0), np.float64).ravel()
        out, into = degree[edges.row], degree[edges.col]
        weight = edges.data / (out**weighting.source * into**weighting.target + weighting.shrink)
        if len(weight):
            weight = weight * np.mean(edges.data / np.sqrt(out * into)) / weight.mean()
        edges.data = weight.astype(np.float32)
        return edges.tocsr()


def fit_item_graph(
    users: np.ndarray,
    baskets: np.ndarray,
    times: np.ndarray,
    hashes: np.ndarray,
    weightings: Mapping[str, Weighting] | None = None,
    max_edges: int = 300,
    nodes: np.ndarray | None = None,
) -> ItemGraph:
    """The graph of engagements, given in columns of one length N.

    `users` and `baskets` are int codes, `times` int64, `hashes` int64 item hashes. The relation "baskets"
    connects items of one basket, "people" items of different baskets of one user, up to ten baskets apart. A
    relation without a weighting uses the cosine. The `max_edges` heaviest edges of each item are kept. Of a
    basket with more than 100 different items the first 100 count. `nodes`, int64, are additional items of the
    graph.
    """
    items = np.unique(hashes if nodes is None else np.concatenate([nodes, hashes]))
    basket_rows = Baskets.of(users, baskets, times, np.searchsorted(items, hashes), len(items))
    weighting_of = {**dict.fromkeys(RELATIONS, Weighting()), **(weightings or {})}
    return ItemGraph(
        items,
        {name: _relation(basket_rows.weights(name, weighting_of[name]), max_edges) for name in weighting_of},
    )


def content_relation(
    vectors: np.ndarray,
    present: np.ndarray,
    hashes: np.ndarray,
    nodes: np.ndarray,
    seeds: np.ndarray,
    max_neighbors: int = 30,
    threshold: float = 0.5,
) -> Relation:
    """The nearest items by cosine of each item in `seeds`, over `nodes`, rising int64 (M,).

    `vectors` (N, D) of unit length and `present` bool (N,) belong to the items `hashes`, all of which are
    nodes. Weights are cosines of at least `threshold`.
    """
    place = np.searchsorted(nodes, hashes)
    pool = np.flatnonzero(present)
    values = vectors[pool].astype(np.float32)
    seed_rows = np.flatnonzero(np.isin(hashes[pool], seeds))
    count = min(max_neighbors, len(pool) - 1)
    neighbors = np.zeros((len(seed_rows), count), np.int64)
    cosine = np.zeros((len(seed_rows), count), np.float32)
    for first in range(0, len(seed_rows) if count > 0 else 0, 256):
        rows = slice(first, first + 256)
        scores = values[seed_rows[rows]] @ values.T
        scores[np.arange(len(scores)), seed_rows[rows]] = -np.inf
        neighbors[rows] = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        cosine[rows] = np.take_along_axis(scores, neighbors[rows], 1)
    above = cosine >= threshold
    counts = np.zeros(len(nodes), np.int64)
    origin = place[pool[seed_rows]]
    counts[origin] = above.sum(1)
    order = np.argsort(origin, kind="stable")
    flat = above[order].ravel()
    return Relation(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        place[pool[neighbors[order]]].ravel()[flat].astype(np.int32),
        cosine[order].ravel()[flat].astype(np.float32),
    )


def _incidence(groups: np.ndarray, items: np.ndarray, count: int, limit: int) -> sparse.csr_matrix:
    """Which group holds which items: float32 (G, M) of ones, the first `limit` items of a group."""
    pairs, first = np.unique(np.stack([groups, items], 1), axis=0, return_index=True)
    order = np.lexsort((first, pairs[:, 0]))
    group = pairs[order, 0]
    start = np.searchsorted(group, group)
    pairs = pairs[order][np.arange(len(group)) - start < limit]
    ones = np.ones(len(pairs), np.float32)
    return sparse.csr_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(groups.max() + 1, count))


def _relation(weights: sparse.csr_matrix, limit: int) -> Relation:
    """The heaviest `limit` edges of each item, ties by item."""
    start, spans = [0], list[np.ndarray]()
    for item in range(weights.shape[0]):
        span = np.arange(weights.indptr[item], weights.indptr[item + 1])
        if len(span) > limit:
            span = span[np.lexsort((weights.indices[span], -weights.data[span]))[:limit]]
        spans.append(span)
        start.append(start[-1] + len(span))
    edges = np.concatenate(spans) if spans else np.empty(0, np.int64)
    return Relation(np.array(start, np.int64), weights.indices[edges].astype(np.int32), weights.data[edges])
