"""Segments that FAISS searches on a GPU: an exact scan, a CAGRA graph, or product quantization (IVF-PQ).

The host has the vectors as well: it compares the candidates in float32, scans for what the device cannot
answer, and saves the segment. `placement.py` moves the indexes; on the host all of this runs without a GPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import faiss
import numpy as np

from services.embedding.index.persistence import StoredParts
from services.embedding.index.placement import Placement, append
from services.embedding.index.recall import RecallSample
from services.embedding.index.refine_depth import RefineDepth
from services.embedding.index.segment import (
    Segment,
    SegmentHits,
    build_faiss_index,
    flat_segment,
    subquantizer_count,
    training_sample,
)

LARGE_ROWS = 20_000
"""The number of rows from which the GPU pays for the copies to and from it."""
GRAPH_ROWS = 2_000_000
"""The number of rows from which a segment gets a graph: the calculated break-even of decision 0021."""
_MIN_APPROXIMATE_ROWS = 1000  # cuVS never returns the CPU form of a graph of three or four rows
_EXTRA_CANDIDATES = 64  # the device scores in half precision
_MAX_CANDIDATES = 16_384  # of one query, by cuVS
_GRAPH_WIDTH = 512
_ROWS_PER_QUALIFYING = 20  # a graph is used if one row in that many qualifies
_COMPONENTS_PER_BYTE, _CODE_BITS = 4, 8
_LISTS_PER_ROOT, _ROWS_PER_LIST = 4, 39
_TRAINING_ROWS_PER_LIST, _MIN_TRAINING_ROWS = 50, 65_536
_TARGET_RECALL, _FIRST_PROBES = 0.98, 16
_RERANKED_COMPONENTS = 1 << 24
_READ_BATCH = 1 << 16
Kind = Literal["flat", "graph", "pq"]
_Find = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class DeviceSegment(Segment):
    """`index` has the vectors on the host in float16: an `IndexScalarQuantizer`, or the graph over one.

    `flat`, `graph` and `codes` are on the device: the first two for kind "graph", only `codes` for kind "pq",
    so that the vectors need not fit there. `host_codes` are `codes` on the host, and `probes` is how many of
    their lists a search without a filter reads.
    """

    placement: Placement = field(kw_only=True)
    flat: faiss.Index | None = None
    graph: faiss.Index | None = None
    codes: faiss.Index | None = None
    host_codes: faiss.IndexIVFPQ | None = None
    probes: int = 0

    large = True

    @property
    def kind(self) -> Kind:
        """How the segment is searched."""
        if self.codes is not None:
            return "pq"
        return "flat" if self.graph is None else "graph"

    @property
    def is_approximate(self) -> bool:
        """Whether a search may miss a nearest row."""
        return self.kind != "flat"

    @property
    def stored_codes(self) -> faiss.Index | None:
        """The codes to save."""
        return self.host_codes

    @property
    def details(self) -> dict[str, Any]:
        """What `DeviceBuilder.restore` needs besides the indexes."""
        return super().details | {"placement": self.placement.name, "probes": self.probes}

    def sibling(self, hashes: np.ndarray, vectors: np.ndarray) -> Segment:
        """A segment of rows that are scanned on the host."""
        return flat_segment(hashes, vectors)

    def search(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, *, only_coded: bool = True
    ) -> SegmentHits:
        """The `count` nearest rows of each query, float32 (Q, D), among `live`, bool (N,), or all rows.

        If an index returns too few rows of `live` for a query, the device compares all vectors with it, or
        the host does if they are only there.
        """
        many = len(self) if live is None else int(np.count_nonzero(live))
        shape = len(queries), min(count, many)
        hits = SegmentHits(np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64))
        if not hits.rows.size:
            return hits
        selector = None
        if live is not None and many < len(self):
            selector = faiss.IDSelectorBitmap(np.packbits(live, bitorder="little"))  # type: ignore[call-arg, arg-type]
        missing = np.arange(len(queries))
        for find in self._stages(shape[1], many, selector):
            with self.placement.lock:
                candidates = find(queries[missing])
            scores, rows = self._rerank(queries[missing], candidates, shape[1], live)
            hits.scores[missing], hits.rows[missing] = scores, rows
            missing = missing[rows[:, -1] < 0]
            if not len(missing):
                return hits
        exact = self._scan(queries[missing], shape[1], live, selector)
        hits.scores[missing], hits.rows[missing] = exact.scores, exact.rows
        return hits

    def _stages(self, count: int, many: int, selector: faiss.IDSelector | None) -> Iterator[_Find]:
        """Searches on the device that return candidates, int64 (Q, M), each for what the last one missed."""
        depth = min(count + _EXTRA_CANDIDATES, many)
        graph, codes, flat = self.graph, self.codes, self.flat
        is_walkable = 2 * depth <= _GRAPH_WIDTH and many * _ROWS_PER_QUALIFYING >= len(self)
        if graph is not None and is_walkable:
            yield lambda queries: self.placement.search_graph(graph, queries, depth, _GRAPH_WIDTH, selector)
        if flat is not None and depth <= _MAX_CANDIDATES:
            parameters = faiss.SearchParameters(sel=selector) if selector else None  # type: ignore[call-arg]
            yield lambda queries: flat.search(queries, depth, params=parameters)[1]
        depth = min(self.depth.of(count), many)
        if (
            codes is not None
            and self._max_scanned(depth, only_coded=True) < many
            and depth <= _MAX_CANDIDATES
        ):
            probes = min(-(-self.probes * len(self) // many), self._lists)
            lists = faiss.SearchParametersIVF(sel=selector, nprobe=probes)  # type: ignore[call-arg]
            yield lambda queries: codes.search(queries, depth, params=lists)[1]

    @property
    def _lists(self) -> int:
        return cast(faiss.IndexIVFPQ, self.host_codes).nlist

    def _rerank(
        self, queries: np.ndarray, candidates: np.ndarray, count: int, live: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows (Q, count) of the best of `candidates` (Q, M) by their vectors; row -1 for none.

        Candidates that are no rows of `live`, or appear twice, are left out: cuVS has returned such rows when
        too few qualified.
        """
        scores = np.full((len(queries), count), -np.inf, np.float32)
        rows = np.full(scores.shape, -1, np.int64)
        step = max(_RERANKED_COMPONENTS // (candidates.shape[1] * queries.shape[1]), 1)
        for start in range(0, len(queries), step):
            page = slice(start, start + step)
            hits = np.sort(candidates[page], axis=1)
            valid = (hits >= 0) & (hits < len(self))
            valid[:, 1:] &= hits[:, 1:] != hits[:, :-1]
            hits[~valid] = 0
            if live is not None:
                valid &= live[hits]
            vectors = self.vectors(hits.ravel()).reshape(*hits.shape, -1)
            exact = (vectors @ queries[page][:, :, None])[:, :, 0]
            exact[~valid] = -np.inf
            best = np.argsort(-exact, axis=1)[:, :count]
            scores[page] = np.take_along_axis(exact, best, 1)
            rows[page] = np.where(np.isfinite(scores[page]), np.take_along_axis(hits, best, 1), -1)
        return scores, rows


class DeviceBuilder:
    """Builds segments where `place` puts them; each segment gets a placement of its own.

    With `pq` they have PQ codes, else from `graph_rows` items on a graph; 0 means never.
    """

    def __init__(
        self, place: Callable[[], Placement], *, pq: bool = False, graph_rows: int = GRAPH_ROWS
    ) -> None:
        self._place, self._pq, self._graph_rows = place, pq, graph_rows

    def kind(self, count: int) -> Kind:
        """How a segment of `count` rows is searched."""
        if count < _MIN_APPROXIMATE_ROWS:
            return "flat"
        if self._pq:
            return "pq"
        return "graph" if 0 < self._graph_rows <= count else "flat"

    def __call__(self, hashes: np.ndarray, vectors: np.ndarray) -> DeviceSegment:
        """Build a segment of `hashes` int64 (N,) and `vectors` float (N, D) of unit length.

        Raises:
            RuntimeError: the device fails, for example because its memory is full.
        """
        placement, kind = self._place(), self.kind(len(hashes))
        vectors = np.ascontiguousarray(vectors, np.float16)
        with placement.lock:
            if kind == "graph":
                graph = placement.build_graph(vectors)
                host = placement.to_host(graph)
                flat = _flat_on(placement, vectors)
                return DeviceSegment(hashes, host, placement=placement, graph=graph, flat=flat)
            host = build_faiss_index(vectors, "SQfp16")
            if kind == "flat":
                return DeviceSegment(hashes, host, placement=placement, flat=_flat_on(placement, vectors))
            codes = _codes_on(placement, vectors)
            host_codes = cast(faiss.IndexIVFPQ, placement.to_host(codes))
        segment = DeviceSegment(
            hashes, host, placement=placement, codes=codes, host_codes=host_codes, probes=_FIRST_PROBES
        )
        return _calibrated(segment, vectors)

    def restore(self, stored: StoredParts) -> DeviceSegment | None:
        """A saved segment on the device; None if another backend saved it."""
        placement = self._place()
        if stored.summary.get("placement") != placement.name or stored.vectors is not None:
            return None
        host = DeviceSegment(
            stored.hashes,
            stored.index,
            depth=stored.depth,
            placement=placement,
            probes=stored.summary["probes"],
        )
        with placement.lock:
            if stored.codes is not None:
                host_codes = cast(faiss.IndexIVFPQ, stored.codes)
                return replace(host, codes=placement.to_device(host_codes), host_codes=host_codes)
            graph = placement.to_device(stored.index) if host.has_graph else None
            flat = placement.to_device(faiss.IndexFlatIP(stored.index.d))
            for start in range(0, len(host), _READ_BATCH):
                append(flat, host.vectors(np.arange(start, min(start + _READ_BATCH, len(host)))))
            return replace(host, graph=graph, flat=flat)

    def is_current(self, segment: Segment) -> bool:
        """Whether a segment is as it would be built today."""
        return isinstance(segment, DeviceSegment) and segment.kind == self.kind(len(segment))

    def stop(self) -> None:
        """Does nothing: a build on a GPU cannot be interrupted."""


def _flat_on(placement: Placement, vectors: np.ndarray) -> faiss.Index:
    """An index on the device that compares every vector."""
    flat = placement.to_device(faiss.IndexFlatIP(vectors.shape[1]))
    append(flat, vectors)
    return flat


def _codes_on(placement: Placement, vectors: np.ndarray) -> faiss.Index:
    """PQ codes in inverted lists on the device, one byte for four components."""
    count, dimension = vectors.shape
    lists = max(min(int(_LISTS_PER_ROOT * count**0.5), count // _ROWS_PER_LIST), 1)
    empty = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(dimension),
        dimension,
        lists,
        subquantizer_count(dimension, _COMPONENTS_PER_BYTE),
        _CODE_BITS,
        faiss.METRIC_INNER_PRODUCT,
    )
    codes = placement.to_device(empty)
    codes.train(training_sample(vectors, max(_TRAINING_ROWS_PER_LIST * lists, _MIN_TRAINING_ROWS)))
    append(codes, vectors)
    return codes


def _calibrated(segment: DeviceSegment, vectors: np.ndarray) -> DeviceSegment:
    """The segment with as many lists and candidates as a recall of 0.98 on a sample of its rows needs."""
    sample = RecallSample.of(vectors.__getitem__, *vectors.shape)
    if sample is None:  # too many rows to measure
        return replace(segment, probes=max(segment._lists // 8, _FIRST_PROBES))
    while sample.recall(segment.search(sample.queries, sample.count, None).scores) < _TARGET_RECALL:
        depth = segment.depth
        if segment.probes < segment._lists:
            segment = replace(segment, probes=2 * segment.probes)
        elif 2 * depth.least <= _MAX_CANDIDATES:
            segment = replace(segment, depth=RefineDepth(2 * depth.least, 2 * depth.times))
        else:
            break
    return segment
