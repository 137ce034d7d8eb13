"""Serializes the writers of one item: a queue per item id."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager


class WriteTurns:
    """Queues of writers, one per item id that is being written.

    A writer enters the queues of all its ids at once and waits only for writers that entered earlier, so
    there are no deadlocks. All calls belong to one event loop.
    """

    def __init__(self) -> None:
        self._last: dict[str, asyncio.Future[None]] = {}
        """By id, the end of the last turn in its queue."""

    def busy(self, item_id: str) -> bool:
        """Whether a writer holds or waits for the turn on an id."""
        return item_id in self._last

    @asynccontextmanager
    async def of(self, item_ids: Collection[str]) -> AsyncIterator[None]:
        """Wait for the turn on all of these ids; the turn ends with the block."""
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        before = {self._last[item_id] for item_id in item_ids if item_id in self._last}
        self._last |= dict.fromkeys(item_ids, end)
        try:
            if before:
                await asyncio.wait(before)
            yield
        finally:
            # A canceled writer keeps its place until the earlier ones end, because later ones wait only for
            # it.
            unfinished = {other for other in before if not other.done()}
            if unfinished:
                waiting = asyncio.gather(*unfinished)
                waiting.add_done_callback(lambda _: self._end(item_ids, end))
            else:
                self._end(item_ids, end)

    def _end(self, item_ids: Collection[str], end: "asyncio.Future[None]") -> None:
        end.set_result(None)
        for item_id in item_ids:
            if self._last.get(item_id) is end:
                del self._last[item_id]
