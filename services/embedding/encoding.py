"""Texts and photographs into vectors beside each other: prepared in threads, run in shared batches.

Tokenising and decoding have threads of their own; the models have theirs, behind the batcher. Large calls are
cut into pieces, of which a few are in memory at a time. Knows nothing of items or storage.
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

from services import deadline
from services.embedding import images
from services.embedding.batching import Batcher, Lane, Model, Rows
from services.embedding.decoding import Decoding
from services.embedding.devices import model_threads, share_cores
from services.embedding.encoders import EncodedTexts, ImageEncoder, TextEncoder
from services.embedding.pools import run_in
from services.errors import FailedPrecondition, InvalidArgument

T = TypeVar("T")
V = TypeVar("V")
_SMALL = 32
_PIECE_TEXTS = 1024
_PIECE_PICTURES = 64
_PIECES = 4
_OF_A_GPU = 4
"""So many times as much is under way where a GPU computes, which is faster than what is made ready for it."""
_TEXT, _PICTURE, _CAPTION = "text", "image", "caption"
_NUMBERS = itertools.count()


class Encoding:
    """The encoders of a bundle at work; a shop without photographs has no image encoder.

    Encoders of another bundle work `beside` these on the same threads, within the same limits.
    A call of up to 32 rows overtakes larger ones, unless `lane` says otherwise.
    """

    def __init__(
        self, text: TextEncoder, image: ImageEncoder | None, beside: "Encoding | None" = None
    ) -> None:
        self.text, self._owner = text, beside is None
        self.missed = False
        """Whether something was written beside another bundle and is not encoded by these."""
        number = next(_NUMBERS)  # another bundle may have the same encoder
        self._names = {kind: f"{kind} {number}" for kind in (_TEXT, _PICTURE, _CAPTION)}
        encoders: dict[str, TextEncoder | ImageEncoder] = {"text": text}
        most = _PIECES * _PIECE_TEXTS * text.settings.max_tokens
        models = [Model(self._names[_TEXT], text.begin, text.budget, most, _TEXT, text.overlaps)]
        if image is not None:
            encoders["image"] = image
            models += [
                Model(self._names[kind], begin, image.budget, _PIECES * _PIECE_PICTURES, kind, image.overlaps)
                for kind, begin in ((_PICTURE, image.begin), (_CAPTION, image.begin_texts))
            ]
        self.digests = {space: encoder.digest for space, encoder in encoders.items()}
        self.dimensions = {space: encoder.dimension for space, encoder in encoders.items()}
        self._models = [model.name for model in models]
        if beside is None:
            threads = model_threads(text.device)
            self._batcher = Batcher(models, threads, partial(share_cores, threads))
            self._budget = images.PixelBudget()
        else:
            self._batcher, self._budget = beside._batcher, beside._budget
            self._batcher.add(models)
        # Pools of their own: what is small does not stand behind a thousand photographs, no text behind any.
        self._tokenising = ThreadPoolExecutor(os.cpu_count(), "tokenise")
        self._decoding = None if image is None else Decoding(image, self._budget)
        pieces = _PIECES * (_OF_A_GPU if text.overlaps else 1)
        self._pieces = {lane: asyncio.Semaphore(pieces) for lane in (Lane.BULK, Lane.BACKGROUND)}

    @property
    def image(self) -> ImageEncoder:
        """The image encoder; FailedPrecondition when the bundle has none."""
        return self._decoder.encoder

    @property
    def _decoder(self) -> Decoding:
        if self._decoding is None:
            raise FailedPrecondition("this bundle has no image encoder")
        return self._decoding

    @property
    def finished(self) -> dict[str, int]:
        """How many texts, photographs ("image") and captions were encoded so far."""
        return self._by_kind(self._batcher.finished)

    @property
    def totals(self) -> dict[str, int]:
        """The same of all encoders that ever ran beside each other, gone ones included."""
        return dict(self._batcher.totals)

    @property
    def waiting(self) -> dict[str, int]:
        """How many of them wait for their encoder."""
        return self._by_kind(self._batcher.waiting())

    def _by_kind(self, counts: Mapping[str, int]) -> dict[str, int]:
        return {kind: counts[name] for kind, name in self._names.items() if name in counts}

    def close(self) -> None:
        """Finish what was accepted and stop."""
        self._tokenising.shutdown()
        if self._decoding is not None:
            self._decoding.close()
        if self._owner:
            self._batcher.close()
        else:
            self._batcher.remove(self._models)

    def pass_on(self, heir: "Encoding") -> None:
        """Leave the threads to encoders that were made beside these; `close` then ends these alone."""
        self._owner, heir._owner = False, True

    async def texts(self, texts: Sequence[str], lane: Lane | None = None) -> EncodedTexts:
        """Vectors in the text space; equal texts are encoded once."""
        if not texts:
            return EncodedTexts(np.empty((0, self.text.dimension), np.float32), np.empty(0, bool))
        different = sorted(set(texts), key=len)
        lane = _lane(len(different), lane)

        async def encode(piece: Sequence[str]) -> EncodedTexts:
            tokens = await run_in(self._tokenising, partial(self.text.tokenise, piece))
            lengths = np.array([len(ids) for ids in tokens.ids])
            return EncodedTexts(await self._run(_TEXT, tokens.ids, lengths, lane), tokens.truncated)

        done = await self._in_pieces(different, _PIECE_TEXTS, lane, encode)
        place = {text: at for at, text in enumerate(different)}
        rows = [place[text] for text in texts]
        vectors = np.concatenate([part.vectors for part in done])
        return EncodedTexts(vectors[rows], np.concatenate([part.truncated for part in done])[rows])

    async def captions(self, texts: Sequence[str], lane: Lane | None = None) -> np.ndarray:
        """Vectors float32 (B, D) of texts in the image space."""
        encoder, lane = self.image, _lane(len(texts), lane)

        async def encode(piece: Sequence[str]) -> np.ndarray:
            tokens = await run_in(self._tokenising, partial(encoder.tokenise, piece))
            return await self._run(_CAPTION, tokens, np.ones(len(piece), np.int64), lane)

        done = await self._in_pieces(texts, _PIECE_PICTURES, lane, encode)
        return np.concatenate([np.empty((0, encoder.dimension), np.float32), *done])

    async def photographs(
        self, files: Sequence[bytes], field: str, lane: Lane | None = None
    ) -> list[np.ndarray | InvalidArgument]:
        """A vector (D,) in the image space per file, or why there is none; `{}` in `field` is the row."""
        decoding, lane = self._decoder, _lane(len(files), lane)

        async def encode(piece: Sequence[int]) -> list[np.ndarray | InvalidArgument]:
            seen = await decoding.pixels(files, piece, field, lane)
            good = [row for row in seen if not isinstance(row, InvalidArgument)]
            if not good:
                return [row for row in seen if isinstance(row, InvalidArgument)]
            vectors = iter(await self._run(_PICTURE, good, np.ones(len(good), np.int64), lane))
            return [row if isinstance(row, InvalidArgument) else next(vectors) for row in seen]

        pieces = await self._in_pieces(range(len(files)), _PIECE_PICTURES, lane, encode)
        return [row for piece in pieces for row in piece]

    async def _in_pieces(
        self, rows: Sequence[T], size: int, lane: Lane, encode: Callable[[Sequence[T]], Awaitable[V]]
    ) -> list[V]:
        room = contextlib.nullcontext() if lane is Lane.INTERACTIVE else self._pieces[lane]

        async def one(start: int) -> V:
            async with room:
                return await encode(rows[start : start + size])

        tasks = [asyncio.ensure_future(one(start)) for start in range(0, len(rows), size)]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:  # nobody waits for the other pieces
                task.cancel()
            raise

    async def _run(self, model: str, rows: Rows, lengths: np.ndarray, lane: Lane) -> np.ndarray:
        return await asyncio.wrap_future(
            self._batcher.submit(self._names[model], rows, lengths, lane, deadline.remaining())
        )


def _lane(rows: int, asked: Lane | None) -> Lane:
    if asked is not None:
        return asked
    return Lane.INTERACTIVE if rows <= _SMALL else Lane.BULK
