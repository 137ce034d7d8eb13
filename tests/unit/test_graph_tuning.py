"""Graph tuning finds a planted order and ignores later days."""

from dataclasses import replace

import numpy as np
import pytest

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


def data_of(events: Events, nodes: np.ndarray = NODES) -> graph_tuning.TuningData:
    data = graph_tuning.tuning_data(events, SETTINGS, nodes, LEARNED_UNTIL * DAY)
    assert data is not None
    return data


def tuned(events: Events, nodes: np.ndarray = NODES) -> dict[str, graph_tuning.TunedGraph]:
    return graph_tuning.tune_graph(events, data_of(events, nodes), SETTINGS, nodes)


def linear(events: Events, nodes: np.ndarray, vectors: np.ndarray) -> graph_tuning.TunedLinear:
    data, others = data_of(events, nodes), tuned(events, nodes)
    return graph_tuning.tune_linear(events, data, SETTINGS, nodes, vectors, others)


def test_tuning_finds_a_planted_order() -> None:
    tuning = tuned(walks())
    assert set(tuning) == {"people"}  # no basket holds two items
    weights = tuning["people"]
    assert weights.ndcg > weights.ndcg_as_cosine + 0.05
    assert weights.weighting.back < 0.5


def test_later_events_change_nothing() -> None:
    events = walks()
    early = np.flatnonzero(events.time < LEARNED_UNTIL * DAY)
    permutation = np.concatenate([early, np.flatnonzero(events.time >= LEARNED_UNTIL * DAY)[::3]])
    whole, less = (tuned(shop) for shop in (events, events.take(permutation)))
    assert whole == less


def test_without_a_past_or_a_budget_cosine_remains_the_weighting() -> None:
    assert graph_tuning.tuning_data(walks(), SETTINGS, NODES, DAY) is None
    frugal = ShopConfig(graph=GraphTraining(trials=0))
    assert graph_tuning.tuning_data(walks(), frugal, NODES, LEARNED_UNTIL * DAY) is None


def families(numbers: np.ndarray, *, random: bool) -> Events:
    """Everybody takes an item a day: one of the ten of a family of their own, or any item.

    Always any item if `random`. Five people share a family, and begin four days before the learned days end.
    """
    count, generator, events = len(numbers), np.random.default_rng(0), walks(users=len(numbers) // 2)
    of_family = 10 * (events.user // 5) + generator.integers(10, size=len(events.user))
    anything = generator.integers(count, size=len(events.user))
    items = np.where(generator.random(len(events.user)) < (1.0 if random else 0.1), anything, of_family)
    ids = [f"i{n}" for n in range(count)]
    every = replace(events, item=items.astype(np.int32), item_ids=ids, number=numbers[items])
    return every.take(np.flatnonzero(every.time >= (LEARNED_UNTIL - 4) * DAY))


@pytest.mark.parametrize("random", [False, True])
def test_a_linear_autoencoder_is_kept_only_where_it_improves_the_order(random: bool) -> None:
    numbers = np.array([item_hash(f"i{n}") for n in range(600)], np.int64)
    events, nodes = families(numbers, random=random), np.sort(numbers)
    vectors = np.zeros((len(numbers), 60), np.float32)
    vectors[np.searchsorted(nodes, numbers), np.arange(len(numbers)) // 10] = 1  # of one family
    result = linear(events, nodes, vectors)
    assert result.improves == (not random)
    assert (result.settings.content > 0) or random
    early = events.take(np.flatnonzero(events.time < LEARNED_UNTIL * DAY))
    assert linear(early, nodes, vectors) == result
