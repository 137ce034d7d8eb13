"""An in-process vector index: immutable FAISS segments plus a fresh matrix of recent changes.

Writers append to the fresh matrix and mark deleted rows with tombstones. A reader takes one snapshot and
needs no lock; a published snapshot never changes. Compaction merges everything into one segment while
readers and writers continue; a large segment is saved for the next start.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from services.embedding.index.builder import BuilderStopped, SegmentBuilder
from services.embedding.index.gpu_flat import GpuSegment
from services.embedding.index.id_map import IdMap
from services.embedding.index.persistence import load, save
from services.embedding.index.recall import HITS, LOW_RECALL, RecallSample
from services.embedding.index.segment import Segment, SegmentHits, flat_segment, refine_candidates
from services.embedding.index.vector_index import TIES, SearchHits, Selection, StoredRows, top_hits

_FRESH_ROWS = 1024
_MERGED_ROWS, _MERGED_PART = 8192, 16  # at most that many rows, or 1/16 of the first segment
_MAX_SEGMENTS = 12
_READ_BATCH = 2000
_RETRY_SECONDS = 60.0
_log = logging.getLogger(__name__)

AnySegment = Segment | GpuSegment
Build = Callable[[np.ndarray, np.ndarray], AnySegment]
Originals = Callable[[Sequence[int]], Mapping[int, np.ndarray]]


@dataclass(frozen=True)
class SegmentFile:
    """The directory in which the large segment is saved, and the name of its store."""

    directory: Path
    store: str


@dataclass(frozen=True)
class _Part:
    """A segment and the mask of its deleted rows, bool (N,)."""

    segment: AnySegment
    dead: np.ndarray
    alive: int

    def without(self, hashes: np.ndarray) -> "_Part":
        rows = np.unique(self.segment.rows(hashes))
        rows = rows[rows >= 0]
        rows = rows[~self.dead[rows]]
        if not len(rows):
            return self
        dead = self.dead.copy()
        dead[rows] = True
        return _Part(self.segment, dead, self.alive - len(rows))

    def live_rows(self) -> np.ndarray:
        return np.flatnonzero(~self.dead)


@dataclass(frozen=True)
class _Snapshot:
    """The state for readers: `parts`, and the rows [0, length) of `fresh`, vectors of `items`, not `dead`."""

    parts: tuple[_Part, ...]
    fresh: np.ndarray
    items: IdMap
    dead: np.ndarray
    length: int

    @property
    def hashes(self) -> np.ndarray:
        return self.items.hashes

    def fresh_rows(self) -> np.ndarray:
        return np.flatnonzero(~self.dead[: self.length])


class SegmentedIndex:
    """A `VectorIndex` of float16 vectors, unless `build` stores them differently.

    A compacted segment of at least `large_rows` items is built by `build` and saved in `segment_file`; 0
    means that no segment is large, and every search is exact. Compaction of a lossy segment reads the vectors
    by item hash from `originals`.
    """

    def __init__(
        self,
        dimension: int,
        large_rows: int = 0,
        build: Build = flat_segment,
        segment_file: SegmentFile | None = None,
        originals: Originals | None = None,
    ) -> None:
        self.dimension, self._build = dimension, build
        self._segment_file, self._originals = segment_file, originals
        self._large_rows = large_rows or sys.maxsize
        self._write_lock, self._compaction_lock = threading.Lock(), threading.Lock()
        self._row_of: dict[int, int] = {}  # rows of the fresh matrix; only the writer uses it
        self._unsaved: tuple[Segment, int] | None = None  # a segment to save, and its sequence
        self._retry_at = 0.0
        self._recall: float | None = None
        self._measured: AnySegment | None = None  # the segment whose recall is known
        self._pinned_parts = 1  # a compaction works on that many first parts, which must stay
        self._snapshot = self._empty(())

    def __len__(self) -> int:
        snapshot = self._snapshot
        return sum(part.alive for part in snapshot.parts) + len(snapshot.fresh_rows())

    @property
    def recall(self) -> float | None:
        """See `VectorIndex`; of the first segment, whose rows are nearly all."""
        return self._recall

    def open(self) -> StoredRows:
        """See `VectorIndex`; loads the saved segment."""
        file, build, saved = self._segment_file, self._build, None
        if file and isinstance(build, SegmentBuilder):
            saved = load(file.directory, file.store, self.dimension, build.restore)
        segment, sequence = saved or (flat_segment(np.empty(0, np.int64), np.empty((0, self.dimension))), 0)
        self.replace_all(segment)
        return StoredRows(segment.hashes, np.full(len(segment), sequence))

    def reconcile(self, deleted: np.ndarray, hashes: np.ndarray, vectors: np.ndarray, sequence: int) -> None:
        """See `VectorIndex`."""
        stored = self._snapshot.parts[0].segment
        changed = [_sibling(stored, hashes, vectors)] if len(hashes) else []
        self.replace_all(stored, changed, deleted)

    def close(self) -> None:
        """Stop building segments."""
        if isinstance(self._build, SegmentBuilder):
            self._build.stop()

    def replace_all(
        self, first: AnySegment, more: Sequence[AnySegment] = (), deleted: Iterable[int] = ()
    ) -> None:
        """Replace the content by these segments, the first without the items `deleted`; no item is in two."""
        with self._compaction_lock, self._write_lock:
            self._row_of.clear()
            live = _part(first).without(np.fromiter(deleted, np.int64))
            self._snapshot = self._empty((live, *(_part(segment) for segment in more)))

    def change(
        self, upserts: Mapping[int, np.ndarray], deletions: Sequence[int] = (), sequence: int = 0
    ) -> None:
        """See `VectorIndex`."""
        hashes = list(upserts)
        with self._write_lock:
            # Published once: a reader sees either the old or the new vector of an item.
            snapshot = self._without_items(self._snapshot, [*hashes, *deletions])
            for start in range(0, len(hashes), _FRESH_ROWS):
                page = hashes[start : start + _FRESH_ROWS]
                snapshot = self._append(snapshot, page, np.stack([upserts[item_hash] for item_hash in page]))
            self._snapshot = snapshot

    def vectors(self, hashes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex`."""
        snapshot, requested = self._snapshot, np.fromiter(hashes, np.int64)
        vectors = np.zeros((len(requested), self.dimension), np.float32)
        is_present = np.zeros(len(requested), bool)
        for part in snapshot.parts:
            rows = part.segment.rows(requested)
            positions = np.flatnonzero(rows >= 0)
            positions = positions[~part.dead[rows[positions]]]
            vectors[positions], is_present[positions] = part.segment.vectors(rows[positions]), True
        rows = snapshot.fresh_rows()
        fresh_hashes = snapshot.hashes[rows]
        for position in np.flatnonzero(np.isin(requested, fresh_hashes)):
            row = rows[np.flatnonzero(fresh_hashes == requested[position])[-1]]
            vectors[position], is_present[position] = snapshot.fresh[row], True
        return np.flatnonzero(is_present), vectors[is_present]

    def search(self, queries: np.ndarray, limit: int, selection: Selection | None = None) -> list[SearchHits]:
        """See `VectorIndex`."""
        snapshot, queries = self._snapshot, np.ascontiguousarray(queries, np.float32)
        results: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in queries]
        estimated: list[tuple[Segment, SegmentHits]] = []
        parts = [part for part in snapshot.parts if part.alive]
        only_coded = sum(part.segment.large for part in parts) == 1
        for part in parts:
            live = None if part.alive == len(part.segment) else ~part.dead
            if selection is not None:
                allowed = selection.of(part.segment)
                live = allowed if live is None else live & allowed
            hits = part.segment.search(queries, limit + TIES, live, only_coded=only_coded)
            if hits.estimated and isinstance(part.segment, Segment):  # isinstance is for mypy
                estimated.append((part.segment, hits))
                continue
            for result, scores, rows in zip(results, hits.scores, hits.rows, strict=True):
                valid = rows >= 0
                result.append((part.segment.hashes[rows[valid]], scores[valid]))
        if estimated:
            reranked = refine_candidates(estimated, queries, limit + TIES)
            for result, best in zip(results, reranked, strict=True):
                result.append(best)
        if snapshot.length:
            hashes, fresh_scores = self._fresh(snapshot, queries, selection)
            for result, scores in zip(results, fresh_scores, strict=True):
                result.append((hashes, scores))
        return [top_hits(result, limit) for result in results]

    def _fresh(
        self, snapshot: _Snapshot, queries: np.ndarray, selection: Selection | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hashes (N,) of the fresh rows that the search may return, and their scores (Q, N)."""
        live = ~snapshot.dead[: snapshot.length]
        if selection is not None:
            live &= selection.of(snapshot.items, snapshot.length)
        rows = np.flatnonzero(live)
        scores = queries @ snapshot.fresh[: snapshot.length].T  # selecting rows first costs more
        return snapshot.hashes[rows], scores[:, rows]

    @property
    def needs_compaction(self) -> bool:
        """Whether compaction pays: many rows are deleted, outside the first segment, or scanned exactly."""
        parts = self._snapshot.parts
        total, alive = sum(len(p.segment) for p in parts), sum(p.alive for p in parts)
        if total < self._large_rows:
            return len(parts) > _MAX_SEGMENTS or alive < total // 2
        first = parts[0].segment
        # A segment saved under another setting is rebuilt.
        build = self._build if isinstance(self._build, SegmentBuilder) else None
        is_outdated = build is not None and isinstance(first, Segment) and not build.is_current(first)
        return is_outdated or not first.large or alive < total * 3 // 4 or len(first) < total * 7 // 8

    def maintain(self, sequence: int) -> None:
        """Compact if that pays, save the segment, and measure the recall of a new one.

        If that fails, for example on a full disk, searches use the index as it is; later calls retry.
        """
        if time.monotonic() < self._retry_at:
            return
        name = self._segment_file.directory.name if self._segment_file else "in memory"
        try:
            if self.needs_compaction:
                start, segment = time.monotonic(), self.compact()
                seconds = time.monotonic() - start
                _log.info("the index %s: %d items compacted in %.1f s", name, len(segment), seconds)
                self._unsaved = None
                if isinstance(segment, Segment) and segment.large:
                    self._unsaved = segment, sequence
            if (file := self._segment_file) and self._unsaved:
                save(self._unsaved[0], file.store, self._unsaved[1], file.directory)
                self._unsaved = None
            self._measure_recall(name)
        except BuilderStopped:
            return
        except (OSError, RuntimeError) as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            trace = not isinstance(error, OSError)
            _log.warning("the index %s was not compacted or not saved: %s", name, error, exc_info=trace)

    def _measure_recall(self, name: str) -> None:
        """Measure the recall of the first segment unless it is known; costs a few seconds of one core."""
        segment = self._snapshot.parts[0].segment if self._snapshot.parts else None
        if segment is None or segment is self._measured:
            return
        recall = sample_recall(segment, self.dimension) if segment.is_approximate else 1.0
        self._recall, self._measured = recall, segment
        if recall is None:
            _log.info("the index %s: %d items are too many to measure recall", name, len(segment))
        elif recall < LOW_RECALL:
            _log.warning("the index %s finds only %.3f of the %d nearest items", name, recall, HITS)

    def compact(self) -> AnySegment:
        """Merge everything that is live at the start into one segment, and return it."""
        with self._compaction_lock:
            with self._write_lock:
                sealed = self._seal(self._snapshot)
                before = tuple(part for part in sealed.parts if part.alive)
                self._snapshot, self._pinned_parts = replace(sealed, parts=before), max(len(before), 1)
            try:
                return self._compact(before)
            finally:
                self._pinned_parts = 1

    def _compact(self, before: tuple[_Part, ...]) -> AnySegment:
        """Replace the first parts by one segment; `before` is their state at the start."""
        rows = [part.live_rows() for part in before]
        hashes_by_part = [
            part.segment.hashes[part_rows] for part, part_rows in zip(before, rows, strict=True)
        ]
        hashes = np.concatenate([np.empty(0, np.int64), *hashes_by_part])
        # Page by page into half precision: a full float32 copy would take twice the index.
        vectors, position = np.empty((len(hashes), self.dimension), np.float16), 0
        for part, part_rows in zip(before, rows, strict=True):
            for start in range(0, len(part_rows), _READ_BATCH):
                page = part_rows[start : start + _READ_BATCH]
                vectors[position : position + len(page)] = self._exact(part.segment, page)
                position += len(page)
        build = self._build if len(hashes) >= self._large_rows else flat_segment
        segment = build(hashes, vectors)
        with self._write_lock:
            snapshot = self._snapshot
            after = snapshot.parts[: len(before)]
            deleted = [
                part.segment.hashes[part.dead & ~old.dead] for part, old in zip(after, before, strict=True)
            ]
            first = _part(segment).without(np.concatenate([np.empty(0, np.int64), *deleted]))
            self._snapshot = replace(snapshot, parts=(first, *snapshot.parts[len(before) :]))
        return segment

    def _exact(self, segment: AnySegment, rows: np.ndarray) -> np.ndarray:
        """The vectors of rows; arbitrary for items that changed meanwhile, because their rows are deleted."""
        values = segment.vectors(rows)
        if self._originals is None or segment.storage != "sq8":
            return values
        hashes = segment.hashes[rows].tolist()
        originals = self._originals(hashes)
        return np.stack([originals.get(key, value) for key, value in zip(hashes, values, strict=True)])

    def _empty(self, parts: tuple[_Part, ...]) -> _Snapshot:
        fresh = np.zeros((_FRESH_ROWS, self.dimension), np.float32)
        items = IdMap(np.zeros(_FRESH_ROWS, np.int64))
        return _Snapshot(parts, fresh, items, np.zeros(_FRESH_ROWS, bool), 0)

    def _without_items(self, snapshot: _Snapshot, hashes: list[int]) -> _Snapshot:
        """A snapshot without these items."""
        deleted, dead = np.array(hashes, np.int64), snapshot.dead.copy()
        for item_hash in hashes:
            if (row := self._row_of.pop(item_hash, None)) is not None:
                dead[row] = True
        return replace(snapshot, parts=tuple(part.without(deleted) for part in snapshot.parts), dead=dead)

    def _append(self, snapshot: _Snapshot, hashes: list[int], vectors: np.ndarray) -> _Snapshot:
        if snapshot.length + len(hashes) > len(snapshot.fresh):
            snapshot = self._seal(snapshot)
        rows = slice(snapshot.length, snapshot.length + len(hashes))
        # A reader ignores rows past its length, so writing them needs no copy.
        snapshot.fresh[rows] = vectors.astype(np.float16)
        snapshot.hashes[rows] = hashes
        self._row_of |= zip(hashes, range(rows.start, rows.stop), strict=True)
        return replace(snapshot, length=rows.stop)

    def _seal(self, snapshot: _Snapshot) -> _Snapshot:
        """A snapshot whose fresh rows have become a segment, with an empty fresh matrix."""
        rows = snapshot.fresh_rows()
        self._row_of.clear()
        if not len(rows):
            return self._empty(snapshot.parts)
        hashes, vectors, count = [snapshot.hashes[rows]], [snapshot.fresh[rows]], len(rows)
        first = snapshot.parts[0].segment if snapshot.parts else None
        max_rows = _MERGED_ROWS if first is None else max(_MERGED_ROWS, len(first) // _MERGED_PART)
        remaining = list(snapshot.parts[: self._pinned_parts])
        # Merge the parts with at most twice as many rows: few parts are searched, and each row is copied only
        # a few times (log-structured merge tree, O'Neil et al., 1996).
        for part in sorted(snapshot.parts[self._pinned_parts :], key=lambda part: part.alive):
            if part.alive > min(2 * count, max_rows - count):
                remaining.append(part)
                continue
            rows = part.live_rows()
            hashes.append(part.segment.hashes[rows])
            vectors.append(part.segment.vectors(rows))
            count += len(rows)
        sealed = _sibling(first, np.concatenate(hashes), np.concatenate(vectors))
        return self._empty((*remaining, _part(sealed)))


def _sibling(first: AnySegment | None, hashes: np.ndarray, vectors: np.ndarray) -> Segment:
    """A segment of rows written after the first segment was built."""
    return (first.sibling if isinstance(first, Segment) else flat_segment)(hashes, vectors)


def sample_recall(segment: AnySegment, dimension: int) -> float | None:
    """The share of the 100 nearest rows that a search of the segment finds, on a sample of its rows.

    None if the segment has no rows, or so many that an exact scan costs too much.
    """

    def read(page: slice) -> np.ndarray:
        return segment.vectors(np.arange(page.start, page.stop))

    sample = RecallSample.of(read, len(segment), dimension)
    if sample is None:
        return None
    index = SegmentedIndex(dimension)
    index.replace_all(segment)
    return sample.recall([hits.scores for hits in index.search(sample.queries, sample.count)])


def _part(segment: AnySegment) -> _Part:
    return _Part(segment, np.zeros(len(segment), bool), len(segment))
