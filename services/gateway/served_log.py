"""Pages on their way to the log that the ranking service keeps: off the request's path, bounded, counted.

What does not fit is lost and counted; what the ranking service cannot take now is sent again.
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

from services import deadline
from services.catalog import item_number
from services.errors import InvalidArgument, VitrineError
from services.gateway.wish import Ordered

_MOST = 10_000
_AT_ONCE = 50  # a larger message would hold the event loop
_MOST_MADE = 8
_EVERY = 0.25
_PATIENCE = 5.0
_log = logging.getLogger(__name__)

Send = Callable[[ranking_pb.LogPagesRequest], Awaitable[object]]


class ServedLog:
    """Takes pages and hands them on with `send`, in their order, several at once.

    Where it is not to `keep` them it hands on what they explored alone, so that its bounds hold.
    """

    def __init__(self, send: Send, *, keep: bool = True) -> None:
        self._send, self._keep = send, keep
        self._waiting: deque[served_pb2.ServedPage] = deque()
        self._sending = asyncio.Lock()
        self._counts = {"kept": 0, "lost": 0}
        self._making: set[asyncio.Task[None]] = set()
        self._behind = False

    @property
    def counts(self) -> Mapping[str, float]:
        """How many pages were handed on, and how many lost."""
        return self._counts

    def add(self, page: served_pb2.ServedPage) -> None:
        """Take a page; returns at once."""
        if not self._keep:
            if not page.exploring.draws:
                return
            page = _counts_of(page)
        if len(self._waiting) >= _MOST:
            self._counts["lost"] += 1
        else:
            self._waiting.append(page)

    def beside(self, page: Coroutine[Any, Any, served_pb2.ServedPage]) -> None:
        """Take a page that is still to be made, unless too many are; it has a time of its own for that."""
        if not self._keep or len(self._making) >= _MOST_MADE:
            page.close()
            self._counts["lost"] += self._keep
            return
        task = asyncio.get_running_loop().create_task(self._made(page), context=Context())
        self._making.add(task)
        task.add_done_callback(self._making.discard)

    async def _made(self, page: Coroutine[Any, Any, served_pb2.ServedPage]) -> None:
        try:
            with deadline.within(_PATIENCE):
                self.add(await deadline.wait(page))
        except VitrineError as error:
            self._counts["lost"] += 1
            _log.warning("a page could not be made for comparison: %s", error)
        except Exception:  # a bug of ours, and nobody waits for it to see
            self._counts["lost"] += 1
            _log.exception("a page could not be made for comparison")

    async def flush(self) -> None:
        """Hand on what is there; whatever goes wrong stays for the next time."""
        async with self._sending:
            while self._waiting:
                some = [self._waiting[at] for at in range(min(_AT_ONCE, len(self._waiting)))]
                try:
                    with deadline.within(_PATIENCE):
                        await deadline.wait(self._send(ranking_pb.LogPagesRequest(pages=some)))
                except InvalidArgument:  # sent again they would hold up all that come after them
                    _log.exception("%d answered pages are refused by the log", len(some))
                    became = "lost"
                except VitrineError as error:
                    if not self._behind:  # said once, not each time
                        _log.warning("answered pages are logged later: %s", error)
                    self._behind = True
                    return
                else:
                    became, self._behind = "kept", False
                self._counts[became] += len(some)
                for _ in some:
                    self._waiting.popleft()

    async def run(self) -> None:
        """Hand on what comes, without end."""
        while True:
            await asyncio.sleep(_EVERY)
            await self.flush()

    async def close(self, seconds: float = 10.0) -> None:
        """Hand on what is left, pages that are still made among it; what does not go in that time is lost."""
        try:
            async with asyncio.timeout(seconds):
                if self._making:
                    await asyncio.wait(self._making)
                await self.flush()
        except TimeoutError:
            pass
        if left := len(self._waiting) + len(self._making):
            self._counts["lost"] += left
            _log.warning("%d answered pages are lost to the log", left)


def _counts_of(page: served_pb2.ServedPage) -> served_pb2.ServedPage:
    """What a page explored, and nothing else of it."""
    named = page.request_id, page.user_id, page.visitor_id
    return served_pb2.ServedPage(
        request_id=hashlib.blake2b(repr(named).encode(), digest_size=16).hexdigest(),
        served_at=page.served_at,
        scenario=page.scenario,
        start=page.start,
        exploring=page.exploring,
        shadow=page.shadow,
    )


def page_of(
    request: pb.RecommendRequest, ordered: Ordered, items: Sequence[pb.Recommendation], start: int
) -> served_pb2.ServedPage:
    """What of a page comes from the request and from what was found; `start` items stood before it."""
    numbers = [item_number(item.item_id) for item in items]
    names = sorted({source.source for item in items for source in item.sources})
    bit = {name: 1 << place for place, name in enumerate(names)}
    arm_of = dict(zip(ordered.numbers, ordered.arms, strict=False))
    page = served_pb2.ServedPage(
        user_id=request.user_id,
        visitor_id=request.visitor_id,
        session_id=request.session_id,
        start=start,
        item_ids=[item.item_id for item in items],
        scores=[item.score for item in items],
        propensities=[item.propensity for item in items],
        sources=names,
        item_sources=[sum(bit[source.source] for source in item.sources) for item in items],
        item_arms=[arm_of[number] for number in numbers] if arm_of else (),
    )
    draws = [draw for draw in ordered.draws if start <= draw.slot < start + len(items)]
    if draws:
        page.exploring.item_numbers.extend(ordered.pool)
        page.exploring.relevances.extend(ordered.relevances)
        for draw in draws:
            page.exploring.draws.add(
                slot=draw.slot, drawn=draw.drawn, left_out=draw.left_out, propensity=draw.propensity
            )
    return page
