"""Data retention: deletes, expires and exports the data of users, in SQL and in every state in memory.

Knows the store and the states that follow it, not the models.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from operator import methodcaller
from typing import Any, Protocol, TypeVar

from services.ranking.events.erasure import ErasedUser
from services.ranking.events.event_store import EventStore, StoredEvent
from services.ranking.events.impression_log import LoggedPage, StoredPage
from services.ranking.events.retention_clock import RetentionClock
from services.ranking.state.event_columns import EventState

T = TypeVar("T")
_EXPIRED_AT_ONCE = 1000
_EXPIRY_INTERVAL = 600.0
_EXPLORATION_DAYS = 90
_END_OF_TIME = datetime(9000, 1, 1, tzinfo=UTC)
_log = logging.getLogger(__name__)


class Threads(Protocol):
    """Runs a blocking function off the event loop."""

    def __call__(self, function: Callable[[], T]) -> Awaitable[T]:
        """The result of the function."""


class DataRetention:
    """Data retention over a store; `on` runs blocking functions on threads."""

    def __init__(self, store: EventStore, on: Threads) -> None:
        self._store, self._on = store, on
        self._unfinished: set[asyncio.Task[Any]] = set()

    async def forget(self, user_id: str, visitor_id: str) -> ErasedUser:
        """Delete all data of a user; after the return no answer depends on it."""

        async def forget() -> ErasedUser:
            erased = await asyncio.wrap_future(self._store.forget(user_id, visitor_id))
            await self._delete_from_states(methodcaller("forget", erased.user_keys, user_id, visitor_id))
            await self._on(self._store.scrub)
            return erased

        return await self._to_completion(forget())

    async def expire(self, before: datetime) -> int:
        """Delete the events that happened before a time; returns their number."""

        async def batch() -> int:
            expired = await asyncio.wrap_future(self._store.expire(before, _EXPIRED_AT_ONCE))
            if expired.sequences:
                await self._delete_from_states(methodcaller("drop", expired.sequences, expired.user_keys))
            return len(expired.sequences)

        total = 0
        while count := await self._to_completion(batch()):
            total += count
        if total:
            await self._on(self._store.scrub)
        return total

    async def log(self, pages: Sequence[LoggedPage]) -> int:
        """Write answered pages to the impression log; returns their number."""
        return await asyncio.wrap_future(self._store.served.write(pages))

    async def retain(self, event_days: int, page_days: int, clock: RetentionClock | None) -> None:
        """Delete old events, pages and exploration counts, without end.

        0 event days keep all events, 0 page days keep no pages. Without a clock nothing expires by age.
        """
        while True:
            if not page_days:
                await self._expire_pages(_END_OF_TIME)
            if clock is not None:
                await self._expire_by_age(await clock.time(), event_days, page_days)
            await asyncio.sleep(_EXPIRY_INTERVAL)

    async def _expire_by_age(self, now: datetime, event_days: int, page_days: int) -> None:
        if event_days and (total := await self.expire(now - timedelta(days=event_days))):
            _log.info("deleted %d events older than %d days", total, event_days)
        if page_days and (total := await self._expire_pages(now - timedelta(days=page_days))):
            _log.info("deleted %d pages older than %d days", total, page_days)
        before = now - timedelta(days=_EXPLORATION_DAYS)
        while await asyncio.wrap_future(self._store.expire_explored(before, _EXPIRED_AT_ONCE)):
            pass

    async def _expire_pages(self, before: datetime) -> int:
        total = 0
        while count := await asyncio.wrap_future(self._store.expire_pages(before, _EXPIRED_AT_ONCE)):
            total += count
        if total:
            await self._on(self._store.scrub)
        return total

    async def export(
        self, user_id: str, visitor_id: str, after: int, limit: int
    ) -> tuple[dict[str, list[str]], list[StoredEvent], bool]:
        """Every id of a user, at most `limit` events after a sequence number, and whether there are more."""

        def export() -> tuple[dict[str, list[str]], list[StoredEvent], bool]:
            user = user_id, visitor_id
            events = self._store.export(*user, after, limit)
            more = bool(events and self._store.export(*user, events[-1].sequence, 1))
            return self._store.user_ids(*user), events, more

        return await self._on(export)

    async def export_pages(self, user_id: str, visitor_id: str, after: int, limit: int) -> list[StoredPage]:
        """At most `limit` pages of a user, after a position in the impression log."""
        return await self._on(lambda: self._store.export_pages(user_id, visitor_id, after, limit))

    async def _to_completion(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for work that runs to its end even if the caller is canceled."""
        task = asyncio.ensure_future(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        return await asyncio.shield(task)

    async def _delete_from_states(self, from_state: Callable[[EventState], None]) -> None:
        """Delete from every state over the store, also from one that still loads."""

        def delete() -> None:
            for reader in list(self._store.readers):
                reader.delete(from_state)

        await self._on(delete)
