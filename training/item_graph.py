"""The item graph's fit: what is bought in one basket, and by one person from one basket to the next.

Item-item co-occurrence (Linden et al., 2003) whose normalisation has free exponents, as RP3beta
(Paudel et al., 2016) has one. Which ones a shop gets is `graph_tuning.py`'s affair.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from services.ranking.graph import ItemGraph, Relation

BASKET_LIMIT = 100
RELATIONS = ("baskets", "people")
_GAPS = 10


@dataclass(frozen=True)
class Weighting:
    """How counts become the weight of an edge from item i to item j.

    A group that holds n items counts n ** -`group`. Where order is known, what came g groups later
    counts `decay` ** (g - 1), and what came earlier `back` times that. The sum is divided by
    n_i ** `source` * n_j ** `target` + `shrink`, n being in how many groups an item occurs.
    The defaults make it the cosine.
    """

    source: float = 0.5
    target: float = 0.5
    shrink: float = 0.0
    group: float = 0.0
    decay: float = 1.0
    back: float = 1.0


@dataclass(frozen=True)
class Groups:
    """Baskets of N engagements in the order of their people and, within one's, of time.

    `held` float32 (G, M) ones, at most 100 items of a basket; `person` int64 (G,).
    """

    held: sparse.csr_matrix
    person: np.ndarray

    @classmethod
    def of(
        cls, users: np.ndarray, baskets: np.ndarray, times: np.ndarray, codes: np.ndarray, count: int
    ) -> "Groups":
        """Groups of engagements in columns of one length N; item codes int64 are below `count`."""
        if not len(codes):
            return cls(sparse.csr_matrix((0, count), dtype=np.float32), np.empty(0, np.int64))
        _, basket, inverse = np.unique(baskets, return_index=True, return_inverse=True)
        began = np.full(len(basket), np.iinfo(np.int64).max)
        np.minimum.at(began, inverse, times)
        order = np.lexsort((basket, began, users[basket]))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return cls(_incidence(place[inverse], codes, count, BASKET_LIMIT), users[basket][order])

    def counts(self, relation: str, weighting: Weighting) -> sparse.csr_matrix:
        """Weighted counts float32 (M, M) of a relation, "baskets" or "people", nothing on the diagonal."""
        size = np.maximum(np.diff(self.held.indptr), 1).astype(np.float32)
        scaled = sparse.diags(size**-weighting.group) @ self.held
        if relation == "baskets":
            found = self.held.T @ scaled
        else:
            found = sparse.csr_matrix((self.held.shape[1],) * 2, dtype=np.float32)
            for gap in range(1, min(_GAPS, len(self.person) - 1) + 1):
                earlier = np.flatnonzero(self.person[:-gap] == self.person[gap:])
                if len(earlier):
                    onward = self.held[earlier].T @ scaled[earlier + gap]
                    found = found + np.float32(weighting.decay ** (gap - 1)) * onward
            found = found + np.float32(weighting.back) * found.T
        found = found.tocoo()
        other = (found.row != found.col) & (found.data > 0)
        parts = found.data[other], (found.row[other], found.col[other])
        return sparse.csr_matrix(parts, shape=found.shape, dtype=np.float32)

    def weights(self, relation: str, weighting: Weighting) -> sparse.csr_matrix:
        """Edge weights float32 (M, M) of a relation, on the scale of the cosine: of the same mean."""
        found = self.counts(relation, weighting).tocoo()
        degree = np.asarray(self.held.sum(0), np.float64).ravel()
        out, into = degree[found.row], degree[found.col]
        weight = found.data / (out**weighting.source * into**weighting.target + weighting.shrink)
        if len(weight):
            weight = weight * np.mean(found.data / np.sqrt(out * into)) / weight.mean()
        found.data = weight.astype(np.float32)
        return found.tocsr()


def fit_item_graph(
    users: np.ndarray,
    baskets: np.ndarray,
    times: np.ndarray,
    numbers: np.ndarray,
    weightings: Mapping[str, Weighting] | None = None,
    neighbours: int = 300,
    nodes: np.ndarray | None = None,
) -> ItemGraph:
    """The graph of engagements in columns of one length N.

    `users` and `baskets` are int codes, `times` int64, `numbers` int64 item numbers. "baskets" relates what
    one basket holds, "people" what one person engaged with in different baskets, up to ten apart; a
    relation without a weighting has the cosine. Of each item the `neighbours` heaviest edges stay. Baskets of
    more than 100 different items count their first ones alone. `nodes`, int64, are items to have a
    place in the graph in any case.
    """
    items = np.unique(numbers if nodes is None else np.concatenate([nodes, numbers]))
    groups = Groups.of(users, baskets, times, np.searchsorted(items, numbers), len(items))
    how = {**dict.fromkeys(RELATIONS, Weighting()), **(weightings or {})}
    return ItemGraph(items, {name: _relation(groups.weights(name, how[name]), neighbours) for name in how})


def content_relation(
    vectors: np.ndarray,
    present: np.ndarray,
    numbers: np.ndarray,
    nodes: np.ndarray,
    seeds: np.ndarray,
    neighbours: int = 30,
    threshold: float = 0.5,
) -> Relation:
    """Of each item in `seeds`, its nearest items by cosine, over `nodes`, rising int64 (M,).

    `vectors` (N, D) of unit length and `present` bool (N,) are of the items `numbers`; every
    one is a node. Weights are cosines of at least `threshold`.
    """
    place = np.searchsorted(nodes, numbers)
    pool = np.flatnonzero(present)
    values = vectors[pool].astype(np.float32)
    mine = np.flatnonzero(np.isin(numbers[pool], seeds))
    most = min(neighbours, len(pool) - 1)
    near = np.zeros((len(mine), most), np.int64)
    cosine = np.zeros((len(mine), most), np.float32)
    for begin in range(0, len(mine) if most > 0 else 0, 256):
        rows = slice(begin, begin + 256)
        scores = values[mine[rows]] @ values.T
        scores[np.arange(len(scores)), mine[rows]] = -np.inf
        near[rows] = np.argpartition(-scores, most - 1, axis=1)[:, :most]
        cosine[rows] = np.take_along_axis(scores, near[rows], 1)
    kept = cosine >= threshold
    counts = np.zeros(len(nodes), np.int64)
    origin = place[pool[mine]]
    counts[origin] = kept.sum(1)
    order = np.argsort(origin, kind="stable")
    flat = kept[order].ravel()
    return Relation(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        place[pool[near[order]]].ravel()[flat].astype(np.int32),
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


def _relation(weights: sparse.csr_matrix, most: int) -> Relation:
    """The heaviest `most` edges out of each item, ties by item."""
    start, kept = [0], list[np.ndarray]()
    for item in range(weights.shape[0]):
        span = np.arange(weights.indptr[item], weights.indptr[item + 1])
        if len(span) > most:
            span = span[np.lexsort((weights.indices[span], -weights.data[span]))[:most]]
        kept.append(span)
        start.append(start[-1] + len(span))
    edges = np.concatenate(kept) if kept else np.empty(0, np.int64)
    return Relation(np.array(start, np.int64), weights.indices[edges].astype(np.int32), weights.data[edges])
