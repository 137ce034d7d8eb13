"""Nearest items within the process: segments of FAISS that never change, and what changed since.

A fresh matrix is only appended to, and tombstones name rows. A reader takes one snapshot and needs
no lock; a published snapshot never changes. Compaction makes one segment of all while readers and writers
go on; a large one is kept from one start to the next.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from services.embedding.builder import Builder, BuilderStopped
from services.embedding.index import TIES, Held, Neighbours, Selection, best
from services.embedding.keeping import load, save
from services.embedding.numbered import Numbered
from services.embedding.on_device import DeviceSegment
from services.embedding.segments import Nearest, Segment, compared, scanned

_FRESH_ROWS = 1024
_MERGED_ROWS, _MERGED_PART = 8192, 16  # at most so many, or such a part of the first segment
_MOST_SEGMENTS = 12
_READ_AT_ONCE = 2000
_log = logging.getLogger(__name__)

AnySegment = Segment | DeviceSegment
Build = Callable[[np.ndarray, np.ndarray], AnySegment]
Originals = Callable[[Sequence[int]], Mapping[int, np.ndarray]]


@dataclass(frozen=True)
class Keep:
    """Where the segment with everything is kept: a directory, of the store of that name."""

    directory: Path
    store: str


@dataclass(frozen=True)
class _Part:
    """A segment and which of its rows are tombstones, bool (N,)."""

    segment: AnySegment
    dead: np.ndarray
    alive: int

    def without(self, numbers: np.ndarray) -> "_Part":
        rows = np.unique(self.segment.rows(numbers))
        rows = rows[rows >= 0]
        rows = rows[~self.dead[rows]]
        if not len(rows):
            return self
        dead = self.dead.copy()
        dead[rows] = True
        return _Part(self.segment, dead, self.alive - len(rows))

    def living(self) -> np.ndarray:
        return np.flatnonzero(~self.dead)


@dataclass(frozen=True)
class _Snapshot:
    """What readers see: `parts`, and rows [0, length) of `fresh`, vectors of `items`, that are not `dead`."""

    parts: tuple[_Part, ...]
    fresh: np.ndarray
    items: Numbered
    dead: np.ndarray
    length: int

    @property
    def numbers(self) -> np.ndarray:
        return self.items.numbers

    def fresh_rows(self) -> np.ndarray:
        return np.flatnonzero(~self.dead[: self.length])


class SegmentedIndex:
    """A `VectorIndex`, kept as float16 where `build` does not store otherwise.

    From `large_rows` items on a compacted segment is one that `build` makes, and goes where `keep` says; 0
    means never: every vector is compared. Made again from a segment that lost something, it is made of
    `originals`, vectors by number.
    """

    def __init__(
        self,
        dimension: int,
        large_rows: int = 0,
        build: Build = scanned,
        keep: Keep | None = None,
        originals: Originals | None = None,
    ) -> None:
        self.dimension, self._build, self._keep, self._originals = dimension, build, keep, originals
        self._large_rows = large_rows or sys.maxsize
        self._changes, self._compacting = threading.Lock(), threading.Lock()
        self._row_of: dict[int, int] = {}  # of the fresh matrix, the writer's alone
        self._settled = 1  # so many first parts stay where they are: a compaction is at work on them
        self._snapshot = self._empty(())

    def __len__(self) -> int:
        snapshot = self._snapshot
        return sum(part.alive for part in snapshot.parts) + len(snapshot.fresh_rows())

    def open(self) -> Held:
        """What the kept segment holds."""
        storage = self._build.storage if isinstance(self._build, Builder) else "fp16"
        kept = self._keep and load(self._keep.directory, self._keep.store, self.dimension, storage)
        segment, until = kept or (scanned(np.empty(0, np.int64), np.empty((0, self.dimension))), 0)
        self.replace_all(segment)
        return Held(segment.numbers, np.full(len(segment), until))

    def hold(self, gone: np.ndarray, numbers: np.ndarray, vectors: np.ndarray, sequence: int) -> None:
        """See `VectorIndex`."""
        kept = self._snapshot.parts[0]
        changed = [_beside(kept.segment, numbers, vectors)] if len(numbers) else []
        self.replace_all(kept.segment, changed, gone)

    def close(self) -> None:
        """Stop the building of segments."""
        if isinstance(self._build, Builder):
            self._build.stop()

    def replace_all(
        self, first: AnySegment, more: Sequence[AnySegment] = (), gone: Iterable[int] = ()
    ) -> None:
        """Hold exactly these segments: of the first all but `gone`, so that no two share an item."""
        with self._compacting, self._changes:
            self._row_of.clear()
            left = _part(first).without(np.fromiter(gone, np.int64))
            self._snapshot = self._empty((left, *(_part(segment) for segment in more)))

    def change(
        self, upserts: Mapping[int, np.ndarray], deletions: Sequence[int] = (), sequence: int = 0
    ) -> None:
        """Put vectors in place of what their items had, and drop items; unknown ones are passed over."""
        numbers = list(upserts)
        with self._changes:
            # Published once: a reader finds an item by what it had or by what it has, never by neither.
            snapshot = self._buried(self._snapshot, [*numbers, *deletions])
            for start in range(0, len(numbers), _FRESH_ROWS):
                some = numbers[start : start + _FRESH_ROWS]
                snapshot = self._appended(snapshot, some, np.stack([upserts[number] for number in some]))
            self._snapshot = snapshot

    def vectors(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Positions (M,) in `numbers` that are known, rising, and their vectors float32 (M, D)."""
        snapshot, wanted = self._snapshot, np.fromiter(numbers, np.int64)
        found = np.zeros((len(wanted), self.dimension), np.float32)
        known = np.zeros(len(wanted), bool)
        for part in snapshot.parts:
            rows = part.segment.rows(wanted)
            here = np.flatnonzero(rows >= 0)
            here = here[~part.dead[rows[here]]]
            found[here], known[here] = part.segment.vectors(rows[here]), True
        rows = snapshot.fresh_rows()
        for at in np.flatnonzero(np.isin(wanted, snapshot.numbers[rows])):
            found[at] = snapshot.fresh[rows[np.flatnonzero(snapshot.numbers[rows] == wanted[at])[-1]]]
            known[at] = True
        return np.flatnonzero(known), found[known]

    def search(self, queries: np.ndarray, limit: int, selection: Selection | None = None) -> list[Neighbours]:
        """The `limit` nearest items of each query, float32 (Q, D), among those of `selection`."""
        snapshot, queries = self._snapshot, np.ascontiguousarray(queries, np.float32)
        found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in queries]
        estimated: list[tuple[Segment, Nearest]] = []
        parts = [part for part in snapshot.parts if part.alive]
        only_coded = sum(part.segment.large for part in parts) == 1
        for part in parts:
            live = None if part.alive == len(part.segment) else ~part.dead
            if selection is not None:
                allowed = selection.of(part.segment)
                live = allowed if live is None else live & allowed
            near = part.segment.search(queries, limit + TIES, live, only_coded=only_coded)
            if near.estimated and isinstance(part.segment, Segment):  # which the latter says to mypy
                estimated.append((part.segment, near))
                continue
            for mine, score, row in zip(found, near.scores, near.rows, strict=True):
                kept = row >= 0
                mine.append((part.segment.numbers[row[kept]], score[kept]))
        if estimated:
            for mine, ordered in zip(found, compared(estimated, queries, limit + TIES), strict=True):
                mine.append(ordered)
        if snapshot.length:
            numbers, fresh = self._fresh(snapshot, queries, selection)
            for mine, score in zip(found, fresh, strict=True):
                mine.append((numbers, score))
        return [best(mine, limit) for mine in found]

    def _fresh(
        self, snapshot: _Snapshot, queries: np.ndarray, selection: Selection | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (N,) of the fresh rows that may be found, and their scores (Q, N)."""
        live = ~snapshot.dead[: snapshot.length]
        if selection is not None:
            live &= selection.of(snapshot.items, snapshot.length)
        rows = np.flatnonzero(live)
        scores = queries @ snapshot.fresh[: snapshot.length].T  # to copy some of its rows costs more
        return snapshot.numbers[rows], scores[:, rows]

    @property
    def worn(self) -> bool:
        """Whether compaction is worth its cost: much is dead, or outside of the first segment, or scanned."""
        parts = self._snapshot.parts
        total, alive = sum(len(p.segment) for p in parts), sum(p.alive for p in parts)
        if total < self._large_rows:
            return len(parts) > _MOST_SEGMENTS or alive < total // 2
        first = parts[0].segment
        if isinstance(self._build, Builder) and isinstance(first, Segment):
            # It may be kept from a start with another setting.
            other = first.has_graph != self._build.lays_graph(len(first))
        else:
            other = False
        return other or not first.large or alive < total * 3 // 4 or len(first) < total * 7 // 8

    def tidy(self, sequence: int) -> None:
        """Compact when that is worth its cost, and keep what came of it."""
        if not self.worn:
            return
        began, name = time.monotonic(), self._keep.directory.name if self._keep else "unkept"
        try:
            segment = self.compact()
            if self._keep and isinstance(segment, Segment) and segment.large:
                save(segment, self._keep.store, sequence, self._keep.directory)
        except BuilderStopped:
            return
        except (OSError, RuntimeError):  # the next change tries again; until then it is searched as it is
            _log.exception("the index %s was not compacted or not kept", name)
            return
        _log.info("the index %s: %d items compacted in %.1f s", name, len(segment), time.monotonic() - began)

    def compact(self) -> AnySegment:
        """Make one segment of everything; it, with what was live when this began."""
        with self._compacting:
            with self._changes:
                sealed = self._sealed(self._snapshot)
                before = tuple(part for part in sealed.parts if part.alive)
                self._snapshot, self._settled = replace(sealed, parts=before), max(len(before), 1)
            try:
                return self._compacted(before)
            finally:
                self._settled = 1

    def _compacted(self, before: tuple[_Part, ...]) -> AnySegment:
        """Put one segment in the place of the first parts, which were `before`."""
        rows = [part.living() for part in before]
        living = [part.segment.numbers[mine] for part, mine in zip(before, rows, strict=True)]
        numbers = np.concatenate([np.empty(0, np.int64), *living])
        # Page by page into half precision: a copy of everything as float32 would be twice the index.
        vectors, at = np.empty((len(numbers), self.dimension), np.float16), 0
        for part, mine in zip(before, rows, strict=True):
            for start in range(0, len(mine), _READ_AT_ONCE):
                page = mine[start : start + _READ_AT_ONCE]
                vectors[at : at + len(page)] = self._exact(part.segment, page)
                at += len(page)
        build = self._build if len(numbers) >= self._large_rows else scanned
        made = build(numbers, vectors)
        with self._changes:
            snapshot = self._snapshot
            now = snapshot.parts[: len(before)]
            died = [
                part.segment.numbers[part.dead & ~old.dead] for part, old in zip(now, before, strict=True)
            ]
            first = _part(made).without(np.concatenate([np.empty(0, np.int64), *died]))
            self._snapshot = replace(snapshot, parts=(first, *snapshot.parts[len(before) :]))
        return made

    def _exact(self, segment: AnySegment, rows: np.ndarray) -> np.ndarray:
        """The vectors of rows; of items that changed meanwhile, whose rows are dead by then, any."""
        values = segment.vectors(rows)
        if self._originals is None or segment.storage != "sq8":
            return values
        numbers = segment.numbers[rows].tolist()
        known = self._originals(numbers)
        return np.stack([known.get(number, value) for number, value in zip(numbers, values, strict=True)])

    def _empty(self, parts: tuple[_Part, ...]) -> _Snapshot:
        fresh = np.zeros((_FRESH_ROWS, self.dimension), np.float32)
        items = Numbered(np.zeros(_FRESH_ROWS, np.int64))
        return _Snapshot(parts, fresh, items, np.zeros(_FRESH_ROWS, bool), 0)

    def _buried(self, snapshot: _Snapshot, numbers: list[int]) -> _Snapshot:
        """A snapshot without these items."""
        gone, dead = np.array(numbers, np.int64), snapshot.dead.copy()
        for number in numbers:
            if (row := self._row_of.pop(number, None)) is not None:
                dead[row] = True
        return replace(snapshot, parts=tuple(part.without(gone) for part in snapshot.parts), dead=dead)

    def _appended(self, snapshot: _Snapshot, numbers: list[int], vectors: np.ndarray) -> _Snapshot:
        if snapshot.length + len(numbers) > len(snapshot.fresh):
            snapshot = self._sealed(snapshot)
        rows = slice(snapshot.length, snapshot.length + len(numbers))
        # Rows past a reader's length are not its own, so writing them needs no copy.
        snapshot.fresh[rows] = vectors.astype(np.float16)
        snapshot.numbers[rows] = numbers
        self._row_of |= zip(numbers, range(rows.start, rows.stop), strict=True)
        return replace(snapshot, length=rows.stop)

    def _sealed(self, snapshot: _Snapshot) -> _Snapshot:
        """A snapshot whose fresh rows are a segment, with a matrix that is empty."""
        rows = snapshot.fresh_rows()
        self._row_of.clear()
        if not len(rows):
            return self._empty(snapshot.parts)
        numbers, vectors, count = [snapshot.numbers[rows]], [snapshot.fresh[rows]], len(rows)
        first = snapshot.parts[0].segment if snapshot.parts else None
        most = _MERGED_ROWS if first is None else max(_MERGED_ROWS, len(first) // _MERGED_PART)
        left = list(snapshot.parts[: self._settled])
        # With those that have at most twice as many: few are searched, and a row is copied a few times (the
        # log-structured merge tree of O'Neil et al., 1996).
        for part in sorted(snapshot.parts[self._settled :], key=lambda part: part.alive):
            if part.alive > min(2 * count, most - count):
                left.append(part)
                continue
            living = part.living()
            numbers.append(part.segment.numbers[living])
            vectors.append(part.segment.vectors(living))
            count += len(living)
        sealed = _beside(first, np.concatenate(numbers), np.concatenate(vectors))
        return self._empty((*left, _part(sealed)))


def _beside(first: AnySegment | None, numbers: np.ndarray, vectors: np.ndarray) -> Segment:
    """A segment of rows that were written after the first one was made."""
    return (first.beside if isinstance(first, Segment) else scanned)(numbers, vectors)


def _part(segment: AnySegment) -> _Part:
    return _Part(segment, np.zeros(len(segment), bool), len(segment))
