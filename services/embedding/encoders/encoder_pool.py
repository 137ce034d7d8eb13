"""Encodes texts and images concurrently: threads prepare the inputs, the batcher runs the models.

Tokenization and decoding have their own threads; the models run on the batcher's. Large calls are split into
pieces, and only a few pieces are in memory at a time. The module depends on no items and no storage.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from services.core import deadline
from services.core.errors import FailedPrecondition, InvalidArgument
from services.core.executors import run_in
from services.embedding.encoders.encoders import EncodedTexts, ImageEncoder, TextEncoder
from services.embedding.encoders.preprocessing import Preprocessor
from services.embedding.images.loader import ImageLoader
from services.embedding.runtime.batching import Batcher, Lane, Model, Rows
from services.embedding.runtime.devices import model_threads, share_cores

T = TypeVar("T")
V = TypeVar("V")
_MAX_INTERACTIVE_ROWS = 32
_PIECE_TEXTS = 1024
_PIECE_IMAGES = 64
_MAX_PIECES = 4
_GPU_FACTOR = 4
"""A GPU consumes pieces faster than they are prepared, so that many times more pieces are in progress."""
_TEXT, _IMAGE, _CAPTION = "text", "image", "caption"
_POOL_NUMBERS = itertools.count()


class EncoderPool:
    """Runs the encoders of a bundle; a shop without images has no image encoder.

    With `shared_with`, this pool uses the threads and limits of another bundle's pool.
    A call of up to 32 rows takes precedence over larger ones, unless `lane` is set.
    """

    def __init__(
        self, text: TextEncoder, image: ImageEncoder | None, shared_with: "EncoderPool | None" = None
    ) -> None:
        self.text, self._owner = text, shared_with is None
        self._has_missed_writes = False
        number = next(_POOL_NUMBERS)  # makes names unique: another bundle may have the same encoder
        self._names = {kind: f"{kind} {number}" for kind in (_TEXT, _IMAGE, _CAPTION)}
        encoders: dict[str, TextEncoder | ImageEncoder] = {"text": text}
        capacity = _MAX_PIECES * _PIECE_TEXTS * text.settings.max_tokens
        models = [Model(self._names[_TEXT], text.start, text.budget, capacity, _TEXT, text.overlaps)]
        if image is not None:
            encoders["image"] = image
            models += [
                Model(
                    self._names[kind], start, image.budget, _MAX_PIECES * _PIECE_IMAGES, kind, image.overlaps
                )
                for kind, start in ((_IMAGE, image.start), (_CAPTION, image.start_texts))
            ]
        self.digests = {space: encoder.digest for space, encoder in encoders.items()}
        self.dimensions = {space: encoder.dimension for space, encoder in encoders.items()}
        self._models = [model.name for model in models]
        if shared_with is None:
            threads = model_threads(text.device)
            self._batcher = Batcher(models, threads, partial(share_cores, threads))
            self._loader = ImageLoader()
        else:
            self._batcher, self._loader = shared_with._batcher, shared_with._loader
            self._batcher.add(models)
        # Separate pools: a small call does not wait for a thousand images, a text does not wait for any
        # image.
        self._tokenizer_pool = ThreadPoolExecutor(os.cpu_count(), "tokenize")
        self._preprocessor = None if image is None else Preprocessor(image, self._loader)
        pieces = _MAX_PIECES * (_GPU_FACTOR if text.overlaps else 1)
        self._pieces = {lane: asyncio.Semaphore(pieces) for lane in (Lane.BULK, Lane.BACKGROUND)}

    @property
    def has_missed_writes(self) -> bool:
        """Whether these encoders failed on a write that another bundle's encoders encoded."""
        return self._has_missed_writes

    def note_missed_write(self) -> None:
        """Record that a write has no vectors by these encoders; `has_missed_writes` is true from now on."""
        self._has_missed_writes = True

    @property
    def image(self) -> ImageEncoder:
        """The image encoder; FailedPrecondition when the bundle has none."""
        return self._image_preprocessor.encoder

    @property
    def _image_preprocessor(self) -> Preprocessor:
        if self._preprocessor is None:
            raise FailedPrecondition("this bundle has no image encoder")
        return self._preprocessor

    @property
    def finished(self) -> dict[str, int]:
        """How many texts, images and captions were encoded so far."""
        return self._by_kind(self._batcher.finished)

    @property
    def totals(self) -> dict[str, int]:
        """The same counts over all pools that have shared these threads, closed pools included."""
        return dict(self._batcher.totals)

    @property
    def decoded(self) -> Mapping[str, int]:
        """How image files were decoded; see `ImageLoader.outcomes`."""
        return self._loader.outcomes

    @property
    def waiting(self) -> dict[str, int]:
        """How many texts, images and captions wait for their encoder."""
        return self._by_kind(self._batcher.waiting())

    def _by_kind(self, counts: Mapping[str, int]) -> dict[str, int]:
        return {kind: counts[name] for kind, name in self._names.items() if name in counts}

    def close(self) -> None:
        """Finish accepted calls and stop."""
        if self._owner:
            self._loader.close()  # drop files whose decoding takes seconds
        self._tokenizer_pool.shutdown()
        if self._preprocessor is not None:
            self._preprocessor.close()
        if self._owner:
            self._batcher.close()
        else:
            self._batcher.remove(self._models)

    def transfer_threads_to(self, other: "EncoderPool") -> None:
        """Make `other`, which shares these threads, their owner; `close` then removes only these encoders."""
        self._owner, other._owner = False, True

    async def texts(self, texts: Sequence[str], lane: Lane | None = None) -> EncodedTexts:
        """Vectors in the text space; equal texts are encoded once."""
        if not texts:
            return EncodedTexts(np.empty((0, self.text.dimension), np.float32), np.empty(0, bool))
        unique = sorted(set(texts), key=len)
        lane = _lane(len(unique), lane)

        async def encode(piece: Sequence[str]) -> EncodedTexts:
            tokens = await run_in(self._tokenizer_pool, partial(self.text.tokenize, piece))
            lengths = np.array([len(ids) for ids in tokens.ids])
            return EncodedTexts(await self._run(_TEXT, tokens.ids, lengths, lane), tokens.truncated)

        parts = await self._in_pieces(unique, _PIECE_TEXTS, lane, encode)
        row_of = {text: row for row, text in enumerate(unique)}
        rows = [row_of[text] for text in texts]
        vectors = np.concatenate([part.vectors for part in parts])
        return EncodedTexts(vectors[rows], np.concatenate([part.truncated for part in parts])[rows])

    async def captions(self, texts: Sequence[str], lane: Lane | None = None) -> np.ndarray:
        """Vectors float32 (B, D) of texts in the image space."""
        encoder, lane = self.image, _lane(len(texts), lane)

        async def encode(piece: Sequence[str]) -> np.ndarray:
            tokens = await run_in(self._tokenizer_pool, partial(encoder.tokenize, piece))
            return await self._run(_CAPTION, tokens, np.ones(len(piece), np.int64), lane)

        parts = await self._in_pieces(texts, _PIECE_IMAGES, lane, encode)
        return np.concatenate([np.empty((0, encoder.dimension), np.float32), *parts])

    async def images(
        self, files: Sequence[bytes], field: str, lane: Lane | None = None
    ) -> list[np.ndarray | InvalidArgument]:
        """A vector (D,) in the image space per file, or the error; `{}` in `field` stands for the row."""
        preprocessor, lane = self._image_preprocessor, _lane(len(files), lane)

        async def encode(piece: Sequence[int]) -> list[np.ndarray | InvalidArgument]:
            results = await preprocessor.pixels(files, piece, field, lane)
            pixels = [row for row in results if not isinstance(row, InvalidArgument)]
            if not pixels:
                return [row for row in results if isinstance(row, InvalidArgument)]
            vectors = iter(await self._run(_IMAGE, pixels, np.ones(len(pixels), np.int64), lane))
            return [row if isinstance(row, InvalidArgument) else next(vectors) for row in results]

        pieces = await self._in_pieces(range(len(files)), _PIECE_IMAGES, lane, encode)
        return [row for piece in pieces for row in piece]

    async def _in_pieces(
        self, rows: Sequence[T], size: int, lane: Lane, encode: Callable[[Sequence[T]], Awaitable[V]]
    ) -> list[V]:
        slots = contextlib.nullcontext() if lane is Lane.INTERACTIVE else self._pieces[lane]

        async def encode_from(start: int) -> V:
            async with slots:
                return await encode(rows[start : start + size])

        tasks = [asyncio.ensure_future(encode_from(start)) for start in range(0, len(rows), size)]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:  # nobody needs the other pieces
                task.cancel()
            raise

    async def _run(self, model: str, rows: Rows, lengths: np.ndarray, lane: Lane) -> np.ndarray:
        return await asyncio.wrap_future(
            self._batcher.submit(self._names[model], rows, lengths, lane, deadline.remaining())
        )


def _lane(rows: int, requested: Lane | None) -> Lane:
    if requested is not None:
        return requested
    return Lane.INTERACTIVE if rows <= _MAX_INTERACTIVE_ROWS else Lane.BULK
