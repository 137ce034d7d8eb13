"""Where FAISS searches the indexes of a `DeviceSegment`: on an NVIDIA GPU, or on the host.

Both have the same four operations. On the host, moving an index does nothing, so tests run the code of the
GPU without one. FAISS for GPUs is the package faiss-gpu-cuvs, which replaces faiss-cpu (decision 0049).
"""

import threading
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import faiss
import numpy as np

from services.core.errors import FailedPrecondition

_gpu: Any = faiss  # the type stubs describe the build without a GPU
_CPU_PACKAGE, _GPU_PACKAGE = "faiss-cpu", "faiss-gpu-cuvs"
GRAPH_DEGREE, _CANDIDATE_DEGREE, _BUILD_WIDTH = 64, 128, 80
# By default, FAISS reserves 1.5 GiB of GPU memory and 256 MiB of pinned memory for each segment.
_TEMPORARY_BYTES, _PINNED_BYTES = 1 << 27, 1 << 24
# With one, the default, one user measured a recall of 0.6 above 100,000 rows, with eight 0.97 to 0.99
# (NVIDIA/cuvs#2102).
_RANDOM_SAMPLINGS = 8
_ADD_BATCH = 1 << 18


class Placement(Protocol):
    """Moves indexes to where they are searched. The methods are called under its `lock`.

    A GPU index is not safe even for concurrent searches.
    """

    name: str
    lock: threading.Lock

    def to_device(self, index: faiss.Index) -> faiss.Index:
        """The index as it is searched. The caller keeps `index` alive as long as the result."""

    def to_host(self, index: faiss.Index) -> faiss.Index:
        """The index as it is written to a file, from the result of `to_device` or `build_graph`."""

    def build_graph(self, vectors: np.ndarray) -> faiss.Index:
        """A CAGRA graph over vectors, float16 (N, D), for `to_host` while they are alive."""

    def search_graph(
        self,
        graph: faiss.Index,
        queries: np.ndarray,
        count: int,
        width: int,
        selector: faiss.IDSelector | None,
    ) -> np.ndarray:
        """Rows int64 (Q, count) by a graph for queries, float32 (Q, D); -1 where it finds none.

        The search keeps the `width` best rows that it has visited, at least `count`.
        """


class HostPlacement:
    """Indexes stay on the host."""

    name = "host"

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def to_device(self, index: faiss.Index) -> faiss.Index:
        """See `Placement`."""
        return index

    def to_host(self, index: faiss.Index) -> faiss.Index:
        """See `Placement`."""
        return index

    def build_graph(self, vectors: np.ndarray) -> faiss.Index:
        """See `Placement`; the graph is built as HNSW, and searched as CAGRA's CPU form is."""
        graph: faiss.IndexHNSW = faiss.IndexHNSWCagra(  # type: ignore[attr-defined]
            vectors.shape[1], GRAPH_DEGREE // 2, faiss.METRIC_INNER_PRODUCT, faiss.Float16
        )
        graph.hnsw.efConstruction = _BUILD_WIDTH
        append(graph, vectors)
        graph.base_level_only = True  # type: ignore[attr-defined] # as in a copy of a GPU's graph
        return graph

    def search_graph(
        self,
        graph: faiss.Index,
        queries: np.ndarray,
        count: int,
        width: int,
        selector: faiss.IDSelector | None,
    ) -> np.ndarray:
        """See `Placement`."""
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=width)  # type: ignore[attr-defined]
        rows: np.ndarray = graph.search(queries, count, params=parameters)[1]
        return rows


class GpuPlacement:
    """Indexes are on a GPU and searched by cuVS, whose indexes apply selectors; FAISS' own ignore them."""

    name = "gpu"

    def __init__(self, device: int = 0) -> None:
        self.lock, self._device = threading.Lock(), device
        self._resources = _gpu.StandardGpuResources()
        self._resources.setTempMemory(_TEMPORARY_BYTES)
        self._resources.setPinnedMemory(_PINNED_BYTES)
        self._options = _gpu.GpuClonerOptions()
        self._options.use_cuvs = True  # not the default in Python
        self._options.useFloat16 = True

    def to_device(self, index: faiss.Index) -> faiss.Index:
        """See `Placement`."""
        moved: faiss.Index = _gpu.index_cpu_to_gpu(self._resources, self._device, index, self._options)
        return moved

    def to_host(self, index: faiss.Index) -> faiss.Index:
        """See `Placement`."""
        copied: faiss.Index = _gpu.index_gpu_to_cpu(index)
        return copied

    def build_graph(self, vectors: np.ndarray) -> faiss.Index:
        """See `Placement`."""
        config = _gpu.GpuIndexCagraConfig()
        config.device = self._device
        config.graph_degree, config.intermediate_graph_degree = GRAPH_DEGREE, _CANDIDATE_DEGREE
        config.build_algo = _gpu.graph_build_algo_NN_DESCENT
        graph: Any = _gpu.GpuIndexCagra(self._resources, vectors.shape[1], _gpu.METRIC_INNER_PRODUCT, config)
        graph.train(vectors, numeric_type=_gpu.Float16)
        built: faiss.Index = graph
        return built

    def search_graph(
        self,
        graph: faiss.Index,
        queries: np.ndarray,
        count: int,
        width: int,
        selector: faiss.IDSelector | None,
    ) -> np.ndarray:
        """See `Placement`."""
        # Parameters of another class end the process.
        parameters = _gpu.SearchParametersCagra(
            itopk_size=width, num_random_samplings=_RANDOM_SAMPLINGS, sel=selector
        )
        index: Any = graph
        rows: np.ndarray = index.search(
            queries.astype(np.float16), count, params=parameters, numeric_type=_gpu.Float16
        )[1]
        return rows


def append(index: faiss.Index, vectors: np.ndarray) -> None:
    """Add vectors, float (N, D), in batches: they may be mapped from a file larger than memory."""
    for start in range(0, len(vectors), _ADD_BATCH):
        index.add(np.ascontiguousarray(vectors[start : start + _ADD_BATCH], np.float32))


def require_gpu() -> None:
    """Check that FAISS can search on a GPU.

    Raises:
        FailedPrecondition: the installed FAISS is not built with cuVS, or finds no GPU.
    """
    if "CUVS" not in faiss.get_compile_options():
        both = _is_installed(_CPU_PACKAGE) and _is_installed(_GPU_PACKAGE)
        reason = (
            f"{_CPU_PACKAGE} has overwritten {_GPU_PACKAGE}: uninstall both and install {_GPU_PACKAGE} again"
            if both
            else f"it needs {_GPU_PACKAGE} in place of {_CPU_PACKAGE}"
        )
        raise FailedPrecondition(
            f"--index-backend faiss-gpu: the installed FAISS does not search on a GPU; {reason} "
            "(docs/operating.md), or choose torch, which uses the GPU too"
        )
    if not _gpu.get_num_gpus():
        raise FailedPrecondition(
            "--index-backend faiss-gpu: FAISS finds no GPU; install the driver, or choose faiss-cpu"
        )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
