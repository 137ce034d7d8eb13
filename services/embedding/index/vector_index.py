"""The interface of a vector index: cosine search in one space while items are added and removed.

`segmented_index.py` implements it in process, `milvus.py` by a Milvus server. Items are identified by their
hashes.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from services.core.ordering import best_first
from services.embedding.index.id_map import IdMap

# One look-up takes as long as sorting this many items; up to the first number, look-ups are always used.
_MAX_LOOK_UPS, _SORTED_PER_LOOK_UP = 10_000, 3
_SORT_FACTOR = 3  # up to that many times the limit is sorted without a partition
TIES = 64
"""An engine cuts off equal scores by position, which differs between processes. So it is asked for that many
more hits, and the cut is by item hash."""


@dataclass(frozen=True)
class SearchHits:
    """`hashes` int64 (K,) and `scores` float32 (K,), best first, ties by item hash."""

    hashes: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class TablePositions:
    """The table positions of an index's rows: `positions` int64 (N,) below `end`, -1 for no position.

    `missing` are the rows without a position, int64, when the table had `table_length` rows.
    """

    positions: np.ndarray
    end: int
    missing: np.ndarray
    table_length: int


class PositionCache(WeakKeyDictionary[IdMap, TablePositions]):
    """Caches the positions of index rows in one table. One thread looks up; others wait for the `lock`."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@dataclass(frozen=True)
class Selection:
    """The items that a search may return: those whose `mask`, bool (M,), is set in the first rows of a table.

    `hashes` int64 (M,) are the items of those rows; `rows_of` gives the rows of items, -1 for unknown ones.
    Selections over one table share a `cache`.
    """

    hashes: np.ndarray
    mask: np.ndarray
    rows_of: Callable[[np.ndarray], np.ndarray]
    cache: PositionCache

    def of(self, rows: IdMap, count: int | None = None) -> np.ndarray:
        """Which rows may be returned, bool (N,); only the first `count` if others are being written."""
        hashes = rows.hashes[:count]
        with self.cache.lock:
            cached = self.cache.get(rows)
            if cached is None or len(cached.positions) < len(hashes):
                cached = self.cache[rows] = self._look_up(hashes, cached)
            elif len(cached.missing) and cached.table_length < len(self.hashes):
                cached = self.cache[rows] = self._look_up(rows.hashes[: len(cached.positions)], cached)
        positions = cached.positions[: len(hashes)]
        if cached.end > len(self.mask):
            positions = np.minimum(positions, len(self.mask))
        allowed: np.ndarray = self._mask_with_default[positions]
        return allowed

    def permits(self, hashes: np.ndarray) -> np.ndarray:
        """Which of a few items may be returned, bool."""
        return self.of(IdMap(hashes))

    @cached_property
    def _mask_with_default(self) -> np.ndarray:
        """The mask with a last entry of False, which unknown items index."""
        return np.append(self.mask, False)

    def _look_up(self, hashes: np.ndarray, before: TablePositions | None) -> TablePositions:
        positions = np.full(len(hashes), -1, np.int64)
        if before is not None:
            positions[: len(before.positions)] = before.positions
        unknown = np.flatnonzero(positions < 0)
        many = len(unknown) > max(_MAX_LOOK_UPS, len(self.hashes) // _SORTED_PER_LOOK_UP)
        positions[unknown] = (IdMap(self.hashes).rows if many else self.rows_of)(hashes[unknown])
        if len(self.hashes):  # the last row may be visible before its look-up entry
            positions[hashes == self.hashes[-1]] = len(self.hashes) - 1
        missing = np.flatnonzero(positions < 0)
        return TablePositions(positions, int(positions.max(initial=-1)) + 1, missing, len(self.hashes))


@dataclass(frozen=True, eq=False)
class StoredRows(IdMap):
    """Items that an index has stored when it is opened.

    `sequences` int64 (N,): each vector is as of this change or a later one.
    """

    sequences: np.ndarray


class VectorIndex(Protocol):
    """The vectors of one space, `dimension` floats each, of unit length.

    It is derived from the item store: calls of `open` and `reconcile` come first and synchronize it. Any
    thread may search; one thread at a time may change it, and one thread at a time may maintain it. Item
    hashes have 63 bits.

    Raises:
        Unavailable: the engine does not answer. A failed change may be repeated.
    """

    dimension: int

    @property
    def recall(self) -> float | None:
        """The measured share of the nearest items that a search finds; None if it was not measured."""

    def open(self) -> StoredRows:
        """Open the index; returns the rows stored by an earlier process."""

    def reconcile(self, deleted: np.ndarray, hashes: np.ndarray, vectors: np.ndarray, sequence: int) -> None:
        """Remove the stored items `deleted`, int64, then add `vectors`, float (N, D), of the items `hashes`.

        A changed item is in both. After that the index equals the store as of the change `sequence`.
        """

    def change(self, upserts: Mapping[int, np.ndarray], deletions: Sequence[int], sequence: int) -> None:
        """Add or replace the vectors of items, and remove items; unknown items are ignored."""

    def vectors(self, hashes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ascending positions (M,) in `hashes` of items in the index, and their vectors float32 (M, D)."""

    def search(self, queries: np.ndarray, limit: int, selection: Selection | None = None) -> list[SearchHits]:
        """The `limit` nearest items of each query, float32 (Q, D), within `selection`."""

    def maintain(self, sequence: int) -> None:
        """Run periodic maintenance, which may take minutes. The index has all changes up to `sequence`."""

    def close(self) -> None:
        """Release resources and stop background work."""

    def __len__(self) -> int: ...


def top_hits(results: Sequence[tuple[np.ndarray, np.ndarray]], limit: int) -> SearchHits:
    """The `limit` best of several lists of hashes and scores."""
    if len(results) == 1:
        [(hashes, scores)] = results
    else:
        hashes = np.concatenate([np.empty(0, np.int64), *(part for part, _ in results)])
        scores = np.concatenate([np.empty(0, np.float32), *(part for _, part in results)])
    # In a matrix product the scores of equal vectors may differ in the last bit, depending on the position.
    rounded = np.round(scores, 6)
    if len(scores) > _SORT_FACTOR * limit > 0:
        candidates = np.flatnonzero(rounded >= np.partition(rounded, -limit)[-limit])
        hashes, scores, rounded = hashes[candidates], scores[candidates], rounded[candidates]
    order = best_first(rounded, hashes)[:limit]
    return SearchHits(hashes[order], scores[order].astype(np.float32))


def weighted_centroid(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The unit vector float32 (D,) of a weighted group, float32 (N, D); zeros if the vectors cancel out."""
    mean = weights @ vectors
    length = float(np.linalg.norm(mean))
    unit: np.ndarray = mean / length if length else mean
    return unit.astype(np.float32)
