"""What searches the vectors of a space, by cosine, while items come and go: the interface, and its terms.

`segmented.py` does it within the process, `milvus.py` by an engine of its own. Knows items by number alone.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from services.embedding.numbered import Numbered

# To look an item up takes as long as to sort so many, and few are looked up in any case.
_ONE_BY_ONE, _SORTED_PER_LOOK_UP = 10_000, 3
_SORTED = 3  # times what is asked for is sorted at once
TIES = 64
"""Engines cut equal items off by where they stand, which differs from one process to the next: so many
more are asked of them, and the cut is by number."""


@dataclass(frozen=True)
class Neighbours:
    """`numbers` int64 (K,) and `scores` float32 (K,), best first, ties by number."""

    numbers: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Found:
    """Where the items of some rows stand in a table: `places` int64 (N,) below `end`, -1 for nowhere.

    `missed` are the rows of those, int64, when the table had `among` rows.
    """

    places: np.ndarray
    end: int
    missed: np.ndarray
    among: int


class Places(WeakKeyDictionary[Numbered, Found]):
    """Where the rows of indexes were found in one table; one thread looks, and others wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.looking = threading.Lock()


@dataclass(frozen=True)
class Selection:
    """The items that may be found: where `mask`, bool (M,), is set among the first rows of a table.

    `numbers` int64 (M,) are those rows' items; `rows_of` gives the rows of items, -1 for unknown ones.
    Selections of one table share `kept`.
    """

    numbers: np.ndarray
    mask: np.ndarray
    rows_of: Callable[[np.ndarray], np.ndarray]
    kept: Places

    def of(self, rows: Numbered, count: int | None = None) -> np.ndarray:
        """Which of some rows may be found, bool (N,); of the first `count` where rows are still appended."""
        numbers = rows.numbers[:count]
        with self.kept.looking:
            found = self.kept.get(rows)
            if found is None or len(found.places) < len(numbers):
                found = self.kept[rows] = self._look_up(numbers, found)
            elif len(found.missed) and found.among < len(self.numbers):
                found = self.kept[rows] = self._look_up(rows.numbers[: len(found.places)], found)
        places = found.places[: len(numbers)]
        if found.end > len(self.mask):
            places = np.minimum(places, len(self.mask))
        allowed: np.ndarray = self._unset_at_the_end[places]
        return allowed

    def permits(self, numbers: np.ndarray) -> np.ndarray:
        """Which of a few items may be found, bool."""
        return self.of(Numbered(numbers))

    @cached_property
    def _unset_at_the_end(self) -> np.ndarray:
        """The mask, and what stands for items that are not known here."""
        return np.append(self.mask, False)

    def _look_up(self, numbers: np.ndarray, before: Found | None) -> Found:
        places = np.full(len(numbers), -1, np.int64)
        if before is not None:
            places[: len(before.places)] = before.places
        unknown = np.flatnonzero(places < 0)
        many = len(unknown) > max(_ONE_BY_ONE, len(self.numbers) // _SORTED_PER_LOOK_UP)
        places[unknown] = (Numbered(self.numbers).rows if many else self.rows_of)(numbers[unknown])
        if len(self.numbers):  # its row may have been counted before it can be looked up
            places[numbers == self.numbers[-1]] = len(self.numbers) - 1
        missed = np.flatnonzero(places < 0)
        return Found(places, int(places.max(initial=-1)) + 1, missed, len(self.numbers))


@dataclass(frozen=True, eq=False)
class Held(Numbered):
    """Items that an index had when it was opened, each as of the change `sequences`, int64 (N,), or later."""

    sequences: np.ndarray


class VectorIndex(Protocol):
    """The vectors of one space, `dimension` floats each, of unit length.

    Derived from the store: `open` and `hold` come first and make it the store's equal. Any thread may search;
    one at a time may change, and one may tidy beside it. Of 63-bit item numbers no two are of one item.

    Raises:
        Unavailable: an engine of its own does not answer. A change that failed may be made again.
    """

    dimension: int

    def open(self) -> Held:
        """What is left from an earlier life."""

    def hold(self, gone: np.ndarray, numbers: np.ndarray, vectors: np.ndarray, sequence: int) -> None:
        """Of what `open` told drop the items `gone`, int64, then put `vectors`, float (N, D), of `numbers`.

        What was changed meanwhile is among both.
        With them the store as of the change `sequence` is held.
        """

    def change(self, upserts: Mapping[int, np.ndarray], deletions: Sequence[int], sequence: int) -> None:
        """Put vectors in place of what their items had, and drop items; unknown ones are passed over."""

    def vectors(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Positions (M,) in `numbers` that are known, rising, and their vectors float32 (M, D)."""

    def search(self, queries: np.ndarray, limit: int, selection: Selection | None = None) -> list[Neighbours]:
        """The `limit` nearest items of each query, float32 (Q, D), among those of `selection`."""

    def tidy(self, sequence: int) -> None:
        """What has to be done now and then; may take minutes. All up to the change `sequence` is held."""

    def close(self) -> None:
        """Let go of what is held open, and end what goes on."""

    def __len__(self) -> int: ...


def best(found: Sequence[tuple[np.ndarray, np.ndarray]], limit: int) -> Neighbours:
    """The `limit` best of several lists of numbers and scores."""
    if len(found) == 1:
        [(numbers, scores)] = found
    else:
        numbers = np.concatenate([np.empty(0, np.int64), *(some for some, _ in found)])
        scores = np.concatenate([np.empty(0, np.float32), *(some for _, some in found)])
    # A matrix product gives equal vectors scores that differ in the last bit, by their place.
    rounded = np.round(scores, 6)
    if len(scores) > _SORTED * limit > 0:
        near = np.flatnonzero(rounded >= np.partition(rounded, -limit)[-limit])
        numbers, scores, rounded = numbers[near], scores[near], rounded[near]
    order = np.lexsort((numbers, -rounded))[:limit]
    return Neighbours(numbers[order], scores[order].astype(np.float32))


def centre(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The unit vector float32 (D,) of a weighted group, float32 (N, D); zeros when they cancel out."""
    mean = weights @ vectors
    length = float(np.linalg.norm(mean))
    unit: np.ndarray = mean / length if length else mean
    return unit.astype(np.float32)
