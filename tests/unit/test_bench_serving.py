"""The arithmetic of the load tests: schedules, percentiles, intervals, and drawn shops."""

import math
from datetime import datetime

import numpy as np
import pytest

from bench.serving import drawn_events
from bench.serving.arrivals import Calls, arrivals, percentiles, summarize
from bench.serving.drawn_catalog import ATTRIBUTES, SPACES, DrawnItems, draw_vectors
from bench.serving.regression import compare, interval
from bench.serving.resampled import ResampledItems, jittered, resampled_graph
from bench.serving.servers import stage_seconds
from services.catalog.items import Item, item_hash, validate
from services.ranking.models.co_occurrence import ItemGraph, Relation


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert arrivals(4, 1.5, poisson=False).tolist() == [0, 0.25, 0.5, 0.75, 1.0, 1.25]


def test_poisson_arrivals_have_the_rate_and_the_variance_of_a_poisson_process() -> None:
    due = arrivals(50, 400, seed=1)
    assert np.all(np.diff(due) > 0)
    assert due[0] >= 0
    assert due[-1] < 400
    per_second = np.bincount(due.astype(int), minlength=400)
    assert per_second.mean() == pytest.approx(50, rel=0.03)
    assert per_second.var() == pytest.approx(50, rel=0.25)  # the variance of a Poisson number is its mean
    assert arrivals(50, 400, seed=1).tolist() == due.tolist()
    assert arrivals(50, 400, seed=2).tolist() != due.tolist()


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (1, 0), (-1, 1)])
def test_a_rate_and_a_duration_are_positive(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        arrivals(rate, seconds)


def test_percentiles_are_measured_values_by_nearest_rank() -> None:
    values = np.arange(100, 0, -1.0)
    assert percentiles(values) == (50, 95, 99)
    assert percentiles(values, [7, 100]) == (7, 100)  # 0.07 * 100 is above 7 in floating point
    assert percentiles(np.array([3.0, 1.0, 2.0])) == (2, 3, 3)
    assert percentiles(np.array([5.0])) == (5, 5, 5)
    assert all(math.isnan(value) for value in percentiles(np.empty(0)))


def test_a_summary_counts_only_complete_pages_in_time_as_goodput() -> None:
    calls = Calls(
        due=np.array([0.0, 1.0, 2.0, 3.0, 4.0]),
        sent=np.array([0.0, 1.0, 2.5, 3.0, 4.0]),
        done=np.array([0.1, 1.1, 3.0, 3.1, 4.05]),  # the third waited half a second in the client
        code=np.array([0, 0, 0, 4, 0]),
        degraded=np.array([False, True, False, False, False]),
        units=np.array([20, 20, 20, 0, 20]),
        cpu_seconds=0.01,
    )
    summary = summarize(calls, 5.0, limit=0.5)
    assert (summary.calls, summary.errors, summary.degraded) == (5, 1, 1)
    assert (summary.offered, summary.goodput) == (1.0, 2 / 5)
    assert summary.p50 == pytest.approx(100)
    assert summary.max == pytest.approx(1000)  # from the time at which it was due
    assert summary.late_ms == pytest.approx(500)
    assert summary.units == 16
    assert summary.client_cpu_ms == pytest.approx(2)


def test_a_comparison_gives_the_ratio_of_geometric_means_and_welchs_interval() -> None:
    old, new = [math.exp(x) for x in (0.0, 1.0, 2.0)], [math.exp(x) for x in (2.0, 3.0, 4.0)]
    change = compare(old, new)
    assert change.ratio == pytest.approx(math.exp(2))
    # Equal variances of 1 and three values each: 4 degrees of freedom, t = 2.776, error sqrt(2 / 3).
    margin = 2.7764451 * math.sqrt(2 / 3)
    assert change.low == pytest.approx(math.exp(2 - margin))
    assert change.high == pytest.approx(math.exp(2 + margin))


def test_a_regression_is_beyond_noise_and_tolerance() -> None:
    steady, slower, noisy = [10.0, 10.1, 9.9], [11.0, 11.1, 10.9], [11.0, 14.0, 8.5]
    assert compare(steady, slower).is_regression(0.02)
    assert not compare(steady, slower).is_regression(0.2)  # within the tolerance
    assert not compare(steady, noisy).is_regression(0.02)  # within the noise
    assert not compare(slower, steady).is_regression(0.02)
    assert compare(slower, steady).is_improvement()
    assert not compare(steady, steady).is_improvement()
    exact = compare([2.0, 2.0], [3.0, 3.0])
    assert (exact.low, exact.ratio, exact.high) == pytest.approx((1.5, 1.5, 1.5))
    with pytest.raises(ValueError, match="two"):
        compare([1.0], [1.0, 1.0])


def test_an_interval_of_one_measurement_is_infinite() -> None:
    assert interval([4.0]) == (4.0, 0.0, math.inf)
    mean, low, high = interval([1.0, 4.0])
    assert mean == pytest.approx(2)
    assert low * high == pytest.approx(4)  # symmetric in logarithms


def test_stage_times_are_read_from_a_counter_or_a_histogram() -> None:
    page = (
        "# TYPE vitrine_stage_cpu_seconds counter\n"
        'vitrine_stage_cpu_seconds_total{stage="rank"} 1.5\n'
        'vitrine_stage_cpu_seconds_created{stage="rank"} 9\n'
        'vitrine_stage_cpu_seconds_sum{service="x",stage="search"} 2.5e-1\n'
        'vitrine_stage_cpu_seconds_count{stage="search"} 7\n'
    )
    assert stage_seconds(page) == {"rank": 1.5, "search": 0.25}
    assert stage_seconds("process_cpu_seconds_total 3\n") == {}


def test_drawn_items_are_valid_distinct_and_the_same_each_time() -> None:
    items = DrawnItems(500)
    made = list(items)
    for item in made:
        validate(Item(**{**item.__dict__, "image_hash": b""}))
    assert len({item.id for item in made}) == len({item.image_hash for item in made}) == 500
    assert len({(item.title, item.description) for item in made}) == 500  # vectors belong to contents
    assert [item.id for item in made] == items.ids
    assert items[7] == made[7] == DrawnItems(500)[7]
    assert items[-3:] == made[-3:]
    assert {a.name for a in made[0].attributes} == set(ATTRIBUTES)


def test_drawn_vectors_have_unit_length_and_are_near_within_a_cluster() -> None:
    items = DrawnItems(2000)
    vectors = draw_vectors(items)
    for space, dimension in SPACES.items():
        values = vectors[space].astype(np.float32)
        assert values.shape == (2000, dimension)
        assert np.linalg.norm(values, axis=1) == pytest.approx(1, abs=0.01)
        cosine = values @ values.T
        same = items.cluster[:, None] == items.cluster
        np.fill_diagonal(same, False)
        assert cosine[same].mean() > 0.6
        assert abs(cosine[~same].mean()) < 0.1


def test_drawn_events_and_edges_stay_in_the_catalog() -> None:
    items = DrawnItems(800)
    ids = items.ids
    hashes = drawn_events.hashes_of(ids)
    until = datetime(2026, 3, 1)
    events = drawn_events.draw_events(items.cluster, items.weights, ids, hashes, until)
    assert len(events) == drawn_events.event_count(800)
    assert np.all(np.diff(events.time) >= 0)
    assert events.time[-1] < until.timestamp() * 1e6
    assert set(events.user.tolist()) == set(range(len(events.user_ids)))
    assert events.number.tolist() == [item_hash(ids[item]) for item in events.item]
    graph = drawn_events.draw_graph(items.cluster, items.weights, hashes)
    assert np.all(np.diff(graph.item_hashes) > 0)
    for relation in graph.relations.values():
        assert relation.start[-1] == len(relation.neighbors) == len(relation.weights)
        assert relation.neighbors.min() >= 0
        assert relation.neighbors.max() < 800


def test_copies_of_items_differ_in_what_must_differ() -> None:
    source = [
        Item(id="a", title="red hat", family_id="f", image_hash=bytes(32)),
        Item(id="b", title="blue hat"),
    ]
    items = ResampledItems(source, np.array([0, 1, 0]))
    assert [item.id for item in items] == ["i0000000", "i0000001", "i0000002"]
    assert [item.title for item in items] == ["red hat v0", "blue hat v0", "red hat v1"]
    assert items[0].image_hash != items[2].image_hash
    assert items[1].image_hash == b""
    assert items[0].family_id != items[2].family_id
    assert items[-1:] == [items[2]]


def test_jittered_vectors_are_near_their_source_and_as_long() -> None:
    random = np.random.default_rng(0)
    source = random.standard_normal((4, 64)).astype(np.float16)
    source[3] = 0
    rows = np.array([0, 1, 1, 3])
    copies = jittered(source, rows, random).astype(np.float32)
    expected = np.linalg.norm(source.astype(np.float32), axis=1)[rows]
    assert np.linalg.norm(copies, axis=1) == pytest.approx(expected, rel=0.01)
    assert not copies[3].any()
    assert not np.array_equal(copies[1], copies[2])
    cosine = (copies[:3] * source[rows[:3]].astype(np.float32)).sum(1) / expected[:3] ** 2
    assert np.all(cosine > 0.95)


def test_an_edge_leads_from_each_copy_to_a_copy_of_the_neighbor() -> None:
    source = drawn_events.hashes_of(["a", "b", "c"])
    order = np.argsort(source)
    node = np.argsort(order)  # of a, b and c
    neighbors = {0: [1], 1: [0, 2], 2: []}  # a-b, b-a, b-c
    by_node = [[node[n] for n in neighbors[row]] for row in order.tolist()]
    start = np.cumsum([0, *map(len, by_node)])
    flat = np.array([n for row in by_node for n in row], np.int32)
    graph = ItemGraph(source[order], {"baskets": Relation(start, flat, np.ones(len(flat), np.float32))})
    rows = np.array([0, 0, 1])  # two copies of a, one of b, none of c
    hashes = drawn_events.hashes_of(["x", "y", "z"])
    copies = resampled_graph(graph, source, rows, hashes)
    relation = copies.relations["baskets"]
    name = dict(zip(hashes.tolist(), "xyz", strict=True))
    edges = {
        name[int(own)]: [name[int(copies.item_hashes[n])] for n in relation.neighbors[begin:end]]
        for own, begin, end in zip(copies.item_hashes, relation.start, relation.start[1:], strict=False)
    }
    assert edges["x"] == edges["y"] == ["z"]
    assert edges["z"] in (["x"], ["y"])
