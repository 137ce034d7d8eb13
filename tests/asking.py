"""Callers of a whole process who go on asking while something happens to it."""

import asyncio
from collections.abc import Callable
from typing import Any

from vitrine.catalog.v1 import event_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as gateway_pb

from tests.catalogues import item, nearest, picture


class Traffic:
    """Callers who ask over and over, each something else; what one of them finds wrong is raised."""

    def __init__(self, embedding: Any, gateway: Any) -> None:
        self._embedding, self._gateway, self._done = embedding, gateway, False
        self.versions = list[str]()
        asks = (self._recommend, self._search, self._write, self._happen)
        self.rounds = [0] * len(asks)
        self._tasks = [asyncio.ensure_future(self._go_on(at, ask)) for at, ask in enumerate(asks)]

    async def _go_on(self, at: int, ask: Callable[[int], Any]) -> None:
        while not self._done:
            await ask(self.rounds[at])
            self.rounds[at] += 1
            await asyncio.sleep(0.002)

    async def _recommend(self, n: int) -> None:
        session = [event_pb2.SessionItem(item_id="garden-03")]
        response = await self._gateway.Recommend(gateway_pb.RecommendRequest(session=session, page_size=10))
        assert len(response.items) == 10
        assert not response.degraded
        self.versions.append(response.versions.bundle)

    async def _search(self, n: int) -> None:
        assert await nearest(self._embedding, f"zebra {n % 100}") == f"own-{n % 100}"

    async def _write(self, n: int) -> None:
        items = [item(f"new-{n}", f"heron {n}", image=item_pb2.Image(data=picture("red")))]
        answer = await self._gateway.BatchUpsertItems(gateway_pb.BatchUpsertItemsRequest(items=items))
        assert answer.outcomes[0].code == item_pb2.ITEM_OUTCOME_CODE_CREATED
        sequence = answer.outcomes[0].sequence if n % 2 else 0
        assert await nearest(self._embedding, f"heron {n}", sequence) == f"new-{n}"

    async def _happen(self, n: int) -> None:
        bought = event_pb2.EventItem(item_id="garden-03")
        event = event_pb2.Event(event_id=f"e{n}", type="purchase", user_id=f"u{n % 7}", items=[bought])
        answer = await self._gateway.WriteEvents(gateway_pb.WriteEventsRequest(events=[event]))
        assert answer.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_RECORDED

    def went_on(self, since: list[int]) -> bool:
        """Whether all have asked some more."""
        return all(now > then + 5 for now, then in zip(self.rounds, since, strict=True))

    async def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            for task in self._tasks:
                if task.done():
                    await task
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._done = True
        await asyncio.gather(*self._tasks)
