"""Fetches the images that items reference by URI, a few at a time, in the background.

The queue is in SQL, so that a restart continues where the last run stopped. An item gets its image, or the
error, as a later change.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from services.core.errors import VitrineError
from services.embedding.catalog.writer import CatalogWriter
from services.embedding.images.fetcher import FetchFailed, ImageFetcher
from services.embedding.store.schema import StoredItem

_MAX_CONCURRENT = 32
_RETRY_SECONDS = 5.0
_log = logging.getLogger(__name__)


class ImageFetchWorker:
    """Fetches images for one catalog; `fetcher` creates the client. `run` goes on until it is canceled."""

    def __init__(self, writer: CatalogWriter, fetcher: Callable[[], ImageFetcher]) -> None:
        self._writer, self._view, self._fetcher = writer, writer.view, fetcher
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)

    async def run(self) -> None:
        """Fetch the images of pending items, then those of new ones."""
        fetcher, position = self._fetcher(), 0
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                table_sequence = self._view.table_sequence
                records = await self._view.read(partial(self._view.items.pending, position, _MAX_CONCURRENT))
                for record in records:
                    await self._slots.acquire()
                    task = asyncio.ensure_future(self._fetch(fetcher, record))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    position = record.sequence
                if not records:
                    position = max(position, table_sequence)
                    await self._view.wait_for_commit_after(position)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await fetcher.close()

    async def _fetch(self, fetcher: ImageFetcher, record: StoredItem) -> None:
        try:
            image, error = b"", ""
            try:
                image = await fetcher.fetch(record.item.image_uri)
            except FetchFailed as failure:
                error = f"image.uri: {failure}"
            await self._attach(record, image, error)
        finally:
            self._slots.release()

    async def _attach(self, record: StoredItem, image: bytes, error: str) -> None:
        while True:
            try:
                await self._writer.attach_image(record, image, error)
                return
            except VitrineError as refusal:  # the image stays in memory until the store accepts it
                _log.warning("the image of %r waits: %s", record.item.id, refusal)
                await asyncio.sleep(_RETRY_SECONDS)
            except SQLAlchemyError:
                _log.exception("the image of %r waits", record.item.id)
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:  # a bug must not block other images; a restart tries again
                _log.exception("the image of %r is dropped", record.item.id)
                return
