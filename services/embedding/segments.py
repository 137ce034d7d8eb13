"""Rows of an index that never change: item numbers and a FAISS index over their vectors.

A small segment is scanned, a large one has a graph over the same rows (HNSW, Malkov and Yashunin, 2016),
which a process of its own builds, since that takes a core for minutes. Knows nothing of changes, and
of filters no more than which rows may be found.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np

from services.embedding.numbered import Numbered

_LINKS, _BUILD_WIDTH = 32, 80
_LEAST_WIDTH = 400
# On 105,542 texts of H&M x 384 a row scanned took a twentieth of a node visited.
_ROWS_PER_NODE = 20
_CODES = {"fp32": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
STORAGES = tuple(_CODES)
"""How components are kept; fp16 is how SQL keeps them, so nothing is lost by it."""
_KEEPING = threading.Lock()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Segment(Numbered):
    """`numbers` int64 (N,), all different, are the items of the rows of `index`."""

    index: faiss.Index

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
        width = max(_LEAST_WIDTH, 2 * count) * len(self) // many
        if self._graph is None or many <= _ROWS_PER_NODE * width:
            parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
            return self._stored.search(queries, count, params=parameters)
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=width)  # type: ignore[attr-defined]
        return self._graph.search(queries, count, params=parameters)

    @property
    def storage(self) -> str:
        """How components are kept, one of `STORAGES`."""
        if not isinstance(self._stored, faiss.IndexScalarQuantizer):
            return "fp32"
        return "fp16" if self._stored.sq.qtype == faiss.ScalarQuantizer.QT_fp16 else "sq8"

    @property
    def large(self) -> bool:
        """Whether many rows are searched without looking at each."""
        return self.has_graph

    @property
    def has_graph(self) -> bool:
        """Whether it is searched by a graph, and not scanned."""
        return self._graph is not None

    @cached_property
    def _graph(self) -> faiss.IndexHNSW | None:
        return self.index if isinstance(self.index, faiss.IndexHNSW) else None

    @cached_property
    def _stored(self) -> faiss.Index:
        return self.index if self._graph is None else faiss.downcast_index(self._graph.storage)


def scanned(numbers: np.ndarray, vectors: np.ndarray, storage: str = "fp16") -> Segment:
    """A segment without a graph: `numbers` int64 (N,), `vectors` float (N, D) of unit length."""
    return Segment(numbers, _filled(vectors, _CODES[storage]))


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
            np.save(given, vectors.astype(np.float16))
            process = self._start(given, made)
            _, said = process.communicate()
            if self._stopped:
                raise BuilderStopped
            if process.returncode:
                raise RuntimeError(f"no index was built: {said.strip()[-1000:]}")
            return Segment(numbers, faiss.read_index(str(made)))

    def _start(self, given: Path, made: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "services.embedding.segments", str(given), str(made), self.storage]
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


def save(segment: Segment, store: str, sequence: int, directory: Path) -> None:
    """Keep a segment that holds everything of a store up to a sequence number; replaces what was kept.

    Its files have names of their own, and one that is renamed last names them: nothing is there until all
    of it is. One process saves and loads one segment at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    index, numbers, told = (directory / f"{name}.{kind}" for kind in ("index", "numbers", "json"))
    written = {"store": store, "sequence": sequence, "rows": len(segment), "dimension": segment.index.d}
    with _KEEPING:
        faiss.write_index(segment.index, str(index))
        with numbers.open("wb") as file:
            np.save(file, segment.numbers)
        told.write_text(json.dumps(written | {"index": index.name, "numbers": numbers.name}) + "\n")
        for path in (index, numbers, told):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        told.rename(directory / "segment.json")
        for path in directory.iterdir():
            if path.name not in ("segment.json", index.name, numbers.name):
                path.unlink()


def load(directory: Path, store: str, dimension: int, storage: str = "fp16") -> tuple[Segment, int] | None:
    """What `save` kept of a store, and its sequence number; None, with a line in the log, if unusable."""
    if not (directory / "segment.json").is_file():
        return None
    try:
        with _KEEPING:
            written = json.loads((directory / "segment.json").read_text())
            numbers = np.load(directory / written["numbers"])
            index = faiss.read_index(str(directory / written["index"]))
        whole = len(numbers) == index.ntotal == written["rows"] and index.d == dimension
        segment = Segment(numbers, index)
        if whole and written["store"] == store and segment.storage == storage:
            return segment, int(written["sequence"])
        reason = "is of another store, encoder or storage"
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = f"is damaged: {error!r}"
    _log.warning("the index in %s %s; it is built again", directory, reason)
    return None


def _filled(vectors: np.ndarray, description: str) -> faiss.Index:
    rows = np.ascontiguousarray(vectors, np.float32)
    index = faiss.index_factory(rows.shape[1], description, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = _BUILD_WIDTH
    if len(rows):
        index.train(rows)
        index.add(rows)
    return index


def main() -> None:
    """Build a graph over a file of vectors; what `Builder` starts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("storage", choices=STORAGES)
    options = parser.parse_args()
    os.nice(10)
    index = _filled(np.load(options.vectors), f"HNSW{_LINKS},{_CODES[options.storage]}")
    faiss.write_index(index, str(options.out))


if __name__ == "__main__":
    main()
