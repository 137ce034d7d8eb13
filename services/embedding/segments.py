"""Rows of an index that never change: item numbers and a FAISS index over their vectors.

Of a small segment all vectors are compared. A large one has codes of two bits a component (product
quantisation, Jégou et al., 2011, looked up in registers as by André et al., 2015): all are read, and the best
compared by their vectors. A very large one has a graph over the same rows as well (HNSW, Malkov and Yashunin,
2016).
Knows nothing of changes, and of filters no more than which rows may be found.
"""

import json
import logging
import os
import threading
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
import torch

from services.embedding.numbered import Numbered

_LEAST_WIDTH = 400
# A row's code took a three-hundredth of a node visited.
_CODES_PER_NODE = 300
# Of what is found by codes so many times more than asked for is compared by vectors, and at least so many:
# items that are nearly one have nearly one code.
_LED, _LEAST_LED = 3, 1000
# What codes lead to lies far apart: a row that is read with its neighbours took a seventh of that.
_FEW = 7
_COMPONENTS_PER_CODE, _CODE_BITS = 2, 4
_TRAINED_ON = 16_384
_CENTROIDS = 256  # a byte's
CODES = {"fp32": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
STORAGES = (*CODES, "pq")
"""How large segments keep components; fp16 is how SQL keeps them, so nothing is lost by it."""
_COMPARED_AT_ONCE, _FILLED_AT_ONCE = 1 << 14, 1 << 18
_BUILD_WIDTH = 80
_KEEPING = threading.Lock()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Segment(Numbered):
    """`numbers` int64 (N,), all different, are the items of the rows of `index`, and of `codes` if any."""

    index: faiss.Index
    codes: faiss.Index | None = None

    _few = _FEW

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows, as they are stored."""
        if not len(rows):
            return np.empty((0, self.index.d), np.float32)
        found: np.ndarray = self._stored.reconstruct_batch(rows)
        return found

    def search(
        self, queries: np.ndarray, count: int, live: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and rows int64 (Q, K), best first, -1 where there are no more.

        Only rows of `live`, bool (N,), are found; none means all. Few are all compared.
        """
        many = len(self) if live is None else int(np.count_nonzero(live))
        count = min(count, many)
        if not count:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        # faiss's type stubs do not know what its Python layer adds to these constructors.
        selector = None
        if live is not None and many < len(self):
            selector = faiss.IDSelectorBitmap(np.packbits(live, bitorder="little"))  # type: ignore[call-arg, arg-type]
        if self.codes is None or many <= self._few * _led(count):
            return self._scan(queries, count, live, selector)
        width = max(_LEAST_WIDTH, 2 * count) * len(self) // many
        if self._graph is not None and len(self) > _CODES_PER_NODE * width:
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=width)  # type: ignore[attr-defined]
            return self._walk(self._graph, queries, count, parameters)
        by_codes = faiss.SearchParametersIVF(sel=selector, nprobe=1)  # type: ignore[call-arg]
        scores, rows = self._by_codes(queries, count, by_codes)
        lost = rows[:, -1] < 0  # codes tell a query of zeros nothing
        if lost.any():
            scores[lost], rows[lost] = self._scan(queries[lost], count, live, selector)
        return scores, rows

    def _scan(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, selector: faiss.IDSelector | None
    ) -> tuple[np.ndarray, np.ndarray]:
        parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        return self._stored.search(queries, count, params=parameters)

    def _by_codes(
        self, queries: np.ndarray, count: int, parameters: faiss.SearchParameters
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best by their vectors of the best by their codes."""
        times = _led(count) / count
        deeper = faiss.IndexRefineSearchParameters(k_factor=times, base_index_params=parameters)  # type: ignore[call-arg]
        return self._refined.search(queries, count, params=deeper)

    def _walk(
        self, graph: faiss.IndexHNSW, queries: np.ndarray, count: int, parameters: faiss.SearchParameters
    ) -> tuple[np.ndarray, np.ndarray]:
        return graph.search(queries, count, params=parameters)

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

    @cached_property
    def _graph(self) -> faiss.IndexHNSW | None:
        return self.index if isinstance(self.index, faiss.IndexHNSW) else None

    @cached_property
    def _stored(self) -> faiss.Index:
        return self.index if self._graph is None else faiss.downcast_index(self._graph.storage)

    @cached_property
    def _refined(self) -> faiss.IndexRefine:
        return faiss.IndexRefine(self.codes, self._stored)


@dataclass(frozen=True, eq=False)
class MappedSegment(Segment):
    """`exact` float16 (N, D) are the vectors, mapped from a file, as in DiskANN (Subramanya et al., 2019).

    Of memory they take the pages that searches read. What stands for them in a graph are other codes, of two
    bits a component too; without a graph `index` is `codes`.
    """

    exact: np.ndarray = field(kw_only=True)

    storage = "pq"
    _few = 1  # each may be a page of a disk

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows."""
        found: np.ndarray = torch.from_numpy(self.exact[rows]).float().numpy()  # a quarter of NumPy's time
        return found

    def _scan(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, selector: faiss.IDSelector | None
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(len(self)) if live is None else np.flatnonzero(live)
        scores = np.empty((len(queries), len(rows)), np.float32)
        for start in range(0, len(rows), _COMPARED_AT_ONCE):
            some = slice(start, start + _COMPARED_AT_ONCE)
            scores[:, some] = queries @ self.vectors(rows[some]).T
        best = np.argsort(-scores, axis=1)[:, :count]
        return np.take_along_axis(scores, best, 1), rows[best]

    def _walk(
        self, graph: faiss.IndexHNSW, queries: np.ndarray, count: int, parameters: faiss.SearchParameters
    ) -> tuple[np.ndarray, np.ndarray]:
        _, rows = graph.search(queries, min(_led(count), len(self)), params=parameters)
        return self._ordered(queries, count, rows)

    def _by_codes(
        self, queries: np.ndarray, count: int, parameters: faiss.SearchParameters
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self.codes is not None  # noqa: S101 - who is asked has them
        _, rows = self.codes.search(queries, min(_led(count), len(self)), params=parameters)
        return self._ordered(queries, count, rows)

    def _ordered(self, queries: np.ndarray, count: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each query's `rows`, int64 (Q, R), -1 for none, the best by their vectors."""
        scores = np.empty(rows.shape, np.float32)
        for query, mine, here in zip(queries, rows, scores, strict=True):
            here[:] = self.vectors(mine) @ query
        scores[rows < 0] = -np.inf
        best = np.argsort(-scores, axis=1)[:, :count]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)


def _led(count: int) -> int:
    """How many rows are compared by their vectors where so many are asked for."""
    return max(_LED * count, _LEAST_LED)


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
    dimension = vectors.shape[1]
    index = faiss.IndexIVFPQFastScan(
        faiss.IndexFlatIP(dimension),
        dimension,
        1,
        parts(dimension, _COMPONENTS_PER_CODE),
        _CODE_BITS,
        faiss.METRIC_INNER_PRODUCT,
    )
    index.by_residual = False
    index.train(sampled(vectors, _TRAINED_ON))
    append(index, vectors)
    return index


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


def save(segment: Segment, store: str, sequence: int, directory: Path) -> None:
    """Keep a segment that holds everything of a store up to a sequence number; replaces what was kept.

    Its files have names of their own, and one that is renamed last names them: nothing is there until all
    of it is. One process saves and loads one segment at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {"store": store, "sequence": sequence, "rows": len(segment), "dimension": segment.index.d}
    arrays, indexes = {"numbers": segment.numbers}, {"index": segment.index}
    if segment.codes is not None:
        indexes |= {"codes": segment.codes}
    if segment.index is segment.codes:
        del indexes["index"]
    if isinstance(segment, MappedSegment):
        arrays["vectors"] = segment.exact
    with _KEEPING:
        name = uuid.uuid4().hex
        files = {kind: directory / f"{name}.{kind}" for kind in (*indexes, *arrays)}
        for kind, index in indexes.items():
            faiss.write_index(index, str(files[kind]))
        for kind, values in arrays.items():
            with files[kind].open("wb") as file:
                np.save(file, values)
        told = directory / f"{name}.json"
        told.write_text(json.dumps(written | {kind: path.name for kind, path in files.items()}) + "\n")
        for path in (*files.values(), told):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        told.rename(directory / "segment.json")
        for path in directory.iterdir():
            if path.name != "segment.json" and path not in files.values():
                path.unlink()


def load(directory: Path, store: str, dimension: int, storage: str = "fp16") -> tuple[Segment, int] | None:
    """What `save` kept of a store, and its sequence number; None, with a line in the log, if unusable."""
    if not (directory / "segment.json").is_file():
        return None
    try:
        with _KEEPING:
            written = json.loads((directory / "segment.json").read_text())
            numbers = np.load(directory / written["numbers"])
            if "codes" not in written:
                raise ValueError("an earlier build made it")
            codes = faiss.read_index(str(directory / written["codes"]))
            index = faiss.read_index(str(directory / written["index"])) if "index" in written else codes
            shape, whole = (len(numbers), dimension), len(numbers) == written["rows"]
            whole = whole and all((one.ntotal, one.d) == shape for one in (index, codes))
            segment = Segment(numbers, index, codes)
            if "vectors" in written:
                exact = np.load(directory / written["vectors"], mmap_mode="r")
                whole = whole and exact.shape == shape
                segment = MappedSegment(numbers, index, codes, exact=exact)
        if whole and written["store"] == store and segment.storage == storage:
            return segment, int(written["sequence"])
        reason = "is of another store, encoder or storage"
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = f"is damaged: {error!r}"
    _log.warning("the index in %s %s; it is built again", directory, reason)
    return None
