"""Vectors by encoders that are to be served next, made beside those that are served now.

What is missing is in SQL: an interrupted preparation goes on where it was, and a process that starts on
the new bundle finds everything encoded. Items and what is searched stay as they are meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from services.catalog import Item, item_text
from services.embedding.batching import Lane
from services.embedding.encoding import Encoding
from services.embedding.item_rows import hashes_of
from services.embedding.item_writes import Block
from services.embedding.view import CatalogueView
from services.errors import InvalidArgument

_PAGE = {"text": 512, "image": 64}  # a page of photographs is in memory with its files
_BROUGHT = 2000  # in one transaction, for which live writes wait
_SAY_EVERY = 10.0
_log = logging.getLogger(__name__)


class Preparation:
    """Encodes the items of a view by `encoding`, in the lane where nobody waits."""

    def __init__(self, view: CatalogueView, encoding: Encoding, name: str) -> None:
        self._view, self._encoding, self._name = view, encoding, name
        self.done, self.left = 0, 0
        """How many contents were encoded so far, and how many are known to lack a vector."""
        self._said = time.monotonic()

    async def bring(self, items: Sequence[Item], blocks: Sequence[Block]) -> None:
        """Take the vectors that were made of these items when the encoders were."""
        for block in blocks:
            rows = np.flatnonzero(block.present).tolist()
            for start in range(0, len(rows), _BROUGHT):
                some = rows[start : start + _BROUGHT]
                found = {hashes_of(items[row])[block.space]: block.values[row] for row in some}
                await asyncio.wrap_future(self._view.items.keep_vectors(block.space, block.digest, found))

    async def foresee(self, items: Sequence[Item]) -> None:
        """Encode the texts of items that may not be here yet, so that they are found from the first."""
        digest, store = self._encoding.digests["text"], self._view.items
        for start in range(0, len(items), _PAGE["text"]):
            page = [(hashes_of(item)["text"], item) for item in items[start : start + _PAGE["text"]]]
            contents = {content: item for content, item in page if content}
            known = await self._view.read(partial(store.known, contents, "text", digest))
            if missing := [(content, item) for content, item in contents.items() if content not in known]:
                made = await self._texts(missing)
                await asyncio.wrap_future(store.keep_vectors("text", digest, made))

    async def run(self, since: int = 0) -> int:
        """Encode what items that changed since a position lack; the position up to which all is done.

        Goes on while more is written than one pass takes.
        """
        while since < self._view.written or not since:
            since, before = await self.once(since), since
            if since == before:  # of an empty catalogue
                break
        return since

    async def once(self, since: int = 0) -> int:
        """The same in one pass."""
        reached, items = self._view.written, self._view.items
        counts = [partial(items.count_lacking, s, d, since) for s, d in self._encoding.digests.items()]
        self.left = sum([await self._view.read(count) for count in counts])
        for space, digest in self._encoding.digests.items():
            await self._space(space, digest, since)
        return reached

    async def _space(self, space: str, digest: str, since: int) -> None:
        after, items = b"", self._view.items
        while True:
            lacking = partial(items.contents_lacking, space, digest, since, after, _PAGE[space])
            if not (page := await self._view.read(lacking)):
                return
            after = page[-1][0]
            found = await (self._texts(page) if space == "text" else self._photographs(page))
            if found:
                await asyncio.wrap_future(items.keep_vectors(space, digest, found))
            self.done += len(found)
            self.left = max(self.left - len(page), 0)
            self._say()

    async def _texts(self, page: list[tuple[bytes, Item]]) -> dict[bytes, np.ndarray]:
        encoded = await self._encoding.texts([item_text(item) for _, item in page], Lane.BACKGROUND)
        return dict(zip((content for content, _ in page), encoded.vectors, strict=True))

    async def _photographs(self, page: list[tuple[bytes, Item]]) -> dict[bytes, np.ndarray]:
        contents = [content for content, _ in page]
        files = await self._view.read(partial(self._view.items.files, contents))
        vectors = await self._encoding.photographs(list(files.values()), "{}", Lane.BACKGROUND)
        pairs = zip(files, vectors, strict=True)
        return {content: vector for content, vector in pairs if not isinstance(vector, InvalidArgument)}

    def _say(self) -> None:
        if time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            counted = self._name, self.done, self.left
            _log.info("bundle %s: %d contents encoded beside the calls, %d are left", *counted)
