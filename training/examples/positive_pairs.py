"""Pairs of items that users engage with together: the positive pairs of the encoders' contrastive loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PositivePairs:
    """Engagements grouped into baskets, from which pairs are sampled.

    `item` int64 (N,) rows of the shop's items, sorted by basket. The basket of position p is
    [`start[p]`, `end[p]`), int64 (N,); each basket has at least two different items. `share` float32 (M,) is
    the sampling probability of each of the M items; it sums to 1.
    """

    item: np.ndarray
    start: np.ndarray
    end: np.ndarray
    share: np.ndarray

    def __len__(self) -> int:
        return len(self.item)

    def draw(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Sample pairs: two columns of item rows, int64 (count,), an engagement and another of its basket."""
        position = generator.integers(0, len(self.item), count)
        size = self.end[position] - self.start[position]
        step = 1 + (generator.random(count) * (size - 1)).astype(np.int64)
        partner = self.start[position] + (position - self.start[position] + step) % size
        return self.item[position], self.item[partner]

    def restrict_to(self, present: np.ndarray) -> "PositivePairs":
        """The pairs of the items in `present`, bool (M,)."""
        keep = present[self.item]
        return make_pairs(np.where(keep, self.item, -1), self.start, len(present))

    def held_out(self, limit: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """At most `limit` pairs, one per basket, the same for the same seed."""
        generator = np.random.default_rng(seed)
        first = np.unique(self.start, return_index=True)[1]
        selected = generator.permutation(first)[:limit]
        size = self.end[selected] - self.start[selected]
        step = (generator.random(len(selected)) * (size - 1)).astype(np.int64) + 1
        return self.item[selected], self.item[selected + step]


def family_recall(
    vectors: np.ndarray,
    present: np.ndarray,
    families: Sequence[str],
    files: Sequence[str],
    k: int,
    limit: int,
    seed: int = 0,
) -> np.ndarray:
    """Whether another item of its family is among the `k` nearest, bool (Q,), for at most `limit` items.

    `vectors` (M, D) have unit length, where `present`, bool (M,); "" is no family. Asked for are items whose
    family has at least two items that are present. Items of one file, `files` (M,), are not found by each
    other: that would show nothing.
    """
    file_code = np.unique(np.array(files, object).astype(str), return_inverse=True)[1]
    names, code = np.unique(np.array(families, object).astype(str), return_inverse=True)
    code = np.where(present & (names[code] != ""), code, -1)
    size = np.bincount(code[code >= 0], minlength=len(names))
    rows, queries = np.flatnonzero(present), np.flatnonzero((code >= 0) & (size[code] > 1))
    queries = np.random.default_rng(seed).permutation(queries)[:limit]
    candidates = vectors[rows].astype(np.float32)
    hits = np.zeros(len(queries), bool)
    for start in range(0, len(queries), 256):
        block = queries[start : start + 256]
        similarity = vectors[block].astype(np.float32) @ candidates.T
        similarity[file_code[block][:, None] == file_code[rows][None, :]] = -np.inf
        nearest = rows[np.argpartition(-similarity, min(k, len(rows)) - 1, axis=1)[:, :k]]
        hits[start : start + 256] = (
            (code[nearest] == code[block][:, None]) & (file_code[nearest] != file_code[block][:, None])
        ).any(1)
    return hits


def make_pairs(items: np.ndarray, baskets: np.ndarray, count: int) -> PositivePairs:
    """Pairs of engagements: `items` int64 (N,) rows below `count` or -1, `baskets` int64 (N,) codes.

    An item counts once per basket; baskets of one item are dropped.
    """
    in_catalog = items >= 0
    rows = np.unique(np.stack([baskets[in_catalog], items[in_catalog]], 1), axis=0)
    _, start, size = np.unique(rows[:, 0], return_index=True, return_counts=True)
    start, size = np.repeat(start, size), np.repeat(size, size)
    keep = size > 1
    shift = np.cumsum(keep) - 1  # positions after single items are removed
    item, start, size = rows[keep, 1], shift[start[keep]], size[keep]
    share = np.bincount(item, minlength=count).astype(np.float32)
    return PositivePairs(item, start, start + size, share / max(float(share.sum()), 1.0))


def pair_recall(vectors: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], k: int = 20) -> np.ndarray:
    """Whether an item's partner is among its `k` nearest other items: bool (P,).

    `vectors` (M, D) have unit length; a tie counts as a hit.
    """
    left, right = pairs
    vectors = vectors.astype(np.float32, copy=False)
    hits = np.empty(len(left), bool)
    for start in range(0, len(left), 512):
        rows = slice(start, start + 512)
        similarity = vectors[left[rows]] @ vectors.T
        partner_similarity = similarity[np.arange(len(similarity)), right[rows]]
        similarity[np.arange(len(similarity)), left[rows]] = -np.inf
        hits[rows] = (similarity > partner_similarity[:, None]).sum(1) < k
    return hits
