"""No call waits for a thread pool that other work can fill."""

import asyncio
import queue
import socket
import threading
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import ResourceExhausted, Unavailable
from services.core.executors import BoundedPool
from services.embedding.images.fetcher import FetchFailed, ImageFetcher
from services.embedding.images.name_lookup import NameLookup
from tests.support.shop_server import Stub, ids, session

MANY = 40  # more than asyncio's default pool has threads, on any machine that tests run on
RULES = pb.Rules(caps=[pb.Cap(attribute="colour", max_count=2)], relax=["caps"])


class Gate:
    """Holds every thread that comes to it, until it opens; a minute at most, so that a failed test ends."""

    def __init__(self) -> None:
        self.waiting, self._open = 0, threading.Event()

    def wait(self, *_: Any, **__: Any) -> Any:
        self.waiting += 1
        self._open.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def silent_dns(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A DNS server that answers nothing: `getaddrinfo` returns only when the gate opens."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **more: Any) -> Any:
        return gate.wait() if str(host).endswith(".silent") else resolve(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return gate


async def test_unresolved_names_delay_no_recommendation(all_in_one_stub: Stub, silent_dns: Gate) -> None:
    items = [
        item_pb2.Item(id=f"far-{n}", title="far", image=item_pb2.Image(uri=f"http://{n}.silent/a.png"))
        for n in range(MANY)
    ]
    await all_in_one_stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
    async with asyncio.timeout(30):
        while not silent_dns.waiting:
            await asyncio.sleep(0.01)
    for _ in range(MANY):
        request = pb.RecommendRequest(session=session("garden-03"), page_size=10, rules=RULES)
        page = await all_in_one_stub.Recommend(request, timeout=30)
        assert len(ids(page)) == 10
        assert not [line for line in page.degraded if line.code != pb.DEGRADATION_CODE_RULE_RELAXED]
    silent_dns.open()


async def test_every_call_of_the_gateway_answers_while_the_default_pool_hangs(
    all_in_one_stub: Stub, gate: Gate
) -> None:
    loop = asyncio.get_running_loop()
    hanging = [loop.run_in_executor(None, gate.wait) for _ in range(MANY)]
    offer = pb.Offer(offer_id="o", percent=10)
    recommend = pb.RecommendRequest(session=session("garden-03"), page_size=10, rules=RULES)
    item = item_pb2.Item(id="new", title="new")
    calls: list[Awaitable[Any]] = [
        all_in_one_stub.Recommend(recommend, timeout=30),
        all_in_one_stub.ExplainItem(
            pb.ExplainItemRequest(request=recommend, item_id="garden-04"), timeout=30
        ),
        all_in_one_stub.Converse(pb.ConverseRequest(user_id="ann", message="something red"), timeout=30),
        all_in_one_stub.RecommendOffers(pb.RecommendOffersRequest(user_id="ann", offers=[offer]), timeout=30),
        all_in_one_stub.SimilarItems(pb.SimilarItemsRequest(item_id="garden-03"), timeout=30),
        all_in_one_stub.SearchItems(pb.SearchItemsRequest(text="red"), timeout=30),
        all_in_one_stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"), timeout=30),
        all_in_one_stub.ExportUser(pb.ExportUserRequest(user_id="ann"), timeout=30),
        all_in_one_stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]), timeout=30),
        all_in_one_stub.GetItem(pb.GetItemRequest(item_id="garden-03"), timeout=30),
    ]
    await asyncio.gather(*calls)
    gate.open()
    await asyncio.gather(*hanging, return_exceptions=True)


async def test_a_lookup_times_out_and_too_many_are_refused(silent_dns: Gate) -> None:
    names = NameLookup(seconds=0.1)
    outcomes = await asyncio.gather(*(names("a.silent", 80) for _ in range(200)), return_exceptions=True)
    kinds = [type(outcome) for outcome in outcomes]
    assert set(kinds) == {TimeoutError, ResourceExhausted}
    assert silent_dns.waiting <= 8  # threads; before them wait 64 at most
    assert 64 <= kinds.count(TimeoutError) <= 72
    silent_dns.open()
    names.close()


async def test_an_image_reports_that_its_host_was_not_resolved(silent_dns: Gate) -> None:
    fetcher = ImageFetcher(tries=1)
    fetcher._names._seconds = 0.1
    with pytest.raises(FetchFailed, match=r"a\.silent cannot be looked up: no DNS server answers"):
        await fetcher.fetch("http://a.silent/a.png")
    await fetcher.close()


async def test_a_cancelled_task_does_not_run(gate: Gate) -> None:
    pool, ran = BoundedPool("test", 1, 2), list[int]()
    first = asyncio.ensure_future(pool.run(gate.wait))
    async with asyncio.timeout(30):
        while not gate.waiting:
            await asyncio.sleep(0.001)
    second = asyncio.ensure_future(pool.run(lambda: ran.append(1)))
    third = asyncio.ensure_future(pool.run(lambda: ran.append(2)))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="2 calls wait for the test threads"):
        await pool.run(lambda: ran.append(3))
    second.cancel()
    await asyncio.wait([second])
    gate.open()
    await asyncio.wait([first, third])
    assert isinstance(first.exception(), socket.gaierror)
    assert ran == [2]
    pool.close()
    with pytest.raises(Unavailable):
        await pool.run(lambda: ran.append(4))


async def test_a_call_during_the_close_of_the_pool_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closing(queue.SimpleQueue[Any]):
        """Closes the pool between the look at the queue and what is put into it, unless that waits."""

        def qsize(self) -> int:
            closing.start()
            closing.join(0.5)
            return super().qsize()

    monkeypatch.setattr("services.core.executors.queue", SimpleNamespace(SimpleQueue=Closing))
    pool = BoundedPool("test", 1, 2)
    closing = threading.Thread(target=pool.close)
    async with asyncio.timeout(30):
        with suppress(Unavailable):
            assert await pool.run(lambda: 1) == 1
        await asyncio.to_thread(closing.join)
        with pytest.raises(Unavailable):
            await pool.run(lambda: 2)
