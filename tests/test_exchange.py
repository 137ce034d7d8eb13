"""Another bundle is served beside live calls: no call fails, nothing written is lost, all of it at once."""

import asyncio
import logging
import threading
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2 as gateway_pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as gateway_grpc

from services.generation import ALL, Generation
from services.server import CHANNEL_OPTIONS
from services.wiring import App
from tests.asking import Traffic
from tests.catalogues import item, nearest, prepared, served, upsert
from tests.shops import UNTIL, make_bundle

CREATED = item_pb2.ITEM_OUTCOME_CODE_CREATED


async def exchanged_under(traffic: Traffic, app: App, stub: Any, root: Path, seed: int) -> Any:
    """Publish a bundle and see it served, with a feed and a stream of writes that began before."""
    before = app.bundle.version
    feed = stub.WatchItems(pb.WatchItemsRequest())
    while not (await feed.read()).caught_up:
        pass
    held = stub.UpsertItems()
    await written(held, stub, f"walrus {seed}")
    make_bundle(root, seed=seed, until=UNTIL + timedelta(days=seed))
    await traffic.until(lambda: app.bundle.version != before)
    rounds = list(traffic.rounds)
    await written(held, stub, f"gnu {seed}")
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        while await feed.read() is not grpc.aio.EOF:
            pass
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    await traffic.until(lambda: traffic.went_on(rounds))
    return held


async def written(stream: Any, stub: Any, words: str) -> None:
    """Write an item by a stream that is open, and find it."""
    await stream.write(pb.UpsertItemsRequest(items=[item(words.replace(" ", "-"), words)]))
    [outcome] = (await stream.read()).outcomes
    assert outcome.code == CREATED
    assert await nearest(stub, words, outcome.sequence) == words.replace(" ", "-")


def test_a_bundle_is_exchanged_beside_live_calls_and_so_is_the_next(tmp_path: Path, own_heap: None) -> None:
    make_bundle(tmp_path)

    async def body(app: App, stub: Any, health: Any) -> None:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{app.port}", options=CHANNEL_OPTIONS)
        gateway = gateway_grpc.RecommendationServiceStub(channel)
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}") for n in range(100)))
        asked = gateway_pb.RecommendRequest(user_id="u1", page_size=5)
        asked.page_token = (await gateway.Recommend(asked)).next_page_token
        assert not (await gateway.Recommend(asked)).degraded
        traffic, first = Traffic(stub, gateway), weakref.ref(app.now.view)
        held = [await exchanged_under(traffic, app, stub, tmp_path, seed) for seed in (1, 2)]
        for stream in held:  # the first began two bundles ago
            await written(stream, stub, f"okapi {held.index(stream)}")
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        await traffic.stop()
        while len(app.exchange.alive) > 1 or first() is not None:  # nothing of the first bundle is kept
            await asyncio.sleep(0.02)
        await upsert(stub, item("last", "tapir"))
        assert await nearest(stub, "tapir") == "last"
        assert app.bundle.until == UNTIL + timedelta(days=2)
        order = list(dict.fromkeys(traffic.versions))
        assert len(order) == 3
        # No answer of a bundle after one of the next.
        assert traffic.versions == sorted(traffic.versions, key=order.index)
        for n in range(traffic.rounds[2]):
            assert await nearest(stub, f"heron {n}") == f"new-{n}"
        response = await gateway.Recommend(gateway_pb.RecommendRequest(user_id="u1", page_size=5))
        assert response.versions.event_sequence == traffic.rounds[3]
        second = await gateway.Recommend(asked)
        assert [(d.stage, d.code) for d in second.degraded] == [
            ("pages", gateway_pb.DEGRADATION_CODE_BUNDLE_CHANGED)
        ]
        await channel.close()

    served(tmp_path, body, ALL, look_every=0.02)


def test_a_third_bundle_comes_while_the_second_is_made_and_then_the_process_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path)
    begun, tidy = [], Generation.tidy

    async def slow(generation: Generation) -> None:
        begun.append(generation.bundle.until)
        if len(begun) != 2:
            await asyncio.sleep(60)
        await tidy(generation)

    monkeypatch.setattr(Generation, "tidy", slow)

    async def body(app: App, stub: Any, health: Any) -> None:
        async def publish(seed: int) -> None:
            make_bundle(tmp_path, seed=seed, until=UNTIL + timedelta(days=seed))
            count = len(begun)
            while len(begun) == count:
                await asyncio.sleep(0.02)

        await publish(1)
        for word in ("zebra", "heron"):  # beside the second generation, which never gets ready
            await upsert(stub, item(word, word))
            assert await nearest(stub, word) == word
        await publish(2)
        while app.bundle.until != UNTIL + timedelta(days=2):
            await asyncio.sleep(0.02)
        await upsert(stub, item("gnu", "gnu"))
        for word in ("zebra", "heron", "gnu"):
            assert await nearest(stub, word) == word
        assert begun == [UNTIL + timedelta(days=1), UNTIL + timedelta(days=2)]
        await publish(3)

    began = threading.active_count()
    served(tmp_path, body, ALL, look_every=0.02)
    assert threading.active_count() <= began + 1  # whatever was begun has ended


@pytest.mark.parametrize("why", ["other events", "told not to", "it fails"])
def test_where_nothing_is_exchanged_the_served_bundle_goes_on(
    tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch, own_heap: None
) -> None:
    make_bundle(tmp_path)
    tried = list[weakref.ref[Any]]()
    # pytest keeps what is logged, with its traceback.
    monkeypatch.setattr(logging.getLogger("services.next_bundle"), "disabled", True)

    async def body(app: App, stub: Any, health: Any) -> None:
        before = app.bundle.version
        await upsert(stub, item("own", "zebra"))

        async def fails(generation: Generation) -> None:
            tried.append(weakref.ref(generation.view))
            raise OSError("no space left on device")

        if why == "it fails":
            monkeypatch.setattr(Generation, "tidy", fails)
        types = {"purchase": 1.0} if why == "other events" else None
        make_bundle(tmp_path, seed=1, until=UNTIL + timedelta(days=1), event_types=types)
        if why == "it fails":
            while not tried or tried[0]() is not None:  # nothing of it is kept
                await asyncio.sleep(0.02)
        else:
            await prepared(health)
        for word in ("heron", "gnu"):
            await upsert(stub, item(f"later-{word}", word))
            assert await nearest(stub, word) == f"later-{word}"
            assert await nearest(stub, "zebra") == "own"
            await asyncio.sleep(0.2)
        assert app.bundle.version == before

    served(tmp_path, body, ALL, look_every=0.02, exchange=why != "told not to")
