"""Follows the change feed of an embedding service in another process into an item table; reconnects."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import numpy as np
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.catalog.item_table import Change, ItemTable
from services.core import deadline
from services.core.errors import OutOfRange, VitrineError
from services.rpc import proto_conversions

_MIN_PAUSE, _MAX_PAUSE = 0.1, 5.0
_MAX_WAIT = 30.0
_log = logging.getLogger(__name__)

Watch = Callable[[pb.WatchItemsRequest], AsyncIterator[pb.WatchItemsResponse]]


class ChangeFeedFollower:
    """Applies the feed of `watch`, with the vectors of `bundle`, to `table`.

    `ready` is set once the table has caught up.
    """

    def __init__(self, watch: Watch, table: ItemTable, bundle: str, ready: asyncio.Event) -> None:
        self._watch, self.table, self._bundle, self._ready = watch, table, bundle, ready
        self.position = 0
        """The sequence of the last applied change."""
        self._applied = asyncio.Event()

    async def run(self) -> None:
        """Follow until canceled; a broken feed continues where it ended, or from 0 if that is too old."""
        pause = _MIN_PAUSE
        first_pass: set[int] | None = set()  # the items, until the table has caught up
        while True:
            try:
                request = pb.WatchItemsRequest(after_sequence=self.position, bundle=self._bundle)
                async for message in self._watch(request):
                    self._apply(message)
                    self.position, pause = message.sequence, _MIN_PAUSE
                    if first_pass is not None:
                        first_pass.update(record.item_hash for record in message.items)
                    if message.caught_up:
                        if first_pass is not None:
                            self.table.retain(frozenset(first_pass))
                            first_pass = None
                        self._ready.set()
            except OutOfRange:
                self.position, first_pass = 0, set()
                continue
            except VitrineError as error:
                _log.warning("the change feed is broken, and is opened again: %s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)

    async def wait_for(self, sequence: int) -> None:
        """Wait until a change is in the table; DeadlineExceeded if the caller's deadline passes first."""

        async def follow() -> None:
            while self.table.sequence < sequence:
                applied = self._applied
                if self.table.sequence < sequence:
                    await applied.wait()

        if self.table.sequence < sequence:
            await deadline.wait(follow(), _MAX_WAIT)

    def _apply(self, message: pb.WatchItemsResponse) -> None:
        vectors: list[dict[str, np.ndarray]] = [{} for _ in message.items]
        for space, rows, block in (
            ("text", message.text_rows, message.text_vectors),
            ("image", message.image_rows, message.image_vectors),
        ):
            if rows:
                values = np.array(block.values, np.float32).reshape(-1, block.dimension)
                for row, vector in zip(rows, values, strict=True):
                    vectors[row][space] = vector
        self.table.apply(
            Change(
                record.item_hash,
                record.sequence,
                proto_conversions.item_from(record.item),
                proto_conversions.time_from(record.create_time, "create_time"),
                item_vectors,
            )
            for record, item_vectors in zip(message.items, vectors, strict=True)
        )
        self.table.apply(
            Change(item_hash, message.sequence, None) for item_hash in message.deleted_item_hashes
        )
        self._applied, applied = asyncio.Event(), self._applied
        applied.set()
