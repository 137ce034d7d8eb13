"""Metrics against counting by hand, and what must hold of them whatever the data."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import metrics
from training.metrics import (
    classification_metrics,
    described,
    interval,
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
    targets = [np.array(wanted, np.int64) for _, wanted, _ in questions]
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
    }


@given(QUESTIONS, st.integers(1, 12))
@settings(deadline=None)
def test_every_query_is_measured_as_by_hand(questions: Questions, k: int) -> None:
    pages, targets, _ = arrays(questions)
    found = per_query(pages, targets, k)
    for row, (page, wanted, _) in enumerate(questions):
        expected = by_hand(page, set(wanted), k)
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected)


def test_ndcg_of_hits_in_the_first_and_third_place() -> None:
    found = per_query([np.array([7, 1, 8, 2])], [np.array([8, 7, 9])], 4)
    assert found["ndcg"][0] == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3) + 0.5))


@given(QUESTIONS, COUNTS, st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_a_run_is_summed_up_as_by_hand(questions: Questions, counts: dict[int, int], k: int) -> None:
    pages, targets, warm = arrays(questions)
    bands = popularity_bands(counts)
    found = ranking_metrics(pages, targets, bands=bands, warm=warm, universe=13, k=k)
    hits: dict[str, list[bool]] = {band: [] for band in metrics.BANDS}
    shown = [0] * 13
    for page, wanted, _ in questions:
        for item in sorted(set(wanted)):
            hits[bands.get(item, "strict_cold")].append(item in page[:k])
        for item in page[:k]:
            shown[item] += 1
    recalls = [by_hand(page, set(wanted), k)["recall"] for page, wanted, _ in questions]
    for name, values in (
        ("recall", recalls),
        ("recall_warm_users", [r for r, w in zip(recalls, warm, strict=True) if w]),
        ("recall_new_users", [r for r, w in zip(recalls, warm, strict=True) if not w]),
    ):
        assert (found[name] or {}).get("mean") == (
            pytest.approx(np.mean(values), abs=1e-5) if values else None
        )
    for band, of_band in hits.items():
        expected = described(np.array(of_band, float))
        assert found["target_recall"][band] == expected
    assert found["coverage"] == pytest.approx(sum(n > 0 for n in shown) / 13, abs=1e-5)
    gaps = sum(abs(a - b) for a in shown for b in shown)
    assert found["gini"] == (pytest.approx(gaps / (2 * 13 * sum(shown)), abs=1e-5) if sum(shown) else None)


def test_what_cannot_be_measured_is_none() -> None:
    found = ranking_metrics([], [], bands={}, warm=np.zeros(0, bool), universe=5)
    assert found["recall"] is None
    assert found["gini"] is None
    assert found["target_recall"]["head"] is None


def test_a_run_that_cannot_be_is_refused() -> None:
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
def test_bands_hold_their_share_of_the_engagements(counts: dict[int, int]) -> None:
    bands = popularity_bands(counts)
    total = sum(counts.values())
    for item, count in counts.items():
        before = sum(n for i, n in counts.items() if (-n, i) < (-count, item))
        expected = "head" if before < 0.5 * total else "mid" if before < 0.8 * total else "tail"
        assert bands[item] == (expected if count else "strict_cold")


def test_bands_of_ids_and_their_ties() -> None:
    assert popularity_bands({"b": 5, "a": 5, "c": 0}) == {"a": "head", "b": "mid", "c": "strict_cold"}


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
@settings(deadline=None, max_examples=30)
def test_an_interval_lies_among_the_values_and_around_their_mean(values: list[float]) -> None:
    found = interval(np.array(values))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.mean == pytest.approx(np.mean(values))
    assert found.count == len(values)
    assert found.to_dict()["ci95"] == [round(found.low, 5), round(found.high, 5)]


def test_an_interval_is_as_wide_as_the_normal_one() -> None:
    values = np.random.default_rng(1).random(4000)
    found = interval(values)
    reach = 1.96 * values.std() / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * reach, rel=0.1)


def test_an_interval_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(301)
    whole = interval(values)
    monkeypatch.setattr(metrics, "_DRAWN_AT_ONCE", 301 * 7)
    assert interval(values) == whole


def test_pairing_finds_a_difference_that_intervals_side_by_side_hide() -> None:
    generator = np.random.default_rng(2)
    a = generator.random(500)
    b = a - 0.01 + 0.02 * generator.random(500) - 0.005
    assert interval(b).high > interval(a).low
    assert paired_interval(a, b).low > 0
    assert paired_interval(a, a) == metrics.Interval(0.0, 0.0, 0.0, 500)


def test_intervals_of_nothing_or_of_no_numbers_are_refused() -> None:
    assert described(np.zeros(0)) is None
    for values in (np.zeros(0), np.array([1.0, np.nan]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="finite"):
            interval(values)
    with pytest.raises(ValueError, match="same queries"):
        paired_interval(np.zeros(3), np.zeros(1))


@given(ROWS)
def test_classification_as_by_hand(rows: Rows) -> None:
    p, y, w = (np.array([row[i] for row in rows], float) for i in range(3))
    found = classification_metrics(p, y, w)
    flat = [(a, b) for a, b, count in rows for _ in range(count)]
    assert found["rows"] == sum(count > 0 for _, _, count in rows)
    pairs = [(a > b) + (a == b) / 2 for a, up in flat if up for b, down in flat if not down]
    assert found["auc"] == (pytest.approx(np.mean(pairs)) if pairs else None)
    if not flat:
        assert found["log_loss"] is found["ece"] is found["base_rate"] is None
        return
    base = np.mean([b for _, b in flat])
    certain = [min(max(a if b else 1 - a, 1e-7), 1 - 1e-7) for a, b in flat]
    loss = -np.mean(np.log(certain))
    assert found["base_rate"] == pytest.approx(base)
    assert found["brier"] == pytest.approx(np.mean([(a - b) ** 2 for a, b in flat]))
    assert found["log_loss"] == pytest.approx(loss, rel=1e-5, abs=1e-9)
    entropy = -(base * math.log(base) + (1 - base) * math.log(1 - base)) if pairs else None
    assert found["normalised_cross_entropy"] == (pytest.approx(loss / entropy, rel=1e-5) if entropy else None)


@given(ROWS, st.integers(1, 20))
def test_a_reliability_curve_holds_every_row_once(rows: Rows, bins: int) -> None:
    p, y = (np.array([row[i] for row in rows], float) for i in range(2))
    found = classification_metrics(p, y, bins=bins)
    curve = found["reliability"]
    assert sum(count for _, _, count in curve) == len(rows)
    assert len(curve) <= bins
    assert [row[0] for row in curve] == sorted(row[0] for row in curve)
    if rows:
        gap = sum(count * abs(predicted - observed) for predicted, observed, count in curve) / len(rows)
        assert found["ece"] == pytest.approx(gap)
        assert abs(p.mean() - y.mean()) - 1e-9 <= found["ece"] <= 1


def test_weights_move_the_calibration_error() -> None:
    p, y = np.array([0.2, 0.8]), np.array([0, 1])
    assert classification_metrics(p, y, np.array([3, 1]), bins=1)["ece"] == pytest.approx(0.35 - 0.25)


def test_a_calibrated_predictor_has_little_error_and_equal_bins() -> None:
    generator = np.random.default_rng(3)
    p = generator.beta(1, 9, 30_000)
    y = generator.random(30_000) < p
    found = classification_metrics(p, y)
    assert found["ece"] < 0.01
    assert {count for _, _, count in found["reliability"]} == {2000}
    assert found["normalised_cross_entropy"] < 1
    assert classification_metrics(np.sqrt(p), y)["ece"] > 0.1


def test_a_constant_prediction_errs_by_its_distance_from_the_base_rate() -> None:
    y = np.arange(100) < 30
    found = classification_metrics(np.full(100, 0.5), y)
    assert (found["auc"], found["ece"]) == (0.5, pytest.approx(0.2))
    assert found["reliability"] == [[0.5, 0.3, 100]]


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_no_auc_and_only_finite_numbers(label: int) -> None:
    found = classification_metrics(np.array([0.0, 1.0, 0.5]), np.full(3, label))
    assert found.pop("auc") is None
    assert found.pop("normalised_cross_entropy") is None
    assert all(math.isfinite(value) for row in found.pop("reliability") for value in row)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        classification_metrics(np.array([p]), np.array([1]))


def test_recall_by_count_pools_targets_by_how_often_they_were_chosen() -> None:
    pages = [np.array([1, 2, 3]), np.array([4, 5, 6])]
    targets = [np.array([2, 7, 7]), np.array([5, 6, 9])]
    counts = {2: 1, 7: 2, 5: 3, 6: 400, 1: 50}
    found = metrics.recall_by_count(pages, targets, counts, k=2)
    means = {name: of and (of["mean"], of["n"]) for name, of in found.items()}
    assert means == {"0": (0.0, 1), "1-2": (0.5, 2), "3-9": (1.0, 1), "10-29": None, "30+": (0.0, 1)}
