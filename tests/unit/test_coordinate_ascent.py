"""Coordinate ascent follows real improvements of a ranking and ignores noise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.scaler import FeatureScaler
from training.examples.ranking_groups import RankingGroups
from training.ranking.coordinate_ascent import DEPTH, _RankPairs, ascend

LISTS = st.lists(
    st.lists(st.tuples(st.sampled_from([0.0, 0.0, 0.5, 1.0]), st.integers(1, 9)), min_size=1, max_size=12),
    min_size=1,
    max_size=8,
)


def lists_of(grade: np.ndarray, matrix: np.ndarray, weight: np.ndarray, size: np.ndarray) -> RankingGroups:
    return RankingGroups(
        matrix.astype(np.float32),
        grade.astype(np.float32),
        weight.astype(np.float32),
        size,
        np.arange(len(size)),
    )


@given(LISTS, st.integers(0, 1 << 16))
@settings(deadline=None)
def test_ranks_of_pairs_are_ranks_of_lists(rows: list[list[tuple[float, int]]], seed: int) -> None:
    generator = np.random.default_rng(seed)
    grade = np.array([g for one in rows for g, _ in one])
    weight = np.array([1 if g else w for one in rows for g, w in one])  # an answer stands for itself
    size = np.array([len(one) for one in rows])
    lists = lists_of(grade, generator.normal(0, 1, (len(grade), 1)), weight, size)
    graded = lists.take(np.bincount(lists.group(), grade, len(size)) > 0)
    if not len(graded.size):
        return
    order, score = _RankPairs(graded), graded.matrix[:, 0]
    np.testing.assert_allclose(order.ndcg(order.lead(score)), graded.ndcg(score, DEPTH), rtol=1e-6)


def shop(count: int = 600, size: int = 60, signal: float = 3.0) -> RankingGroups:
    """Lists of which one row was taken, mostly for its first column; the second is noise."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(0, 1, (count, size, 2))
    chance = np.exp(signal * matrix[:, :, 0])
    is_taken = (chance / chance.sum(1, keepdims=True)).cumsum(1) > generator.random((count, 1))
    grade = np.zeros((count, size))
    grade[np.arange(count), is_taken.argmax(1)] = 1
    whole = np.full(count, size)
    return lists_of(grade.ravel(), matrix.reshape(-1, 2), np.ones(count * size), whole)


def ndcg(choice: ConditionalLogit, lists: RankingGroups) -> float:
    return float(lists.ndcg(choice.terms(lists.matrix).sum(1), DEPTH).mean())


@pytest.mark.parametrize("weight", [[1.0, 1.0], [0.1, -2.0], [0.0, 1.0]])
def test_bad_weights_are_corrected(weight: list[float]) -> None:
    lists = shop()
    bad = ConditionalLogit(["taste", "noise"], FeatureScaler.of(lists.matrix), weight)
    weights = ascend(bad, lists)
    best = ndcg(ConditionalLogit(bad.columns, bad.scales, [1.0, 0.0]), lists)
    assert ndcg(weights, lists) > 0.97 * best > ndcg(bad, lists)
    assert abs(weights.weight[1]) < 0.3 * weights.weight[0]
    assert ascend(bad, lists) == weights


def test_noise_moves_no_weight_far() -> None:
    """The best of a few dozen moves looks better by chance: little is gained, so little is lost."""
    lists = shop(signal=0.0)
    even = ConditionalLogit(["a", "b"], FeatureScaler.of(lists.matrix), [1.0, 0.0])
    assert ndcg(ascend(even, lists), lists) < 1.25 * ndcg(even, lists)


def test_one_list_or_none_teaches_nothing() -> None:
    lists = shop()
    even = ConditionalLogit(["a", "b"], FeatureScaler.of(lists.matrix), [1.0, 0.5])
    for many in (0, 1):
        assert ascend(even, lists.take(np.arange(len(lists.size)) < many)) == even
    blank = lists_of(np.zeros(120), lists.matrix[:120], np.ones(120), np.full(2, 60))
    assert ascend(even, blank) == even
