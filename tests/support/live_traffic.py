"""Concurrent callers that keep a server busy during a test."""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

from vitrine.catalog.v1 import event_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as gateway_pb

from tests.support.catalogs import item, nearest, png_bytes


def title_of(number: int) -> str:
    """The title of a new item.

    The test encoder hardly tells "heron 112" from "heron 121": in float16 either may be the nearest.
    """
    return f"heron {hashlib.sha256(str(number).encode()).hexdigest()[:12]}"


class LiveTraffic:
    """Four callers that repeat one method each; `wait_until` raises the failure of a caller."""

    def __init__(self, embedding: Any, gateway: Any) -> None:
        self._embedding, self._gateway, self._stopped = embedding, gateway, False
        self.versions = list[str]()
        calls = (self._recommend, self._search, self._write_items, self._write_events)
        self.rounds = [0] * len(calls)
        self._tasks = [asyncio.ensure_future(self._repeat(at, call)) for at, call in enumerate(calls)]

    async def _repeat(self, at: int, call: Callable[[int], Any]) -> None:
        while not self._stopped:
            await call(self.rounds[at])
            self.rounds[at] += 1
            await asyncio.sleep(0.002)

    async def _recommend(self, n: int) -> None:
        session = [event_pb2.SessionItem(item_id="garden-03")]
        request = gateway_pb.RecommendRequest(session=session, page_size=10)
        response = await self._gateway.Recommend(request, timeout=60)  # a busy machine skips no stage
        assert len(response.items) == 10
        assert not response.degraded
        self.versions.append(response.versions.bundle)

    async def _search(self, n: int) -> None:
        assert await nearest(self._embedding, f"zebra {n % 100}") == f"own-{n % 100}"

    async def _write_items(self, n: int) -> None:
        items = [item(f"new-{n}", title_of(n), image=item_pb2.Image(data=png_bytes("red")))]
        response = await self._gateway.BatchUpsertItems(gateway_pb.BatchUpsertItemsRequest(items=items))
        assert response.outcomes[0].code == item_pb2.ITEM_OUTCOME_CODE_CREATED
        sequence = response.outcomes[0].sequence if n % 2 else 0
        assert await nearest(self._embedding, title_of(n), sequence) == f"new-{n}"

    async def _write_events(self, n: int) -> None:
        event_item = event_pb2.EventItem(item_id="garden-03")
        event = event_pb2.Event(event_id=f"e{n}", type="purchase", user_id=f"u{n % 7}", items=[event_item])
        response = await self._gateway.WriteEvents(gateway_pb.WriteEventsRequest(events=[event]))
        assert response.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_RECORDED

    def progressed(self, since: list[int]) -> bool:
        """Whether every caller has made more than five calls since these counts."""
        return all(now > then + 5 for now, then in zip(self.rounds, since, strict=True))

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            for task in self._tasks:
                if task.done():
                    await task
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)
