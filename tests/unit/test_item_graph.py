"""The item graph equals a count by hand."""

from collections import Counter, defaultdict
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Item, item_hash
from services.ranking.models.co_occurrence import GraphView, ItemGraph
from training.retrieval.item_graph import Baskets, Weighting, fit_item_graph

EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 7)), max_size=60)
SHARE = st.sampled_from([0.0, 0.3, 0.7, 1.0])

Events = list[tuple[int, int, int]]
Weights = dict[tuple[int, int], float]


def columns(events: Events) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    users = np.array([u for u, _, _ in events], np.int64)
    days = np.array([d for _, d, _ in events], np.int64)
    return users, users * 3 + days, days, np.array([i for _, _, i in events], np.int64)


def edges(graph: ItemGraph, relation: str) -> Weights:
    relation_edges = graph.relations[relation]
    return {
        (int(graph.item_hashes[node]), int(graph.item_hashes[near])): float(weight)
        for node in range(len(graph.item_hashes))
        for near, weight in zip(
            relation_edges.neighbors[relation_edges.start[node] : relation_edges.start[node + 1]],
            relation_edges.weights[relation_edges.start[node] : relation_edges.start[node + 1]],
            strict=True,
        )
    }


def baskets_of(events: Events) -> dict[int, list[set[int]]]:
    """Each person's baskets in the order of days."""
    by_day: dict[tuple[int, int], set[int]] = defaultdict(set)
    for user, day, item in events:
        by_day[user, day].add(item)
    baskets: dict[int, list[set[int]]] = defaultdict(list)
    for (user, _), items in sorted(by_day.items()):
        baskets[user].append(items)
    return baskets


def count_relation(events: Events, relation: str, how: Weighting) -> Weights:
    """The definition, one pair of items at a time."""
    total: defaultdict[tuple[int, int], float] = defaultdict(float)
    for baskets in baskets_of(events).values():
        if relation == "baskets":
            for items in baskets:
                for a, b in product(items, items):
                    total[a, b] += len(items) ** -how.group
        else:
            for (x, earlier), (y, later) in combinations(enumerate(baskets), 2):
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
def test_relations_match_their_definition(events: Events, how: Weighting) -> None:
    graph = fit_item_graph(*columns(events), {"baskets": how, "people": how})
    degree = Counter(item for baskets in baskets_of(events).values() for items in baskets for item in items)
    for relation in ("baskets", "people"):
        counts = count_relation(events, relation, how)
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
def test_each_item_keeps_its_heaviest_edges(events: Events, most: int) -> None:
    whole = edges(fit_item_graph(*columns(events)), "people")
    heaviest = edges(fit_item_graph(*columns(events), max_edges=most), "people")
    for item in {a for a, _ in whole}:
        weights = sorted((w for (a, _), w in whole.items() if a == item), reverse=True)
        assert sorted((w for (a, _), w in heaviest.items() if a == item), reverse=True) == weights[:most]


def test_a_row_does_not_depend_on_unconnected_users() -> None:
    groups = Baskets.of(*columns([(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 3)]), 4)
    assert groups.counts("people", Weighting()).toarray()[2, 3] == 0


def test_a_graph_reads_back_and_follows_a_growing_table(tmp_path: Path) -> None:
    ids = ["a", "b", "c"]
    numbers = np.array([item_hash(i) for i in ids])
    graph = fit_item_graph(np.array([0, 0, 1]), np.array([0, 0, 1]), np.zeros(3, int), numbers)
    graph.save(tmp_path)
    table = ItemTable()
    view = GraphView(ItemGraph.load(tmp_path), table)
    table.apply([Change(item_hash("c"), 1, Item("c"))])

    def neighbors(item_id: str) -> list[int]:
        nodes, _, _ = view.edges("baskets", table.rows([item_hash(item_id)]), np.ones(1, np.float32))
        return [int(row) for row in np.sort(view.rows(nodes))]

    assert neighbors("c") == []
    assert view.rows(np.arange(3)).tolist() == [0 if i == "c" else -1 for i in sorted(ids, key=item_hash)]
    table.apply(Change(item_hash(i), 2, Item(i)) for i in ("new", "b", "a"))
    assert neighbors("a") == [2]
    np.testing.assert_array_equal(ItemGraph.load(tmp_path).item_hashes, graph.item_hashes)
