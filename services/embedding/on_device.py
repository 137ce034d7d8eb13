"""Rows of an index in a GPU's memory, all compared: exact, and whatever a filter leaves.

A scan reads every vector once, so memory bandwidth is its floor. Among millions FAISS finds the near ones by
a graph, where its build for GPUs is installed (decision 0021).
"""

import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from services.embedding import cagra
from services.embedding.devices import is_gpu, sent
from services.embedding.numbered import Numbered

_MORE = 64
_NUMBERS_AT_ONCE = 1 << 29  # some gigabytes of them
_BLOCK = 64
_GATHERED = 64
"""Rows are gathered, and not masked, when no more than one in so many qualifies."""
_WALKED = 20
"""The graph is asked while one row in so many qualifies, or more."""
_GRAPH_ROWS = 2_000_000


@dataclass(frozen=True, eq=False)
class DeviceSegment(Numbered):
    """`values` float16 (N, D), of unit length, on a device of torch's; nothing of it ever changes."""

    values: torch.Tensor
    graph: cagra.Graph | None = None
    _turn: threading.Lock = field(default_factory=threading.Lock)

    storage = "fp16"
    large = True

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows."""
        found: np.ndarray = self.values[torch.from_numpy(rows).to(self.values.device)].float().cpu().numpy()
        return found

    @torch.inference_mode()
    def search(
        self, queries: np.ndarray, count: int, live: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and rows int64 (Q, K), best first: of `live`, bool (N,), or of all.

        Compared in half precision, or found by the graph, then the best and some more in float32.
        """
        many = len(self) if live is None else int(np.count_nonzero(live))
        scores = np.empty((len(queries), min(count, many)), np.float32)
        rows = np.empty(scores.shape, np.int64)
        if not rows.size:
            return scores, rows
        device, values, gathered, mask = self.values.device, self.values, None, None
        deep = min(count + _MORE, many)
        walked = self._walked(queries, deep, live, many)
        with self._turn:  # who comes second would only make both slower, and need twice the memory
            if walked is None and live is not None and many * _GATHERED <= len(self):
                gathered = torch.from_numpy(np.flatnonzero(live)).to(device)
                values = values[gathered]
            elif walked is None and live is not None and many < len(self):
                mask = sent(live, device).logical_not_()
            step = max(_NUMBERS_AT_ONCE // max(len(values), deep * values.shape[1]), 1)
            for start in range(0, len(queries), step):
                some = slice(start, start + step)
                asked = torch.from_numpy(queries[some]).to(device)
                if walked is not None:
                    at = torch.from_numpy(walked[some]).to(device)
                else:
                    near = asked.half() @ values.T
                    if mask is not None:
                        near.masked_fill_(mask, -torch.inf)
                    at = _best(near, deep)
                    at = at if gathered is None else gathered[at]
                scores[some], rows[some] = self._ordered(asked, at, rows.shape[1])
        return scores, rows

    def _walked(
        self, queries: np.ndarray, count: int, live: np.ndarray | None, many: int
    ) -> np.ndarray | None:
        """Rows int64 (Q, count) by the graph; None where all have to be compared."""
        if self.graph is None or count > cagra.MOST or many * _WALKED < len(self):
            return None
        near = self.graph.search(queries, count, live)
        # Where too few qualified, FAISS' other indices for GPUs were seen to find rows that do not.
        found = near.min() >= 0 and (live is None or live[near].all())
        return near if found else None

    def _ordered(self, asked: torch.Tensor, at: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The best of rows `at` (Q, M) by float32 products."""
        exact = torch.einsum("qd,qkd->qk", asked, self.values[at].float())
        best, order = exact.topk(count)
        # One way back: a second would wait as long again.
        both = torch.stack([best.view(torch.int32), at.gather(1, order).int()]).cpu().numpy()
        return both[0].view(np.float32), both[1].astype(np.int64)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Columns int64 (Q, count) of the best of `scores` (Q, N), in no order.

    The best lie in the blocks with the best maxima: all are read once, where a selection reads them often.
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


class DeviceBuilder:
    """Puts rows into the memory of a device of torch's."""

    def __init__(self, device: str, graph_rows: int = _GRAPH_ROWS) -> None:
        self._device, self._graph_rows = device, graph_rows

    def __call__(self, numbers: np.ndarray, vectors: np.ndarray) -> DeviceSegment:
        """A segment of `numbers` int64 (N,) and `vectors` float (N, D) of unit length."""
        values = np.ascontiguousarray(vectors, np.float16)
        large = len(values) >= self._graph_rows and is_gpu(self._device) and cagra.available()
        graph = cagra.Graph(values) if large else None
        return DeviceSegment(numbers, torch.from_numpy(values).to(self._device), graph)
