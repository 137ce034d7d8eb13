"""Saves and loads a large segment, so that a restart does not rebuild it."""

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import faiss
import numpy as np

from services.embedding.index.refine_depth import RefineDepth
from services.embedding.index.segment import MappedSegment, Segment

_FILES_LOCK = threading.Lock()
_WRITE_BUFFER = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredParts:
    """The parts of a saved segment: those of `Segment`, `vectors` of a `MappedSegment`, and the summary.

    `index` is `codes` if only these were saved.
    """

    hashes: np.ndarray
    index: faiss.Index
    codes: faiss.Index | None
    vectors: np.ndarray | None
    depth: RefineDepth
    summary: Mapping[str, Any]


def save(segment: Segment, store: str, sequence: int, directory: Path) -> None:
    """Save a segment with all items of a store up to a sequence; replaces the segment saved before.

    The files have unique names. A summary file that names them is renamed into place last, so that a partial
    segment is never visible. A process saves and loads one segment at a time.

    Raises:
        OSError: a file cannot be written. Then the files are removed and the segment saved before stays.
    """
    directory.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "store": store,
        "sequence": sequence,
        "rows": len(segment),
        "dimension": segment.index.d,
        **segment.details,
    }
    arrays, indexes = {"numbers": segment.hashes}, {"index": segment.index}
    if segment.stored_codes is not None:
        indexes |= {"codes": segment.stored_codes}
    if segment.index is segment.stored_codes:
        del indexes["index"]
    if isinstance(segment, MappedSegment):
        arrays["vectors"] = segment.exact
    name = uuid.uuid4().hex
    files = {kind: directory / f"{name}.{kind}" for kind in (*indexes, *arrays)}
    summary_path = directory / f"{name}.json"
    text = json.dumps(summary | {kind: path.name for kind, path in files.items()}) + "\n"
    with _FILES_LOCK:
        try:
            for kind, index in indexes.items():
                with _synced(files[kind]) as file:  # FAISS itself does not report a truncated file
                    writer = faiss.PyCallbackIOWriter(file.write, _WRITE_BUFFER)  # type: ignore[attr-defined] # what SWIG adds
                    faiss.write_index(index, writer)
            for kind, values in arrays.items():
                with _synced(files[kind]) as file:
                    np.save(file, values)
            with _synced(summary_path) as file:
                file.write(text.encode())
            summary_path.rename(directory / "segment.json")
        except BaseException:  # free the space of partial files on a full disk
            for path in (*files.values(), summary_path):
                path.unlink(missing_ok=True)
            raise
        for path in directory.iterdir():
            if path.name != "segment.json" and path not in files.values():
                path.unlink()


@contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is synced to disk at the end of the block."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def load(
    directory: Path, store: str, dimension: int, restore: Callable[[StoredParts], Segment | None]
) -> tuple[Segment, int] | None:
    """The segment that `save` wrote for a store, and its sequence; None, with a log line, if unusable.

    `restore` makes the segment of its parts, or returns None if a segment of another kind is needed.
    """
    if not (directory / "segment.json").is_file():
        return None
    try:
        with _FILES_LOCK:
            stored = _read(directory, json.loads((directory / "segment.json").read_text()))
        shape, summary = (len(stored.hashes), dimension), stored.summary
        indexes = [part for part in (stored.index, stored.codes) if part is not None]
        is_complete = len(stored.hashes) == summary["rows"]
        is_complete = is_complete and all((part.ntotal, part.d) == shape for part in indexes)
        is_complete = is_complete and (stored.vectors is None or stored.vectors.shape == shape)
        segment = restore(stored) if is_complete and summary["store"] == store else None
        if segment is not None:
            return segment, int(summary["sequence"])
        reason = "is of another store, encoder, storage or backend"
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = f"is damaged: {error!r}"
    _log.warning("the index in %s %s; it is rebuilt", directory, reason)
    return None


def _read(directory: Path, summary: Mapping[str, Any]) -> StoredParts:
    if "depth" not in summary:
        raise ValueError("an earlier version wrote it")
    codes = faiss.read_index(str(directory / summary["codes"])) if "codes" in summary else None
    index = faiss.read_index(str(directory / summary["index"])) if "index" in summary else codes
    if index is None:
        raise ValueError("it has no vectors")
    vectors = np.load(directory / summary["vectors"], mmap_mode="r") if "vectors" in summary else None
    hashes, depth = np.load(directory / summary["numbers"]), RefineDepth(**summary["depth"])
    return StoredParts(hashes, index, codes, vectors, depth, summary)
