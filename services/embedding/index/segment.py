"""Immutable index segments: item hashes and a FAISS index over their vectors.

A search of a small segment scans all vectors. A large segment has PQ codes of two bits per component (product
quantization, Jégou et al., 2011, with look-up tables in registers, André et al., 2015): a search scans all
codes and reranks the best candidates by their vectors. A very large segment also has an HNSW graph over the
same rows (Malkov and Yashunin, 2016). Segments do not handle changes; a filter is a mask of rows.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import faiss
import numpy as np
import torch

from services.embedding.index.id_map import IdMap
from services.embedding.index.placement import append
from services.embedding.index.refine_depth import UNMEASURED, RefineDepth

_MIN_SEARCH_WIDTH = 400
# Scanning a code takes 1/300 of the time of visiting a graph node.
_CODES_PER_NODE = 300
# Scoring a row by its vector takes as long as scanning that many codes.
_CODES_PER_ROW = 40
# Reranking a candidate at a random address takes as long as scoring that many adjacent rows.
_ROWS_PER_CANDIDATE = 3
# The fixed cost of scanning codes equals scoring that many rows; smaller segments have no codes.
_MIN_CODED_ROWS = 1500
# The limit for reusing the codebook of other rows. On H&M, a codebook from other departments raises the error
# up to 1.14 times; recall fell for synthetic vectors, where the error was at least 2 times (decision 0034).
_MAX_ERROR_RATIO, _ERROR_SAMPLE = 1.5, 1000
_COMPONENTS_PER_CODE, _CODE_BITS = 2, 4
_TRAINING_ROWS = 16_384
_CENTROIDS = 256  # of a one-byte code
FAISS_CODECS = {"fp32": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
STORAGES = (*FAISS_CODECS, "pq")
"""How large segments store components; fp16 loses nothing, because SQL stores fp16."""
_SCORE_BATCH = 1 << 14
_BUILD_WIDTH = 80


class SegmentHits(NamedTuple):
    """Scores float32 and rows int64 (Q, K), best first; row -1 means no further hit.

    `estimated` scores come from PQ codes; then there are more candidates than requested, to be reranked.
    """

    scores: np.ndarray
    rows: np.ndarray
    estimated: bool = False


@dataclass(frozen=True, eq=False)
class Segment(IdMap):
    """`hashes` int64 (N,), all different, are the items of the rows of `index`, and of `pq_codes` if any.

    `depth` is how many candidates of the PQ codes are reranked by their vectors.
    """

    index: faiss.Index
    pq_codes: faiss.IndexIVFPQFastScan | None = None
    depth: RefineDepth = UNMEASURED

    _reranks_in_faiss = True

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows, as they are stored."""
        if not len(rows):
            return np.empty((0, self.index.d), np.float32)
        # A quarter of the time of one FAISS call per row.
        stored = self._vector_bytes.take(rows, 0)
        if self.storage == "fp16":
            return as_float32(stored.view(np.float16))
        decoded: np.ndarray = self._stored.sa_decode(stored)
        return decoded

    def search(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, *, only_coded: bool = True
    ) -> SegmentHits:
        """The `count` nearest rows of each query, float32 (Q, D).

        Only rows of the mask `live`, bool (N,), are returned; None means all rows. Few rows are scanned
        exactly. If other segments have codes too, that is, this is not the `only_coded` one, the result is
        candidates, which the caller reranks with theirs.
        """
        many = len(self) if live is None else int(np.count_nonzero(live))
        count = min(count, many)
        if not count:
            return SegmentHits(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        # The type stubs of FAISS lack the constructor arguments that its Python layer adds.
        selector = None
        if live is not None and many < len(self):
            selector = faiss.IDSelectorBitmap(np.packbits(live, bitorder="little"))  # type: ignore[call-arg, arg-type]
        width = max(_MIN_SEARCH_WIDTH, 2 * count) * len(self) // many
        if self._graph is not None and len(self) > _CODES_PER_NODE * width:
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=width)  # type: ignore[attr-defined]
            return self._walk(self._graph, queries, count, parameters)
        depth = min(self.depth.of(count), many)
        if self.pq_codes is None or many <= self._max_scanned(depth, only_coded=only_coded):
            return self._scan(queries, count, live, selector)
        reranked = only_coded and self._reranks_in_faiss
        if reranked:
            result = self._refined.search(queries, count, params=_refine_parameters(depth / count, selector))
        else:
            result = self.pq_codes.search(queries, depth, params=_codes_parameters(selector))
        hits = SegmentHits(*result, estimated=not reranked)
        incomplete = hits.rows[:, -1] < 0  # codes return nothing for a query of zeros
        if incomplete.any():
            exact = self._scan(queries[incomplete], hits.rows.shape[1], live, selector)
            hits.scores[incomplete], hits.rows[incomplete] = exact.scores, exact.rows
        return hits

    def _scan(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, selector: faiss.IDSelector | None
    ) -> SegmentHits:
        parameters = None if selector is None else faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        return SegmentHits(*self._stored.search(queries, count, params=parameters))

    def _walk(
        self, graph: faiss.IndexHNSW, queries: np.ndarray, count: int, parameters: faiss.SearchParameters
    ) -> SegmentHits:
        return SegmentHits(*graph.search(queries, count, params=parameters))

    def sibling(self, hashes: np.ndarray, vectors: np.ndarray) -> "Segment":
        """A segment of other rows, with this codebook if the rows are many and the codes accurate."""
        segment = flat_segment(hashes, vectors)
        if self.pq_codes is None or len(hashes) < _MIN_CODED_ROWS:
            return segment
        if len(self) <= self._max_scanned(self.depth.least, only_coded=True):  # the codes are too inaccurate
            return segment
        if _error(self.pq_codes, vectors) > _MAX_ERROR_RATIO * self._own_error:
            return segment
        pq_codes = _empty_pq_codes(self.pq_codes.d)
        pq_codes.pq, pq_codes.is_trained = self.pq_codes.pq, True
        pq_codes.quantizer.add(self.pq_codes.quantizer.reconstruct_n(0, 1))
        append(pq_codes, vectors)
        return replace(segment, pq_codes=pq_codes, depth=self.depth)

    @cached_property
    def storage(self) -> str:
        """How components are stored, one of `STORAGES`."""
        if not isinstance(self._stored, faiss.IndexScalarQuantizer):
            return "fp32"
        return "fp16" if self._stored.sq.qtype == faiss.ScalarQuantizer.QT_fp16 else "sq8"

    @property
    def stored_codes(self) -> faiss.Index | None:
        """The codes to save."""
        return self.pq_codes

    @property
    def details(self) -> dict[str, Any]:
        """What a loader needs besides the indexes, as JSON values."""
        return {"depth": asdict(self.depth)}

    @property
    def large(self) -> bool:
        """Whether a search does not read every vector."""
        return self.pq_codes is not None

    @property
    def is_approximate(self) -> bool:
        """Whether a search may miss a nearest row."""
        return self.pq_codes is not None or self.has_graph

    @property
    def has_graph(self) -> bool:
        """Whether there is an HNSW graph, used if many rows are live."""
        return self._graph is not None

    def _max_scanned(self, depth: int, *, only_coded: bool) -> int:
        """How many rows an exact scan scores in the time of scanning the codes and reranking."""
        return len(self) // _CODES_PER_ROW + (_ROWS_PER_CANDIDATE * depth if only_coded else _MIN_CODED_ROWS)

    @cached_property
    def _graph(self) -> faiss.IndexHNSW | None:
        return self.index if isinstance(self.index, faiss.IndexHNSW) else None

    @cached_property
    def _stored(self) -> faiss.IndexFlatCodes:
        stored = self.index if self._graph is None else faiss.downcast_index(self._graph.storage)
        return cast(faiss.IndexFlatCodes, stored)

    @cached_property
    def _refined(self) -> faiss.IndexRefine:
        return faiss.IndexRefine(self.pq_codes, self._stored)

    @cached_property
    def _vector_bytes(self) -> np.ndarray:
        """The encoded vectors, uint8 (N, B): a view of FAISS memory, valid as long as `index`."""
        codes = self._stored.codes
        view: np.ndarray = faiss.rev_swig_ptr(codes.data(), codes.size())
        return view.reshape(len(self), self._stored.code_size)

    @cached_property
    def _own_error(self) -> float:
        rows = np.random.default_rng(0).permutation(len(self))[:_ERROR_SAMPLE]
        return _error(cast(faiss.IndexIVFPQFastScan, self.pq_codes), self.vectors(rows))


@dataclass(frozen=True, eq=False)
class MappedSegment(Segment):
    """`exact` float16 (N, D) are the vectors, mapped from a file, as in DiskANN (Subramanya et al., 2019).

    They take only the memory of the pages that searches read. In a graph, separate codes of two bits per
    component represent them; without a graph `index` is `pq_codes`.
    """

    exact: np.ndarray = field(kw_only=True)

    storage = "pq"
    _reranks_in_faiss = False  # FAISS has no vectors for reranking

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows."""
        return as_float32(self.exact[rows])

    def _max_scanned(self, depth: int, *, only_coded: bool) -> int:
        return depth  # each row may be a disk page

    def _scan(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, selector: faiss.IDSelector | None
    ) -> SegmentHits:
        rows = np.arange(len(self)) if live is None else np.flatnonzero(live)
        scores = np.empty((len(queries), len(rows)), np.float32)
        for start in range(0, len(rows), _SCORE_BATCH):
            page = slice(start, start + _SCORE_BATCH)
            scores[:, page] = queries @ self.vectors(rows[page]).T
        best = np.argsort(-scores, axis=1)[:, :count]
        return SegmentHits(np.take_along_axis(scores, best, 1), rows[best])

    def _walk(
        self, graph: faiss.IndexHNSW, queries: np.ndarray, count: int, parameters: faiss.SearchParameters
    ) -> SegmentHits:
        return SegmentHits(
            *graph.search(queries, min(self.depth.of(count), len(self)), params=parameters), estimated=True
        )


# Creating these parameters takes as long as scoring a hundred vectors, so those without a selector are
# cached.
def _codes_parameters(selector: faiss.IDSelector | None) -> faiss.SearchParametersIVF:
    if selector is None:
        return _UNFILTERED
    return faiss.SearchParametersIVF(sel=selector, nprobe=1)  # type: ignore[call-arg]


def _refine_parameters(times: float, selector: faiss.IDSelector | None) -> faiss.IndexRefineSearchParameters:
    return (
        _unfiltered_refine(times)
        if selector is None
        else _refine_search_parameters(times, _codes_parameters(selector))
    )


@lru_cache(8)
def _unfiltered_refine(times: float) -> faiss.IndexRefineSearchParameters:
    return _refine_search_parameters(times, _UNFILTERED)


def _refine_search_parameters(
    times: float, codes: faiss.SearchParametersIVF
) -> faiss.IndexRefineSearchParameters:
    return faiss.IndexRefineSearchParameters(k_factor=times, base_index_params=codes)  # type: ignore[call-arg]


_UNFILTERED = faiss.SearchParametersIVF(nprobe=1)  # type: ignore[call-arg]


def refine_candidates(
    results: Sequence[tuple[Segment, SegmentHits]], queries: np.ndarray, count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rerank estimated hits of several segments by their vectors, for queries float32 (Q, D).

    Returns item hashes int64 and scores float32 (K,) of each query: the best `count`, unordered. The
    estimates of all segments are comparable, so the best of all are reranked, as many as for a single
    segment.
    """
    estimates = np.concatenate([hits.scores for _, hits in results], axis=1)
    depth = max(segment.depth.of(count) for segment, _ in results)
    threshold = np.full(len(queries), -np.inf)
    if estimates.shape[1] > depth:
        threshold = np.partition(estimates, -depth)[:, -depth]
    reranked = []
    for index, query in enumerate(queries):
        candidates = [
            (segment, hits.rows[index, (hits.scores[index] >= threshold[index]) & (hits.rows[index] >= 0)])
            for segment, hits in results
        ]
        hashes = np.concatenate([segment.hashes[rows] for segment, rows in candidates])
        scores = np.concatenate([segment.vectors(rows) @ query for segment, rows in candidates])
        if len(scores) > count:
            best = np.argpartition(-scores, count)[:count]
            hashes, scores = hashes[best], scores[best]
        reranked.append((hashes, scores))
    return reranked


def as_float32(values: np.ndarray) -> np.ndarray:
    """Convert float16 to float32."""
    converted: np.ndarray = torch.from_numpy(values).float().numpy()  # a quarter of NumPy's time
    return converted


def flat_segment(hashes: np.ndarray, vectors: np.ndarray, storage: str = "fp16") -> Segment:
    """A segment without codes and graph: `hashes` int64 (N,), `vectors` float (N, D) of unit length."""
    return Segment(hashes, build_faiss_index(vectors, FAISS_CODECS[storage]))


def build_faiss_index(vectors: np.ndarray, description: str) -> faiss.Index:
    """A FAISS index of vectors, float (N, D), by a description for FAISS' index factory."""
    index = faiss.index_factory(vectors.shape[1], description, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = _BUILD_WIDTH
    if len(vectors) and not index.is_trained:
        index.train(np.ascontiguousarray(vectors, np.float32))
    append(index, vectors)
    return index


def build_pq_codes(vectors: np.ndarray) -> faiss.IndexIVFPQFastScan:
    """PQ codes of vectors, float (N, D): four bits per two components, in one list for selectors."""
    index = _empty_pq_codes(vectors.shape[1])
    index.train(training_sample(vectors, _TRAINING_ROWS))
    append(index, vectors)
    return index


def _empty_pq_codes(dimension: int) -> faiss.IndexIVFPQFastScan:
    index = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatIP(dimension),
        dimension,
        1,
        subquantizer_count(dimension, _COMPONENTS_PER_CODE),
        _CODE_BITS,
        faiss.METRIC_INNER_PRODUCT,
    )
    index.by_residual = False
    return index


def _error(pq_codes: faiss.IndexIVFPQFastScan, vectors: np.ndarray) -> float:
    """The mean squared distance between vectors and their decoded codes."""
    sample = np.ascontiguousarray(vectors[:: len(vectors) // _ERROR_SAMPLE + 1], np.float32)
    decoded: Any = pq_codes.pq.decode(pq_codes.pq.compute_codes(sample))  # type: ignore[call-arg, func-returns-value]
    return float(np.square(decoded - sample).sum(1).mean())


def read_pq_codes(path: Path) -> faiss.IndexIVFPQFastScan:
    """Read PQ codes that `faiss.write_index` wrote."""
    return cast(faiss.IndexIVFPQFastScan, faiss.read_index(str(path)))


def subquantizer_count(dimension: int, max_size: int) -> int:
    """The number of equal parts of at most `max_size` components that a vector splits into."""
    return dimension // next(size for size in range(max_size, 0, -1) if dimension % size == 0)


def training_sample(vectors: np.ndarray, size: int) -> np.ndarray:
    """A random sample of the vectors, float32 (M, D); few vectors are repeated."""
    sample = np.random.default_rng(0).permutation(len(vectors))[:size]
    return np.ascontiguousarray(vectors[np.sort(np.resize(sample, max(len(sample), _CENTROIDS)))], np.float32)
