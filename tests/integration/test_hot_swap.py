"""A bundle is swapped under live calls without failures or lost writes."""

import asyncio
import logging
import threading
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from vitrine.catalog.v1 import event_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2 as gateway_pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as gateway_grpc

from services.catalog.items import item_hash
from services.rpc.server import CHANNEL_OPTIONS
from services.serving.app import App
from services.serving.loaded_bundle import ALL, LoadedBundle
from tests.support.catalogs import item, nearest, serve_app, upsert, wait_for_next_bundle
from tests.support.live_traffic import LiveTraffic, title_of
from tests.support.shops import UNTIL, make_bundle

CREATED = item_pb2.ITEM_OUTCOME_CODE_CREATED


async def swap_under(traffic: LiveTraffic, app: App, stub: Any, root: Path, seed: int) -> Any:
    """Publish a bundle and see it served, with a feed and a stream of writes that began before."""
    before = app.bundle.version
    feed = stub.WatchItems(pb.WatchItemsRequest())
    while not (await feed.read()).caught_up:
        pass
    stream = stub.UpsertItems()
    await write_item(stream, stub, f"walrus {seed}")
    make_bundle(root, seed=seed, until=UNTIL + timedelta(days=seed))
    await traffic.wait_until(lambda: app.bundle.version != before)
    rounds = list(traffic.rounds)
    await write_item(stream, stub, f"gnu {seed}")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await feed.read() is not grpc.aio.EOF:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await traffic.wait_until(lambda: traffic.progressed(rounds))
    return stream


async def write_item(stream: Any, stub: Any, words: str) -> None:
    """Write an item by a stream that is open, and find it."""
    await stream.write(pb.UpsertItemsRequest(items=[item(words.replace(" ", "-"), words)]))
    [outcome] = (await stream.read()).outcomes
    assert outcome.code == CREATED
    assert await nearest(stub, words, outcome.sequence) == words.replace(" ", "-")


async def test_two_bundles_are_swapped_in_turn_under_live_calls(tmp_path: Path, tuned_gc: None) -> None:
    make_bundle(tmp_path)
    async with serve_app(tmp_path, ALL, bundle_poll_seconds=0.02) as (app, stub, _):
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{app.port}", options=CHANNEL_OPTIONS)
        gateway = gateway_grpc.RecommendationServiceStub(channel)
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}") for n in range(100)))
        request = gateway_pb.RecommendRequest(user_id="u1", page_size=5)
        request.page_token = (await gateway.Recommend(request)).next_page_token
        assert not (await gateway.Recommend(request)).degraded
        traffic, first = LiveTraffic(stub, gateway), weakref.ref(app.current.view)
        streams = [await swap_under(traffic, app, stub, tmp_path, seed) for seed in (1, 2)]
        for stream in streams:  # the first began two bundles ago
            await write_item(stream, stub, f"okapi {streams.index(stream)}")
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        await traffic.stop()
        # Nothing of the first bundle stays in memory.
        while len(app.version_manager.open_bundles) > 1 or first() is not None:
            await asyncio.sleep(0.02)
        await upsert(stub, item("last", "tapir"))
        assert await nearest(stub, "tapir") == "last"
        assert app.bundle.until == UNTIL + timedelta(days=2)
        order = list(dict.fromkeys(traffic.versions))
        assert len(order) == 3
        # No answer of a bundle after one of the next.
        assert traffic.versions == sorted(traffic.versions, key=order.index)
        for n in range(traffic.rounds[2]):
            assert await nearest(stub, title_of(n)) == f"new-{n}"
        response = await gateway.Recommend(gateway_pb.RecommendRequest(user_id="u1", page_size=5))
        assert response.versions.event_sequence == traffic.rounds[3]
        second = await gateway.Recommend(request)
        assert [(d.stage, d.code) for d in second.degraded] == [
            ("pages", gateway_pb.DEGRADATION_CODE_BUNDLE_CHANGED)
        ]
        await channel.close()


async def test_a_write_survives_the_close_of_another_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    event = event_pb2.Event(
        event_id="e", type="purchase", user_id="ann", items=[event_pb2.EventItem(item_id="garden-03")]
    )
    async with serve_app(tmp_path, ALL) as (app, _, _):
        new = LoadedBundle(app._resources, app.bundle)
        assert app._resources.event_followers is not None
        app._resources.event_followers.register(new.ranking)
        new.ranking.close()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}", options=CHANNEL_OPTIONS) as channel:
            gateway = gateway_grpc.RecommendationServiceStub(channel)
            answer = await gateway.WriteEvents(gateway_pb.WriteEventsRequest(events=[event]))
        assert answer.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_RECORDED
        new.close()


async def test_a_write_in_progress_reaches_the_bundle_of_a_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path)
    event_item = event_pb2.EventItem(item_id="garden-03")
    event = event_pb2.Event(event_id="e", type="purchase", user_id="ann", items=[event_item])
    async with serve_app(tmp_path, ALL) as (app, stub, _):
        old, followers = app.current, app._resources.event_followers
        assert followers is not None
        new = LoadedBundle(app._resources, app.bundle)
        follow_items, follow_events = old.view.follow, old.ranking.follow

        async def swap_items() -> None:
            if old.view.items.sequence > old.view.sequence:  # after the commit
                old.catalog.retarget(view=new.view, also_encode_for=[])
            await follow_items()

        async def swap_events() -> None:
            followers.register(new.ranking)
            await follow_events()

        monkeypatch.setattr(old.view, "follow", swap_items)
        monkeypatch.setattr(old.ranking, "follow", swap_events)
        await upsert(stub, item("last", "tapir"))
        assert new.view.table.rows([item_hash("last")])[0] >= 0
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}", options=CHANNEL_OPTIONS) as channel:
            gateway = gateway_grpc.RecommendationServiceStub(channel)
            await gateway.WriteEvents(gateway_pb.WriteEventsRequest(events=[event]))
        assert new.ranking.event_sequence == 1
        followers.unregister(new.ranking)
        old.catalog.retarget(view=old.view, also_encode_for=[])
        new.close()


async def test_a_third_bundle_arrives_while_the_second_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path)
    loads, tidy = [], LoadedBundle.tidy

    async def slow(generation: LoadedBundle) -> None:
        loads.append(generation.bundle.until)
        if len(loads) != 2:
            await asyncio.sleep(60)
        await tidy(generation)

    monkeypatch.setattr(LoadedBundle, "tidy", slow)

    thread_count = threading.active_count()
    async with serve_app(tmp_path, ALL, bundle_poll_seconds=0.02) as (app, stub, _):

        async def publish(seed: int) -> None:
            make_bundle(tmp_path, seed=seed, until=UNTIL + timedelta(days=seed))
            count = len(loads)
            while len(loads) == count:
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
        assert loads == [UNTIL + timedelta(days=1), UNTIL + timedelta(days=2)]
        await publish(3)
    await asyncio.get_running_loop().shutdown_default_executor()  # whose threads live as long as the loop
    assert threading.active_count() <= thread_count + 1  # whatever was begun has ended


@pytest.mark.parametrize("why", ["other events", "told not to", "it fails"])
async def test_without_hot_swap_the_served_bundle_stays(
    tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch, tuned_gc: None
) -> None:
    make_bundle(tmp_path)
    views = list[weakref.ref[Any]]()
    # pytest keeps what is logged, with its traceback.
    monkeypatch.setattr(logging.getLogger("services.serving.bundle_watcher"), "disabled", True)
    async with serve_app(tmp_path, ALL, bundle_poll_seconds=0.02, hot_swap=why != "told not to") as (
        app,
        stub,
        health,
    ):
        before = app.bundle.version
        await upsert(stub, item("own", "zebra"))

        async def fails(generation: LoadedBundle) -> None:
            views.append(weakref.ref(generation.view))
            raise OSError("no space left on device")

        if why == "it fails":
            monkeypatch.setattr(LoadedBundle, "tidy", fails)
        types = {"purchase": 1.0} if why == "other events" else None
        make_bundle(tmp_path, seed=1, until=UNTIL + timedelta(days=1), event_types=types)
        if why == "it fails":
            while not views or views[0]() is not None:  # nothing of it is kept
                await asyncio.sleep(0.02)
        else:
            await wait_for_next_bundle(health)
        for word in ("heron", "gnu"):
            await upsert(stub, item(f"later-{word}", word))
            assert await nearest(stub, word) == f"later-{word}"
            assert await nearest(stub, "zebra") == "own"
            await asyncio.sleep(0.2)
        assert app.bundle.version == before
