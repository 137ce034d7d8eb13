"""The bounded queue of pages for the impression log of the ranking service, off the request's path.

A page that finds the queue full is lost and counted. Pages that the ranking service cannot take are sent
again.
"""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from typing import Any

from vitrine.catalog.v1 import served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.catalog.items import item_hash
from services.core import deadline
from services.core.errors import InvalidArgument, VitrineError
from services.gateway.query import RankedPage

_MAX_QUEUED = 10_000
_BATCH = 50  # a larger message would block the event loop
_MAX_SHADOWS = 8
_EVERY = 0.25
_TIMEOUT = 5.0
_log = logging.getLogger(__name__)

Send = Callable[[ranking_pb.LogPagesRequest], Awaitable[object]]


class ImpressionLog:
    """Queues pages and sends them with `send`, in order and in batches.

    Without `keep` it sends only the pages' exploration, which the limits of exploration need.
    """

    def __init__(self, send: Send, *, keep: bool = True) -> None:
        self._send, self._keep = send, keep
        self._queue: deque[served_pb2.ServedPage] = deque()
        self._sending = asyncio.Lock()
        self._counts = {"kept": 0, "lost": 0}
        self._shadows: set[asyncio.Task[None]] = set()
        self._is_late = False

    @property
    def counts(self) -> Mapping[str, float]:
        """The number of pages that were sent, and of those that were lost."""
        return self._counts

    def add(self, page: served_pb2.ServedPage) -> None:
        """Queue a page; returns at once."""
        if not self._keep:
            if not page.exploring.draws:
                return
            page = _exploration_of(page)
        if len(self._queue) >= _MAX_QUEUED:
            self._counts["lost"] += 1
        else:
            self._queue.append(page)

    def add_shadow(self, page: Coroutine[Any, Any, served_pb2.ServedPage]) -> None:
        """Compute the page of a shadow arm, within a time limit of its own, and queue it.

        The page is lost if too many are being computed.
        """
        if not self._keep or len(self._shadows) >= _MAX_SHADOWS:
            page.close()
            self._counts["lost"] += self._keep
            return
        task = asyncio.get_running_loop().create_task(self._compute(page), context=Context())
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _compute(self, page: Coroutine[Any, Any, served_pb2.ServedPage]) -> None:
        try:
            with deadline.within(_TIMEOUT):
                self.add(await deadline.wait(page))
        except VitrineError as error:
            self._counts["lost"] += 1
            _log.warning("the page of a shadow arm failed: %s", error)
        except Exception:  # a bug, and no caller waits who could report it
            self._counts["lost"] += 1
            _log.exception("the page of a shadow arm failed")

    async def flush(self) -> None:
        """Send the pages in the queue; pages that cannot be sent stay for the next time."""
        async with self._sending:
            remaining = len(self._queue)  # later pages are for the next time, or this might never end
            while remaining:
                batch = [self._queue[index] for index in range(min(_BATCH, remaining))]
                try:
                    with deadline.within(_TIMEOUT):
                        await deadline.wait(self._send(ranking_pb.LogPagesRequest(pages=batch)))
                except InvalidArgument:  # sent again, they would block the pages behind them
                    _log.exception("the impression log refuses %d pages", len(batch))
                    outcome = "lost"
                except VitrineError as error:
                    if not self._is_late:  # logged once, not each time
                        _log.warning("pages are logged later: %s", error)
                    self._is_late = True
                    return
                else:
                    outcome, self._is_late = "kept", False
                self._counts[outcome] += len(batch)
                remaining -= len(batch)
                for _ in batch:
                    self._queue.popleft()

    async def run(self) -> None:
        """Send pages as they come, until canceled."""
        while True:
            await asyncio.sleep(_EVERY)
            await self.flush()

    async def close(self, seconds: float = 10.0) -> None:
        """Send the pages in the queue and those of shadow arms; what is not sent in time is lost."""
        try:
            async with asyncio.timeout(seconds):
                if self._shadows:
                    await asyncio.wait(self._shadows)
                await self.flush()
        except TimeoutError:
            pass
        if lost := len(self._queue) + len(self._shadows):
            self._counts["lost"] += lost
            _log.warning("%d pages are lost to the impression log", lost)


def _exploration_of(page: served_pb2.ServedPage) -> served_pb2.ServedPage:
    """The exploration of a page without its items and its user."""
    key = page.request_id, page.user_id, page.visitor_id
    return served_pb2.ServedPage(
        request_id=hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest(),
        served_at=page.served_at,
        scenario=page.scenario,
        start=page.start,
        exploring=page.exploring,
        shadow=page.shadow,
    )


def build_page(
    request: pb.RecommendRequest, ranked: RankedPage, items: Sequence[pb.Recommendation], start: int
) -> served_pb2.ServedPage:
    """The page that shows `items` after `start` others, without its bundle, time and experiment."""
    item_hashes = [item_hash(item.item_id) for item in items]
    # The message names only the leading sources.
    sources = [ranked.candidates.sources_of(item) for item in item_hashes]
    names = sorted({name for of_item in sources for name in of_item})
    bit = {name: 1 << index for index, name in enumerate(names)}
    arm_of = dict(zip(ranked.item_hashes, ranked.arms, strict=False))
    page = served_pb2.ServedPage(
        user_id=request.user_id,
        visitor_id=request.visitor_id,
        session_id=request.session_id,
        start=start,
        item_ids=[item.item_id for item in items],
        scores=[item.score for item in items],
        propensities=[item.propensity for item in items],
        sources=names,
        item_sources=[sum(bit[name] for name in of_item) for of_item in sources],
        item_arms=[arm_of[item] for item in item_hashes] if arm_of else (),
    )
    draws = [draw for draw in ranked.draws if start <= draw.slot < start + len(items)]
    if draws:
        page.exploring.item_hashes.extend(ranked.pool)
        page.exploring.relevances.extend(ranked.relevances)
        for draw in draws:
            page.exploring.draws.add(
                slot=draw.slot,
                item_index=draw.pool_index,
                excluded_indices=draw.excluded,
                propensity=draw.propensity,
            )
    return page
