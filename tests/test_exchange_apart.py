"""Three processes' worth of services go over to another bundle one after the other, and nobody notices."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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

from services import exchange, next_bundle
from services.bundle import version_of
from services.catalog import Item
from services.generation import EMBEDDING, GATEWAY, RANKING
from services.server import CHANNEL_OPTIONS
from services.settings import Settings
from services.wiring import App, first_bundle
from tests import shops
from tests.asking import Traffic
from tests.catalogues import item, nearest, upsert
from tests.processes import free_port, serving
from tests.shops import UNTIL, make_bundle

KEPT = 1.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a minute takes a second."""
    monkeypatch.setattr(exchange, "KEEP", KEPT)
    monkeypatch.setattr(next_bundle, "ASK_EVERY", 0.05)


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
    def served(self) -> list[str]:
        return [self.apps[name].bundle.version for name in (EMBEDDING, RANKING, GATEWAY)]

    def settings(self, **more: Any) -> Settings:
        base: dict[str, Any] = {"bundle": self.root / "bundles", "address": "127.0.0.1:0", "look_every": 0.05}
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
            await serving(app.port, name)
        yield three


async def until(reached: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not reached():
            await asyncio.sleep(0.02)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(body(), 120)

    asyncio.run(main())


def test_bundles_are_exchanged_beside_live_calls_and_no_page_is_poorer(tmp_path: Path) -> None:
    first = publish(tmp_path, 0)

    async def body() -> None:
        async with apart(tmp_path) as three:
            embedding, gateway = three.stubs[EMBEDDING], three.stubs[GATEWAY]
            await upsert(embedding, *(item(f"own-{n}", f"zebra {n}") for n in range(100)))
            traffic = Traffic(embedding, gateway)
            served = [first]
            for day in (1, 2):
                served.append(publish(tmp_path, day))
                await traffic.until(lambda: three.served == [served[-1]] * 3)
                rounds = list(traffic.rounds)
                await traffic.until(lambda then=rounds: traffic.went_on(then))  # type: ignore[misc]
            await traffic.until(lambda: all(len(app.exchange.alive) == 1 for app in three.apps.values()))
            await traffic.stop()
            order = list(dict.fromkeys(traffic.versions))
            assert set(order) <= set(served)
            assert order[0] == first
            assert order[-1] == served[-1]
            assert traffic.versions == sorted(traffic.versions, key=served.index)
            for n in range(traffic.rounds[2]):
                assert await nearest(embedding, f"heron {n}") == f"new-{n}"
            response = await gateway.Recommend(gateway_pb.RecommendRequest(user_id="u1", page_size=5))
            assert response.versions.event_sequence == traffic.rounds[3]

    run(body)


def test_what_a_gateway_serves_by_is_kept_while_it_does_and_no_longer(tmp_path: Path) -> None:
    before = publish(tmp_path, 0)

    async def body() -> None:
        async with apart(tmp_path, (EMBEDDING, RANKING)) as three:
            embedding, ranking = three.stubs[EMBEDDING], three.stubs[RANKING]
            await upsert(embedding, *(item(f"own-{n}", f"zebra {n}") for n in range(100)))
            async with AsyncExitStack() as stack:
                await three.start(GATEWAY, stack, exchange=False)
                traffic, after = Traffic(embedding, three.stubs[GATEWAY]), publish(tmp_path, 1)
                await traffic.until(lambda: three.served == [after, after, before])
                rounds = list(traffic.rounds)
                await asyncio.sleep(3 * KEPT)
                await traffic.until(lambda: traffic.went_on(rounds))
                await traffic.stop()
                assert set(traffic.versions) == {before}
                for stub, request in ((embedding, pb), (ranking, ranking_pb)):
                    assert list((await stub.ListBundles(request.ListBundlesRequest())).bundles) == [
                        after,
                        before,
                    ]
                vectors = []
                for bundle in (before, after):  # what is written meanwhile is there by the encoders of both
                    asked = pb.SearchRequest(
                        text="heron 1", limit=1, view=item_pb2.VIEW_READABLE, bundle=bundle
                    )
                    asked.spaces.append(item_pb2.SPACE_TEXT)
                    found = await embedding.Search(asked)
                    assert (found.bundle, found.results[0].hits[0].item_id) == (bundle, "new-1")
                    assert found.results[0].hits[0].score == pytest.approx(1, abs=1e-3)
                    texts = pb.EmbedTextsRequest(texts=["heron 1"], bundle=bundle)
                    vectors.append(list((await embedding.EmbedTexts(texts)).vectors.values))
                assert vectors[0] != vectors[1]
            await until(lambda: len(three.apps[EMBEDDING].exchange.alive) == 1)
            assert len(three.apps[RANKING].exchange.alive) == 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await embedding.Search(pb.SearchRequest(text="heron 1", limit=1, bundle=before))
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    run(body)


def test_a_service_begins_with_what_its_neighbours_serve_and_goes_over_with_them(tmp_path: Path) -> None:
    before = publish(tmp_path, 0)

    async def body() -> None:
        async with apart(tmp_path, embedding={"exchange": False}) as three, AsyncExitStack() as stack:
            after = publish(tmp_path, 1)
            settings = three.settings(state=tmp_path / "other")
            assert version_of(await first_bundle(settings, (GATEWAY,))) == before
            nobody = three.settings(embedding=f"127.0.0.1:{free_port()}", ranking=f"127.0.0.1:{free_port()}")
            assert version_of(await first_bundle(nobody, (GATEWAY,))) == after
            # One that began with another all the same finds the one that they serve.
            three.apps.pop(RANKING)
            other = tmp_path / "bundles" / after, tmp_path / "other"
            newer = await three.start(RANKING, stack, other[0], state=other[1], exchange=False)
            assert newer.bundle.version == after
            await serving(newer.port, RANKING)
            assert newer.bundle.version == before
            answer = await three.stubs[RANKING].ListBundles(ranking_pb.ListBundlesRequest())
            assert answer.bundles[0] == before

    run(body)


def test_what_is_taken_away_is_left_for_the_bundle_before_which_lacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, known = publish(tmp_path, 0), shops.items()

    async def fails(*_: Any) -> Any:
        raise OSError("not now")

    async def body() -> None:
        async with apart(tmp_path) as three:
            embedding, brought = three.stubs[EMBEDDING], Item(id="brought", title="quokka")
            monkeypatch.setattr(shops, "items", lambda: [*known, brought])
            after = publish(tmp_path, 1)
            await until(lambda: three.served == [after] * 3)
            held, _ = three.apps[EMBEDDING].exchange.alive
            by_the_first = pb.SearchRequest(
                text="quokka", limit=1, view=item_pb2.VIEW_READABLE, bundle=before
            )
            assert (await embedding.Search(by_the_first)).results[0].hits[0].item_id == "brought"
            with monkeypatch.context() as patch:
                patch.setattr(held.catalogue.encoding, "texts", fails)
                await upsert(embedding, item("own", "zebra"))
            assert await nearest(embedding, "zebra") == "own"
            (tmp_path / "bundles" / after).rename(tmp_path / "taken")
            await until(lambda: three.served == [before] * 3)
            for words, found in (("zebra", "own"), ("quokka", "brought")):
                assert await nearest(embedding, words) == found
            await upsert(embedding, item("later", "heron"))
            assert await nearest(embedding, "heron") == "later"
            await until(lambda: all(len(app.exchange.alive) == 1 for app in three.apps.values()))
            page = await three.stubs[GATEWAY].Recommend(gateway_pb.RecommendRequest(page_size=10))
            assert page.versions.bundle == before
            assert not page.degraded

    run(body)


def test_a_start_begins_with_what_was_served_and_encodes_for_the_newest_beside(tmp_path: Path) -> None:
    before = publish(tmp_path, 0)
    settings = Settings(bundle=tmp_path / "bundles", state=tmp_path / "state", look_every=0.05)

    async def body() -> None:
        async with apart(tmp_path, (EMBEDDING,)) as one:
            await upsert(one.stubs[EMBEDDING], item("own", "zebra"))
        after = publish(tmp_path, 1)
        told = {"exchange": False}, {"state": tmp_path / "other"}, {"look_every": 0}
        for other in told:
            assert version_of(await first_bundle(settings.model_copy(update=other), (EMBEDDING,))) == after
        found = await first_bundle(settings, (EMBEDDING,))
        assert version_of(found) == before
        async with AsyncExitStack() as stack:
            again = Apart(tmp_path, {}, {})
            app = await again.start(EMBEDDING, stack, found)
            assert app.now.catalogue.encoding.totals == {}  # nothing had to be encoded
            await until(lambda: app.bundle.version == after)
            assert await nearest(again.stubs[EMBEDDING], "zebra") == "own"
        assert version_of(await first_bundle(settings, (EMBEDDING,))) == after
        later = make_bundle(tmp_path, seed=2, until=UNTIL + timedelta(days=2), event_types={"purchase": 1.0})
        assert await first_bundle(settings, (EMBEDDING,)) == later  # it can only be served from a start

    run(body)


def test_a_ranking_service_that_knows_no_items_yet_says_so(tmp_path: Path) -> None:
    publish(tmp_path, 0)

    async def body() -> None:
        three = Apart(tmp_path, {}, {})
        async with AsyncExitStack() as stack:
            await three.start(RANKING, stack, embedding=f"127.0.0.1:{free_port()}")
            stub, now = three.stubs[RANKING], timestamp_pb2.Timestamp(seconds=1_800_000_000)
            person = ranking_pb.Person(user_id="ann")
            for call in (
                stub.Retrieve(ranking_pb.RetrieveRequest(person=person, limit=9, as_of=now)),
                stub.Rank(ranking_pb.RankRequest(person=person, item_ids=["garden-03"], as_of=now)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert not (await stub.ListBundles(ranking_pb.ListBundlesRequest())).bundles

    run(body)
