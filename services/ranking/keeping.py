"""What is kept of people and for how long: deleting, expiring and reading it, in SQL and in every memory.

Knows what the store deletes and who reads it, not what answers are made of.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from operator import methodcaller
from typing import Any, Protocol, TypeVar

from services.ranking.behaviour import BehaviourStore, Stored
from services.ranking.erasure import Forgotten
from services.ranking.served import Kept, Served
from services.ranking.state import BehaviourState

T = TypeVar("T")
_EXPIRED_AT_ONCE = 1000
_BETWEEN_EXPIRIES = 600.0
_EXPLORED_DAYS = 90
_log = logging.getLogger(__name__)


class Threads(Protocol):
    """Runs what blocks, off the event loop."""

    def __call__(self, function: Callable[[], T]) -> Awaitable[T]:
        """Its result."""


class Keeping:
    """Over a store; what blocks runs `on` threads."""

    def __init__(self, store: BehaviourStore, on: Threads) -> None:
        self._store, self._on = store, on
        self._finishing: set[asyncio.Task[Any]] = set()

    async def forget(self, user_id: str, visitor_id: str) -> Forgotten:
        """Delete all that is known of a person; on return no answer rests on it."""

        async def forget() -> Forgotten:
            forgotten = await asyncio.wrap_future(self._store.forget(user_id, visitor_id))
            await self._lose(methodcaller("forget", forgotten.user_keys, user_id, visitor_id))
            await self._on(self._store.scrub)
            return forgotten

        return await self._to_the_end(forget())

    async def expire(self, before: datetime) -> int:
        """Delete the events that happened before a time; how many."""

        async def some() -> int:
            gone = await asyncio.wrap_future(self._store.expire(before, _EXPIRED_AT_ONCE))
            if gone.sequences:
                await self._lose(methodcaller("drop", gone.sequences, gone.user_keys))
            return len(gone.sequences)

        many = 0
        while count := await self._to_the_end(some()):
            many += count
        if many:
            await self._on(self._store.scrub)
        return many

    async def log(self, pages: Sequence[Served]) -> int:
        """Keep pages that were answered; how many."""
        return await asyncio.wrap_future(self._store.served.write(pages))

    async def keep_pages_for(self, days: int, clock: Callable[[], datetime]) -> None:
        """Delete pages of more than so many days ago, and old counts of what was explored, without end."""
        while True:
            now, many = clock(), 0
            before = now - timedelta(days=days or -1)  # where none is kept not those of this moment either
            while count := await asyncio.wrap_future(self._store.expire_pages(before, _EXPIRED_AT_ONCE)):
                many += count
            explored = now - timedelta(days=_EXPLORED_DAYS)
            while await asyncio.wrap_future(self._store.expire_explored(explored, _EXPIRED_AT_ONCE)):
                pass
            if many:
                await self._on(self._store.scrub)
                _log.info("%d pages of more than %d days ago were deleted", many, days)
            await asyncio.sleep(_BETWEEN_EXPIRIES)

    async def keep_for(self, days: int, clock: Callable[[], datetime]) -> None:
        """Delete what is older than so many days, without end."""
        while True:
            if many := await self.expire(clock() - timedelta(days=days)):
                _log.info("%d events of more than %d days ago were deleted", many, days)
            await asyncio.sleep(_BETWEEN_EXPIRIES)

    async def export(
        self, user_id: str, visitor_id: str, after: int, limit: int
    ) -> tuple[dict[str, list[str]], list[Stored]]:
        """Every id of a person, and at most `limit` events after a sequence number."""
        return await self._on(
            lambda: (
                self._store.known_ids(user_id, visitor_id),
                self._store.exported(user_id, visitor_id, after, limit),
            )
        )

    async def export_pages(self, user_id: str, visitor_id: str, after: int, limit: int) -> list[Kept]:
        """At most `limit` pages that a person was answered, after a place in the log."""
        return await self._on(lambda: self._store.exported_pages(user_id, visitor_id, after, limit))

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for what must not stop in the middle, as it would when a caller goes away."""
        task = asyncio.ensure_future(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        return await asyncio.shield(task)

    async def _lose(self, from_state: Callable[[BehaviourState], None]) -> None:
        """Let every state over the store lose what that has lost, one that is still being filled too."""

        def lose() -> None:
            for reader in list(self._store.readers):
                reader.lose(from_state)

        await self._on(lose)
