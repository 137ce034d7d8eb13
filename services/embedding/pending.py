"""Photographs that items name by their address: fetched behind the scenes, a few at a time.

What is to be fetched is in SQL, so that a restart goes on where it was. An item gets its photograph, or the
reason why it has none, as a later change.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from services.embedding.catalogue import Catalogue
from services.embedding.fetching import Fetcher, FetchFailed
from services.embedding.item_rows import Record
from services.errors import VitrineError

_AT_ONCE = 32
_PAUSE = 5.0
_log = logging.getLogger(__name__)


class PendingPhotographs:
    """Fetches for one catalogue by what `fetcher` makes, in `run` until that is cancelled."""

    def __init__(self, catalogue: Catalogue, fetcher: Callable[[], Fetcher]) -> None:
        self._catalogue, self._view, self._fetcher = catalogue, catalogue.view, fetcher
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Fetch what waits, then what comes."""
        fetcher, seen = self._fetcher(), 0
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                reached = self._view.written
                records = await self._view.read(partial(self._view.items.pending, seen, _AT_ONCE))
                for record in records:
                    await self._room.acquire()
                    task = asyncio.ensure_future(self._fetch(fetcher, record))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    seen = record.sequence
                if not records:
                    seen = max(seen, reached)
                    await self._view.moved(seen)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await fetcher.close()

    async def _fetch(self, fetcher: Fetcher, record: Record) -> None:
        try:
            photograph, error = b"", ""
            try:
                photograph = await fetcher.fetch(record.item.image_uri)
            except FetchFailed as failed:
                error = f"image.uri: {failed}"
            await self._attach(record, photograph, error)
        finally:
            self._room.release()

    async def _attach(self, record: Record, photograph: bytes, error: str) -> None:
        while True:
            try:
                await self._catalogue.attach(record, photograph, error)
                return
            except (VitrineError, SQLAlchemyError):  # what was fetched is kept until the store is back
                _log.exception("the photograph of %r waits", record.item.id)
                await asyncio.sleep(_PAUSE)
            except Exception:  # a bug of ours must not keep the others waiting; a start tries again
                _log.exception("the photograph of %r is given up", record.item.id)
                return
