"""The item graph's fit: what is bought in one basket, and by one person over time.

Item-item co-occurrence (Linden et al., 2003) in two relations; the services normalise it.
"""

import numpy as np
from scipy import sparse

from services.ranking.graph import ItemGraph, Relation

BASKET_LIMIT = 100
_PERSON_LIMIT = 300


def fit_item_graph(
    users: np.ndarray,
    baskets: np.ndarray,
    numbers: np.ndarray,
    neighbours: int = 300,
    nodes: np.ndarray | None = None,
) -> ItemGraph:
    """The graph of engagements in columns of one length N.

    `users` and `baskets` are int codes, `numbers` int64 item numbers. "baskets" counts the
    baskets that hold two items, "people" the people who engaged with both in different
    baskets. Of each item the `neighbours` of highest cosine stay. Baskets of more than 100
    different items, and people of more than 300, count their first ones alone. `nodes`, int64,
    are items to have a place in the graph in any case.
    """
    items = np.unique(numbers if nodes is None else np.concatenate([nodes, numbers]))
    codes = np.searchsorted(items, numbers)
    by_basket = _incidence(baskets, codes, len(items), BASKET_LIMIT)
    by_person = _incidence(users, codes, len(items), _PERSON_LIMIT)
    together = (by_basket.T @ by_basket).tocsr()
    apart = (by_person.T @ by_person).tocsr()
    return ItemGraph(
        items,
        {
            "baskets": _relation(together, neighbours),
            "people": _relation(apart, neighbours, without=together),
        },
    )


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
    one is a node. Counts are cosines of at least `threshold`, degrees 1.
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
        np.ones(len(nodes), np.float32),
    )


def _incidence(groups: np.ndarray, items: np.ndarray, count: int, limit: int) -> sparse.csr_matrix:
    """Which group holds which items: float32 (G, M) of ones, the first `limit` items of a group."""
    pairs, first = np.unique(np.stack([groups, items], 1), axis=0, return_index=True)
    order = np.lexsort((first, pairs[:, 0]))
    group = pairs[order, 0]
    start = np.searchsorted(group, group)
    pairs = pairs[order][np.arange(len(group)) - start < limit]
    _, rows = np.unique(pairs[:, 0], return_inverse=True)
    ones = np.ones(len(pairs), np.float32)
    return sparse.csr_matrix((ones, (rows, pairs[:, 1])), shape=(rows.max(initial=-1) + 1, count))


def _relation(counts: sparse.csr_matrix, most: int, without: sparse.csr_matrix | None = None) -> Relation:
    degree = counts.diagonal().astype(np.float32)
    if without is not None:
        counts = counts - without
    counts = counts - sparse.diags(counts.diagonal())
    counts = counts.tocsr()
    counts.data[counts.data < 0] = 0
    counts.eliminate_zeros()
    start, kept = [0], list[np.ndarray]()
    for item in range(counts.shape[0]):
        span = np.arange(counts.indptr[item], counts.indptr[item + 1])
        if len(span) > most:
            near = counts.indices[span]
            cosine = counts.data[span] / np.sqrt(degree[near])
            span = span[np.lexsort((near, -cosine))[:most]]
        kept.append(span)
        start.append(start[-1] + len(span))
    edges = np.concatenate(kept) if kept else np.empty(0, np.int64)
    return Relation(
        np.array(start, np.int64),
        counts.indices[edges].astype(np.int32),
        counts.data[edges].astype(np.float32),
        degree,
    )
