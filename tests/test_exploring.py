"""What is new is tried in its share of the slots, within its bounds, with probabilities that hold."""

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

from services.catalog import Item, item_number
from services.gateway.trial import trial
from services.item_table import ItemTable
from services.ranking import showings
from services.ranking.exploring import Explore, _lots, explorable
from services.ranking.moment import moment
from services.ranking.state import BehaviourState
from services.wire import time_to
from tests.recommending import NOW, Shop, ids, only, purchase, session, violations
from tests.shops import UNTIL

NEW = [f"new-{n:02}" for n in range(12)]


flags = st.lists(st.booleans(), min_size=1, max_size=12).filter(any)


@given(flags, st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_chances_are_a_distribution_over_what_is_possible(possible: list[bool], seed: int) -> None:
    mask, count = np.array(possible), len(possible)
    zero = np.zeros(count)
    made = trial(np.arange(count), zero > 0, zero, zero, np.full(count, 0.3), seed=seed, depth=4)
    chances = made.chances(mask)
    assert chances.sum() == pytest.approx(1)
    assert (chances[~mask] == 0).all()
    assert (chances[mask] >= 0.2 / mask.sum() - 1e-12).all()
    drawn = made.draw(0, mask)
    assert drawn is not None
    assert mask[drawn.drawn]
    assert drawn.propensity == chances[drawn.drawn]
    assert made.draw(0, np.zeros(count, bool)) is None


def test_what_a_page_led_to_is_weighed_without_bias_and_what_did_well_is_drawn_more() -> None:
    showings, led = np.array([90.0, 90, 0, 30]), np.array([30.0, 2, 0, 1])
    worth, zero = np.array([3.0, 1.0, 2.0, 5.0]), np.zeros(4)
    weighed, drawn = [], Counter[int]()
    for seed in range(4000):
        made = trial(np.arange(4), zero > 0, showings, led, zero + 0.1, seed=seed, depth=1)
        found = made.draw(0, np.ones(4, bool))
        assert found is not None
        weighed.append(worth[found.drawn] / found.propensity)
        drawn[found.drawn] += 1
    # The sum of all worths, as if each had been shown (Horvitz and Thompson).
    error = np.std(weighed) / np.sqrt(len(weighed))
    assert abs(np.mean(weighed) - worth.sum()) < 4 * error < 2
    assert drawn[0] > drawn[2] > drawn[1]
    assert min(drawn.values()) > 4000 * 0.2 / 4 * 0.8


def test_a_draw_of_many_is_fair() -> None:
    numbers = np.arange(1, 41, dtype=np.int64) * 7919
    first = Counter(int(np.argsort(_lots(numbers, seed))[0]) for seed in range(4000))
    expected = 4000 / 40
    chi = sum((first[n] - expected) ** 2 / expected for n in range(40))
    assert chi < 80  # of 39 degrees of freedom: once in ten thousand


def explored(page: Any) -> list[str]:
    return [item.item_id for item in page.items if "exploration" in item.rules]


async def bring(stub: Any, *item_ids: str, age: int = 1, now: datetime = NOW) -> None:
    since = time_to(now - timedelta(days=age))
    items = [item_pb2.Item(id=i, title=f"novelty {i}", available_from=since, family_id=i) for i in item_ids]
    written = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
    sequence = max(outcome.sequence for outcome in written.outcomes)
    await stub.Recommend(pb.RecommendRequest(min_sequence=sequence))


def test_new_items_have_their_share_and_the_rest_of_the_page_is_as_it_was(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        await bring(stub, *NEW)
        asked = pb.RecommendRequest(session=session("garden-03"), page_size=20, filter=None)
        plain = await stub.Recommend(asked)
        assert {item.propensity for item in plain.items} == {1.0}
        asked.exploration = 0.2
        page = await stub.Recommend(asked)
        tried = explored(page)
        assert [at for at, i in enumerate(ids(page), 1) if i in tried] == [5, 10, 15, 20]
        assert set(tried) <= set(NEW)
        for item in page.items:
            drawn = item.item_id in tried
            assert (0.2 / 12 <= item.propensity < 1) if drawn else item.propensity == 1.0
            assert ("explore" in {s.source for s in item.sources}) >= drawn
        rest = [i for i in ids(page) if i not in tried]
        assert [i for i in ids(plain) if i in rest] == [i for i in rest if i in set(ids(plain))]
        # It keeps to all other rules.
        asked.filter.CopyFrom(only("world", "garden"))
        assert not explored(await stub.Recommend(asked))
        asked.ClearField("filter")
        asked.exclude_item_ids.extend(NEW[:11])
        assert explored(await stub.Recommend(asked)) == [NEW[11]]
        asked.exploration = 1.5
        assert await violations(stub.Recommend(asked)) == ["exploration"]

    shop.run(body)


def test_pages_are_one_long_page_and_everybody_is_tried(shop: Shop, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        await bring(stub, *NEW)
        asked = pb.RecommendRequest(exploration=0.5, page_size=30)
        long = await stub.Recommend(asked)
        asked.page_size, short = 7, []
        for _ in range(4):
            page = await stub.Recommend(asked)
            short += [(i.item_id, i.propensity) for i in page.items]
            asked.page_token = page.next_page_token
        assert short == [(i.item_id, i.propensity) for i in long.items][: len(short)]
        # Each has a chance: none is left out for ever.
        assert set(await tried_on(stub, 60)) == set(NEW)

    shop.run(body, scenarios=scenario_file(tmp_path))


def scenario_file(tmp_path: Path, **more: object) -> Path:
    stated = ", ".join(f"{name} = {value}" for name, value in {"share": 0.5, **more}.items())
    file = tmp_path / "scenarios.toml"
    # Without the source "new" nothing is shown on its merit before it is tried.
    file.write_text(
        f"[home]\nsources = ['graph', 'popular']\nexploration = {{ {stated} }}\n[shut]\nlocked = true\n"
    )
    return file


async def tried_on(stub: Any, pages: int) -> Counter[str]:
    counts = Counter[str]()
    for n in range(pages):
        counts.update(explored(await stub.Recommend(pb.RecommendRequest(user_id=f"u{n}", page_size=10))))
        await asyncio.sleep(0.01)
    return counts


@pytest.fixture
def counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showings, "_FOLLOW_EVERY", 0.0)


async def tried_one_by_one(stub: Any, pages: int) -> Counter[str]:
    """What is tried on pages of which each is logged before the next is asked for."""
    counts = Counter[str]()
    for _ in range(pages):
        counts += await tried_on(stub, 1)
        await stub.DeleteUser(pb.DeleteUserRequest(user_id="nobody"))  # flushes the log before it looks
    return counts


@pytest.mark.usefixtures("counted_at_once")
@pytest.mark.parametrize("days", [30, 0])
def test_an_item_is_tried_so_often_and_no_more(one: Shop, tmp_path: Path, days: int) -> None:
    async def body(stub: Any) -> None:
        await bring(stub, *NEW[:4], now=datetime.now(UTC))
        counts = await tried_one_by_one(stub, 40)
        assert counts == dict.fromkeys(NEW[:4], 9)  # and once when they were brought

    settings = {"scenarios": scenario_file(tmp_path, showings=10), "clock": None, "served_days": days}
    one.run(body, **settings)
    one.run(nothing, **settings)


async def nothing(stub: Any) -> None:
    assert not await tried_on(stub, 5)  # what was counted outlives the process


@pytest.mark.usefixtures("counted_at_once")
def test_old_items_are_not_tried_and_a_day_has_its_bound(one: Shop, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        await bring(stub, *NEW[:6], age=40)
        await bring(stub, *NEW[6:])
        assert set(await tried_on(stub, 20)) == set(NEW[6:])
        assert await violations(stub.Recommend(pb.RecommendRequest(scenario="shut", exploration=0.0))) == [
            "exploration"
        ]

    one.run(body, scenarios=scenario_file(tmp_path))

    async def bounded(stub: Any) -> None:
        await bring(stub, *NEW, now=datetime.now(UTC))
        await stub.DeleteUser(pb.DeleteUserRequest(user_id="nobody"))
        # The page after the items were brought had ten slots of the thirty, each of these has five.
        assert (await tried_one_by_one(stub, 10)).total() == 20

    one.run(bounded, scenarios=scenario_file(tmp_path, per_day=30), clock=None)


def test_only_what_people_hardly_know_where_that_is_asked(shop: Shop, bundle: Path, tmp_path: Path) -> None:
    async def earlier(stub: Any) -> None:
        await bring(stub, *NEW)
        bought = [purchase(f"e{n}{i}", f"somebody{n}", i) for n in range(3) for i in NEW[6:]]
        await stub.WriteEvents(pb.WriteEventsRequest(events=bought))

    async def later(stub: Any) -> None:
        assert set(await tried_on(stub, 60)) == set(NEW[:6])

    Shop(bundle, tmp_path / "state", "one", clock=NOW - timedelta(hours=2)).run(earlier)
    shop.run(later, scenarios=scenario_file(tmp_path, max_engagements=1.0))


class Unshown:
    """Counts of a log in which nothing is."""

    def follow(self, at_least: int = 0) -> int:
        return at_least

    def of(self, numbers: np.ndarray, upto: int) -> np.ndarray:
        return np.zeros(len(numbers), np.int64)

    def slots(self, scenario: str, day: int, upto: int) -> int:
        return 0


@given(st.integers(0, 2**64 - 1), st.integers(1, 60), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_of_many_half_are_the_nearest_and_the_rest_a_draw(seed: int, limit: int, near: int) -> None:
    items = [Item(id=f"i{n}") for n in range(200)]
    table = ItemTable.of(items, {}, {}, [UNTIL] * 200)
    now = moment(BehaviourState({"purchase": 1.0}), table, 0)
    nearest = np.arange(50, 50 + near)
    found = explorable(
        Explore("home", limit, seed, 0, 10),
        np.ones(200, bool),
        now,
        table,
        Unshown(),  # type: ignore[arg-type]
        0,
        lambda mask, most: nearest[:most],
    )
    assert len(found.numbers) == len(set(found.numbers.tolist())) == limit
    wanted = table.item_numbers[nearest[: limit // 2]]
    assert set(wanted.tolist()) <= set(found.numbers.tolist())


@pytest.mark.usefixtures("counted_at_once")
def test_pages_of_an_answer_agree_whatever_is_shown_meanwhile(shop: Shop, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        await bring(stub, *NEW, now=datetime.now(UTC))
        for n in range(6):
            asked = pb.RecommendRequest(user_id=f"a{n}", page_size=6)
            pages = [await stub.Recommend(asked)]
            for _ in range(3):
                await tried_one_by_one(stub, 2)
                asked.page_token = pages[-1].next_page_token
                pages.append(await stub.Recommend(asked))
            shown = [i for page in pages for i in ids(page)]
            assert len(shown) == len(set(shown)) == 24

    shop.run(body, scenarios=scenario_file(tmp_path, showings=12), clock=None)


def test_what_is_only_tried_fills_no_page_of_its_own(one: Shop, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text('[similar]\nsources = ["graph"]\nexploration = { share = 0.1 }\n')

    async def body(stub: Any) -> None:
        await bring(stub, *NEW)
        page = await stub.SimilarItems(pb.SimilarItemsRequest(item_id="garden-03", page_size=40))
        new = [item for item in page.items if item.item_id in NEW]
        assert [item.item_id for item in new] == explored(page)
        assert len(new) == len(page.items) // 10

    one.run(body, scenarios=file)


def test_strangers_do_not_all_see_one_list(shop: Shop, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text("[home]\nvariety = 0.5\n")

    async def body(stub: Any) -> None:
        async def seen(**who: Any) -> tuple[str, ...]:
            return tuple(ids(await stub.Recommend(pb.RecommendRequest(page_size=5, **who))))

        pages = [await seen(visitor_id=f"v{n}") for n in range(20)]
        assert len(set(pages)) > 15
        assert [await seen(visitor_id=f"v{n}") for n in range(20)] == pages
        # Of whom something is known nothing is shuffled.
        known = [await seen(visitor_id=f"v{n}", session=session("garden-03")) for n in range(5)]
        assert len(set(known)) == 1

    shop.run(body, scenarios=file)


def test_what_is_tried_is_explained(one: Shop) -> None:
    async def body(stub: Any) -> None:
        await bring(stub, *NEW)
        visit = session("garden-01", "garden-03")
        asked = pb.RecommendRequest(session=visit, exploration=0.5, page_size=10)
        page = await stub.Recommend(asked)
        tried = explored(page)[0]
        answer = await stub.ExplainItem(pb.ExplainItemRequest(request=asked, item_id=tried))
        assert answer.standing == pb.STANDING_SHOWN
        assert answer.place == ids(page).index(tried) + 1
        plain = ids(await stub.Recommend(pb.RecommendRequest(session=visit, page_size=10)))
        lost = next(i for i in plain if i not in ids(page))
        answer = await stub.ExplainItem(pb.ExplainItemRequest(request=asked, item_id=lost))
        assert answer.standing == pb.STANDING_RULE
        assert list(answer.rules) == ["exploration"]

    one.run(body)


def test_numbers_of_items_are_lots_by_themselves() -> None:
    numbers = np.array([item_number(i) for i in NEW], np.int64)
    shuffled = np.random.default_rng(0).permutation(numbers)
    lots = dict(zip(numbers.tolist(), _lots(numbers, 5).tolist(), strict=True))
    assert lots == dict(zip(shuffled.tolist(), _lots(shuffled, 5).tolist(), strict=True))
