"""A graph over rows in a GPU's memory (CAGRA, Ootomo et al., 2024), by FAISS' cuVS build."""

import threading
from typing import Any

import faiss
import numpy as np

_gpu: Any = faiss  # the type stubs are of the build without a GPU
_LINKS, _CANDIDATES = 64, 128
_KEPT = 512
_SCRATCH = 1 << 28
# One index at a time: FAISS' resources of a GPU are one thread's.
_TURN = threading.Lock()
_resources: list[Any] = []

MOST = _KEPT // 2
"""As many rows of a query are found at most."""


def available() -> bool:
    """Whether FAISS' build for GPUs is installed, and has one."""
    return hasattr(_gpu, "GpuIndexCagra") and bool(_gpu.get_num_gpus())


class Graph:
    """Rows `vectors` float16 (N, D) of unit length; FAISS keeps a copy of them beside the links."""

    def __init__(self, vectors: np.ndarray) -> None:
        with _TURN:
            if not _resources:
                _resources.append(_gpu.StandardGpuResources())
                _resources[0].setTempMemory(_SCRATCH)
            config = _gpu.GpuIndexCagraConfig()
            config.graph_degree, config.intermediate_graph_degree = _LINKS, _CANDIDATES
            config.build_algo = _gpu.graph_build_algo_NN_DESCENT
            self._index = _gpu.GpuIndexCagra(
                _resources[0], vectors.shape[1], _gpu.METRIC_INNER_PRODUCT, config
            )
            self._index.train(vectors, numeric_type=_gpu.Float16)

    def search(self, queries: np.ndarray, count: int, live: np.ndarray | None) -> np.ndarray:
        """Rows int64 (Q, count) near float32 (Q, D), of `live`, bool (N,); -1 where fewer were found."""
        selector = None if live is None else _gpu.IDSelectorBitmap(np.packbits(live, bitorder="little"))
        parameters = _gpu.SearchParametersCagra(itopk_size=_KEPT, sel=selector)
        with _TURN:
            found: np.ndarray = self._index.search(
                queries.astype(np.float16), count, params=parameters, numeric_type=_gpu.Float16
            )[1]
        return found
