"""The vector indexes of the contract suite, by backend; on a machine with a GPU they use it."""

from collections.abc import Callable
from pathlib import Path

import faiss
import torch

from services.embedding.index.builder import Builder
from services.embedding.index.device_segment import DeviceBuilder
from services.embedding.index.gpu_flat import GpuBuilder
from services.embedding.index.placement import GpuPlacement, HostPlacement, Placement
from services.embedding.index.segmented_index import Build, SegmentedIndex, SegmentFile

IN_PROCESS = ("faiss-cpu", "torch", "flat", "graph", "pq")
"""The last three are the kinds of faiss-gpu."""
_LARGE_ROWS = 1400
_torch_device = "cuda" if torch.cuda.is_available() else "cpu"


def place() -> Placement:
    """On a GPU if FAISS has one, else the CPU form of the same indexes."""
    has_gpu = "CUVS" in faiss.get_compile_options() and torch.cuda.is_available()
    return GpuPlacement() if has_gpu else HostPlacement()


def builder(backend: str) -> Build:
    """Builds the large segments of a backend in this process."""
    builders: dict[str, Callable[[], Build]] = {
        "faiss-cpu": Builder,
        "torch": lambda: GpuBuilder(_torch_device),
        "flat": lambda: DeviceBuilder(place, graph_rows=0),
        "graph": lambda: DeviceBuilder(place, graph_rows=1000),
        "pq": lambda: DeviceBuilder(place, pq=True),
    }
    return builders[backend]()


def make_index(backend: str, dimension: int, directory: Path, store: str) -> SegmentedIndex:
    """The index of a store under a directory, where a second one finds what the first saved."""
    large_rows = _LARGE_ROWS if backend == "faiss-cpu" else 5
    file = SegmentFile(directory / store, store)
    return SegmentedIndex(dimension, large_rows, builder(backend), file)
