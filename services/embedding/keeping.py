"""A large segment in files, from one start to the next."""

import json
import logging
import os
import threading
import uuid
from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np

from services.embedding.calibration import Depth
from services.embedding.segments import MappedSegment, Segment, read_codes

_KEEPING = threading.Lock()
_log = logging.getLogger(__name__)


def save(segment: Segment, store: str, sequence: int, directory: Path) -> None:
    """Keep a segment that holds everything of a store up to a sequence number; replaces what was kept.

    Its files have names of their own, and one that is renamed last names them: nothing is there until all
    of it is. One process saves and loads one segment at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {
        "store": store,
        "sequence": sequence,
        "rows": len(segment),
        "dimension": segment.index.d,
        "depth": asdict(segment.depth),
    }
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
            if "depth" not in written:
                raise ValueError("an earlier build made it")
            codes = read_codes(directory / written["codes"])
            index = faiss.read_index(str(directory / written["index"])) if "index" in written else codes
            shape, whole = (len(numbers), dimension), len(numbers) == written["rows"]
            whole = whole and all((one.ntotal, one.d) == shape for one in (index, codes))
            depth = Depth(**written["depth"])
            segment = Segment(numbers, index, codes, depth)
            if "vectors" in written:
                exact = np.load(directory / written["vectors"], mmap_mode="r")
                whole = whole and exact.shape == shape
                segment = MappedSegment(numbers, index, codes, depth, exact=exact)
        if whole and written["store"] == store and segment.storage == storage:
            return segment, int(written["sequence"])
        reason = "is of another store, encoder or storage"
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = f"is damaged: {error!r}"
    _log.warning("the index in %s %s; it is built again", directory, reason)
    return None
