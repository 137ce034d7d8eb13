"""Statistics of ticks: which tick holds, and what is prepared before it does."""

import threading
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.catalog.item_table import ItemTable
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.models.co_occurrence import GraphView, ItemGraph
from services.ranking.retrieval.candidate_sources import CandidateSources
from services.ranking.state import stats_by_tick
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import DAY, HOUR, TICKS, ItemStats, item_stats
from services.ranking.state.stats_by_tick import StatsByTick
from services.ranking.state.user_query import UserQuery
from tests.unit.test_retrieval_sources import NAMES, TICK, change, random_item, random_state

MINUTE = HOUR // 60
ITEMS = 30
NOON = TICK - TICK % DAY + 12 * HOUR


@given(st.sampled_from(["hour", "day"]), st.integers(0, 1 << 60))
def test_the_tick_of_a_time_is_past_and_the_upcoming_one_follows_it(granularity: str, time: int) -> None:
    ticks = TICKS[granularity]
    tick = ticks.at(time)
    assert tick % ticks.length == 0
    assert ticks.delay <= time - tick < ticks.delay + ticks.length
    upcoming = ticks.upcoming(time)
    assert upcoming in (None, tick + ticks.length)
    if upcoming is not None:
        assert MINUTE <= time - upcoming < ticks.delay  # all events before it are in memory
    assert not ticks.is_over(tick, time)
    assert ticks.is_over(tick - 2 * ticks.length, time)


def test_statistics_of_hours_hold_five_minutes_later_those_of_days_at_once() -> None:
    hours, days = TICKS["hour"], TICKS["day"]
    assert hours.at(NOON + 5 * MINUTE - 1) == NOON - HOUR
    assert hours.at(NOON + 5 * MINUTE) == NOON
    assert hours.upcoming(NOON + MINUTE - 1) is None
    assert hours.upcoming(NOON + MINUTE) == NOON
    assert days.at(NOON - 12 * HOUR) == NOON - 12 * HOUR


class Shop:
    """A few items and events, with every source and feature that derives something per tick."""

    def __init__(self) -> None:
        generator = np.random.default_rng(2)
        items = [random_item(n, generator) for n in range(ITEMS)]
        self.state, self.table = random_state(items, generator), ItemTable()
        self.table.apply(change(n, item) for n, item in enumerate(items))
        self.more = [random_item(ITEMS + n, generator) for n in range(3)]
        graph = GraphView(ItemGraph(np.empty(0, np.int64), {}), self.table)
        context = RankingContext(self.table, graph, (*NAMES, "family_id"), ("weight",))
        self.sources, self.features = CandidateSources(context), Features(context)
        self.stats = StatsByTick(self.state, self.table, TICKS["hour"])

    def use(self, stats: ItemStats) -> dict[str, np.ndarray]:
        """The candidates of every source, and the features of all items."""
        rows = np.arange(2)
        query = UserQuery(
            rows,
            np.ones(2, np.float32),
            rows,
            np.ones(2, np.float32),
            np.ones(2, np.float32),
            np.zeros(2, bool),
            np.zeros(2, np.int16),
        )
        allowed = np.ones(stats.length, bool)
        used = {
            name: self.sources.candidates(name, query, stats, allowed, 9).rows
            for name in self.sources.by_name
        }
        return used | {"": self.features.matrix(query, np.arange(stats.length), stats)}

    def finish_preparing(self) -> None:
        """Wait for the thread that prepares."""
        self.stats._thread.submit(int).result()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The ticks whose statistics were computed, and by which thread."""
    calls: list[tuple[int, str]] = []

    def counted(state: EventState, table: ItemTable, tick: int) -> ItemStats:
        calls.append((tick, threading.current_thread().name))
        return item_stats(state, table, tick)

    monkeypatch.setattr(stats_by_tick, "item_stats", counted)
    return calls


def assert_equal(one: ItemStats, other: ItemStats) -> None:
    for name in [f.name for f in fields(ItemStats) if f.name not in ("derived", "counted")]:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)


def test_a_request_after_the_delay_finds_all_prepared(computed: list[tuple[int, str]]) -> None:
    shop = Shop()
    present = shop.stats.at(NOON + MINUTE - 1)
    shop.use(present)
    assert shop.stats.at(NOON + MINUTE) is present  # and starts to prepare
    shop.finish_preparing()
    after = shop.stats.at(NOON + 5 * MINUTE)
    assert [tick for tick, _ in computed] == [NOON - HOUR, NOON]
    assert computed[1][1].startswith("statistics")
    assert_equal(after, item_stats(shop.state, shop.table, NOON))
    prepared = dict(after.derived.by_cache)
    assert set(prepared) == set(present.derived.by_cache) != set()
    used = shop.use(after)
    assert after.derived.by_cache == prepared  # nothing was computed again
    expected = shop.use(item_stats(shop.state, shop.table, NOON))
    for name, values in expected.items():
        np.testing.assert_array_equal(used[name], values, err_msg=name)


def test_items_that_arrive_after_the_preparation_have_rows(computed: list[tuple[int, str]]) -> None:
    shop = Shop()
    shop.use(shop.stats.at(NOON + MINUTE))
    shop.finish_preparing()
    shop.table.apply(change(ITEMS + n, item) for n, item in enumerate(shop.more))
    after = shop.stats.at(NOON + 5 * MINUTE)
    assert len(computed) == 2
    assert after.length == ITEMS + 3
    assert len(shop.use(after)[""]) == ITEMS + 3


def test_a_request_that_began_in_the_tick_before_still_finds_its_statistics(
    computed: list[tuple[int, str]],
) -> None:
    shop = Shop()
    before = shop.stats.at(NOON + 5 * MINUTE - 1)
    shop.finish_preparing()
    after = shop.stats.at(NOON + 5 * MINUTE)
    assert shop.stats.at(NOON + 5 * MINUTE - 1) is before
    assert shop.stats.at(NOON + 6 * MINUTE) is after
    assert len(computed) == 2
    assert list(shop.stats._entries) == [NOON]  # the memory of the hour before is free


def test_deleted_events_count_in_no_prepared_statistics(
    computed: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop()
    shop.stats.at(NOON + MINUTE)
    shop.finish_preparing()
    shop.state.drop(shop.state.all().sequence[:20].tolist())
    shop.stats.clear()
    shop.finish_preparing()
    assert_equal(shop.stats.at(NOON + 5 * MINUTE), item_stats(shop.state, shop.table, NOON))


def test_a_deletion_while_statistics_are_prepared_voids_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop, started, go_on = Shop(), threading.Event(), threading.Event()

    def slow(state: EventState, table: ItemTable, tick: int) -> ItemStats:
        stats = item_stats(state, table, tick)
        if threading.current_thread().name.startswith("statistics"):
            started.set()
            assert go_on.wait(60)
        return stats

    monkeypatch.setattr(stats_by_tick, "item_stats", slow)
    shop.stats.at(NOON + MINUTE)
    assert started.wait(60)
    shop.state.drop(shop.state.all().sequence[:20].tolist())
    shop.stats.clear()
    go_on.set()
    shop.finish_preparing()
    assert_equal(shop.stats.at(NOON + 5 * MINUTE), item_stats(shop.state, shop.table, NOON))


def test_a_failed_preparation_is_logged_and_a_request_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop()

    def failing(state: EventState, table: ItemTable, tick: int) -> ItemStats:
        if threading.current_thread().name.startswith("statistics"):
            raise MemoryError
        return item_stats(state, table, tick)

    monkeypatch.setattr(stats_by_tick, "item_stats", failing)
    shop.stats.at(NOON + MINUTE)
    shop.finish_preparing()
    assert "a request will wait" in caplog.text
    shop.stats.at(NOON + 2 * MINUTE)  # does not try again
    shop.finish_preparing()
    assert len(caplog.records) == 1
    assert_equal(shop.stats.at(NOON + 5 * MINUTE), item_stats(shop.state, shop.table, NOON))


def test_no_statistics_of_days_are_prepared(computed: list[tuple[int, str]]) -> None:
    shop = Shop()
    stats = StatsByTick(shop.state, shop.table, TICKS["day"])
    for time in (NOON, NOON + 12 * HOUR, NOON + 13 * HOUR):
        stats.at(time)
    assert [tick for tick, _ in computed] == [NOON - 12 * HOUR, NOON + 12 * HOUR]
