"""Separate services switch to another bundle one after the other without a failed call."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import timestamp_pb2
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as embedding_grpc
from vitrine.gateway.v1 import recommendation_service_pb2 as gateway_pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as gateway_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services.catalog.bundle import version_of
from services.catalog.items import Item
from services.rpc.server import CHANNEL_OPTIONS
from services.serving import bundle_watcher, version_manager
from services.serving.app import App, first_bundle
from services.serving.loaded_bundle import EMBEDDING, GATEWAY, RANKING
from services.serving.settings import Settings
from tests.support import shops
from tests.support.catalogs import item, nearest, upsert
from tests.support.live_traffic import LiveTraffic, title_of
from tests.support.processes import free_port, wait_until_serving
from tests.support.shops import UNTIL, make_bundle

KEEP_SECONDS = 3.0  # longer than a full garbage collection in a process that has run many tests


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a minute takes some seconds."""
    monkeypatch.setattr(version_manager, "KEEP_SECONDS", KEEP_SECONDS)
    monkeypatch.setattr(bundle_watcher, "PEER_POLL_SECONDS", 0.05)


def publish(root: Path, day: int) -> str:
    """A bundle that is newer than those of earlier days; its version."""
    return version_of(make_bundle(root, seed=day, until=UNTIL + timedelta(days=day)))


@dataclass
class Apart:
    """Three apps over one directory of bundles, and their stubs."""

    root: Path
    apps: dict[str, App]
    stubs: dict[str, Any]

    @property
    def versions(self) -> list[str]:
        return [self.apps[name].bundle.version for name in (EMBEDDING, RANKING, GATEWAY)]

    def settings(self, **more: Any) -> Settings:
        base: dict[str, Any] = {
            "bundle": self.root / "bundles",
            "address": "127.0.0.1:0",
            "bundle_poll_seconds": 0.05,
        }
        base |= {name: f"127.0.0.1:{app.port}" for name, app in self.apps.items() if name != GATEWAY}
        return Settings(**(base | {"state": self.root / "state"} | more))

    async def start(self, name: str, stack: AsyncExitStack, bundle: Path | None = None, **more: Any) -> App:
        app = self.apps[name] = App(self.settings(**more), (name,), bundle)
        stack.push_async_callback(app.stop)
        await app.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{app.port}", options=CHANNEL_OPTIONS)
        stack.push_async_callback(channel.close)
        kinds = {
            EMBEDDING: embedding_grpc.EmbeddingServiceStub,
            RANKING: ranking_grpc.RankingServiceStub,
            GATEWAY: gateway_grpc.RecommendationServiceStub,
        }
        self.stubs[name] = kinds[name](channel)
        return app


@asynccontextmanager
async def apart(
    root: Path, names: Sequence[str] = (EMBEDDING, RANKING, GATEWAY), **more: dict[str, Any]
) -> AsyncIterator[Apart]:
    """These serving; `more` are settings by service."""
    async with AsyncExitStack() as stack:
        three = Apart(root, {}, {})
        for name in names:
            app = await three.start(name, stack, **more.get(name, {}))
            await wait_until_serving(app.port, name)
        yield three


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_bundles_are_swapped_under_live_calls_without_degraded_pages(tmp_path: Path) -> None:
    first = publish(tmp_path, 0)
    async with asyncio.timeout(120), apart(tmp_path) as three:
        embedding, gateway = three.stubs[EMBEDDING], three.stubs[GATEWAY]
        await upsert(embedding, *(item(f"own-{n}", f"zebra {n}") for n in range(100)))
        traffic = LiveTraffic(embedding, gateway)
        versions = [first]
        for day in (1, 2):
            versions.append(publish(tmp_path, day))
            await traffic.wait_until(lambda: three.versions == [versions[-1]] * 3)
            rounds = list(traffic.rounds)
            await traffic.wait_until(lambda then=rounds: traffic.progressed(then))  # type: ignore[misc]
        await traffic.wait_until(
            lambda: all(len(app.version_manager.open_bundles) == 1 for app in three.apps.values())
        )
        await traffic.stop()
        order = list(dict.fromkeys(traffic.versions))
        assert set(order) <= set(versions)
        assert order[0] == first
        assert order[-1] == versions[-1]
        assert traffic.versions == sorted(traffic.versions, key=versions.index)
        for n in range(traffic.rounds[2]):
            assert await nearest(embedding, title_of(n)) == f"new-{n}"
        response = await gateway.Recommend(gateway_pb.RecommendRequest(user_id="u1", page_size=5))
        assert response.versions.event_sequence == traffic.rounds[3]


async def test_a_bundle_is_kept_as_long_as_a_gateway_uses_it(tmp_path: Path) -> None:
    before = publish(tmp_path, 0)
    async with asyncio.timeout(120), apart(tmp_path, (EMBEDDING, RANKING)) as three:
        embedding, ranking = three.stubs[EMBEDDING], three.stubs[RANKING]
        await upsert(embedding, *(item(f"own-{n}", f"zebra {n}") for n in range(100)))
        async with AsyncExitStack() as stack:
            await three.start(GATEWAY, stack, hot_swap=False)
            traffic, after = LiveTraffic(embedding, three.stubs[GATEWAY]), publish(tmp_path, 1)
            await traffic.wait_until(lambda: three.versions == [after, after, before])
            rounds = list(traffic.rounds)
            await asyncio.sleep(3 * KEEP_SECONDS)
            await traffic.wait_until(lambda: traffic.progressed(rounds))
            await traffic.stop()
            assert set(traffic.versions) == {before}
            for stub, request in ((embedding, pb), (ranking, ranking_pb)):
                assert list((await stub.ListBundles(request.ListBundlesRequest())).bundles) == [
                    after,
                    before,
                ]
            vectors = []
            for bundle in (before, after):  # what is written meanwhile is there by the encoders of both
                search_request = pb.SearchRequest(
                    text=title_of(1), limit=1, view=item_pb2.VIEW_READABLE, bundle=bundle
                )
                search_request.spaces.append(item_pb2.SPACE_TEXT)
                response = await embedding.Search(search_request)
                assert (response.bundle, response.results[0].hits[0].item_id) == (bundle, "new-1")
                assert response.results[0].hits[0].score == pytest.approx(1, abs=1e-3)
                texts = pb.EmbedTextsRequest(texts=[title_of(1)], bundle=bundle)
                vectors.append(list((await embedding.EmbedTexts(texts)).vectors.values))
            assert vectors[0] != vectors[1]
        await until(lambda: len(three.apps[EMBEDDING].version_manager.open_bundles) == 1)
        assert len(three.apps[RANKING].version_manager.open_bundles) == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await embedding.Search(pb.SearchRequest(text=title_of(1), limit=1, bundle=before))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_service_starts_with_the_bundle_of_its_peers_and_follows_them(tmp_path: Path) -> None:
    before = publish(tmp_path, 0)
    async with (
        asyncio.timeout(120),
        apart(tmp_path, embedding={"hot_swap": False}) as three,
        AsyncExitStack() as stack,
    ):
        after = publish(tmp_path, 1)
        settings = three.settings(state=tmp_path / "other")
        assert version_of(await first_bundle(settings, (GATEWAY,))) == before
        nobody = three.settings(embedding=f"127.0.0.1:{free_port()}", ranking=f"127.0.0.1:{free_port()}")
        assert version_of(await first_bundle(nobody, (GATEWAY,))) == after
        # One that began with another all the same finds the one that they serve.
        three.apps.pop(RANKING)
        other = tmp_path / "bundles" / after, tmp_path / "other"
        newer = await three.start(RANKING, stack, other[0], state=other[1], hot_swap=False)
        assert newer.bundle.version == after
        await wait_until_serving(newer.port, RANKING)
        assert newer.bundle.version == before
        answer = await three.stubs[RANKING].ListBundles(ranking_pb.ListBundlesRequest())
        assert answer.bundles[0] == before


async def test_a_removed_bundle_falls_back_to_a_complete_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, catalog = publish(tmp_path, 0), shops.items()

    async def fails(*_: Any) -> Any:
        raise OSError("not now")

    async with asyncio.timeout(120), apart(tmp_path) as three:
        embedding, new_item = three.stubs[EMBEDDING], Item(id="brought", title="quokka")
        monkeypatch.setattr(shops, "items", lambda: [*catalog, new_item])
        after = publish(tmp_path, 1)
        await until(lambda: three.versions == [after] * 3)
        open_bundle, _ = three.apps[EMBEDDING].version_manager.open_bundles
        by_the_first = pb.SearchRequest(text="quokka", limit=1, view=item_pb2.VIEW_READABLE, bundle=before)
        assert (await embedding.Search(by_the_first)).results[0].hits[0].item_id == "brought"
        with monkeypatch.context() as patch:
            patch.setattr(open_bundle.catalog.encoders, "texts", fails)
            await upsert(embedding, item("own", "zebra"))
        assert await nearest(embedding, "zebra") == "own"
        (tmp_path / "bundles" / after).rename(tmp_path / "taken")
        await until(lambda: three.versions == [before] * 3)
        for words, item_id in (("zebra", "own"), ("quokka", "brought")):
            assert await nearest(embedding, words) == item_id
        await upsert(embedding, item("later", "heron"))
        assert await nearest(embedding, "heron") == "later"
        await until(lambda: all(len(app.version_manager.open_bundles) == 1 for app in three.apps.values()))
        page = await three.stubs[GATEWAY].Recommend(gateway_pb.RecommendRequest(page_size=10))
        assert page.versions.bundle == before
        assert not page.degraded


async def test_a_start_serves_the_previous_bundle_and_encodes_the_newest(tmp_path: Path) -> None:
    before = publish(tmp_path, 0)
    settings = Settings(bundle=tmp_path / "bundles", state=tmp_path / "state", bundle_poll_seconds=0.05)
    async with asyncio.timeout(120):
        async with apart(tmp_path, (EMBEDDING,)) as one:
            await upsert(one.stubs[EMBEDDING], item("own", "zebra"))
        after = publish(tmp_path, 1)
        overrides = {"hot_swap": False}, {"state": tmp_path / "other"}, {"bundle_poll_seconds": 0}
        for other in overrides:
            assert version_of(await first_bundle(settings.model_copy(update=other), (EMBEDDING,))) == after
        bundle = await first_bundle(settings, (EMBEDDING,))
        assert version_of(bundle) == before
        async with AsyncExitStack() as stack:
            again = Apart(tmp_path, {}, {})
            app = await again.start(EMBEDDING, stack, bundle)
            assert app.current.catalog.encoders.totals == {}  # nothing had to be encoded
            await until(lambda: app.bundle.version == after)
            assert await nearest(again.stubs[EMBEDDING], "zebra") == "own"
        assert version_of(await first_bundle(settings, (EMBEDDING,))) == after
        later = make_bundle(tmp_path, seed=2, until=UNTIL + timedelta(days=2), event_types={"purchase": 1.0})
        assert await first_bundle(settings, (EMBEDDING,)) == later  # it can only be served from a start


async def test_a_ranking_service_without_items_refuses_calls(tmp_path: Path) -> None:
    publish(tmp_path, 0)
    async with asyncio.timeout(120):
        three = Apart(tmp_path, {}, {})
        async with AsyncExitStack() as stack:
            await three.start(RANKING, stack, embedding=f"127.0.0.1:{free_port()}")
            stub, now = three.stubs[RANKING], timestamp_pb2.Timestamp(seconds=1_800_000_000)
            user = ranking_pb.User(user_id="ann")
            for call in (
                stub.Retrieve(ranking_pb.RetrieveRequest(user=user, limit=9, as_of=now)),
                stub.Rank(ranking_pb.RankRequest(user=user, item_ids=["garden-03"], as_of=now)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert not (await stub.ListBundles(ranking_pb.ListBundlesRequest())).bundles
