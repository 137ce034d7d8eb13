"""Windows hold enough baskets, whatever the pace of a shop, and features of a part come from before it."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.histories import Interaction, make_shop
from training.data.config import RankingTraining, ShopConfig, Split
from training.data.events import Events
from training.examples import windows as windows_module
from training.examples.queries import DAY, make_eval_queries
from training.examples.windows import Windows, choose_windows

SETTINGS = ShopConfig(event_types={"purchase": 1.0, "view": 0.1, "impression": 0.0})
FIRST = 10_000


def shop_of(days: list[int], baskets_a_day: int = 1, settings: ShopConfig = SETTINGS) -> Events:
    """On each of these days so many new users buy two items each."""
    interactions = [
        Interaction(f"u{day * 1000 + user}", f"i{item}", "purchase", (FIRST + day) * DAY + user)
        for day in days
        for user in range(baskets_a_day)
        for item in range(2)
    ]
    return make_shop([], interactions, settings).events


def window(days: list[int], baskets_a_day: int = 1, settings: ShopConfig = SETTINGS) -> Windows:
    return choose_windows(shop_of(days, baskets_a_day, settings), settings)


def test_a_fast_shop_needs_two_days() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "ENOUGH", 40)
        patch.setattr(windows_module, "ENOUGH_TO_EVALUATE", 10)
        windows = window(list(range(20)), 50)
    assert windows.days == 2
    assert (windows.end - windows.evaluated_from) // DAY == 1
    assert (windows.baskets, windows.evaluated, windows.earlier) == (100, 50, 900)


def test_a_slow_shop_looks_back_over_most_of_its_baskets() -> None:
    windows = window(list(range(0, 8000, 40)))  # 200 baskets in 22 years
    assert (windows.baskets, windows.evaluated, windows.earlier) == (150, 38, 50)
    assert windows.days == 149 * 40 + 1
    assert len(windows.parts) == 10
    assert windows.parts[0] == windows.since


def test_at_most_half_of_many_baskets_are_in_the_window() -> None:
    windows = window(list(range(0, 4000, 40)), 20)
    assert (windows.baskets, windows.earlier) == (1000, 1000)


def test_gaps_without_a_basket_cost_nothing() -> None:
    windows = window([*range(5), *range(4000, 4005), *range(8000, 8005)])
    assert len(windows.parts) <= windows.baskets


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=60, unique=True), st.integers(1, 30))
def test_the_counts_are_those_of_the_queries(days: list[int], baskets_a_day: int) -> None:
    events, weights = shop_of(days, baskets_a_day), dict(SETTINGS.event_types)
    windows = choose_windows(events, SETTINGS)
    every = make_eval_queries(events, weights, SETTINGS.targets, 0)
    times = np.array([query.as_of for query in every])
    assert windows.baskets == np.count_nonzero(times >= windows.since)
    assert windows.evaluated == np.count_nonzero(times >= windows.evaluated_from)
    assert windows.earlier == np.count_nonzero(times < windows.since)
    assert windows.since <= windows.evaluated_from < windows.end
    assert windows.tuned_from <= windows.since
    assert windows.parts[0] == windows.since
    assert (np.diff(windows.parts) > 0).all()
    assert len(windows.parts) <= 10
    assert not (windows.parts % DAY).any()


def test_settings_fix_the_number_of_days() -> None:
    settings = ShopConfig(ranking=RankingTraining(ranking_days=7), split=Split(test_days=3))
    windows = window(list(range(40)), 10, settings)
    assert windows.days == 7
    assert (windows.end - windows.evaluated_from) // DAY == 3
    assert windows.parts.tolist() == [(FIRST + 33 + day) * DAY for day in range(7)]


def test_a_shop_that_logs_pages_looks_back_over_pages() -> None:
    """Twenty pages a day, and one purchase every tenth day."""
    shown = [
        Interaction(f"u{page}", f"i{n}", "impression", (FIRST + day) * DAY + page * 1000)
        for day in range(40)
        for page in range(20)
        for n in range(3)
    ]
    bought = [
        Interaction("u1", f"i{n}", "purchase", (FIRST + day) * DAY)
        for day in range(0, 40, 10)
        for n in range(2)
    ]
    events = make_shop([], [*shown, *bought], SETTINGS).events
    events = replace(events, session=events.user, session_ids=events.user_ids)
    assert choose_windows(events, SETTINGS).days == 20


@pytest.mark.parametrize(("kind", "baskets"), [("view", 37), ("impression", 0)])
def test_views_teach_and_do_not_evaluate_and_impressions_do_neither(kind: str, baskets: int) -> None:
    interactions = [Interaction("u0", f"i{n}", kind, (FIRST + n) * DAY) for n in range(50)]
    windows = choose_windows(make_shop([], interactions, SETTINGS).events, SETTINGS)
    assert (windows.baskets, windows.evaluated) == (baskets, 0)


@pytest.mark.parametrize("days", [[0] * 900 + [1] * 50, [0] * 100 + [10] * 800 + [11] * 60 + [12] * 40])
def test_a_peak_day_leaves_baskets_to_learn_from_and_to_evaluate(days: list[int]) -> None:
    interactions = [
        Interaction(f"u{user}", f"i{n}", "purchase", (FIRST + day) * DAY + user)
        for user, day in enumerate(days)
        for n in range(2)
    ]
    windows = choose_windows(make_shop([], interactions, SETTINGS).events, SETTINGS)
    assert 0 < windows.evaluated < windows.baskets


def test_a_shop_without_events_has_empty_windows() -> None:
    windows = choose_windows(Events.none(), SETTINGS)
    assert (windows.days, windows.baskets) == (0, 0)


def test_the_choice_is_a_sentence() -> None:
    text = str(window([0, 1, 2, 3], 8))
    since = datetime.fromtimestamp((FIRST + 1) * 86_400, UTC).date()
    assert text == (
        f"rankers learn from the last 3 days, from {since}, with 24 baskets; the last 1 day of them, with "
        "8 baskets, evaluate them; 8 baskets came before"
    )
