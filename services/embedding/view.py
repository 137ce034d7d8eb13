"""What follows from the catalogue's truth: the index of each space and the item table, kept up with it.

Reads the store change by change. Search, table and change feed are answered from here; nothing is written.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import TypeVar

import numpy as np

from services import deadline, filters
from services.embedding.index import Neighbours, Places, Selection, VectorIndex
from services.embedding.item_rows import Record
from services.embedding.items import ItemStore
from services.embedding.pools import run_in
from services.errors import Unavailable
from services.item_table import Change, ItemTable

T = TypeVar("T")
_BATCH = 2000
_LONGEST_WAIT = 30.0
_LOOK_EVERY = 1.0
_FEW = 500
_log = logging.getLogger(__name__)


class CatalogueView:
    """The items of a store by their vectors of `digests`, searched by the indexes `spaces`, both by space.

    SQL and search run on a few threads.

    Raises:
        Unavailable: an index's engine does not answer.
    """

    def __init__(
        self, items: ItemStore, digests: Mapping[str, str], spaces: Mapping[str, VectorIndex]
    ) -> None:
        self.items, self._digests, self.spaces = items, digests, spaces
        self._places = Places()
        self.table, self._sequence = ItemTable(), 0
        self._away_until = 0.0
        self._pool = ThreadPoolExecutor(4, "catalogue")
        self._following = ThreadPoolExecutor(1, "follow")  # in turn, and reads do not wait for it
        self._moved, self._feeds_ended = asyncio.Event(), False
        self._follow_from_the_beginning()

    def close(self) -> None:
        """Stop; what waits is answered."""
        for index in self.spaces.values():
            index.close()
        self._following.shutdown()
        self._pool.shutdown()

    @property
    def sequence(self) -> int:
        """The last change that search and table reflect."""
        return self._sequence

    @property
    def written(self) -> int:
        """The last change that table and feeds reflect; search follows, unless its engine is away."""
        return self.table.sequence

    async def wait_for(self, sequence: int) -> None:
        """Wait until a change is searchable; DeadlineExceeded when the caller's time ends first."""
        if self.sequence < sequence:
            await deadline.wait(self._until(lambda: self.sequence >= sequence), _LONGEST_WAIT)

    async def read(self, function: Callable[[], T]) -> T:
        """Run a read of the store off the event loop."""
        return await run_in(self._pool, function)

    async def search(
        self,
        space: str,
        queries: np.ndarray,
        limit: int,
        condition: filters.Filter | None,
        excluded: Sequence[int] = (),
        as_of: datetime | None = None,
    ) -> list[Neighbours]:
        """The nearest live items of each query, float32 (Q, D), that meet `condition`.

        With `as_of`, only those available at that time.
        """

        def run() -> list[Neighbours]:
            index = self.spaces[space]
            mask = np.ones(self.table.length, bool) if as_of is None else self.table.available(as_of)
            if condition is not None:
                qualifying = filters.evaluate(condition, self.table)
                mask = mask & qualifying[: len(mask)]
            few = len(excluded) <= _FEW
            if not few:
                rows = self.table.rows(excluded)
                mask[rows[(rows >= 0) & (rows < len(mask))]] = False
            numbers = self.table.item_numbers[: len(mask)]
            # Even of a mask that is set everywhere: the index may know items by now that it does not.
            every = condition is None and as_of is None and few
            selection = None if every else Selection(numbers, mask, self.table.rows, self._places)
            found = index.search(queries, limit + few * len(excluded), selection)
            return [_without(near, excluded, limit) for near in found]

        return await run_in(self._pool, run)

    async def changes(
        self, after: int, *, until_current: bool
    ) -> AsyncIterator[tuple[list[Record], dict[str, dict[int, np.ndarray]], int]]:
        """Records after a position with their vectors by space and number, and the position then reached.

        The position is the last sequence of the batch. An empty batch says that all
        that was committed has been sent; then the feed waits for more, unless `until_current`.
        """
        while True:
            moved = self._moved
            if self._feeds_ended:
                raise Unavailable("another bundle is served now: follow again")
            batch = await self.read(partial(self._batch, after))
            if batch[0]:
                after = batch[0][-1].sequence
                yield *batch, after
                continue
            yield [], {}, after
            if until_current:
                return
            await moved.wait()

    def end_feeds(self) -> None:
        """Let those who follow change feeds ask again, of whoever answers then."""
        self._feeds_ended = True
        self._wake()

    async def moved(self, sequence: int) -> None:
        """Wait until something was committed after a position."""
        await self._until(lambda: self.written > sequence)

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            moved = self._moved
            if not reached():
                await moved.wait()

    async def follow(self) -> None:
        """Let search and table follow what was committed, and wake who waits for that.

        While an index's engine is away search stays behind: `maintain` tries again.
        """
        before = self.written, self.sequence
        await run_in(self._following, self._advance)
        if before != (self.written, self.sequence):
            self._wake()

    async def repeat(self, since: int) -> None:
        """Change the indexes once more by all that was written since a position."""
        self._sequence = min(self._sequence, since)
        await self.follow()

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _batch(self, after: int) -> tuple[list[Record], dict[str, dict[int, np.ndarray]]]:
        records = self.items.changes(after, _BATCH)
        numbers = [record.number for record in records if not record.deleted]
        return records, {s: self.items.vectors(numbers, s, digest) for s, digest in self._digests.items()}

    def _advance(self) -> None:
        """Let table and indexes follow what was committed; the table alone while an engine is away."""
        level = self.sequence == self.written
        while (batch := self._batch(self.written))[0]:
            # The table first: what is found has a row there.
            self.table.apply(_change(record, batch[1]) for record in batch[0])
            if level:
                level = self._indexed(*batch)
        while self.sequence < self.written and self._indexed(*self._batch(self.sequence)):
            pass

    def _indexed(self, records: Sequence[Record], vectors: Mapping[str, Mapping[int, np.ndarray]]) -> bool:
        """Change the indexes; False when the engine of one is away, or was a moment ago."""
        if time.monotonic() < self._away_until:
            return False
        reached = records[-1].sequence
        try:
            for space, index in self.spaces.items():
                gone = [r.number for r in records if r.number not in vectors[space]]
                index.change(vectors[space], gone, reached)
        except Unavailable as error:
            if not self._away_until:  # said once, not every second
                _log.warning("search stays behind what was written: %s", error)
            # Else each writer would wait for it in turn.
            self._away_until = time.monotonic() + _LOOK_EVERY / 2
            return False
        self._sequence, self._away_until = reached, 0.0
        return True

    def _follow_from_the_beginning(self) -> None:
        """Read the whole store; what an index holds from before, unchanged, is not put into it again."""
        held = {space: index.open() for space, index in self.spaces.items()}
        fresh = {space: (list[int](), list[np.ndarray]()) for space in self.spaces}
        live = {space: np.zeros(len(of), bool) for space, of in held.items()}
        while True:
            records, vectors = self._batch(self.table.sequence)
            if not records:
                break
            changed = {record.number: record.sequence for record in records}
            for space, (numbers, values) in fresh.items():
                mine = np.fromiter(vectors[space], np.int64)
                rows = held[space].rows(mine)
                for number, row in zip(mine.tolist(), rows.tolist(), strict=True):
                    if row >= 0 and changed[number] <= held[space].sequences[row]:
                        live[space][row] = True
                    else:
                        numbers.append(number)
                        values.append(vectors[space][number].astype(np.float16))
            self.table.apply(_change(record, vectors) for record in records)
        self._sequence = self.table.sequence
        for space, (numbers, values) in fresh.items():
            index, gone = self.spaces[space], held[space].numbers[~live[space]]
            stacked = np.array(values, np.float16).reshape(len(values), index.dimension)
            index.hold(gone, np.array(numbers, np.int64), stacked, self._sequence)

    async def maintain(self) -> None:
        """Tidy the indexes, and follow what nobody told of, until cancelled.

        A call that was left after its commit tells nobody, nor does another process.
        """
        loop = asyncio.get_running_loop()
        while True:
            written, searchable = self.written, self.sequence
            for index in self.spaces.values():
                await loop.run_in_executor(None, partial(index.tidy, searchable))
            try:
                async with asyncio.timeout(_LOOK_EVERY):  # wait_for may lose a cancellation
                    await self.moved(written)
            except TimeoutError:
                await self.follow()


def _change(record: Record, vectors: Mapping[str, Mapping[int, np.ndarray]]) -> Change:
    mine = {space: of[record.number] for space, of in vectors.items() if record.number in of}
    return Change(
        record.number, record.sequence, None if record.deleted else record.item, record.created, mine
    )


def _without(near: Neighbours, excluded: Sequence[int], limit: int) -> Neighbours:
    if not len(excluded):
        return near
    keep = np.flatnonzero(~np.isin(near.numbers, np.asarray(excluded, np.int64)))[:limit]
    return Neighbours(near.numbers[keep], near.scores[keep])
