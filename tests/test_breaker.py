"""A neighbour that keeps failing costs a call nothing, and is asked again when it may have come back."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services import deadline
from services.errors import InvalidArgument, Unavailable
from services.gateway import breaker as breaker_module
from services.gateway.breaker import Breaker
from services.generation import EMBEDDING, GATEWAY, RANKING
from services.wiring import App
from tests.processes import serving
from tests.recommending import Shop, ids, session
from tests.shops import make_bundle


class Time:
    """Stands still until it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def broken(clock: Time) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(5):
        assert breaker.wait() == 0
        breaker.failed(1.0)
    return breaker


def test_five_failures_in_a_row_open_it_and_one_success_shuts_it() -> None:
    clock = Time()
    breaker = Breaker(clock)
    for _ in range(20):
        for _ in range(4):
            breaker.failed(1.0)
        breaker.succeeded()
        assert breaker.wait() == 0
    breaker = broken(clock)
    assert breaker.wait() == 1.0
    clock.now += 0.6
    assert breaker.wait() == pytest.approx(0.4)
    clock.now += 0.5
    assert breaker.wait() == 0  # one finds out
    assert breaker.wait() > 0  # others wait for it
    breaker.succeeded()
    assert breaker.wait() == breaker.wait() == 0


def test_calls_that_were_on_their_way_do_not_make_the_pause_longer() -> None:
    clock = Time()
    breaker = broken(clock)
    for _ in range(20):
        breaker.failed(1.0)
    assert breaker.wait() == 1.0
    clock.now += 1
    assert breaker.wait() == 0
    for _ in range(20):
        breaker.failed(1.0)
    assert breaker.wait() == 2.0


def test_each_trial_that_fails_doubles_the_pause_up_to_half_a_minute() -> None:
    clock = Time()
    breaker, pauses = broken(clock), []
    for _ in range(7):
        pauses.append(breaker.wait())
        clock.now += pauses[-1]
        assert breaker.wait() == 0
        breaker.failed(1.0)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


@given(st.lists(st.floats(0, 0.19)))
def test_callers_in_a_hurry_prove_nothing(seconds: list[float]) -> None:
    breaker = Breaker(Time())
    for one in seconds:
        breaker.failed(one)
    assert breaker.wait() == 0


def test_a_ranking_service_that_is_gone_is_left_alone_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker_module, "_FIRST_PAUSE", 5.0)  # longer than a dozen calls on a busy machine
    shop = Shop(make_bundle(tmp_path), tmp_path / "state", "three")

    async def body() -> None:
        embedding = App(shop.settings(), (EMBEDDING,))
        await embedding.start()
        at = f"127.0.0.1:{embedding.port}"
        ranking = App(shop.settings(embedding=at, grace=0), (RANKING,))
        await ranking.start()
        await serving(ranking.port, RANKING)
        port = ranking.port
        gateway = App(shop.settings(embedding=at, ranking=f"127.0.0.1:{port}"), (GATEWAY,))
        await gateway.start()
        assert gateway.gateway is not None
        recommend: Any = gateway.gateway.Recommend
        request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
        assert not (await recommend(request, None)).degraded
        await ranking.stop()
        said = []
        for _ in range(12):
            page = await recommend(request, None)
            assert len(ids(page)) == 10
            said.append(next(line.message for line in page.degraded if line.stage == "retrieve"))
        assert not any("not asked" in line for line in said[:5])
        assert all("is not asked for another" in line for line in said[5:])
        again = App(shop.settings(embedding=at, address=f"127.0.0.1:{port}"), (RANKING,))
        await again.start()
        async with asyncio.timeout(60):
            while (await recommend(request, None)).degraded:
                await asyncio.sleep(0.05)
        for app in (gateway, again, embedding):
            await app.stop()

    asyncio.run(body())


def test_a_wrong_request_says_nothing_of_the_neighbour(tmp_path: Path) -> None:
    shop = Shop(make_bundle(tmp_path), tmp_path / "state", "one")

    async def body() -> None:
        app = App(shop.settings())
        await app.start()
        assert app.gateway is not None
        pipeline, degraded = app.gateway.pipeline, list[pb.Degradation]()

        async def raises(error: Exception) -> None:
            raise error

        for _ in range(20):
            with pytest.raises(InvalidArgument):
                await pipeline._attempt("rank", raises(InvalidArgument.of("x", "y")), 1.0, degraded)
        assert not degraded
        for _ in range(9):  # whose caller has no time
            with deadline.within(0.01):
                await pipeline._attempt("rank", asyncio.sleep(30), 1.0, degraded)
        assert await pipeline._attempt("rank", asyncio.sleep(0, "found"), 1.0, degraded) == "found"
        for _ in range(5):
            await pipeline._attempt("rank", raises(Unavailable("away")), 1.0, degraded)
            assert await pipeline._attempt("retrieve", asyncio.sleep(0, "found"), 1.0, degraded) == "found"
        begun: list[str] = []

        async def slow() -> None:
            begun.append("slow")

        many = len(degraded)
        await pipeline._attempt("rank", slow(), 30.0, degraded)
        assert len(degraded) == many + 1
        assert not begun
        assert await pipeline._attempt("search", asyncio.sleep(0, "found"), 1.0, degraded) == "found"
        await app.stop()

    asyncio.run(body())
