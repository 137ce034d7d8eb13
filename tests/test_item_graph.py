"""The item graph against counting by hand."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog import Item, item_number
from services.item_table import Change, ItemTable
from services.ranking.graph import GraphView, ItemGraph
from training.item_graph import fit_item_graph

EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 7)), max_size=60)


def counted(graph: ItemGraph, relation: str) -> dict[tuple[int, int], float]:
    edges = graph.relations[relation]
    return {
        (int(graph.numbers[node]), int(graph.numbers[near])): float(count)
        for node in range(len(graph.numbers))
        for near, count in zip(
            edges.neighbours[edges.start[node] : edges.start[node + 1]],
            edges.counts[edges.start[node] : edges.start[node + 1]],
            strict=True,
        )
    }


def by_hand(groups: dict[int, set[int]]) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for items in groups.values():
        for a, b in combinations(sorted(items), 2):
            found[a, b] += 1
            found[b, a] += 1
    return found


@given(EVENTS)
@settings(deadline=None)
def test_relations_count_what_happened_together(events: list[tuple[int, int, int]]) -> None:
    users = np.array([u for u, _, _ in events], np.int64)
    baskets = np.array([u * 3 + d for u, d, _ in events], np.int64)
    numbers = np.array([i for _, _, i in events], np.int64)
    graph = fit_item_graph(users, baskets, numbers)
    of_basket: dict[int, set[int]] = {}
    of_user: dict[int, set[int]] = {}
    for user, day, item in events:
        of_basket.setdefault(user * 3 + day, set()).add(item)
        of_user.setdefault(user, set()).add(item)
    together = by_hand(of_basket)
    assert counted(graph, "baskets") == together
    apart = Counter({pair: n - together[pair] for pair, n in by_hand(of_user).items()})
    assert counted(graph, "people") == {pair: n for pair, n in apart.items() if n > 0}
    degree = graph.relations["baskets"].degree
    assert degree.tolist() == [sum(int(n) in s for s in of_basket.values()) for n in graph.numbers]


def test_a_graph_is_read_as_written_and_seen_from_a_growing_table(tmp_path: Path) -> None:
    ids = ["a", "b", "c"]
    numbers = np.array([item_number(i) for i in ids])
    graph = fit_item_graph(np.array([0, 0, 1]), np.array([0, 0, 1]), numbers)
    graph.save(tmp_path)
    table = ItemTable()
    view = GraphView(ItemGraph.load(tmp_path), table)
    table.apply([Change(item_number("c"), 1, Item("c"))])
    assert view.to_rows(view.spread("baskets", np.array([0]), np.ones(1, np.float32))).tolist() == [0]
    table.apply(Change(item_number(i), 2, Item(i)) for i in ("new", "b", "a"))
    scores = view.to_rows(view.spread("baskets", table.rows([item_number("a")]), np.ones(1, np.float32)))
    assert scores.tolist() == [0, 0, 1, 0]
    np.testing.assert_array_equal(ItemGraph.load(tmp_path).numbers, graph.numbers)
