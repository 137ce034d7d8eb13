"""Graph tuning finds a planted order and ignores later days."""

import numpy as np

from services.catalog.items import item_hash
from training.data.config import GraphTraining, ShopConfig
from training.data.dataset import Events
from training.examples.queries import DAY
from training.retrieval import graph_tuning

ITEMS, DAYS, LEARNED_UNTIL = 30, 12, 10
SETTINGS = ShopConfig(graph=GraphTraining(trials=12))
NUMBERS = np.array([item_hash(f"i{n}") for n in range(ITEMS)], np.int64)
NODES = np.sort(NUMBERS)


def walks(users: int = 80, seed: int = 0) -> Events:
    """Everybody takes an item a day: mostly the next one around a circle, sometimes any other."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        item = int(generator.integers(ITEMS))
        for day in range(DAYS):
            rows.append((user, item, day))
            strays = generator.random() < 0.2
            item = int(generator.integers(ITEMS)) if strays else (item + 1) % ITEMS
    user, item, day = np.array(sorted(rows, key=lambda r: r[2]), np.int64).T
    count = len(rows)
    return Events(
        event_ids=np.array([str(n) for n in range(count)], object),
        user=user.astype(np.int32),
        user_ids=[f"u{n}" for n in range(users)],
        item=item.astype(np.int32),
        item_ids=[f"i{n}" for n in range(ITEMS)],
        number=NUMBERS[item],
        kind=np.zeros(count, np.int16),
        time=day * DAY,
        price=np.full(count, np.nan),
        position=np.zeros(count, np.int32),
        session=np.full(count, -1, np.int32),
        session_ids=[],
        channel=np.full(count, -1, np.int32),
        channel_names=[],
    )


def test_tuning_finds_a_planted_order() -> None:
    tuning = graph_tuning.tune_graph(walks(), SETTINGS, NODES, (LEARNED_UNTIL - 1) * DAY, LEARNED_UNTIL * DAY)
    assert set(tuning) == {"people"}  # no basket holds two items
    weights = tuning["people"]
    assert weights.ndcg > weights.ndcg_as_cosine + 0.05
    assert weights.weighting.back < 0.5


def test_later_events_change_nothing() -> None:
    events = walks()
    early = np.flatnonzero(events.time < LEARNED_UNTIL * DAY)
    permutation = np.concatenate([early, np.flatnonzero(events.time >= LEARNED_UNTIL * DAY)[::3]])
    whole, less = (
        graph_tuning.tune_graph(shop, SETTINGS, NODES, (LEARNED_UNTIL - 1) * DAY, LEARNED_UNTIL * DAY)
        for shop in (events, events.take(permutation))
    )
    assert whole == less


def test_without_a_past_or_a_budget_cosine_remains_the_weighting() -> None:
    assert graph_tuning.tune_graph(walks(), SETTINGS, NODES, 0, DAY) == {}
    frugal = ShopConfig(graph=GraphTraining(trials=0))
    assert (
        graph_tuning.tune_graph(walks(), frugal, NODES, (LEARNED_UNTIL - 1) * DAY, LEARNED_UNTIL * DAY) == {}
    )
