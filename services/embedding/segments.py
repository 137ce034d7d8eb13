"""Rows of an index that never change: item numbers and a FAISS index over their vectors.

Of a small segment all vectors are compared. A large one has codes of two bits a component (product
quantisation, Jégou et al., 2011, looked up in registers as by André et al., 2015): all are read, and the best
compared by their vectors. A very large one has a graph over the same rows as well (HNSW, Malkov and Yashunin,
2016).
Knows nothing of changes, and of filters no more than which rows may be found.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import faiss
import numpy as np
import torch

from services.embedding.calibration import UNMEASURED, Depth
from services.embedding.numbered import Numbered

_LEAST_WIDTH = 400
# A row's code took a three-hundredth of a node visited.
_CODES_PER_NODE = 300
# To compare a row takes as long as to read so many codes,
_CODES_PER_ROW = 40
# a candidate, which lies far from the others, takes as long as so many rows beside each other,
_ROWS_PER_CANDIDATE = 3
# and to read codes at all takes as long as so many rows: fewer have none.
_LEAST_CODED = 1500
# Codes were learned of other rows. H&M's departments, each coded by what was learned of the others, err up to
# 1.14 times as much; where recall fell, of drawn vectors, it was 2 at least (decision 0034).
_MOST_ERROR, _TRIED = 1.5, 1000
_COMPONENTS_PER_CODE, _CODE_BITS = 2, 4
_TRAINED_ON = 16_384
_CENTROIDS = 256  # a byte's
CODES = {"fp32": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
STORAGES = (*CODES, "pq")
"""How large segments keep components; fp16 is how SQL keeps them, so nothing is lost by it."""
_COMPARED_AT_ONCE, _FILLED_AT_ONCE = 1 << 14, 1 << 18
_BUILD_WIDTH = 80


class Nearest(NamedTuple):
    """Scores float32 and rows int64 (Q, K), best first, -1 where there are no more.

    Where they are `estimated`, by codes, they are candidates, more than were asked for.
    """

    scores: np.ndarray
    rows: np.ndarray
    estimated: bool = False


@dataclass(frozen=True, eq=False)
class Segment(Numbered):
    """`numbers` int64 (N,), all different, are the items of the rows of `index`, and of `codes` if any.

    Of the candidates that codes tell, `depth` many are compared by their vectors.
    """

    index: faiss.Index
    codes: faiss.IndexIVFPQFastScan | None = None
    depth: Depth = UNMEASURED

    _refines = True

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows, as they are stored."""
        if not len(rows):
            return np.empty((0, self.index.d), np.float32)
        # A quarter of the time that FAISS takes for each row by itself.
        stored = self._memory.take(rows, 0)
        if self.storage == "fp16":
            return widened(stored.view(np.float16))
        found: np.ndarray = self._stored.sa_decode(stored)
        return found

    def search(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, *, only_coded: bool = True
    ) -> Nearest:
        """The `count` nearest rows of each query, float32 (Q, D).

        Only rows of `live`, bool (N,), are found; none means all. Few are all compared. Where other segments
        have codes too, so that this is not the `only_coded` one, candidates are left to be told from theirs.
        """
        many = len(self) if live is None else int(np.count_nonzero(live))
        count = min(count, many)
        if not count:
            return Nearest(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        # faiss's type stubs do not know what its Python layer adds to these constructors.
        selector = None
        if live is not None and many < len(self):
            selector = faiss.IDSelectorBitmap(np.packbits(live, bitorder="little"))  # type: ignore[call-arg, arg-type]
        width = max(_LEAST_WIDTH, 2 * count) * len(self) // many
        if self._graph is not None and len(self) > _CODES_PER_NODE * width:
            wide = faiss.SearchParametersHNSW(sel=selector, efSearch=width)  # type: ignore[attr-defined]
            return self._walk(self._graph, queries, count, wide)
        deep = min(self.depth.of(count), many)
        if self.codes is None or many <= self._few(deep, only_coded=only_coded):
            return self._scan(queries, count, live, selector)
        ordered = only_coded and self._refines
        if ordered:
            told = self._refined.search(queries, count, params=_refine_parameters(deep / count, selector))
        else:
            told = self.codes.search(queries, deep, params=_codes_parameters(selector))
        near = Nearest(*told, estimated=not ordered)
        lost = near.rows[:, -1] < 0  # codes tell a query of zeros nothing
        if lost.any():
            found = self._scan(queries[lost], near.rows.shape[1], live, selector)
            near.scores[lost], near.rows[lost] = found.scores, found.rows
        return near

    def _scan(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, selector: faiss.IDSelector | None
    ) -> Nearest:
        chosen = None if selector is None else faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        return Nearest(*self._stored.search(queries, count, params=chosen))

    def _walk(
        self, graph: faiss.IndexHNSW, queries: np.ndarray, count: int, parameters: faiss.SearchParameters
    ) -> Nearest:
        return Nearest(*graph.search(queries, count, params=parameters))

    def beside(self, numbers: np.ndarray, vectors: np.ndarray) -> "Segment":
        """A segment of other rows; with codes like this one's, if they are many and such codes tell them."""
        made = scanned(numbers, vectors)
        if self.codes is None or len(numbers) < _LEAST_CODED:
            return made
        if len(self) <= self._few(self.depth.least, only_coded=True):  # they tell too little to be read
            return made
        if _error(self.codes, vectors) > _MOST_ERROR * self._own_error:
            return made
        codes = _no_codes(self.codes.d)
        codes.pq, codes.is_trained = self.codes.pq, True
        codes.quantizer.add(self.codes.quantizer.reconstruct_n(0, 1))
        append(codes, vectors)
        return replace(made, codes=codes, depth=self.depth)

    @property
    def storage(self) -> str:
        """How components are kept, one of `STORAGES`."""
        if not isinstance(self._stored, faiss.IndexScalarQuantizer):
            return "fp32"
        return "fp16" if self._stored.sq.qtype == faiss.ScalarQuantizer.QT_fp16 else "sq8"

    @property
    def large(self) -> bool:
        """Whether it is searched without reading every vector."""
        return self.codes is not None

    @property
    def has_graph(self) -> bool:
        """Whether it is searched by a graph where many rows may be found."""
        return self._graph is not None

    def _few(self, deep: int, *, only_coded: bool) -> int:
        """How many rows are compared in the time that codes take, with their candidates."""
        return len(self) // _CODES_PER_ROW + (_ROWS_PER_CANDIDATE * deep if only_coded else _LEAST_CODED)

    @cached_property
    def _graph(self) -> faiss.IndexHNSW | None:
        return self.index if isinstance(self.index, faiss.IndexHNSW) else None

    @cached_property
    def _stored(self) -> faiss.IndexFlatCodes:
        stored = self.index if self._graph is None else faiss.downcast_index(self._graph.storage)
        return cast(faiss.IndexFlatCodes, stored)

    @cached_property
    def _refined(self) -> faiss.IndexRefine:
        return faiss.IndexRefine(self.codes, self._stored)

    @cached_property
    def _memory(self) -> np.ndarray:
        """The memory of the vectors, uint8 (N, B): FAISS' own, so it lasts as long as `index` does."""
        codes = self._stored.codes
        kept: np.ndarray = faiss.rev_swig_ptr(codes.data(), codes.size())
        return kept.reshape(len(self), self._stored.code_size)

    @cached_property
    def _own_error(self) -> float:
        rows = np.random.default_rng(0).permutation(len(self))[:_TRIED]
        return _error(cast(faiss.IndexIVFPQFastScan, self.codes), self.vectors(rows))


@dataclass(frozen=True, eq=False)
class MappedSegment(Segment):
    """`exact` float16 (N, D) are the vectors, mapped from a file, as in DiskANN (Subramanya et al., 2019).

    Of memory they take the pages that searches read. What stands for them in a graph are other codes, of two
    bits a component too; without a graph `index` is `codes`.
    """

    exact: np.ndarray = field(kw_only=True)

    storage = "pq"
    _refines = False  # FAISS has no vectors to order candidates by

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows."""
        return widened(self.exact[rows])

    def _few(self, deep: int, *, only_coded: bool) -> int:
        return deep  # each may be a page of a disk

    def _scan(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, selector: faiss.IDSelector | None
    ) -> Nearest:
        rows = np.arange(len(self)) if live is None else np.flatnonzero(live)
        scores = np.empty((len(queries), len(rows)), np.float32)
        for start in range(0, len(rows), _COMPARED_AT_ONCE):
            some = slice(start, start + _COMPARED_AT_ONCE)
            scores[:, some] = queries @ self.vectors(rows[some]).T
        best = np.argsort(-scores, axis=1)[:, :count]
        return Nearest(np.take_along_axis(scores, best, 1), rows[best])

    def _walk(
        self, graph: faiss.IndexHNSW, queries: np.ndarray, count: int, parameters: faiss.SearchParameters
    ) -> Nearest:
        return Nearest(
            *graph.search(queries, min(self.depth.of(count), len(self)), params=parameters), estimated=True
        )


# To make and drop these takes as long as to compare a hundred vectors, so those of no selection are kept.
def _codes_parameters(selector: faiss.IDSelector | None) -> faiss.SearchParametersIVF:
    if selector is None:
        return _ALL_CODES
    return faiss.SearchParametersIVF(sel=selector, nprobe=1)  # type: ignore[call-arg]


def _refine_parameters(times: float, selector: faiss.IDSelector | None) -> faiss.IndexRefineSearchParameters:
    return _refine_everywhere(times) if selector is None else _refining(times, _codes_parameters(selector))


@lru_cache(8)
def _refine_everywhere(times: float) -> faiss.IndexRefineSearchParameters:
    return _refining(times, _ALL_CODES)


def _refining(times: float, codes: faiss.SearchParametersIVF) -> faiss.IndexRefineSearchParameters:
    return faiss.IndexRefineSearchParameters(k_factor=times, base_index_params=codes)  # type: ignore[call-arg]


_ALL_CODES = faiss.SearchParametersIVF(nprobe=1)  # type: ignore[call-arg]


def compared(
    found: Sequence[tuple[Segment, Nearest]], queries: np.ndarray, count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Item numbers int64 and scores float32 (K,) of each query, float32 (Q, D): the best `count`, unordered.

    Of all that was estimated the best are compared by their vectors, as many as of one segment: estimates of
    several are of the same products.
    """
    estimates = np.concatenate([near.scores for _, near in found], axis=1)
    most = max(segment.depth.of(count) for segment, _ in found)
    least = np.full(len(queries), -np.inf)
    if estimates.shape[1] > most:
        least = np.partition(estimates, -most)[:, -most]
    both = []
    for at, query in enumerate(queries):
        mine = [
            (segment, near.rows[at, (near.scores[at] >= least[at]) & (near.rows[at] >= 0)])
            for segment, near in found
        ]
        numbers = np.concatenate([segment.numbers[rows] for segment, rows in mine])
        scores = np.concatenate([segment.vectors(rows) @ query for segment, rows in mine])
        if len(scores) > count:
            best = np.argpartition(-scores, count)[:count]
            numbers, scores = numbers[best], scores[best]
        both.append((numbers, scores))
    return both


def widened(values: np.ndarray) -> np.ndarray:
    """Values float16 as float32."""
    found: np.ndarray = torch.from_numpy(values).float().numpy()  # a quarter of NumPy's time
    return found


def scanned(numbers: np.ndarray, vectors: np.ndarray, storage: str = "fp16") -> Segment:
    """A segment without a graph: `numbers` int64 (N,), `vectors` float (N, D) of unit length."""
    return Segment(numbers, filled(vectors, CODES[storage]))


def filled(vectors: np.ndarray, description: str) -> faiss.Index:
    """A FAISS index of vectors, float (N, D), as its factory describes it."""
    index = faiss.index_factory(vectors.shape[1], description, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = _BUILD_WIDTH
    if len(vectors) and not index.is_trained:
        index.train(np.ascontiguousarray(vectors, np.float32))
    append(index, vectors)
    return index


def coded(vectors: np.ndarray) -> faiss.IndexIVFPQFastScan:
    """Codes of vectors, float (N, D): four bits for two components, in one list: that honours selections."""
    index = _no_codes(vectors.shape[1])
    index.train(sampled(vectors, _TRAINED_ON))
    append(index, vectors)
    return index


def _no_codes(dimension: int) -> faiss.IndexIVFPQFastScan:
    index = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatIP(dimension),
        dimension,
        1,
        parts(dimension, _COMPONENTS_PER_CODE),
        _CODE_BITS,
        faiss.METRIC_INNER_PRODUCT,
    )
    index.by_residual = False
    return index


def _error(codes: faiss.IndexIVFPQFastScan, vectors: np.ndarray) -> float:
    """The mean of the squared distances between vectors and what their codes stand for."""
    some = np.ascontiguousarray(vectors[:: len(vectors) // _TRIED + 1], np.float32)
    told: Any = codes.pq.decode(codes.pq.compute_codes(some))  # type: ignore[call-arg, func-returns-value]
    return float(np.square(told - some).sum(1).mean())


def read_codes(path: Path) -> faiss.IndexIVFPQFastScan:
    """What `faiss.write_index` wrote of `coded`."""
    return cast(faiss.IndexIVFPQFastScan, faiss.read_index(str(path)))


def parts(dimension: int, most: int) -> int:
    """Into how many equal parts of at most so many components a vector can be cut."""
    return dimension // next(size for size in range(most, 0, -1) if dimension % size == 0)


def sampled(vectors: np.ndarray, most: int) -> np.ndarray:
    """Some of the vectors, float32 (M, D), some of them twice where they are few."""
    sample = np.random.default_rng(0).permutation(len(vectors))[:most]
    return np.ascontiguousarray(vectors[np.sort(np.resize(sample, max(len(sample), _CENTROIDS)))], np.float32)


def append(index: faiss.Index, vectors: np.ndarray) -> None:
    """Add vectors, float (N, D), some at a time: they may be mapped from a file that memory does not hold."""
    for start in range(0, len(vectors), _FILLED_AT_ONCE):
        index.add(np.ascontiguousarray(vectors[start : start + _FILLED_AT_ONCE], np.float32))
