"""Backfill of vectors: encodes the catalog for a bundle that is not served yet.

SQL shows which vectors are missing: an interrupted backfill continues where it stopped, and a process that
starts on the new bundle finds everything encoded. Items and search results do not change meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from services.catalog.items import Item, item_text
from services.core.errors import InvalidArgument
from services.embedding.catalog.search_view import SearchView
from services.embedding.encoders.encoder_pool import EncoderPool
from services.embedding.runtime.batching import Lane
from services.embedding.store.bundle_import import VectorBlock
from services.embedding.store.schema import content_hashes

_PAGE = {"text": 512, "image": 64}  # a page of images is in memory with its files
_TRANSACTION_ROWS = 2000  # live writes wait for a transaction
_LOG_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Backfill:
    """Encodes the items of a view by `encoders` in the background lane; `name` is the bundle for the log."""

    def __init__(self, view: SearchView, encoders: EncoderPool, name: str) -> None:
        self._view, self._encoders, self._name = view, encoders, name
        self.encoded, self.remaining = 0, 0
        """How many contents were encoded so far, and how many still lack a vector."""
        self._logged_at = time.monotonic()

    async def import_vectors(self, items: Sequence[Item], blocks: Sequence[VectorBlock]) -> None:
        """Store the vectors of these items that the bundle carries."""
        for block in blocks:
            rows = np.flatnonzero(block.present).tolist()
            for start in range(0, len(rows), _TRANSACTION_ROWS):
                page = rows[start : start + _TRANSACTION_ROWS]
                vectors = {content_hashes(items[row])[block.space]: block.values[row] for row in page}
                await asyncio.wrap_future(self._view.items.store_vectors(block.space, block.digest, vectors))

    async def encode_texts_of(self, items: Sequence[Item]) -> None:
        """Encode the texts of items that may not be in the store yet, so that they are searchable at once."""
        digest, store = self._encoders.digests["text"], self._view.items
        for start in range(0, len(items), _PAGE["text"]):
            page = [(content_hashes(item)["text"], item) for item in items[start : start + _PAGE["text"]]]
            contents = {content: item for content, item in page if content}
            stored = await self._view.read(partial(store.stored_vectors, contents, "text", digest))
            if missing := [(content, item) for content, item in contents.items() if content not in stored]:
                vectors = await self._texts(missing)
                await asyncio.wrap_future(store.store_vectors("text", digest, vectors))

    async def run(self, since: int = 0) -> int:
        """Encode missing vectors of items that changed after a position; returns the position reached.

        Repeats passes until no writes came in during a pass.
        """
        while since < self._view.table_sequence or not since:
            since, before = await self.run_once(since), since
            if since == before:  # the catalog is empty
                break
        return since

    async def run_once(self, since: int = 0) -> int:
        """Run one pass of `run`."""
        reached, items = self._view.table_sequence, self._view.items
        counts = [
            partial(items.count_contents_without_vectors, s, d, since)
            for s, d in self._encoders.digests.items()
        ]
        self.remaining = sum([await self._view.read(count) for count in counts])
        for space, digest in self._encoders.digests.items():
            await self._space(space, digest, since)
        return reached

    async def _space(self, space: str, digest: str, since: int) -> None:
        after, items = b"", self._view.items
        while True:
            read = partial(items.contents_without_vectors, space, digest, since, after, _PAGE[space])
            if not (page := await self._view.read(read)):
                return
            after = page[-1][0]
            vectors = await (self._texts(page) if space == "text" else self._images(page))
            if vectors:
                await asyncio.wrap_future(items.store_vectors(space, digest, vectors))
            self.encoded += len(vectors)
            self.remaining = max(self.remaining - len(page), 0)
            self._log_progress()

    async def _texts(self, page: list[tuple[bytes, Item]]) -> dict[bytes, np.ndarray]:
        encoded = await self._encoders.texts([item_text(item) for _, item in page], Lane.BACKGROUND)
        return dict(zip((content for content, _ in page), encoded.vectors, strict=True))

    async def _images(self, page: list[tuple[bytes, Item]]) -> dict[bytes, np.ndarray]:
        contents = [content for content, _ in page]
        files = await self._view.read(partial(self._view.items.files, contents))
        vectors = await self._encoders.images(list(files.values()), "{}", Lane.BACKGROUND)
        pairs = zip(files, vectors, strict=True)
        return {content: vector for content, vector in pairs if not isinstance(vector, InvalidArgument)}

    def _log_progress(self) -> None:
        if time.monotonic() - self._logged_at > _LOG_SECONDS:
            self._logged_at = time.monotonic()
            progress = self._name, self.encoded, self.remaining
            _log.info("bundle %s: %d contents encoded in the background, %d remaining", *progress)
