"""Reciprocal rank fusion (Cormack et al., 2009): several orders of items become one."""

from collections.abc import Iterable, Sequence

import numpy as np

from services.catalog.candidate_sources import EXPLORE, NAMES, QUOTA
from services.core.ordering import best_first

RANK_CONSTANT = 60
CROSS_MODAL_WEIGHT = 0.3
"""The weight of a text query's order in the image space; its order in the text space has weight 1."""
# Sums in float32 depend on the order of addition in their last bit, so it is fixed.
_ORDER = {name: index for index, name in enumerate(NAMES)}


def fuse(orders: Iterable[tuple[float, Sequence[int]]]) -> dict[int, float]:
    """Fused scores by item hash. Each order has a weight and holds hashes, best first."""
    scores: dict[int, float] = {}
    for weight, item_hashes in orders:
        for position, item in enumerate(item_hashes, 1):
            scores[item] = scores.get(item, 0.0) + weight / (RANK_CONSTANT + position)
    return scores


def fuse_sources(item_hashes: np.ndarray, names: Sequence[str], scores: np.ndarray) -> np.ndarray:
    """Fused scores, float32 (C,), of C item hashes, from the scores of S sources, (C, S), NaN for none."""
    total = np.zeros(len(item_hashes), np.float32)
    # Items of a quota, or to explore, come without an order.
    used = [(name, column) for column, name in enumerate(names) if name not in (QUOTA, EXPLORE)]
    for _, column in sorted(used, key=lambda pair: (_ORDER.get(pair[0], len(_ORDER)), pair[0])):
        of_source = np.flatnonzero(~np.isnan(scores[:, column]))
        order = of_source[best_first(scores[of_source, column], item_hashes[of_source])]
        total[order] += (1 / (RANK_CONSTANT + np.arange(1, len(order) + 1))).astype(np.float32)
    return total
