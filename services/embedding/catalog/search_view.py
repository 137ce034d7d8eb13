"""The searchable view of the item store: a vector index per space and the item table.

The view follows the store change by change. It answers searches, table reads and change feeds; it writes
nothing to the store.
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

from services.catalog import filters
from services.catalog.item_table import Change, ItemTable
from services.catalog.query_vectors import QueryGroup
from services.core import deadline
from services.core.accumulator import Accumulator
from services.core.errors import OutOfRange, Unavailable
from services.core.executors import finish_queued, run_in
from services.core.ordering import best_first
from services.embedding.catalog.neighbors import SCORE_DIGITS, Neighbors
from services.embedding.catalog.table_file import TableFile
from services.embedding.index.vector_index import (
    PositionCache,
    SearchHits,
    Selection,
    VectorIndex,
    weighted_centroid,
)
from services.embedding.store.item_store import ItemStore
from services.embedding.store.schema import StoredItem

T = TypeVar("T")
_BATCH = 2000
_FEED_BATCH = 256  # items per feed in memory while the caller reads
_MAX_WAIT_SECONDS = 30.0
_POLL_SECONDS = 1.0
_MAX_OVERFETCH = 500
_SPARE_HITS = 64
_log = logging.getLogger(__name__)


class SearchView:
    """Searches the items of a store; `digests` are the encoder digests and `spaces` the indexes, by space.

    SQL and searches run on a few threads of the view. The searches of pages, `search_groups`, run on
    `page_pool` if there is one, which stays open. `file` keeps the item table for the next start.

    Raises:
        Unavailable: the engine of an index does not answer.
    """

    def __init__(
        self,
        items: ItemStore,
        digests: Mapping[str, str],
        spaces: Mapping[str, VectorIndex],
        page_pool: ThreadPoolExecutor | None = None,
        file: TableFile | None = None,
    ) -> None:
        self.items, self._digests, self.spaces = items, digests, spaces
        self._positions, self._accumulator = PositionCache(), Accumulator()
        self._file = file
        self.table, self._sequence = self._read_table(), 0
        self._neighbors = {space: Neighbors(index, self.table) for space, index in spaces.items()}
        self._retry_index_at = 0.0
        self._pool = ThreadPoolExecutor(4, "catalog")
        self._page_pool = page_pool
        self._follow_pool = ThreadPoolExecutor(1, "follow")  # one at a time; reads do not wait for it
        self._table_changed, self._feeds_ended = asyncio.Event(), False
        self._open_indexes()

    def close(self) -> None:
        """Stop; calls in progress are answered."""
        if self._page_pool is not None:
            finish_queued(self._page_pool)
        for index in self.spaces.values():
            index.close()
        self._follow_pool.shutdown()
        self._pool.shutdown()

    @property
    def sequence(self) -> int:
        """Sequence of the last change that search and table reflect."""
        return self._sequence

    @property
    def table_sequence(self) -> int:
        """Sequence of the last change that table and feeds reflect; search lags if its engine is down."""
        return self.table.sequence

    async def wait_for(self, sequence: int) -> None:
        """Wait until a change is searchable; DeadlineExceeded if the caller's deadline passes first."""
        if self.sequence < sequence:
            await deadline.wait(self._until(lambda: self.sequence >= sequence), _MAX_WAIT_SECONDS)

    async def read(self, function: Callable[[], T]) -> T:
        """Run a read, of the store or an index, off the event loop."""
        return await run_in(self._pool, function)

    async def search(
        self,
        space: str,
        queries: np.ndarray,
        limit: int,
        condition: filters.Filter | None,
        excluded: Sequence[int] = (),
        as_of: datetime | None = None,
    ) -> list[SearchHits]:
        """The nearest live items of each query, float32 (Q, D), that meet `condition`, without `excluded`.

        With `as_of`, only items available at that time.
        """

        def run() -> list[SearchHits]:
            index = self.spaces[space]
            mask = np.ones(self.table.length, bool) if as_of is None else self.table.available(as_of)
            if condition is not None:
                mask = filters.both(mask, filters.evaluate(condition, self.table))
            overfetch = len(excluded) <= _MAX_OVERFETCH
            if not overfetch:
                mask, rows = mask.copy(), self.table.rows(excluded)
                mask[rows[(rows >= 0) & (rows < len(mask))]] = False
            hashes = self.table.item_hashes[: len(mask)]
            # A mask that is all True still selects: the index may already have items without a table row.
            is_unrestricted = condition is None and as_of is None and overfetch
            selection = None if is_unrestricted else Selection(hashes, mask, self.table.rows, self._positions)
            results = index.search(queries, limit + overfetch * len(excluded), selection)
            return [_without(hits, excluded, limit) for hits in results]

        return await self.read(run)

    async def search_groups(
        self,
        groups: Sequence[QueryGroup],
        spaces: Sequence[str],
        limit: int,
        condition: filters.Filter | None,
        excluded: Sequence[int] | np.ndarray = (),
        as_of: datetime | None = None,
    ) -> dict[str, SearchHits]:
        """By space, the `limit` nearest items of each group, as in `search`, with their best score of any."""

        def run() -> dict[str, SearchHits]:
            mask = np.ones(self.table.length, bool) if as_of is None else self.table.available(as_of)
            if condition is not None:
                mask = filters.both(mask, filters.evaluate(condition, self.table))
            mask, rows = mask.copy(), self.table.rows(excluded)
            mask[rows[(rows >= 0) & (rows < len(mask))]] = False
            return {space: self._merged(space, groups, limit, mask, condition is None) for space in spaces}

        return await run_in(self._page_pool or self._pool, run)

    def _merged(
        self, space: str, groups: Sequence[QueryGroup], limit: int, mask: np.ndarray, most: bool
    ) -> SearchHits:
        """The hits of all groups in one space; `most` says that the mask allows most items."""
        index, rows, scores = self.spaces[space], list[np.ndarray](), list[np.ndarray]()
        if not len(mask):
            return SearchHits(np.empty(0, np.int64), np.empty(0, np.float32))
        singles = [group.item_hashes[0] for group in groups if most and _is_item(group)]
        rest: list[int] = []
        if singles:
            rows, scores, rest = self._neighbors[space].search(singles, limit, mask)
        centroids = []
        for group in groups:
            if most and _is_item(group) and group.item_hashes[0] not in rest:
                continue
            positions, vectors = index.vectors(group.item_hashes)
            if len(positions):
                weights = np.asarray(group.weights or np.ones(len(group.item_hashes)), np.float32)
                centroids.append(weighted_centroid(vectors, weights[positions]))
        for hits in self._allowed_hits(index, centroids, limit, mask, most):
            hit_rows = self.table.rows(hits.hashes)
            known = np.flatnonzero(hit_rows >= 0)
            rows.append(hit_rows[known])
            scores.append(hits.scores[known])
        if not rows:
            return SearchHits(np.empty(0, np.int64), np.empty(0, np.float32))
        every, every_score = np.concatenate(rows), np.concatenate(scores)
        distinct, index_of = self._accumulator.distinct(every, self.table.length)
        best = np.full(len(distinct), -np.inf, np.float32)
        np.maximum.at(best, index_of, np.round(every_score, SCORE_DIGITS))  # as for neighbors
        hashes = self.table.item_hashes[distinct]
        order = best_first(best, hashes)
        return SearchHits(hashes[order], best[order])

    def _allowed_hits(
        self, index: VectorIndex, queries: Sequence[np.ndarray], limit: int, mask: np.ndarray, most: bool
    ) -> list[SearchHits]:
        """The `limit` nearest items of each query, float32 (D,), that the mask allows.

        A search for more items than are needed costs less than a selection, where most items are allowed.
        """
        if not queries:
            return []
        vectors = np.stack(queries)
        if most:
            results = []
            for hits in index.search(vectors, limit + _SPARE_HITS):
                hit_rows = self.table.rows(hits.hashes)
                usable = np.flatnonzero((hit_rows >= 0) & (hit_rows < len(mask)))
                usable = usable[mask[hit_rows[usable]]][:limit]
                if len(usable) < limit <= len(hits.hashes):
                    break
                results.append(SearchHits(hits.hashes[usable], hits.scores[usable]))
            else:
                return results
        hashes = self.table.item_hashes[: len(mask)]
        return index.search(vectors, limit, Selection(hashes, mask, self.table.rows, self._positions))

    async def changes(
        self, after: int, *, until_current: bool
    ) -> AsyncIterator[tuple[list[StoredItem], dict[str, dict[int, np.ndarray]], int]]:
        """Records after a position, their vectors by space and item hash, and the new position.

        The position is the last sequence of the batch. An empty batch means that every committed change has
        been sent; then the feed waits for more, unless `until_current`.
        """
        while True:
            changed = self._table_changed
            if self._feeds_ended:
                raise Unavailable(
                    "this feed has ended, as another bundle is served or the server stops: follow again"
                )
            batch = await self.read(partial(self._batch, after, _FEED_BATCH))
            if batch[0]:
                after = batch[0][-1].sequence
                yield *batch, after
                continue
            yield [], {}, after
            if until_current:
                return
            await changed.wait()

    def end_feeds(self) -> None:
        """End all change feeds; followers reconnect to the server that is current then."""
        self._feeds_ended = True
        self._wake()

    async def wait_for_commit_after(self, sequence: int) -> None:
        """Wait until the table reflects a change after a position."""
        await self._until(lambda: self.table_sequence > sequence)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            changed = self._table_changed
            if not condition():
                await changed.wait()

    async def follow(self) -> None:
        """Apply committed changes to table and indexes, and wake the callers that wait for them.

        While the engine of an index is down, search lags; `maintain` retries.
        """
        before = self.table_sequence, self.sequence
        await run_in(self._follow_pool, self._advance)
        if before != (self.table_sequence, self.sequence):
            self._wake()

    async def repeat(self, since: int) -> None:
        """Apply all changes after a position to the indexes again."""
        self._sequence = min(self._sequence, since)
        await self.follow()

    def _wake(self) -> None:
        changed, self._table_changed = self._table_changed, asyncio.Event()
        changed.set()

    def _batch(
        self, after: int, limit: int = _BATCH
    ) -> tuple[list[StoredItem], dict[str, dict[int, np.ndarray]]]:
        records = self.items.changes(after, limit)
        return records, self._vectors_of(records)

    def _vectors_of(self, records: Sequence[StoredItem]) -> dict[str, dict[int, np.ndarray]]:
        hashes = [record.item_hash for record in records if not record.deleted]
        return {s: self.items.vectors(hashes, s, digest) for s, digest in self._digests.items()}

    def _advance(self) -> None:
        """Apply committed changes to table and indexes; only to the table while an engine is down."""
        is_current = self.sequence == self.table_sequence
        while (batch := self._batch(self.table_sequence))[0]:
            # The table comes first, so that every search hit has a row.
            self.table.apply(_change(record, batch[1]) for record in batch[0])
            if is_current:
                is_current = self._index(*batch)
        while self.sequence < self.table_sequence and self._index(*self._batch(self.sequence)):
            pass

    def _index(self, records: Sequence[StoredItem], vectors: Mapping[str, Mapping[int, np.ndarray]]) -> bool:
        """Update the indexes; False if the engine of one is down, or was down a moment ago."""
        if time.monotonic() < self._retry_index_at:
            return False
        last = records[-1].sequence
        try:
            for space, index in self.spaces.items():
                deletions = [r.item_hash for r in records if r.item_hash not in vectors[space]]
                index.change(vectors[space], deletions, last)
                self._neighbors[space].note([r.item_hash for r in records])
        except Unavailable as error:
            if not self._retry_index_at:  # logged once, not every second
                _log.warning("search lags behind the item store: %s", error)
            # Otherwise every writer would wait for the engine in turn.
            self._retry_index_at = time.monotonic() + _POLL_SECONDS / 2
            return False
        self._sequence, self._retry_index_at = last, 0.0
        return True

    def _read_table(self) -> ItemTable:
        """The table of all items: from the file, if there is one, and the store."""
        if (columns := self._file.load() if self._file else None) is not None:
            try:
                table = self._with_store_changes(ItemTable.of_columns(columns))
                self._add_later_vectors(table)
                return table
            except OutOfRange as error:
                _log.warning("the saved item table is of no use, items are read from the store: %s", error)
        return self._with_store_changes(ItemTable())

    def _with_store_changes(self, table: ItemTable) -> ItemTable:
        """The same table with the changes of the store that it lacks."""
        while (batch := self._batch(table.sequence))[0]:
            table.apply(_change(record, batch[1]) for record in batch[0])
        return table

    def _add_later_vectors(self, table: ItemTable) -> None:
        """Add the vectors that the store got without a change of their items: those of a backfill."""
        for space in self._digests:
            column = table.vectors(space)
            lacking = np.flatnonzero(table.live if column is None else table.live & ~column[1])
            if not len(lacking):
                continue
            lacking = lacking[np.isin(table.item_hashes[lacking], self.items.with_content(space))]
            for start in range(0, len(lacking), _BATCH):
                ids = table.ids(lacking[start : start + _BATCH])
                records = list(self.items.get(ids).values())
                vectors = self._vectors_of(records)
                table.apply(_change(r, vectors) for r in records if r.item_hash in vectors[space])

    def _open_indexes(self) -> None:
        """Let the indexes equal the table; unchanged vectors that an index has stored are not added again."""
        self._sequence = self.table.sequence
        live, hashes, sequences = self.table.live, self.table.item_hashes, self.table.sequences
        for space, index in self.spaces.items():
            stored = index.open()
            values, present = self.table.vectors(space) or (
                np.empty((len(hashes), index.dimension), np.float16),
                np.zeros(len(hashes), bool),
            )
            with_vector = np.flatnonzero(live & present)
            stored_rows = stored.rows(hashes[with_vector])
            is_stored = stored_rows >= 0
            is_stored[is_stored] = (
                sequences[with_vector[is_stored]] <= stored.sequences[stored_rows[is_stored]]
            )
            is_live = np.zeros(len(stored), bool)
            is_live[stored_rows[is_stored]] = True
            fresh = with_vector[~is_stored]
            index.reconcile(stored.hashes[~is_live], hashes[fresh], values[fresh], self._sequence)

    async def maintain(self) -> None:
        """Maintain the indexes and poll the store for changes, until canceled.

        Polling finds changes without a notification: by calls that ended after their commit, and by other
        processes.
        """
        loop = asyncio.get_running_loop()
        while True:
            table_sequence, sequence = self.table_sequence, self.sequence
            for index in self.spaces.values():
                await loop.run_in_executor(None, partial(index.maintain, sequence))
            if self._file is not None:
                await loop.run_in_executor(None, partial(self._file.save_if_outdated, self.table))
            try:
                async with asyncio.timeout(_POLL_SECONDS):  # asyncio.wait_for may lose a cancellation
                    await self.wait_for_commit_after(table_sequence)
            except TimeoutError:
                await self.follow()


def _change(record: StoredItem, vectors: Mapping[str, Mapping[int, np.ndarray]]) -> Change:
    item_hash, item = record.item_hash, None if record.deleted else record.item
    item_vectors = {space: rows[item_hash] for space, rows in vectors.items() if item_hash in rows}
    return Change(item_hash, record.sequence, item, record.created, item_vectors)


def _is_item(group: QueryGroup) -> bool:
    """Whether a group searches by the vector of one item; a negative weight points away from it."""
    return len(group.item_hashes) == 1 and (not group.weights or group.weights[0] > 0)


def _without(hits: SearchHits, excluded: Sequence[int], limit: int) -> SearchHits:
    if not len(excluded):
        return hits
    rows = np.flatnonzero(~np.isin(hits.hashes, np.asarray(excluded, np.int64)))[:limit]
    return SearchHits(hits.hashes[rows], hits.scores[rows])
