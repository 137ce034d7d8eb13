"""The item graph against counting by hand."""

from collections import Counter, defaultdict
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog import Item, item_number
from services.item_table import Change, ItemTable
from services.ranking.graph import GraphView, ItemGraph
from training.item_graph import Groups, Weighting, fit_item_graph

EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 7)), max_size=60)
SHARE = st.sampled_from([0.0, 0.3, 0.7, 1.0])

Events = list[tuple[int, int, int]]
Weights = dict[tuple[int, int], float]


def columns(events: Events) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    users = np.array([u for u, _, _ in events], np.int64)
    days = np.array([d for _, d, _ in events], np.int64)
    return users, users * 3 + days, days, np.array([i for _, _, i in events], np.int64)


def edges(graph: ItemGraph, relation: str) -> Weights:
    found = graph.relations[relation]
    return {
        (int(graph.numbers[node]), int(graph.numbers[near])): float(weight)
        for node in range(len(graph.numbers))
        for near, weight in zip(
            found.neighbours[found.start[node] : found.start[node + 1]],
            found.weights[found.start[node] : found.start[node + 1]],
            strict=True,
        )
    }


def baskets_of(events: Events) -> dict[int, list[set[int]]]:
    """Each person's baskets in the order of days."""
    by_day: dict[tuple[int, int], set[int]] = defaultdict(set)
    for user, day, item in events:
        by_day[user, day].add(item)
    found: dict[int, list[set[int]]] = defaultdict(list)
    for (user, _), items in sorted(by_day.items()):
        found[user].append(items)
    return found


def counted(events: Events, relation: str, how: Weighting) -> Weights:
    """The definition, one pair of items at a time."""
    total: defaultdict[tuple[int, int], float] = defaultdict(float)
    for mine in baskets_of(events).values():
        if relation == "baskets":
            for items in mine:
                for a, b in product(items, items):
                    total[a, b] += len(items) ** -how.group
        else:
            for (x, earlier), (y, later) in combinations(enumerate(mine), 2):
                worth = how.decay ** (y - x - 1) * len(later) ** -how.group
                for a, b in product(earlier, later):
                    total[a, b] += worth
                    total[b, a] += how.back * worth
    return {pair: n for pair, n in total.items() if pair[0] != pair[1] and n > 0}


@given(
    EVENTS,
    st.builds(Weighting, source=SHARE, target=SHARE, shrink=SHARE, group=SHARE, decay=SHARE, back=SHARE),
)
@settings(deadline=None)
def test_relations_are_what_their_definition_says(events: Events, how: Weighting) -> None:
    graph = fit_item_graph(*columns(events), {"baskets": how, "people": how})
    degree = Counter(item for mine in baskets_of(events).values() for items in mine for item in items)
    for relation in ("baskets", "people"):
        counts = counted(events, relation, how)
        weight = {
            (a, b): n / (degree[a] ** how.source * degree[b] ** how.target + how.shrink)
            for (a, b), n in counts.items()
        }
        cosine = [n / (degree[a] * degree[b]) ** 0.5 for (a, b), n in counts.items()]
        scale = np.mean(cosine) / np.mean(list(weight.values())) if counts else 1.0
        assert edges(graph, relation) == pytest.approx(
            {pair: scale * n for pair, n in weight.items()}, rel=1e-4, abs=1e-6
        )


@given(EVENTS, st.integers(1, 4))
@settings(deadline=None)
def test_of_each_item_the_heaviest_edges_stay(events: Events, most: int) -> None:
    whole = edges(fit_item_graph(*columns(events)), "people")
    kept = edges(fit_item_graph(*columns(events), neighbours=most), "people")
    for item in {a for a, _ in whole}:
        mine = sorted((w for (a, _), w in whole.items() if a == item), reverse=True)
        assert sorted((w for (a, _), w in kept.items() if a == item), reverse=True) == mine[:most]


def test_a_row_has_nothing_to_do_with_people_far_away() -> None:
    groups = Groups.of(*columns([(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 3)]), 4)
    assert groups.counts("people", Weighting()).toarray()[2, 3] == 0


def test_a_graph_is_read_as_written_and_seen_from_a_growing_table(tmp_path: Path) -> None:
    ids = ["a", "b", "c"]
    numbers = np.array([item_number(i) for i in ids])
    graph = fit_item_graph(np.array([0, 0, 1]), np.array([0, 0, 1]), np.zeros(3, int), numbers)
    graph.save(tmp_path)
    table = ItemTable()
    view = GraphView(ItemGraph.load(tmp_path), table)
    table.apply([Change(item_number("c"), 1, Item("c"))])
    assert view.to_rows(view.spread("baskets", np.array([0]), np.ones(1, np.float32))).tolist() == [0]
    table.apply(Change(item_number(i), 2, Item(i)) for i in ("new", "b", "a"))
    scores = view.to_rows(view.spread("baskets", table.rows([item_number("a")]), np.ones(1, np.float32)))
    assert scores.tolist() == [0, 0, 1, 0]
    np.testing.assert_array_equal(ItemGraph.load(tmp_path).numbers, graph.numbers)
