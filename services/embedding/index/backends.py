"""Chooses the backend that searches vectors, and makes its indexes.

`auto` takes what was measured to be the fastest on the device (decisions 0021, 0033 and 0049): torch on a
GPU, else FAISS on the CPU. It takes Milvus if an address is set.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from services.core.errors import FailedPrecondition
from services.embedding.index import builder, device_segment, gpu_flat, placement
from services.embedding.index.segmented_index import Build, Originals, SegmentedIndex, SegmentFile
from services.embedding.index.vector_index import VectorIndex
from services.embedding.runtime.devices import is_gpu

Backend = Literal["auto", "faiss-gpu", "torch", "faiss-cpu", "milvus"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexOptions:
    """What the settings say about indexes; `device` is a torch device, `directory` is for saved segments."""

    backend: Backend
    device: str
    directory: Path
    storage: str
    hnsw_min_items: int
    exact: bool
    milvus: str
    milvus_token: str


@dataclass(frozen=True)
class VectorSpace:
    """A space, the digest of its encoder, and a reader of its stored vectors by item hash."""

    name: str
    digest: str
    dimension: int
    originals: Originals


def resolve(options: IndexOptions) -> Backend:
    """The backend of `options`, never `auto`.

    Raises:
        FailedPrecondition: its device or its package is missing.
    """
    if options.backend == "auto":
        if options.milvus:
            return "milvus"
        return "torch" if is_gpu(options.device) else "faiss-cpu"
    if options.backend == "faiss-gpu":
        if not is_gpu(options.device):
            raise FailedPrecondition(
                "--index-backend faiss-gpu: it searches on a GPU, but the device of this bundle is "
                f"{options.device}; choose --device cuda or --index-backend faiss-cpu"
            )
        placement.require_gpu()
    return options.backend


def make_indexes(
    options: IndexOptions, store: str, spaces: Sequence[VectorSpace]
) -> tuple[Mapping[str, VectorIndex], Callable[[], None]]:
    """An index for each space of a store, and a function that releases what they share.

    Raises:
        FailedPrecondition: the device or the package of the backend is missing.
        Unavailable: Milvus does not answer.
    """
    backend = resolve(options)
    _log.info("vectors are searched by %s", backend)
    if backend == "milvus":
        from services.embedding.index import milvus  # noqa: PLC0415 - an extra

        client = milvus.connect(options.milvus, options.milvus_token)
        return {
            space.name: milvus.MilvusIndex(client, store, space.name, space.digest, space.dimension)
            for space in spaces
        }, client.close
    return {space.name: _in_process(backend, options, store, space) for space in spaces}, lambda: None


def _in_process(backend: Backend, options: IndexOptions, store: str, space: VectorSpace) -> SegmentedIndex:
    file: SegmentFile | None = SegmentFile(options.directory / f"{space.name}-{space.digest}", store)
    build: Build
    if backend == "faiss-gpu":
        rows = device_segment.LARGE_ROWS
        build = device_segment.DeviceBuilder(
            partial(placement.GpuPlacement, torch.device(options.device).index or 0),
            pq=options.storage == "pq" and not options.exact,
            graph_rows=0 if options.exact else device_segment.GRAPH_ROWS,
        )
    elif backend == "torch":
        rows, build, file = gpu_flat.LARGE_ROWS, gpu_flat.GpuBuilder(options.device), None
    else:
        rows, build = builder.LARGE_ROWS, builder.Builder(options.storage, options.hnsw_min_items)
        if options.exact:
            rows, file = 0, None
    return SegmentedIndex(space.dimension, rows, build, file, space.originals)
