"""An item table kept up from another process: follows embedding's change feed, and comes back.

Knows the feed's messages and nothing of what the table is for.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import numpy as np
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services import deadline, wire
from services.errors import OutOfRange, VitrineError
from services.item_table import Change, ItemTable

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_LONGEST_WAIT = 30.0
_log = logging.getLogger(__name__)

Watch = Callable[[pb.WatchItemsRequest], AsyncIterator[pb.WatchItemsResponse]]


class Follower:
    """Applies the feed of `watch`, with vectors of `bundle`, to `table` until cancelled.

    `ready` is set once it caught up.
    """

    def __init__(self, watch: Watch, table: ItemTable, bundle: str, ready: asyncio.Event) -> None:
        self._watch, self.table, self._bundle, self._ready = watch, table, bundle, ready
        self.position = 0
        """The feed's last change that was applied."""
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """Follow; a lost feed is taken up where it ended, a position too old starts from 0."""
        pause = _FIRST_PAUSE
        seen: set[int] | None = set()
        while True:
            try:
                asked = pb.WatchItemsRequest(after_sequence=self.position, bundle=self._bundle)
                async for message in self._watch(asked):
                    self._apply(message)
                    self.position, pause = message.sequence, _FIRST_PAUSE
                    if seen is not None:
                        seen.update(record.number for record in message.items)
                    if message.caught_up:
                        if seen is not None:
                            self.table.retain(frozenset(seen))
                            seen = None
                        self._ready.set()
            except OutOfRange:
                self.position, seen = 0, set()
                continue
            except VitrineError as error:
                _log.warning("the change feed broke off: %s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def wait_for(self, sequence: int) -> None:
        """Wait until a change is in the table; DeadlineExceeded when the caller's time ends first."""

        async def follow() -> None:
            while self.table.sequence < sequence:
                moved = self._moved
                if self.table.sequence < sequence:
                    await moved.wait()

        if self.table.sequence < sequence:
            await deadline.wait(follow(), _LONGEST_WAIT)

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
                record.number,
                record.sequence,
                wire.item_from(record.item),
                wire.time_from(record.create_time, "create_time"),
                mine,
            )
            for record, mine in zip(message.items, vectors, strict=True)
        )
        self.table.apply(Change(n, message.sequence, None) for n in message.deleted_item_numbers)
        self._moved, moved = asyncio.Event(), self._moved
        moved.set()
