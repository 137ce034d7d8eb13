"""Rows of an index in a GPU's memory, all compared: exact, and whatever a filter leaves.

A scan reads every vector once, so memory bandwidth is its floor. Decision 0021 says why FAISS does not do it.
"""

import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from services.embedding.devices import sent
from services.embedding.numbered import Numbered
from services.embedding.segments import Nearest

LARGE_ROWS = 20_000
"""From how many rows on a GPU is asked, which takes a way there and back."""
_MORE = 64
_NUMBERS_AT_ONCE = 1 << 29  # some gigabytes of them
_BLOCK = 64
_GATHERED = 64
"""Rows are gathered, and not masked, when no more than one in so many qualifies."""


@dataclass(frozen=True, eq=False)
class DeviceSegment(Numbered):
    """`values` float16 (N, D), of unit length, on a device of torch's; nothing of it ever changes."""

    values: torch.Tensor
    _turn: threading.Lock = field(default_factory=threading.Lock)

    storage = "fp16"
    large = True

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors float32 (M, D) of rows."""
        found: np.ndarray = self.values[torch.from_numpy(rows).to(self.values.device)].float().cpu().numpy()
        return found

    @torch.inference_mode()
    def search(
        self,
        queries: np.ndarray,
        count: int,
        live: np.ndarray | None,
        *,
        only_coded: bool = True,
    ) -> Nearest:
        """The `count` nearest rows of each query, float32 (Q, D): of `live`, bool (N,), or of all.

        Compared in half precision, then the best and some more in float32.
        """
        many = len(self) if live is None else int(np.count_nonzero(live))
        scores = np.empty((len(queries), min(count, many)), np.float32)
        rows = np.empty(scores.shape, np.int64)
        if not rows.size:
            return Nearest(scores, rows)
        device, values, gathered, mask = self.values.device, self.values, None, None
        deep = min(count + _MORE, many)
        with self._turn:  # who comes second would only make both slower, and need twice the memory
            if live is not None and many * _GATHERED <= len(self):
                gathered = torch.from_numpy(np.flatnonzero(live)).to(device)
                values = values[gathered]
            elif live is not None and many < len(self):
                mask = sent(live, device).logical_not_()
            step = max(_NUMBERS_AT_ONCE // max(len(values), deep * values.shape[1]), 1)
            for start in range(0, len(queries), step):
                some = slice(start, start + step)
                asked = torch.from_numpy(queries[some]).to(device)
                # Of unit length, so that float16 holds it.
                near = torch.nn.functional.normalize(asked, dim=1).half() @ values.T
                if mask is not None:
                    near.masked_fill_(mask, -torch.inf)
                at = _best(near, deep)
                at = at if gathered is None else gathered[at]
                scores[some], rows[some] = self._ordered(asked, at, rows.shape[1])
        return Nearest(scores, rows)

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

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(self, numbers: np.ndarray, vectors: np.ndarray) -> DeviceSegment:
        """A segment of `numbers` int64 (N,) and `vectors` float (N, D) of unit length."""
        values = torch.from_numpy(np.ascontiguousarray(vectors, np.float16))
        return DeviceSegment(numbers, values.to(self._device))
