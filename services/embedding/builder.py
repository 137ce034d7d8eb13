"""Builds large segments in a process of low priority, since that takes a core for minutes."""

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np

from services.embedding.segments import CODES, STORAGES, CodedSegment, Segment, append, filled

_LINKS = 32
_COMPONENTS_PER_BYTE = 4
_TRAINED_ON = 65_536


class BuilderStopped(Exception):
    """No more graphs are built."""


class Builder:
    """Builds segments with a graph, one at a time, each in a process of low priority; `stop` ends that."""

    def __init__(self, storage: str = "fp16") -> None:
        self.storage = storage
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def __call__(self, numbers: np.ndarray, vectors: np.ndarray) -> Segment:
        """A segment of `numbers` int64 (N,) and `vectors` float (N, D) of unit length.

        Raises:
            BuilderStopped: meanwhile or before.
            RuntimeError: the process failed; the message holds what it said.
        """
        with TemporaryDirectory(prefix="vitrine-index-") as folder:
            given, made = Path(folder) / "vectors.npy", Path(folder) / "index.faiss"
            np.save(given, vectors.astype(np.float16, copy=False))
            process = self._start(given, made)
            _, said = process.communicate()
            if self._stopped:
                raise BuilderStopped
            if process.returncode:
                raise RuntimeError(f"no index was built: {said.strip()[-1000:]}")
            index = faiss.read_index(str(made))
            if self.storage == "pq":
                # Mapped, so it stays when its name goes.
                return CodedSegment(numbers, index, np.load(given, mmap_mode="r"))
            return Segment(numbers, index)

    def _start(self, given: Path, made: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "services.embedding.builder", str(given), str(made), self.storage]
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
    """Build a graph over a file of vectors; what `Builder` starts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("storage", choices=STORAGES)
    options = parser.parse_args()
    os.nice(10)
    vectors = np.load(options.vectors, mmap_mode="r")
    index = filled(vectors, f"HNSW{_LINKS},{CODES.get(options.storage, CODES['fp16'])}")
    if options.storage == "pq":
        index = _coded(index, vectors)
    faiss.write_index(index, str(options.out))


def _coded(graph: faiss.Index, vectors: np.ndarray) -> faiss.Index:
    """The same graph over codes of a byte for four components: it was laid through the vectors themselves."""
    most = max(graph.d // _COMPONENTS_PER_BYTE, 1)
    codes = next(count for count in range(most, 0, -1) if graph.d % count == 0)
    coder = faiss.IndexPQ(graph.d, codes, 8, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(len(vectors))[:_TRAINED_ON]
    # Of fewer rows than centroids some are taken again: codes then hold each of them.
    sample = np.resize(sample, max(len(sample), coder.pq.ksub))
    coder.train(np.ascontiguousarray(vectors[np.sort(sample)], np.float32))
    append(coder, vectors)
    coded = faiss.IndexHNSWPQ()  # type: ignore[call-arg] # of its overloads
    for name in ("d", "ntotal", "is_trained", "metric_type", "hnsw"):
        setattr(coded, name, getattr(graph, name))
    coded.storage, coded.own_fields = coder, True
    coder.this.disown()  # type: ignore[attr-defined] # what SWIG adds
    return coded


if __name__ == "__main__":
    main()
