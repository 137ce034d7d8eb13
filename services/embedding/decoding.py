"""Image files into what an image encoder reads: by threads, and by a GPU that computes there."""

import asyncio
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from services.embedding import images
from services.embedding.batching import Lane
from services.embedding.devices import share_cores
from services.embedding.encoders import ImageEncoder
from services.embedding.pools import run_in
from services.errors import InvalidArgument

_AT_ONCE = 8
Pixels = np.ndarray | torch.Tensor
"""uint8 (S, S, 3) here, or (3, S, S) in a GPU's memory."""


class Decoding:
    """Threads for each lane, which share `budget`."""

    def __init__(self, encoder: ImageEncoder, budget: images.PixelBudget) -> None:
        self.encoder, self._budget = encoder, budget
        self._threads = os.cpu_count() or 1
        share = partial(share_cores, self._threads)
        self._pools = {lane: ThreadPoolExecutor(self._threads, f"decode-{lane.name}", share) for lane in Lane}

    def close(self) -> None:
        """Finish what was begun."""
        for pool in self._pools.values():
            pool.shutdown()

    async def pixels(
        self, files: Sequence[bytes], rows: Sequence[int], field: str, lane: Lane
    ) -> list[Pixels | InvalidArgument]:
        """What the encoder reads of some rows of `files`, or why it cannot; `{}` in `field` is the row."""
        there: list[torch.Tensor | None] = [None] * len(rows)
        # A few do not queue behind the many that a GPU decodes one batch after the other.
        if self.encoder.overlaps and lane is not Lane.INTERACTIVE:
            mine = [files[row] for row in rows]
            there = await run_in(self._pools[lane], partial(self.encoder.pixels_there, mine))
        left = [row for row, seen in zip(rows, there, strict=True) if seen is None]
        # Handing a thread a few at a time costs less than it takes to decode one small photograph.
        step = max(min(-(-len(left) // self._threads), _AT_ONCE), 1)
        parts = (left[start : start + step] for start in range(0, len(left), step))
        work = (run_in(self._pools[lane], partial(self._here, files, part, field)) for part in parts)
        here = itertools.chain.from_iterable(await asyncio.gather(*work))
        return [next(here) if seen is None else seen for seen in there]

    def _here(
        self, files: Sequence[bytes], rows: Sequence[int], field: str
    ) -> list[np.ndarray | InvalidArgument]:
        found: list[np.ndarray | InvalidArgument] = []
        for row in rows:
            try:
                picture = images.load(files[row], self.encoder.side, field.format(row), self._budget)
                found.append(self.encoder.pixels(picture))
            except InvalidArgument as error:
                found.append(error)
        return found
