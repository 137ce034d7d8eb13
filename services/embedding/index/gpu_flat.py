"""An exact scan in GPU memory, with any filter.

A scan reads every vector once, so memory bandwidth limits it. Decision 0021 explains why FAISS is not used.
"""

import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from services.embedding.index.id_map import IdMap
from services.embedding.index.segment import SegmentHits
from services.embedding.runtime.devices import to_device

LARGE_ROWS = 20_000
"""The number of rows from which the GPU pays for the copies to and from it."""
_EXTRA_CANDIDATES = 64
_MAX_SCORES = 1 << 29  # per step, some gigabytes
_BLOCK = 64
_GATHER_RATIO = 64
"""Rows are gathered rather than masked if at most one in that many qualifies."""


@dataclass(frozen=True, eq=False)
class GpuSegment(IdMap):
    """`values` float16 (N, D), of unit length, on a torch device; immutable."""

    values: torch.Tensor
    _lock: threading.Lock = field(default_factory=threading.Lock)

    storage = "fp16"
    large = True
    is_approximate = False

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows."""
        gathered = self.values[torch.from_numpy(rows).to(self.values.device)]
        vectors: np.ndarray = gathered.float().cpu().numpy()
        return vectors

    @torch.inference_mode()
    def search(
        self,
        queries: np.ndarray,
        count: int,
        live: np.ndarray | None,
        *,
        only_coded: bool = True,
    ) -> SegmentHits:
        """The `count` nearest rows of each query, float32 (Q, D), among `live`, bool (N,), or all rows.

        Scores are computed in half precision; the best and some more are reranked in float32.
        """
        many = len(self) if live is None else int(np.count_nonzero(live))
        scores = np.empty((len(queries), min(count, many)), np.float32)
        rows = np.empty(scores.shape, np.int64)
        if not rows.size:
            return SegmentHits(scores, rows)
        device, values, gathered, mask = self.values.device, self.values, None, None
        depth = min(count + _EXTRA_CANDIDATES, many)
        with self._lock:  # two searches at once are slower and need twice the memory
            if live is not None and many * _GATHER_RATIO <= len(self):
                gathered = torch.from_numpy(np.flatnonzero(live)).to(device)
                values = values[gathered]
            elif live is not None and many < len(self):
                mask = to_device(live, device).logical_not_()
            step = max(_MAX_SCORES // max(len(values), depth * values.shape[1]), 1)
            for start in range(0, len(queries), step):
                page = slice(start, start + step)
                page_queries = torch.from_numpy(queries[page]).to(device)
                # Unit length keeps the scores in the range of float16.
                products = torch.nn.functional.normalize(page_queries, dim=1).half() @ values.T
                if mask is not None:
                    products.masked_fill_(mask, -torch.inf)
                candidates = _top_columns(products, depth)
                candidates = candidates if gathered is None else gathered[candidates]
                scores[page], rows[page] = self._rerank(page_queries, candidates, rows.shape[1])
        return SegmentHits(scores, rows)

    def _rerank(
        self, queries: torch.Tensor, candidates: torch.Tensor, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best of the rows `candidates` (Q, M) by float32 products."""
        exact = torch.einsum("qd,qkd->qk", queries, self.values[candidates].float())
        best, order = exact.topk(count)
        # One copy to the host, because each copy waits for the GPU.
        both = torch.stack([best.view(torch.int32), candidates.gather(1, order).int()]).cpu().numpy()
        return both[0].view(np.float32), both[1].astype(np.int64)


def _top_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Columns int64 (Q, count) of the best `scores` (Q, N), unordered.

    The best columns lie in the blocks with the best maxima. This reads each score once; `topk` reads it
    often.
    """
    blocks = scores.shape[1] // _BLOCK
    if blocks <= count:
        return scores.topk(count, sorted=False).indices
    whole = blocks * _BLOCK
    maxima = scores[:, :whole].view(-1, blocks, _BLOCK).amax(2)
    first = maxima.topk(count, sorted=False).indices * _BLOCK
    columns = (first[:, :, None] + torch.arange(_BLOCK, device=scores.device)).flatten(1)
    rest = torch.arange(whole, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], 1)
    return columns.gather(1, scores.gather(1, columns).topk(count, sorted=False).indices)


class GpuBuilder:
    """Builds segments in the memory of a torch device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(self, hashes: np.ndarray, vectors: np.ndarray) -> GpuSegment:
        """Build a segment of `hashes` int64 (N,) and `vectors` float (N, D) of unit length."""
        values = torch.from_numpy(np.ascontiguousarray(vectors, np.float16))
        return GpuSegment(hashes, values.to(self._device))
