"""Exploration gives new items their share of slots within limits, with exact propensities."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog.item_table import ItemTable
from services.catalog.items import Item, item_hash
from services.gateway.rules.exploration import sample_pool
from services.ranking.events import exploration_counts
from services.ranking.retrieval.exploration import ExplorationQuery, exploration_candidates, random_keys
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import item_stats
from services.rpc.proto_conversions import time_to
from tests.support.shop_server import NOW, Shop, Stub, equals_filter, ids, purchase, session, violations
from tests.support.shops import UNTIL

NEW = [f"new-{n:02}" for n in range(12)]


flags = st.lists(st.booleans(), min_size=1, max_size=12).filter(any)


@given(flags, st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_probabilities_are_a_distribution_over_the_possible_items(possible: list[bool], seed: int) -> None:
    mask, count = np.array(possible), len(possible)
    zero = np.zeros(count)
    pool = sample_pool(np.arange(count), zero > 0, zero, zero, np.full(count, 0.3), seed=seed, depth=4)
    chances = pool.probabilities(mask)
    assert chances.sum() == pytest.approx(1)
    assert (chances[~mask] == 0).all()
    assert (chances[mask] >= 0.2 / mask.sum() - 1e-12).all()
    draw = pool.draw(0, mask)
    assert draw is not None
    assert mask[draw.pool_index]
    assert draw.propensity == chances[draw.pool_index]
    assert pool.draw(0, np.zeros(count, bool)) is None


def test_outcome_estimates_are_unbiased_and_better_items_are_drawn_more_often() -> None:
    showings, engagements = np.array([90.0, 90, 0, 30]), np.array([30.0, 2, 0, 1])
    worth, zero = np.array([3.0, 1.0, 2.0, 5.0]), np.zeros(4)
    estimates, draw_counts = [], Counter[int]()
    for seed in range(4000):
        pool = sample_pool(np.arange(4), zero > 0, showings, engagements, zero + 0.1, seed=seed, depth=1)
        draw = pool.draw(0, np.ones(4, bool))
        assert draw is not None
        estimates.append(worth[draw.pool_index] / draw.propensity)
        draw_counts[draw.pool_index] += 1
    # The sum of all worths, as if each had been shown (Horvitz and Thompson).
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - worth.sum()) < 4 * error < 2
    assert draw_counts[0] > draw_counts[2] > draw_counts[1]
    assert min(draw_counts.values()) > 4000 * 0.2 / 4 * 0.8


def test_a_draw_from_many_items_is_fair() -> None:
    numbers = np.arange(1, 41, dtype=np.int64) * 7919
    first = Counter(int(np.argsort(random_keys(numbers, seed))[0]) for seed in range(4000))
    expected = 4000 / 40
    chi = sum((first[n] - expected) ** 2 / expected for n in range(40))
    assert chi < 80  # of 39 degrees of freedom: once in ten thousand


def explored_ids_of(page: Any) -> list[str]:
    return [item.item_id for item in page.items if "exploration" in item.rules]


async def bring(stub: Stub, *item_ids: str, age: int = 1, now: datetime = NOW) -> None:
    since = time_to(now - timedelta(days=age))
    items = [item_pb2.Item(id=i, title=f"novelty {i}", available_from=since, family_id=i) for i in item_ids]
    response = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
    sequence = max(outcome.sequence for outcome in response.outcomes)
    await stub.Recommend(pb.RecommendRequest(min_sequence=sequence))


async def test_new_items_get_their_share_and_the_rest_of_the_page_is_unchanged(stub: Stub) -> None:
    await bring(stub, *NEW)
    request = pb.RecommendRequest(session=session("garden-03"), page_size=20, filter=None)
    plain = await stub.Recommend(request)
    assert {item.propensity for item in plain.items} == {1.0}
    request.exploration = 0.2
    page = await stub.Recommend(request)
    explored_ids = explored_ids_of(page)
    assert [at for at, i in enumerate(ids(page), 1) if i in explored_ids] == [5, 10, 15, 20]
    assert set(explored_ids) <= set(NEW)
    for item in page.items:
        is_explored = item.item_id in explored_ids
        assert (0.2 / 12 <= item.propensity < 1) if is_explored else item.propensity == 1.0
        assert ("explore" in {s.source for s in item.sources}) >= is_explored
    rest = [i for i in ids(page) if i not in explored_ids]
    assert [i for i in ids(plain) if i in rest] == [i for i in rest if i in set(ids(plain))]
    # It keeps to all other rules.
    request.filter.CopyFrom(equals_filter("world", "garden"))
    assert not explored_ids_of(await stub.Recommend(request))
    request.ClearField("filter")
    request.exclude_item_ids.extend(NEW[:11])
    assert explored_ids_of(await stub.Recommend(request)) == [NEW[11]]
    request.exploration = 1.5
    assert await violations(stub.Recommend(request)) == ["exploration"]


async def test_pages_continue_one_list_and_every_new_item_is_explored(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both lists are drawn from the same counts: the impressions of the first are not counted yet.
    monkeypatch.setattr(exploration_counts, "_FOLLOW_INTERVAL", 3600.0)
    async with shop.serve(scenarios=scenario_file(tmp_path)) as stub:
        await bring(stub, *NEW)
        request = pb.RecommendRequest(exploration=0.5, page_size=30)
        long = await stub.Recommend(request)
        request.page_size, short = 7, []
        for _ in range(4):
            page = await stub.Recommend(request)
            short += [(i.item_id, i.propensity) for i in page.items]
            request.page_token = page.next_page_token
        assert short == [(i.item_id, i.propensity) for i in long.items][: len(short)]
        # Each has a chance: none is left out for ever.
        assert set(await explored_counts(stub, 60)) == set(NEW)


def scenario_file(tmp_path: Path, **more: object) -> Path:
    fields = ", ".join(f"{name} = {value}" for name, value in {"share": 0.5, **more}.items())
    file = tmp_path / "scenarios.toml"
    # Without the source "new_arrivals" nothing is shown on its merit before it is tried.
    file.write_text(
        f"[home]\nsources = ['co_occurrence', 'popular']\n"
        f"exploration = {{ {fields} }}\n[shut]\nallow_overrides = false\n"
    )
    return file


async def explored_counts(stub: Stub, pages: int) -> Counter[str]:
    counts = Counter[str]()
    for n in range(pages):
        counts.update(
            explored_ids_of(await stub.Recommend(pb.RecommendRequest(user_id=f"u{n}", page_size=10)))
        )
        await asyncio.sleep(0.01)
    return counts


@pytest.fixture
def immediate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploration_counts, "_FOLLOW_INTERVAL", 0.0)


async def explored_counts_one_by_one(stub: Stub, pages: int) -> Counter[str]:
    """How often pages explore each item, if each page is logged before the next request."""
    counts = Counter[str]()
    for _ in range(pages):
        counts += await explored_counts(stub, 1)
        await stub.DeleteUser(pb.DeleteUserRequest(user_id="nobody"))  # flushes the log before it looks
    return counts


@pytest.mark.usefixtures("immediate_counts")
@pytest.mark.parametrize("days", [30, 0])
async def test_an_item_is_explored_up_to_its_impression_limit(
    all_in_one: Shop, tmp_path: Path, days: int
) -> None:
    settings = {
        "scenarios": scenario_file(tmp_path, max_impressions=10),
        "fixed_time": None,
        "impression_log_days": days,
    }
    async with all_in_one.serve(**settings) as stub:
        await bring(stub, *NEW[:4], now=datetime.now(UTC))
        counts = await explored_counts_one_by_one(stub, 40)
        assert counts == dict.fromkeys(NEW[:4], 9)  # and once when they were brought
    async with all_in_one.serve(**settings) as stub:
        assert not await explored_counts(stub, 5)  # the counts outlive the process


@pytest.mark.usefixtures("immediate_counts")
async def test_old_items_are_not_explored_and_the_daily_limit_holds(all_in_one: Shop, tmp_path: Path) -> None:
    async with all_in_one.serve(scenarios=scenario_file(tmp_path)) as stub:
        await bring(stub, *NEW[:6], age=40)
        await bring(stub, *NEW[6:])
        assert set(await explored_counts(stub, 20)) == set(NEW[6:])
        assert await violations(stub.Recommend(pb.RecommendRequest(scenario="shut", exploration=0.0))) == [
            "exploration"
        ]
    async with all_in_one.serve(
        scenarios=scenario_file(tmp_path, max_slots_per_day=30), fixed_time=None
    ) as stub:
        await bring(stub, *NEW, now=datetime.now(UTC))
        await stub.DeleteUser(pb.DeleteUserRequest(user_id="nobody"))
        # The page after the items were brought had ten slots of the thirty, each of these has five.
        assert (await explored_counts_one_by_one(stub, 10)).total() == 20


async def test_max_interactions_limits_exploration_to_rarely_used_items(
    shop: Shop, bundle: Path, tmp_path: Path
) -> None:
    async with Shop(bundle, tmp_path / "state", "one", clock=NOW - timedelta(hours=2)).serve() as stub:
        await bring(stub, *NEW)
        purchases = [purchase(f"e{n}{i}", f"somebody{n}", i) for n in range(3) for i in NEW[6:]]
        await stub.WriteEvents(pb.WriteEventsRequest(events=purchases))
    async with shop.serve(scenarios=scenario_file(tmp_path, max_interactions=1.0)) as stub:
        assert set(await explored_counts(stub, 60)) == set(NEW[:6])


class Unshown:
    """Counts of a log in which nothing is."""

    def of(self, numbers: np.ndarray, upto: int) -> np.ndarray:
        return np.zeros(len(numbers), np.int64)

    def slots(self, scenario: str, day: int, upto: int) -> int:
        return 0


@given(st.integers(0, 2**64 - 1), st.integers(1, 60), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_half_of_the_candidates_are_the_nearest_and_half_are_random(seed: int, limit: int, near: int) -> None:
    items = [Item(id=f"i{n}") for n in range(200)]
    table = ItemTable.of(items, {}, {}, [UNTIL] * 200)
    now = item_stats(EventState({"purchase": 1.0}), table, 0)
    nearest = np.arange(50, 50 + near)
    candidates = exploration_candidates(
        ExplorationQuery("home", limit, seed, 0, 10, log_position=0),
        np.ones(200, bool),
        now,
        table,
        Unshown(),  # type: ignore[arg-type]
        0,
        lambda mask, most: nearest[:most],
    )
    assert len(candidates.item_hashes) == len(set(candidates.item_hashes.tolist())) == limit
    expected = table.item_hashes[nearest[: limit // 2]]
    assert set(expected.tolist()) <= set(candidates.item_hashes.tolist())


@pytest.mark.usefixtures("immediate_counts")
async def test_pages_of_a_response_agree_while_impressions_arrive(shop: Shop, tmp_path: Path) -> None:
    async with shop.serve(scenarios=scenario_file(tmp_path, max_impressions=12), fixed_time=None) as stub:
        await bring(stub, *NEW, now=datetime.now(UTC))
        for n in range(6):
            request = pb.RecommendRequest(user_id=f"a{n}", page_size=6)
            pages = [await stub.Recommend(request)]
            for _ in range(3):
                await explored_counts_one_by_one(stub, 2)
                request.page_token = pages[-1].next_page_token
                pages.append(await stub.Recommend(request))
            item_ids = [i for page in pages for i in ids(page)]
            assert len(item_ids) == len(set(item_ids)) == 24


async def test_exploration_candidates_alone_do_not_fill_a_page(all_in_one: Shop, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text('[similar]\nsources = ["co_occurrence"]\nexploration = { share = 0.1 }\n')
    async with all_in_one.serve(scenarios=file) as stub:
        await bring(stub, *NEW)
        page = await stub.SimilarItems(pb.SimilarItemsRequest(item_id="garden-03", page_size=40))
        new = [item for item in page.items if item.item_id in NEW]
        assert [item.item_id for item in new] == explored_ids_of(page)
        assert len(new) == len(page.items) // 10


async def test_anonymous_users_do_not_all_get_the_same_list(shop: Shop, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text("[home]\nanonymous_jitter = 0.5\n")
    async with shop.serve(scenarios=file) as stub:

        async def page_of(**who: Any) -> tuple[str, ...]:
            request = pb.RecommendRequest(page_size=5, **who)
            page = await stub.Recommend(request, timeout=60)  # a busy machine must not degrade a page
            assert not page.degraded
            return tuple(ids(page))

        pages = [await page_of(visitor_id=f"v{n}") for n in range(20)]
        assert len(set(pages)) > 15
        assert [await page_of(visitor_id=f"v{n}") for n in range(20)] == pages
        # Of whom something is known nothing is shuffled.
        visitor_pages = [await page_of(visitor_id=f"v{n}", session=session("garden-03")) for n in range(5)]
        assert len(set(visitor_pages)) == 1


async def test_an_explored_item_is_explained(all_in_one_stub: Stub) -> None:
    await bring(all_in_one_stub, *NEW)
    visit = session("garden-01", "garden-03")
    request = pb.RecommendRequest(session=visit, exploration=0.5, page_size=10)
    page = await all_in_one_stub.Recommend(request)
    item_id = explored_ids_of(page)[0]
    answer = await all_in_one_stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=item_id))
    assert answer.item_status == pb.ITEM_STATUS_SHOWN
    assert answer.position == ids(page).index(item_id) + 1
    plain = ids(await all_in_one_stub.Recommend(pb.RecommendRequest(session=visit, page_size=10)))
    lost = next(i for i in plain if i not in ids(page))
    answer = await all_in_one_stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=lost))
    assert answer.item_status == pb.ITEM_STATUS_RULE
    assert list(answer.rules) == ["exploration"]


def test_random_keys_do_not_depend_on_the_order_of_items() -> None:
    numbers = np.array([item_hash(i) for i in NEW], np.int64)
    shuffled = np.random.default_rng(0).permutation(numbers)
    lots = dict(zip(numbers.tolist(), random_keys(numbers, 5).tolist(), strict=True))
    assert lots == dict(zip(shuffled.tolist(), random_keys(shuffled, 5).tolist(), strict=True))
