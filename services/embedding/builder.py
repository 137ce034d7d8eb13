"""Builds large segments in a process of low priority, since that may take a core for minutes."""

import argparse
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np

from services.embedding.calibration import Depth, calibrated
from services.embedding.segments import (
    CODES,
    STORAGES,
    MappedSegment,
    Segment,
    append,
    coded,
    filled,
    parts,
    read_codes,
    sampled,
)

LARGE_ROWS = 20_000
"""From how many rows on codes are worth their making."""
_LINKS = 32
_COMPONENTS_PER_BYTE = 4
_TRAINED_ON = 65_536


class BuilderStopped(Exception):
    """No more segments are built."""


class Builder:
    """Builds segments, one at a time, each in a process of low priority; `stop` ends that.

    Each has codes; one of `graph_rows` items and more has a graph too, where that is not 0.
    """

    def __init__(self, storage: str = "fp16", graph_rows: int = 1) -> None:
        self.storage, self._graph_rows = storage, graph_rows
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def lays_graph(self, count: int) -> bool:
        """Whether a segment of so many rows has a graph."""
        return 0 < self._graph_rows <= count

    def __call__(self, numbers: np.ndarray, vectors: np.ndarray) -> Segment:
        """A segment of `numbers` int64 (N,) and `vectors` float (N, D) of unit length.

        Raises:
            BuilderStopped: meanwhile or before.
            RuntimeError: the process failed; the message holds what it said.
        """
        with TemporaryDirectory(prefix="vitrine-index-") as folder:
            names = ("vectors.npy", "index.faiss", "codes.faiss", "depth.json")
            given, made, codes, depth = paths = [Path(folder) / name for name in names]
            np.save(given, vectors.astype(np.float16, copy=False))
            process = self._start(*paths, graph=self.lays_graph(len(numbers)))
            _, said = process.communicate()
            if self._stopped:
                raise BuilderStopped
            if process.returncode:
                raise RuntimeError(f"no index was built: {said.strip()[-1000:]}")
            read = read_codes(codes)
            index = faiss.read_index(str(made)) if made.exists() else read
            deep = Depth(**json.loads(depth.read_text()))
            if self.storage == "pq":
                # Mapped, so it stays when its name goes.
                return MappedSegment(numbers, index, read, deep, exact=np.load(given, mmap_mode="r"))
            return Segment(numbers, index, read, deep)

    def _start(self, *paths: Path, graph: bool) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "services.embedding.builder", *map(str, paths), self.storage]
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
        """Kill what runs and start nothing more."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()


def main() -> None:
    """Build an index and codes of a file of vectors, and measure these; what `Builder` starts."""
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
    codes = coded(vectors)
    faiss.write_index(codes, str(options.codes))
    options.depth.write_text(json.dumps(asdict(calibrated(codes, vectors))))
    stored = CODES.get(options.storage, CODES["fp16"])
    if options.storage != "pq":
        laid = f"HNSW{_LINKS}," if options.graph else ""
        faiss.write_index(filled(vectors, laid + stored), str(options.index))
    elif options.graph:
        graph = filled(vectors, f"HNSW{_LINKS},{stored}")
        faiss.write_index(_over_codes(graph, _bytes(vectors)), str(options.index))


def _bytes(vectors: np.ndarray) -> faiss.IndexPQ:
    """Codes of a byte for each four components."""
    dimension = vectors.shape[1]
    index = faiss.IndexPQ(dimension, parts(dimension, _COMPONENTS_PER_BYTE), 8, faiss.METRIC_INNER_PRODUCT)
    index.train(sampled(vectors, _TRAINED_ON))
    append(index, vectors)
    return index


def _over_codes(graph: faiss.Index, coder: faiss.IndexPQ) -> faiss.Index:
    """The same graph over codes: it was laid through the vectors themselves."""
    coded = faiss.IndexHNSWPQ()  # type: ignore[call-arg] # of its overloads
    for name in ("d", "ntotal", "is_trained", "metric_type", "hnsw"):
        setattr(coded, name, getattr(graph, name))
    coded.storage, coded.own_fields = coder, True
    coder.this.disown()  # type: ignore[attr-defined] # what SWIG adds
    return coded


if __name__ == "__main__":
    main()
