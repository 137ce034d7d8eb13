"""Pairs of items that people engaged with together: what the encoders learn likeness from."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """Engagements grouped into baskets, ready to be drawn from as pairs.

    `item` int64 (N,) rows of the shop's items, sorted by basket; basket of position p spans
    [`start[p]`, `end[p]`), int64 (N,); every basket holds two different items at least.
    `share` float32 (M,): how often each item is drawn, over all M items, adding up to 1.
    """

    item: np.ndarray
    start: np.ndarray
    end: np.ndarray
    share: np.ndarray

    def __len__(self) -> int:
        return len(self.item)

    def draw(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Two columns of item rows, int64 (count,): an engagement, and another of its basket."""
        at = generator.integers(0, len(self.item), count)
        size = self.end[at] - self.start[at]
        step = 1 + (generator.random(count) * (size - 1)).astype(np.int64)
        other = self.start[at] + (at - self.start[at] + step) % size
        return self.item[at], self.item[other]

    def among(self, present: np.ndarray) -> "Pairs":
        """The pairs of items that are `present`, bool (M,)."""
        keep = present[self.item]
        return make_pairs(np.where(keep, self.item, -1), self.start, len(present))

    def held_out(self, limit: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """At most `limit` pairs, one of each basket, the same for the same seed."""
        generator = np.random.default_rng(seed)
        first = np.unique(self.start, return_index=True)[1]
        chosen = generator.permutation(first)[:limit]
        size = self.end[chosen] - self.start[chosen]
        step = (generator.random(len(chosen)) * (size - 1)).astype(np.int64) + 1
        return self.item[chosen], self.item[chosen + step]


def make_pairs(items: np.ndarray, baskets: np.ndarray, count: int) -> Pairs:
    """Pairs of engagements: `items` int64 (N,) rows below `count` or -1, `baskets` int64 (N,) codes.

    An item counts once per basket; baskets of one item are left out.
    """
    known = items >= 0
    rows = np.unique(np.stack([baskets[known], items[known]], 1), axis=0)
    _, start, size = np.unique(rows[:, 0], return_index=True, return_counts=True)
    start, size = np.repeat(start, size), np.repeat(size, size)
    keep = size > 1
    shift = np.cumsum(keep) - 1  # positions once the single ones are gone
    item, start, size = rows[keep, 1], shift[start[keep]], size[keep]
    share = np.bincount(item, minlength=count).astype(np.float32)
    return Pairs(item, start, start + size, share / max(float(share.sum()), 1.0))


def pair_recall(vectors: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], k: int = 20) -> np.ndarray:
    """Whether an item's partner is among its `k` nearest others: bool (P,).

    `vectors` (M, D) of unit length; ties count as found.
    """
    left, right = pairs
    vectors = vectors.astype(np.float32, copy=False)
    found = np.empty(len(left), bool)
    for begin in range(0, len(left), 512):
        rows = slice(begin, begin + 512)
        near = vectors[left[rows]] @ vectors.T
        own = near[np.arange(len(near)), right[rows]]
        near[np.arange(len(near)), left[rows]] = -np.inf
        found[rows] = (near > own[:, None]).sum(1) < k
    return found
