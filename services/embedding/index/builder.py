"""Builds large segments in a low-priority process, because a build may take a core for minutes."""

import argparse
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, cast, runtime_checkable

import faiss
import numpy as np

from services.embedding.index.persistence import StoredParts
from services.embedding.index.placement import append
from services.embedding.index.refine_depth import RefineDepth, calibrate
from services.embedding.index.segment import (
    FAISS_CODECS,
    STORAGES,
    MappedSegment,
    Segment,
    build_faiss_index,
    build_pq_codes,
    read_pq_codes,
    subquantizer_count,
    training_sample,
)

LARGE_ROWS = 20_000
"""The number of rows from which PQ codes pay."""
_LINKS = 32
_COMPONENTS_PER_BYTE = 4
_TRAINING_ROWS = 65_536


class BuilderStopped(Exception):
    """The builder has been stopped."""


@runtime_checkable
class SegmentBuilder(Protocol):
    """Builds large segments, which are saved and restored.

    Raises:
        BuilderStopped: `stop` was called during a build.
        RuntimeError: a build failed.
    """

    def __call__(self, hashes: np.ndarray, vectors: np.ndarray) -> Segment:
        """Build a segment of `hashes` int64 (N,) and `vectors` float (N, D) of unit length."""

    def restore(self, stored: StoredParts) -> Segment | None:
        """A saved segment; None if this builder would have built another kind."""

    def is_current(self, segment: Segment) -> bool:
        """Whether a segment is as it would be built today."""

    def stop(self) -> None:
        """Stop a running build if that is possible, and build no more."""


class Builder:
    """Builds segments, one at a time, each in a low-priority process, until `stop`.

    Each segment has PQ codes; from `graph_rows` items on it also has an HNSW graph, 0 means never.
    """

    def __init__(self, storage: str = "fp16", graph_rows: int = 1) -> None:
        self.storage, self._graph_rows = storage, graph_rows
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def builds_graph(self, count: int) -> bool:
        """Whether a segment of `count` rows gets a graph."""
        return 0 < self._graph_rows <= count

    def __call__(self, hashes: np.ndarray, vectors: np.ndarray) -> Segment:
        """Build a segment of `hashes` int64 (N,) and `vectors` float (N, D) of unit length.

        Raises:
            BuilderStopped: `stop` was called.
            RuntimeError: the process failed; the message has its error output.
        """
        with TemporaryDirectory(prefix="vitrine-index-") as folder:
            names = ("vectors.npy", "index.faiss", "codes.faiss", "depth.json")
            vectors_path, index_path, codes_path, depth_path = paths = [Path(folder) / name for name in names]
            np.save(vectors_path, vectors.astype(np.float16, copy=False))
            process = self._start(*paths, graph=self.builds_graph(len(hashes)))
            _, errors = process.communicate()
            if self._stopped:
                raise BuilderStopped
            if process.returncode:
                raise RuntimeError(f"no index was built: {errors.strip()[-1000:]}")
            pq_codes = read_pq_codes(codes_path)
            index = faiss.read_index(str(index_path)) if index_path.exists() else pq_codes
            depth = RefineDepth(**json.loads(depth_path.read_text()))
            if self.storage == "pq":
                # The mapping outlives the file name.
                exact = np.load(vectors_path, mmap_mode="r")
                return MappedSegment(hashes, index, pq_codes, depth, exact=exact)
            return Segment(hashes, index, pq_codes, depth)

    def restore(self, stored: StoredParts) -> Segment | None:
        """See `SegmentBuilder`."""
        if stored.codes is None or "placement" in stored.summary:
            return None
        codes = cast(faiss.IndexIVFPQFastScan, stored.codes)
        if stored.vectors is None:
            segment = Segment(stored.hashes, stored.index, codes, stored.depth)
        else:
            segment = MappedSegment(stored.hashes, stored.index, codes, stored.depth, exact=stored.vectors)
        return segment if segment.storage == self.storage else None

    def is_current(self, segment: Segment) -> bool:
        """See `SegmentBuilder`."""
        return segment.has_graph == self.builds_graph(len(segment))

    def _start(self, *paths: Path, graph: bool) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "services.embedding.index.builder", *map(str, paths), self.storage]
        command += ["--graph"] if graph else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        with self._lock:
            if self._stopped:
                raise BuilderStopped
            self._process = subprocess.Popen(  # noqa: S603 - this file
                command, env=environment, stderr=subprocess.PIPE, text=True
            )
            return self._process

    def stop(self) -> None:
        """Kill the running build and start no more."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()


def main() -> None:
    """Build the index and PQ codes of a vector file and calibrate them; `Builder` starts this."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("index", type=Path)
    parser.add_argument("codes", type=Path)
    parser.add_argument("depth", type=Path)
    parser.add_argument("storage", choices=STORAGES)
    parser.add_argument("--graph", action="store_true")
    options = parser.parse_args()
    os.nice(10)
    vectors = np.load(options.vectors, mmap_mode="r")
    pq_codes = build_pq_codes(vectors)
    faiss.write_index(pq_codes, str(options.codes))
    options.depth.write_text(json.dumps(asdict(calibrate(pq_codes, vectors))))
    storage = FAISS_CODECS.get(options.storage, FAISS_CODECS["fp16"])
    if options.storage != "pq":
        prefix = f"HNSW{_LINKS}," if options.graph else ""
        faiss.write_index(build_faiss_index(vectors, prefix + storage), str(options.index))
    elif options.graph:
        graph = build_faiss_index(vectors, f"HNSW{_LINKS},{storage}")
        faiss.write_index(_graph_over_codes(graph, _byte_codes(vectors)), str(options.index))


def _byte_codes(vectors: np.ndarray) -> faiss.IndexPQ:
    """PQ codes of one byte per four components."""
    dimension = vectors.shape[1]
    index = faiss.IndexPQ(
        dimension, subquantizer_count(dimension, _COMPONENTS_PER_BYTE), 8, faiss.METRIC_INNER_PRODUCT
    )
    index.train(training_sample(vectors, _TRAINING_ROWS))
    append(index, vectors)
    return index


def _graph_over_codes(graph: faiss.Index, coder: faiss.IndexPQ) -> faiss.Index:
    """The same graph over PQ codes; it was built on the exact vectors."""
    index = faiss.IndexHNSWPQ()  # type: ignore[call-arg] # of its overloads
    for name in ("d", "ntotal", "is_trained", "metric_type", "hnsw"):
        setattr(index, name, getattr(graph, name))
    index.storage, index.own_fields = coder, True
    coder.this.disown()  # type: ignore[attr-defined] # added by SWIG
    return index


if __name__ == "__main__":
    main()
