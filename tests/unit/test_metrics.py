"""Metrics equal a count by hand and satisfy their invariants."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.core import metrics
from training.core.metrics import (
    classification_metrics,
    interval,
    interval_or_none,
    paired_interval,
    per_query,
    popularity_bands,
    ranking_metrics,
)

ITEMS = st.integers(0, 12)
QUESTION = st.tuples(
    st.lists(ITEMS, unique=True, max_size=10), st.lists(ITEMS, min_size=1, max_size=6), st.booleans()
)
QUESTIONS = st.lists(QUESTION, min_size=1, max_size=8)
COUNTS = st.dictionaries(ITEMS, st.integers(0, 5), max_size=12)
ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans(), st.integers(0, 3)), max_size=30
)
Questions = list[tuple[list[int], list[int], bool]]
Rows = list[tuple[float, bool, int]]


def arrays(questions: Questions) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    pages = [np.array(page, np.int64) for page, _, _ in questions]
    targets = [np.array(target, np.int64) for _, target, _ in questions]
    return pages, targets, np.array([warm for _, _, warm in questions])


def by_hand(page: list[int], targets: set[int], k: int) -> dict[str, float]:
    """The definitions, one query at a time and place by place."""
    places = [place for place, item in enumerate(page[:k], 1) if item in targets]
    recall, precision = len(places) / len(targets), len(places) / k
    dcg = sum(1 / math.log2(place + 1) for place in places)
    ideal = sum(1 / math.log2(place + 1) for place in range(1, min(len(targets), k) + 1))
    return {
        "recall": recall,
        "ndcg": dcg / ideal,
        "hit": 1.0 if places else 0.0,
        "mrr": 1 / places[0] if places else 0.0,
        "precision": precision,
        "f1": 2 * precision * recall / (precision + recall) if places else 0.0,
        "map": sum(hits / place for hits, place in enumerate(places, 1)) / min(len(targets), k),
    }


@given(QUESTIONS, st.integers(1, 12))
@settings(deadline=None)
def test_query_metrics_equal_a_count_by_hand(questions: Questions, k: int) -> None:
    pages, targets, _ = arrays(questions)
    scores = per_query(pages, targets, k)
    for row, (page, target, _) in enumerate(questions):
        expected = by_hand(page, set(target), k)
        assert {name: values[row] for name, values in scores.items()} == pytest.approx(expected)


def test_ndcg_of_hits_at_ranks_one_and_three() -> None:
    scores = per_query([np.array([7, 1, 8, 2])], [np.array([8, 7, 9])], 4)
    assert scores["ndcg"][0] == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3) + 0.5))


@given(QUESTIONS, COUNTS, st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_the_summary_of_a_run_equals_a_count_by_hand(
    questions: Questions, counts: dict[int, int], k: int
) -> None:
    pages, targets, warm = arrays(questions)
    bands = popularity_bands(counts)
    summary = ranking_metrics(pages, targets, bands=bands, warm=warm, universe=13, k=k)
    hits: dict[str, list[bool]] = {band: [] for band in metrics.BANDS}
    item_counts = [0] * 13
    for page, target, _ in questions:
        for item in sorted(set(target)):
            hits[bands.get(item, "strict_cold")].append(item in page[:k])
        for item in page[:k]:
            item_counts[item] += 1
    recalls = [by_hand(page, set(target), k)["recall"] for page, target, _ in questions]
    for name, values in (
        ("recall", recalls),
        ("recall_warm_users", [r for r, w in zip(recalls, warm, strict=True) if w]),
        ("recall_new_users", [r for r, w in zip(recalls, warm, strict=True) if not w]),
    ):
        assert (summary[name] or {}).get("mean") == (
            pytest.approx(np.mean(values), abs=1e-5) if values else None
        )
    for band, of_band in hits.items():
        expected = interval_or_none(np.array(of_band, float))
        assert summary["target_recall"][band] == expected
    assert summary["coverage"] == pytest.approx(sum(n > 0 for n in item_counts) / 13, abs=1e-5)
    gaps = sum(abs(a - b) for a in item_counts for b in item_counts)
    assert summary["gini"] == (
        pytest.approx(gaps / (2 * 13 * sum(item_counts)), abs=1e-5) if sum(item_counts) else None
    )


def test_an_undefined_metric_is_none() -> None:
    summary = ranking_metrics([], [], bands={}, warm=np.zeros(0, bool), universe=5)
    assert summary["recall"] is None
    assert summary["gini"] is None
    assert summary["target_recall"]["head"] is None


def test_an_inconsistent_run_is_refused() -> None:
    one, two = np.array([1]), np.array([1, 2])
    with pytest.raises(ValueError, match="repeats"):
        per_query([np.array([1, 1])], [one])
    with pytest.raises(ValueError, match="no target"):
        per_query([one], [np.zeros(0, np.int64)])
    with pytest.raises(ValueError, match="shorter"):
        per_query([one, one], [one])
    with pytest.raises(ValueError, match="universe"):
        ranking_metrics([two], [one], bands={}, warm=np.ones(1, bool), universe=1)


@given(COUNTS)
def test_popularity_bands_contain_their_share_of_the_engagements(counts: dict[int, int]) -> None:
    bands = popularity_bands(counts)
    total = sum(counts.values())
    for item, count in counts.items():
        before = sum(n for i, n in counts.items() if (-n, i) < (-count, item))
        expected = "head" if before < 0.5 * total else "mid" if before < 0.8 * total else "tail"
        assert bands[item] == (expected if count else "strict_cold")


def test_popularity_bands_break_ties_by_id() -> None:
    assert popularity_bands({"b": 5, "a": 5, "c": 0}) == {"a": "head", "b": "mid", "c": "strict_cold"}


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
@settings(deadline=None, max_examples=30)
def test_an_interval_lies_among_the_values_and_around_their_mean(values: list[float]) -> None:
    bounds = interval(np.array(values))
    assert min(values) - 1e-9 <= bounds.low <= bounds.high <= max(values) + 1e-9
    assert bounds.mean == pytest.approx(np.mean(values))
    assert bounds.count == len(values)
    assert bounds.to_dict()["ci95"] == [round(bounds.low, 5), round(bounds.high, 5)]


def test_a_bootstrap_interval_is_as_wide_as_the_normal_one() -> None:
    values = np.random.default_rng(1).random(4000)
    bounds = interval(values)
    reach = 1.96 * values.std() / math.sqrt(len(values))
    assert bounds.high - bounds.low == pytest.approx(2 * reach, rel=0.1)


def test_an_interval_does_not_depend_on_the_size_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(301)
    whole = interval(values)
    monkeypatch.setattr(metrics, "_SAMPLES_PER_STEP", 301 * 7)
    assert interval(values) == whole


def test_a_paired_interval_finds_a_difference_that_separate_ones_hide() -> None:
    generator = np.random.default_rng(2)
    a = generator.random(500)
    b = a - 0.01 + 0.02 * generator.random(500) - 0.005
    assert interval(b).high > interval(a).low
    assert paired_interval(a, b).low > 0
    assert paired_interval(a, a) == metrics.Interval(0.0, 0.0, 0.0, 500)


def test_intervals_of_no_values_or_of_nan_are_refused() -> None:
    assert interval_or_none(np.zeros(0)) is None
    for values in (np.zeros(0), np.array([1.0, np.nan]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="finite"):
            interval(values)
    with pytest.raises(ValueError, match="same queries"):
        paired_interval(np.zeros(3), np.zeros(1))


@given(ROWS)
def test_classification_metrics_equal_a_count_by_hand(rows: Rows) -> None:
    p, y, w = (np.array([row[i] for row in rows], float) for i in range(3))
    scores = classification_metrics(p, y, w)
    flat = [(a, b) for a, b, count in rows for _ in range(count)]
    assert scores["rows"] == sum(count > 0 for _, _, count in rows)
    pairs = [(a > b) + (a == b) / 2 for a, up in flat if up for b, down in flat if not down]
    assert scores["auc"] == (pytest.approx(np.mean(pairs)) if pairs else None)
    if not flat:
        assert scores["log_loss"] is scores["ece"] is scores["base_rate"] is None
        return
    base = np.mean([b for _, b in flat])
    certain = [min(max(a if b else 1 - a, 1e-7), 1 - 1e-7) for a, b in flat]
    loss = -np.mean(np.log(certain))
    assert scores["base_rate"] == pytest.approx(base)
    assert scores["brier"] == pytest.approx(np.mean([(a - b) ** 2 for a, b in flat]))
    assert scores["log_loss"] == pytest.approx(loss, rel=1e-5, abs=1e-9)
    entropy = -(base * math.log(base) + (1 - base) * math.log(1 - base)) if pairs else None
    assert scores["normalised_cross_entropy"] == (
        pytest.approx(loss / entropy, rel=1e-5) if entropy else None
    )


@given(ROWS, st.integers(1, 20))
def test_a_reliability_curve_contains_every_row_once(rows: Rows, bins: int) -> None:
    p, y = (np.array([row[i] for row in rows], float) for i in range(2))
    scores = classification_metrics(p, y, bins=bins)
    curve = scores["reliability"]
    assert sum(count for _, _, count in curve) == len(rows)
    assert len(curve) <= bins
    assert [row[0] for row in curve] == sorted(row[0] for row in curve)
    if rows:
        gap = sum(count * abs(predicted - observed) for predicted, observed, count in curve) / len(rows)
        assert scores["ece"] == pytest.approx(gap)
        assert abs(p.mean() - y.mean()) - 1e-9 <= scores["ece"] <= 1


def test_weights_change_the_calibration_error() -> None:
    p, y = np.array([0.2, 0.8]), np.array([0, 1])
    assert classification_metrics(p, y, np.array([3, 1]), bins=1)["ece"] == pytest.approx(0.35 - 0.25)


def test_a_calibrated_predictor_has_little_error_and_equal_bins() -> None:
    generator = np.random.default_rng(3)
    p = generator.beta(1, 9, 30_000)
    y = generator.random(30_000) < p
    scores = classification_metrics(p, y)
    assert scores["ece"] < 0.01
    assert {count for _, _, count in scores["reliability"]} == {2000}
    assert scores["normalised_cross_entropy"] < 1
    assert classification_metrics(np.sqrt(p), y)["ece"] > 0.1


def test_a_constant_prediction_errs_by_its_distance_from_the_base_rate() -> None:
    y = np.arange(100) < 30
    scores = classification_metrics(np.full(100, 0.5), y)
    assert (scores["auc"], scores["ece"]) == (0.5, pytest.approx(0.2))
    assert scores["reliability"] == [[0.5, 0.3, 100]]


@pytest.mark.parametrize("label", [0, 1])
def test_a_single_class_has_no_auc_and_finite_metrics(label: int) -> None:
    scores = classification_metrics(np.array([0.0, 1.0, 0.5]), np.full(3, label))
    assert scores.pop("auc") is None
    assert scores.pop("normalised_cross_entropy") is None
    assert all(math.isfinite(value) for row in scores.pop("reliability") for value in row)
    assert all(math.isfinite(value) for value in scores.values())


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_a_value_outside_the_unit_interval_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        classification_metrics(np.array([p]), np.array([1]))


def test_recall_by_count_groups_targets_by_their_frequency() -> None:
    pages = [np.array([1, 2, 3]), np.array([4, 5, 6])]
    targets = [np.array([2, 7, 7]), np.array([5, 6, 9])]
    counts = {2: 1, 7: 2, 5: 3, 6: 400, 1: 50}
    recalls = metrics.recall_by_count(pages, targets, counts, k=2)
    means = {name: of and (of["mean"], of["n"]) for name, of in recalls.items()}
    assert means == {"0": (0.0, 1), "1-2": (0.5, 2), "3-9": (1.0, 1), "10-29": None, "30+": (0.0, 1)}
