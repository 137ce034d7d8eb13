"""What searches the vectors of a space, by cosine, while items come and go: the interface, and its terms.

`segmented.py` does it within the process, `milvus.py` by an engine of its own. Knows items by number alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from services.embedding.numbered import Numbered

TIES = 64
"""Engines cut equal items off by where they stand, which differs from one process to the next: so many
more are asked of them, and the cut is by number."""


@dataclass(frozen=True)
class Neighbours:
    """`numbers` int64 (K,) and `scores` float32 (K,), best first, ties by number."""

    numbers: np.ndarray
    scores: np.ndarray


Places = WeakKeyDictionary[Numbered, tuple[np.ndarray, int]]
"""Where the items of some rows stand in a table, -1 for nowhere, and among how many it looked."""


@dataclass(frozen=True)
class Selection:
    """The items that may be found: where `mask`, bool (M,), is set among `numbers`, int64 (M,).

    Of several selections the one with more numbers begins with those of the other, as the
    rows of an item table do; they share `kept`, where an index's rows were found.
    """

    numbers: np.ndarray
    mask: np.ndarray
    kept: Places

    def of(self, rows: Numbered) -> np.ndarray:
        """Which of some rows may be found, bool (N,)."""
        places, looked_among = self.kept.get(rows, (None, 0))
        if places is None or (len(self.numbers) > looked_among and places.min(initial=0) < 0):
            places = Numbered(self.numbers).rows(rows.numbers)
            self.kept[rows] = places, len(self.numbers)
        # Those of no item known here are the last of the mask, which is unset.
        mask = np.append(self.mask, np.zeros(max(looked_among - len(self.mask), 0) + 1, bool))
        allowed: np.ndarray = mask[places]
        return allowed

    def among(self, numbers: np.ndarray) -> np.ndarray:
        """Which of a few numbers may be found, bool."""
        return np.isin(numbers, self.numbers[self.mask])


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
    numbers = np.concatenate([np.empty(0, np.int64), *(some for some, _ in found)])
    scores = np.concatenate([np.empty(0, np.float32), *(some for _, some in found)])
    # A matrix product gives equal vectors scores that differ in the last bit, by their place.
    order = np.lexsort((numbers, -np.round(scores, 6)))[:limit]
    return Neighbours(numbers[order], scores[order].astype(np.float32))


def centre(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The unit vector float32 (D,) of a weighted group, float32 (N, D); zeros when they cancel out."""
    mean = weights @ vectors
    length = float(np.linalg.norm(mean))
    unit: np.ndarray = mean / length if length else mean
    return unit.astype(np.float32)
