"""Data retention ignores clock jumps, and an idle shop still expires."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import Unavailable
from services.ranking.events.event_store import EventStore
from services.ranking.events.events import Event, EventItem
from services.ranking.events.retention_clock import (
    CATCH_UP,
    MAX_JUMP,
    MAX_WAIT,
    RetentionClock,
    TrustedTime,
    advance,
    observe,
)
from services.ranking.users import data_retention as module
from services.ranking.users.data_retention import DataRetention
from services.serving.app import App
from services.serving.settings import Settings
from services.storage import store
from tests.conftest import Clock
from tests.integration.test_telemetry import read_samples
from tests.support.shop_server import NOW, Shop, purchase

START = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
_spans = st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=2))


class Process:
    """A process' clocks: the wall's may jump, the monotonic one never does."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds = clock, 0.0

    def monotonic(self) -> float:
        return self.seconds

    def run(self, span: timedelta) -> None:
        self.seconds += span.total_seconds()
        self.clock.now += span


@pytest.fixture
def event_store(engine: sa.Engine, clock: Clock) -> Iterator[EventStore]:
    event_store = EventStore(engine, ["view"], clock)
    yield event_store
    event_store.close()


def event_ids(event_store: EventStore) -> list[str]:
    return [record.event.event_id for record in event_store.export("ann", "", 0, 100)]


async def on_thread(function: Any) -> Any:
    return await asyncio.to_thread(function)


@given(steps=st.lists(_spans, max_size=20), offset=st.timedeltas(min_value=-MAX_JUMP, max_value=MAX_JUMP))
def test_a_running_clock_is_trusted_after_two_days_of_downtime(
    steps: list[timedelta], offset: timedelta
) -> None:
    now = START
    trusted = TrustedTime(START)
    for step in steps:
        now += step
        trusted = advance(trusted, now, timedelta(0))
        assert trusted == TrustedTime(now)
    assert advance(trusted, now + offset, timedelta(0)).time == now + offset


@given(
    jump=st.timedeltas(min_value=MAX_JUMP + HOUR, max_value=timedelta(days=40_000)),
    backward=st.booleans(),
    steps=st.lists(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=3)), max_size=40),
)
def test_a_clock_jump_is_trusted_after_a_proportional_wait(
    jump: timedelta, backward: bool, steps: list[timedelta]
) -> None:
    wait = min(jump / CATCH_UP, MAX_WAIT)
    now, trusted, elapsed = START - jump if backward else START + jump, TrustedTime(START), timedelta(0)
    for step in steps:
        now += step
        elapsed += step
        trusted = advance(trusted, now, step)
        if elapsed >= wait:
            assert trusted == TrustedTime(now)
            return
        assert trusted == TrustedTime(START + elapsed, elapsed)


def test_trusted_time_survives_a_restart_and_starts_at_the_newest_event(
    event_store: EventStore, engine: sa.Engine, clock: Clock
) -> None:
    event_store.write(Event("e", "view", (EventItem("a"),), "ann")).result()
    newest, wrong = clock.now, clock.now + timedelta(days=3650)
    waiting = [
        TrustedTime(newest),
        TrustedTime(newest + HOUR, HOUR),
        TrustedTime(newest + 2 * HOUR, 2 * HOUR),
    ]
    writing = engine.execution_options(vitrine_writes=True)
    for elapsed, expected in zip((timedelta(0), HOUR, HOUR), waiting, strict=True):
        with writing.begin() as connection:
            assert observe(connection, wrong, elapsed) == expected
    assert event_store.observe_clock(newest + 3 * HOUR, HOUR).result() == TrustedTime(newest + 3 * HOUR)


async def test_a_clock_jump_deletes_nothing_until_it_persists(
    event_store: EventStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_EXPIRY_INTERVAL", 0.01)
    process = Process(clock)
    for days in (20, 1):
        time_of_event = clock.now - timedelta(days=days)
        event_store.write(
            Event(f"{days}-days", "view", (EventItem("a"),), "ann", occurred=time_of_event)
        ).result()
    time = RetentionClock(clock, event_store.observe_clock, process.monotonic)
    upkeep = asyncio.ensure_future(DataRetention(event_store, on_thread).retain(30, 30, time))

    async def runs(count: int) -> None:
        for _ in range(count):
            before = process.seconds
            process.run(HOUR)
            async with asyncio.timeout(60):
                while time.read_at <= before:
                    await asyncio.sleep(0.005)

    await runs(3)
    assert event_ids(event_store) == ["20-days", "1-days"]
    clock.advance(days=90)  # 90 hours of running make it right
    await runs(80)
    assert event_ids(event_store) == ["20-days", "1-days"]
    assert time.offset == pytest.approx(90 * 86_400)
    await runs(12)
    assert event_ids(event_store) == []
    assert time.offset == 0
    upkeep.cancel()
    with suppress(asyncio.CancelledError):
        await upkeep
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "deletes by the earlier one" in warnings[0]


async def test_time_that_was_not_stored_counts_later(event_store: EventStore, clock: Clock) -> None:
    process, away = Process(clock), [Unavailable("the database does not answer")]

    def observe_clock(now: datetime, elapsed: timedelta) -> Future[TrustedTime]:
        if not away:
            return event_store.observe_clock(now, elapsed)
        future: Future[TrustedTime] = Future()
        future.set_exception(away.pop())
        return future

    clock.now = START
    time = RetentionClock(clock, observe_clock, process.monotonic)
    with pytest.raises(Unavailable):
        await time.time()
    assert await time.time() == START
    for _ in range(3):  # days of running, longer than a jump that is believed
        process.run(timedelta(days=1))
        away.append(Unavailable("the database does not answer"))
        with pytest.raises(Unavailable):
            await time.time()
    assert await time.time() == clock.now
    assert time.offset == 0


async def test_a_state_with_only_old_events_is_not_deleted_at_once(bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    engine = store.open_engine(f"sqlite:///{state / 'ranking.sqlite'}")
    event_store = EventStore(engine, ["purchase"], lambda: datetime.now(UTC))
    old = datetime.now(UTC) - timedelta(days=400)
    item = (EventItem("garden-01"),)
    event_store.load([Event("e", "purchase", item, "ann", occurred=old)]).result()
    event_store.close()
    engine.dispose()
    apps: list[App] = []
    start = App.start

    async def start_and_remember(app: App) -> None:
        apps.append(app)
        await start(app)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(App, "start", start_and_remember)
        async with Shop(bundle, state, "one", clock=None).serve(
            event_retention_days=30, metrics="127.0.0.1:0"
        ) as stub:
            figure = ("vitrine_clock_offset_seconds", "retention")
            async with asyncio.timeout(60):
                while not (await asyncio.to_thread(read_samples, apps[0].metrics_port)).get(figure):
                    await asyncio.sleep(0.05)
            export = await stub.ExportUser(pb.ExportUserRequest(user_id="ann"))
            assert [record.event.event_id for record in export.events] == ["e"]


async def test_a_fixed_clock_deletes_nothing_by_age(all_in_one: Shop) -> None:
    async with all_in_one.serve() as stub:
        event = purchase("old", "ann", "garden-01")
        event.occurred_at.FromDatetime(NOW - timedelta(days=100))
        await stub.WriteEvents(pb.WriteEventsRequest(events=[event]))
    async with all_in_one.serve(event_retention_days=30) as stub:
        await asyncio.sleep(0.3)
        assert len((await stub.ExportUser(pb.ExportUserRequest(user_id="ann"))).events) == 1


def test_a_fixed_clock_without_a_zone_is_utc_and_has_bounds(tmp_path: Path) -> None:
    zoneless = Settings(bundle=tmp_path, fixed_time=datetime(2026, 3, 1, 12))
    assert zoneless.fixed_time == datetime(2026, 3, 1, 12, tzinfo=UTC)
    for year in (1, 1970, 9999):
        with pytest.raises(ValidationError, match="1971 to 9000"):
            Settings(bundle=tmp_path, fixed_time=datetime(year, 1, 1, tzinfo=UTC))
