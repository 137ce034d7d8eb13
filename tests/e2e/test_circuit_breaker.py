"""A circuit breaker skips a failing backend and tries it again after a pause."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core import deadline
from services.core.errors import InvalidArgument, Unavailable
from services.gateway.clients import circuit_breaker as breaker_module
from services.gateway.clients.backend_recovery import BackendRecovery
from services.gateway.clients.circuit_breaker import CircuitBreaker
from services.gateway.query import Degradation
from services.serving.app import App
from services.serving.loaded_bundle import EMBEDDING, GATEWAY, RANKING
from tests.support.processes import free_port, wait_until_serving
from tests.support.shop_server import Shop, ids, session
from tests.support.shops import make_bundle


class Time:
    """Stands still until it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def open_breaker(clock: Time) -> CircuitBreaker:
    breaker = CircuitBreaker(clock)
    for _ in range(5):
        assert breaker.wait() == 0
        breaker.failed(1.0)
    return breaker


def test_five_failures_open_the_breaker_and_one_success_closes_it() -> None:
    clock = Time()
    breaker = CircuitBreaker(clock)
    for _ in range(20):
        for _ in range(4):
            breaker.failed(1.0)
        breaker.succeeded()
        assert breaker.wait() == 0
    breaker = open_breaker(clock)
    assert breaker.wait() == 1.0
    clock.now += 0.6
    assert breaker.wait() == pytest.approx(0.4)
    clock.now += 0.5
    assert breaker.wait() == 0  # one finds out
    assert breaker.wait() > 0  # others wait for it
    breaker.succeeded()
    assert breaker.wait() == breaker.wait() == 0


def test_calls_in_flight_do_not_extend_the_pause() -> None:
    clock = Time()
    breaker = open_breaker(clock)
    for _ in range(20):
        breaker.failed(1.0)
    assert breaker.wait() == 1.0
    clock.now += 1
    assert breaker.wait() == 0
    for _ in range(20):
        breaker.failed(1.0)
    assert breaker.wait() == 2.0


def test_each_failed_probe_doubles_the_pause_up_to_half_a_minute() -> None:
    clock = Time()
    breaker, pauses = open_breaker(clock), []
    for _ in range(7):
        pauses.append(breaker.wait())
        clock.now += pauses[-1]
        assert breaker.wait() == 0
        breaker.failed(1.0)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


@given(st.lists(st.floats(0, 0.19)))
def test_short_deadlines_do_not_count_as_failures(seconds: list[float]) -> None:
    breaker = CircuitBreaker(Time())
    for one in seconds:
        breaker.failed(one)
    assert breaker.wait() == 0


async def test_a_lost_ranking_service_is_skipped_and_used_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker_module, "_FIRST_PAUSE", 5.0)  # longer than a dozen calls on a busy machine
    shop = Shop(make_bundle(tmp_path), tmp_path / "state", "three")
    embedding = App(shop.settings(), (EMBEDDING,))
    await embedding.start()
    at = f"127.0.0.1:{embedding.port}"
    ranking = App(shop.settings(embedding=at, grace=0), (RANKING,))
    await ranking.start()
    await wait_until_serving(ranking.port, RANKING)
    port = ranking.port
    gateway = App(shop.settings(embedding=at, ranking=f"127.0.0.1:{port}"), (GATEWAY,))
    await gateway.start()
    assert gateway.gateway is not None
    recommend: Any = gateway.gateway.Recommend
    request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
    assert not (await recommend(request, None)).degraded
    await ranking.stop()
    messages = []
    for _ in range(12):
        page = await recommend(request, None)
        assert len(ids(page)) == 10
        messages.append(next(line.message for line in page.degraded if line.stage == "retrieve"))
    assert not any("not asked" in line for line in messages[:5])
    assert all("is not asked for another" in line for line in messages[5:])
    again = App(shop.settings(embedding=at, address=f"127.0.0.1:{port}"), (RANKING,))
    await again.start()
    async with asyncio.timeout(60):
        while (await recommend(request, None)).degraded:
            await asyncio.sleep(0.05)
    for app in (gateway, again, embedding):
        await app.stop()


async def test_a_recovered_backend_is_tried_at_once() -> None:
    states = {"ranking": True, "embedding": True}
    clocks = {name: Time() for name in states}
    breakers = {name: [open_breaker(clock)] for name, clock in clocks.items()}
    polls: list[str] = []

    def serves(name: str) -> Any:
        async def answer() -> bool:
            polls.append(name)
            return states[name]

        return answer

    recovery = BackendRecovery({name: serves(name) for name in states}, breakers.__getitem__)
    [ranking], [embedding] = breakers["ranking"], breakers["embedding"]
    for breaker, clock in zip((ranking, embedding), clocks.values(), strict=True):
        while breaker.wait() < 30:  # to the longest pause
            clock.now += breaker.wait()
            assert breaker.wait() == 0
            breaker.failed(1.0)
    states["ranking"] = False
    for _ in range(3):
        await recovery.check()
    assert ranking.wait() == embedding.wait() == 30
    states["ranking"] = True
    await recovery.check()
    assert ranking.wait() == 0  # one finds out
    assert ranking.wait() == embedding.wait() == 30
    ranking.failed(1.0)
    await recovery.check()
    assert ranking.wait() == 30  # no second time
    ranking.succeeded()
    embedding.succeeded()
    polls.clear()
    await recovery.check()
    assert not polls


async def test_a_killed_ranking_service_is_used_again_once_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(breaker_module, "_FIRST_PAUSE", 3600.0)  # without health it would stay degraded
    shop = Shop(make_bundle(tmp_path), tmp_path / "state", "three")
    port = free_port()
    embedding = App(shop.settings(), (EMBEDDING,))
    await embedding.start()
    at = f"127.0.0.1:{embedding.port}"

    def ranking() -> "subprocess.Popen[bytes]":
        bundle, state = str(shop.settings().bundle), str(tmp_path / "ranking")
        command = [sys.executable, "-m", "cli.main", "serve", "ranking", "--bundle", bundle]
        more = ["--state", state, "--embedding", at, "--address", f"127.0.0.1:{port}"]
        return subprocess.Popen([*command, *more])

    process = ranking()
    try:
        await wait_until_serving(port, RANKING)
        gateway = App(shop.settings(embedding=at, ranking=f"127.0.0.1:{port}"), (GATEWAY,))
        await gateway.start()
        assert gateway.gateway is not None
        recommend: Any = gateway.gateway.Recommend
        request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
        assert not (await recommend(request, None)).degraded
        process.send_signal(signal.SIGKILL)
        process.wait()
        messages = [line.message for _ in range(12) for line in (await recommend(request, None)).degraded]
        assert any("not asked for another" in line for line in messages)
        assert "the ranking service is unavailable" in messages
        assert not any("127.0.0.1" in line or str(port) in line for line in messages)
        assert str(port) in caplog.text  # the log has the detail
        process = ranking()
        await wait_until_serving(port, RANKING)
        async with asyncio.timeout(60):
            while (await recommend(request, None)).degraded:
                await asyncio.sleep(0.05)
        await gateway.stop()
    finally:
        process.kill()
        process.wait()
        await embedding.stop()


async def test_an_invalid_request_is_no_failure_of_the_backend(tmp_path: Path) -> None:
    shop = Shop(make_bundle(tmp_path), tmp_path / "state", "one")
    app = App(shop.settings())
    await app.start()
    assert app.gateway is not None
    calls, degradations = app.gateway.pipeline._calls, list[Degradation]()

    async def raises(error: Exception) -> None:
        raise error

    for _ in range(20):
        with pytest.raises(InvalidArgument):
            await calls.attempt("rank", raises(InvalidArgument.of("x", "y")), 1.0, degradations)
    assert not degradations
    for _ in range(9):  # whose caller has no time
        with deadline.within(0.01):
            await calls.attempt("rank", asyncio.sleep(30), 1.0, degradations)
    assert await calls.attempt("rank", asyncio.sleep(0, "found"), 1.0, degradations) == "found"
    for _ in range(5):
        await calls.attempt("rank", raises(Unavailable("away")), 1.0, degradations)
        assert await calls.attempt("retrieve", asyncio.sleep(0, "found"), 1.0, degradations) == "found"
    starts: list[str] = []

    async def slow() -> None:
        starts.append("slow")

    many = len(degradations)
    await calls.attempt("rank", slow(), 30.0, degradations)
    assert len(degradations) == many + 1
    assert not starts
    assert await calls.attempt("search", asyncio.sleep(0, "found"), 1.0, degradations) == "found"
    await app.stop()
