"""Nearest items of one vector space, by cosine, while items come and go.

An immutable FAISS base segment, a fresh segment that is only appended to, and tombstones
that name rows. A reader takes one snapshot and needs no lock; a published snapshot never
changes. Knows items by number alone.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import faiss
import numpy as np

_FRESH_ROWS = 4096
_EXACT_ROWS = 20_000
# FAISS cuts equal items off by their row, which differs from one process to the next: so many more are
# asked for, and the cut is by number.
_TIES = 64


@dataclass(frozen=True)
class Neighbours:
    """`numbers` int64 (K,) and `scores` float32 (K,), best first, ties by number."""

    numbers: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class _Snapshot:
    """What readers see: rows [0, base) are in `index`, rows [base, length) in `fresh`.

    `numbers` and `dead` cover rows [0, length) and may be longer; `fresh` likewise. `order`
    sorts the numbers of the base.
    """

    index: faiss.Index
    base: np.ndarray
    order: np.ndarray
    fresh: np.ndarray
    length: int
    numbers: np.ndarray
    dead: np.ndarray
    row_of: Mapping[int, int]


class SpaceIndex:
    """The vectors of one space; `dimension` floats each, of unit length.

    Any thread may search; one thread at a time may change.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._changes = threading.Lock()
        self._snapshot = _build(np.empty(0, np.int64), np.empty((0, dimension), np.float32))

    def __len__(self) -> int:
        return len(self._snapshot.row_of)

    def replace_all(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Hold exactly these: `numbers` int64 (N,), all different, `vectors` float32 (N, D)."""
        with self._changes:
            self._snapshot = _build(numbers, np.ascontiguousarray(vectors, np.float32))

    def change(self, upserts: Mapping[int, np.ndarray], deletions: Sequence[int] = ()) -> None:
        """Put vectors in place of what their items had, and drop items; unknown ones are passed over."""
        with self._changes:
            snapshot = self._snapshot
            if snapshot.length - len(snapshot.base) + len(upserts) > len(snapshot.fresh):
                snapshot = _compact(snapshot, max(_FRESH_ROWS, len(upserts)))
            dead, row_of, end = snapshot.dead.copy(), dict(snapshot.row_of), snapshot.length
            for number in (*upserts, *deletions):
                if (row := row_of.pop(number, None)) is not None:
                    dead[row] = True
            for number, vector in upserts.items():
                # Rows past a reader's length are not its own, so writing them needs no copy.
                snapshot.fresh[end - len(snapshot.base)] = vector
                snapshot.numbers[end] = number
                dead[end] = False
                row_of[number] = end
                end += 1
            self._snapshot = replace(snapshot, length=end, dead=dead, row_of=row_of)

    def vectors(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Positions (M,) in `numbers` that are known, and their vectors float32 (M, D)."""
        snapshot = self._snapshot
        known = [(at, row) for at, n in enumerate(numbers) if (row := snapshot.row_of.get(n)) is not None]
        rows = [_row(snapshot, row) for _, row in known]
        stacked = np.stack(rows) if rows else np.empty((0, self.dimension), np.float32)
        return np.array([at for at, _ in known], np.int64), stacked

    def search(self, queries: np.ndarray, limit: int, allowed: np.ndarray | None = None) -> list[Neighbours]:
        """The `limit` nearest items of each query, float32 (Q, D).

        `allowed`, int64 (M,), restricts the answer to these items: an exact scan when few, a
        selection inside the index otherwise.
        """
        snapshot = self._snapshot
        mask = ~snapshot.dead[: snapshot.length]
        rows = None
        if allowed is not None:
            mask &= _held(snapshot, allowed)
            rows = np.flatnonzero(mask)
        if rows is not None and len(rows) <= _EXACT_ROWS:
            return _exact(snapshot, rows, queries, limit)
        return _indexed(snapshot, mask, queries, limit)


def _build(numbers: np.ndarray, vectors: np.ndarray, room: int = _FRESH_ROWS) -> _Snapshot:
    count, dimension = vectors.shape
    index = faiss.IndexFlatIP(dimension)
    index.add(vectors)
    return _Snapshot(
        index=index,
        base=vectors,
        order=np.argsort(numbers),
        fresh=np.zeros((room, dimension), np.float32),
        length=count,
        numbers=np.concatenate([numbers.astype(np.int64), np.zeros(room, np.int64)]),
        dead=np.zeros(count + room, bool),
        row_of=dict(zip(numbers.tolist(), range(count), strict=True)),
    )


def _held(snapshot: _Snapshot, allowed: np.ndarray) -> np.ndarray:
    """Which rows hold an item of `allowed`: bool (length,)."""
    mask = np.zeros(snapshot.length, bool)
    base = len(snapshot.base)
    if base:
        at = np.minimum(np.searchsorted(snapshot.numbers[:base], allowed, sorter=snapshot.order), base - 1)
        rows = snapshot.order[at]
        mask[rows[snapshot.numbers[rows] == allowed]] = True
    mask[base:] = np.isin(snapshot.numbers[base : snapshot.length], allowed)
    return mask


def _compact(snapshot: _Snapshot, room: int) -> _Snapshot:
    rows = np.flatnonzero(~snapshot.dead[: snapshot.length])
    return _build(snapshot.numbers[rows], _rows(snapshot, rows), room)


def _row(snapshot: _Snapshot, row: int) -> np.ndarray:
    base = len(snapshot.base)
    vector: np.ndarray = snapshot.base[row] if row < base else snapshot.fresh[row - base]
    return vector


def _rows(snapshot: _Snapshot, rows: np.ndarray) -> np.ndarray:
    base = len(snapshot.base)
    out = np.empty((len(rows), snapshot.base.shape[1]), np.float32)
    old = rows < base
    out[old], out[~old] = snapshot.base[rows[old]], snapshot.fresh[rows[~old] - base]
    return out


def _exact(snapshot: _Snapshot, rows: np.ndarray, queries: np.ndarray, limit: int) -> list[Neighbours]:
    scores = queries @ _rows(snapshot, rows).T
    numbers = snapshot.numbers[rows]
    return [_best(numbers, row, limit) for row in scores]


def _indexed(snapshot: _Snapshot, mask: np.ndarray, queries: np.ndarray, limit: int) -> list[Neighbours]:
    base = len(snapshot.base)
    # faiss's type stubs do not know what its Python layer adds to these two constructors.
    bitmap = np.packbits(mask[:base], bitorder="little")
    selector = faiss.IDSelectorBitmap(bitmap)  # type: ignore[call-arg, arg-type]
    parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
    near = min(limit + _TIES, base)
    scores, rows = (
        snapshot.index.search(np.ascontiguousarray(queries, np.float32), near, params=parameters)
        if near
        else (np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
    )
    fresh_rows = base + np.flatnonzero(mask[base:])
    fresh_scores = queries @ snapshot.fresh[fresh_rows - base].T
    found = []
    for query in range(len(queries)):
        hit = rows[query] >= 0
        numbers = snapshot.numbers[np.concatenate([rows[query][hit], fresh_rows])]
        found.append(_best(numbers, np.concatenate([scores[query][hit], fresh_scores[query]]), limit))
    return found


def _best(numbers: np.ndarray, scores: np.ndarray, limit: int) -> Neighbours:
    # A matrix product gives equal vectors scores that differ in the last bit, by their place.
    order = np.lexsort((numbers, -np.round(scores, 6)))[:limit]
    return Neighbours(numbers[order], scores[order].astype(np.float32))


def centre(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The unit vector float32 (D,) of a weighted group, float32 (N, D); zeros when they cancel out."""
    mean = weights @ vectors
    length = float(np.linalg.norm(mean))
    unit: np.ndarray = mean / length if length else mean
    return unit.astype(np.float32)
