"""Converts image files to an image encoder's input, by threads, processes or a GPU."""

import asyncio
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from services.core.errors import InvalidArgument
from services.core.executors import run_in
from services.embedding.encoders.encoders import ImageEncoder
from services.embedding.images.headers import ImageHeader, read_header
from services.embedding.images.loader import ImageLoader
from services.embedding.runtime.batching import Lane
from services.embedding.runtime.devices import share_cores

_FILES_PER_TASK = 8
Pixels = np.ndarray | torch.Tensor
"""uint8 (S, S, 3) in host memory, or (3, S, S) in GPU memory."""


class Preprocessor:
    """Decodes and resizes image files; each lane has its own threads, and all share `loader`.

    Costly files have separate threads, which wait for the decoder processes, so that other files do not.
    """

    def __init__(self, encoder: ImageEncoder, loader: ImageLoader) -> None:
        self.encoder, self._loader = encoder, loader
        self._threads = os.cpu_count() or 1
        share = partial(share_cores, self._threads)
        self._pools = {lane: ThreadPoolExecutor(self._threads, f"decode-{lane.name}", share) for lane in Lane}
        self._costly = {
            lane: ThreadPoolExecutor(self._threads, f"decode-costly-{lane.name}", share) for lane in Lane
        }

    def close(self) -> None:
        """Finish the files in progress."""
        for pool in self._costly.values():
            pool.shutdown(cancel_futures=True)
        for pool in self._pools.values():
            pool.shutdown()

    async def pixels(
        self, files: Sequence[bytes], rows: Sequence[int], field: str, lane: Lane
    ) -> list[Pixels | InvalidArgument]:
        """The pixels of some rows of `files`, or the error; `{}` in `field` stands for the row."""
        on_gpu: list[torch.Tensor | None] = [None] * len(rows)
        # Interactive calls do not queue behind the batches that a GPU decodes one after the other.
        if self.encoder.overlaps and lane is not Lane.INTERACTIVE:
            data = [files[row] for row in rows]
            on_gpu = await run_in(self._pools[lane], partial(self.encoder.pixels_on_gpu, data))
        remaining = [row for row, pixels in zip(rows, on_gpu, strict=True) if pixels is None]
        # Dispatching a few files per task costs less than decoding one small image.
        step = max(min(-(-len(remaining) // self._threads), _FILES_PER_TASK), 1)
        parts = (remaining[start : start + step] for start in range(0, len(remaining), step))
        tasks = (run_in(self._pools[lane], partial(self._plain, files, part, field, lane)) for part in parts)
        plain = dict(itertools.chain.from_iterable(await asyncio.gather(*tasks)))
        costly = [row for row in remaining if row not in plain]
        costly_tasks = (
            run_in(self._costly[lane], partial(self._one, files[row], field.format(row), lane))
            for row in costly
        )
        on_host = {**plain, **dict(zip(costly, await asyncio.gather(*costly_tasks), strict=True))}
        return [on_host[row] if pixels is None else pixels for row, pixels in zip(rows, on_gpu, strict=True)]

    def _plain(
        self, files: Sequence[bytes], rows: Sequence[int], field: str, lane: Lane
    ) -> list[tuple[int, np.ndarray | InvalidArgument]]:
        """Rows with their pixels or error; costly rows are left out."""
        results: list[tuple[int, np.ndarray | InvalidArgument]] = []
        for row in rows:
            try:
                header = read_header(files[row], self.encoder.side, field.format(row))
                if not header.is_costly:
                    results.append((row, self._one(files[row], field.format(row), lane, header)))
            except InvalidArgument as error:
                results.append((row, error))
        return results

    def _one(
        self, data: bytes, field: str, lane: Lane, header: ImageHeader | None = None
    ) -> np.ndarray | InvalidArgument:
        try:
            image = self._loader.load(
                data, self.encoder.side, field, header=header, interactive=lane is Lane.INTERACTIVE
            )
            return self.encoder.pixels(image)
        except InvalidArgument as error:
            return error
