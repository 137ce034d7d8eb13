"""The conditional logit has the weights of the highest likelihood."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.scaler import FeatureScaler
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import fit_choice

pytestmark = pytest.mark.usefixtures("single_thread")

TWO = ("fame", "taste")


def choices(seed: int, weight: Sequence[float], count: int = 2000) -> RankingGroups:
    """Lists of two to nine rows, of which one is chosen with exp(weight x row) for its odds."""
    generator = np.random.default_rng(seed)
    size = generator.integers(2, 10, count)
    # A median of 1 is its own unit.
    matrix = generator.exponential(1 / np.log(2), (int(size.sum()), len(weight))).astype(np.float32)
    score = np.log1p(matrix) @ np.array(weight) + generator.gumbel(size=len(matrix))
    start = np.cumsum(size) - size
    grade = np.zeros(len(matrix), np.float32)
    for first, length in zip(start, size, strict=True):
        grade[first + np.argmax(score[first : first + length])] = 1
    return RankingGroups(matrix, grade, np.ones(len(matrix), np.float32), size, np.arange(count))


def test_the_fit_recovers_the_true_weights() -> None:
    weights = np.array([1.5, -1.0, 0.0])
    model = fit_choice(choices(0, weights.tolist(), 5000), ("a", "b", "c"))
    np.testing.assert_allclose(np.array(model.weight) / np.array(model.scales.scale), weights, atol=0.15)


def cost(lists: RankingGroups, choice: ConditionalLogit, weight: np.ndarray) -> float:
    """The penalised listwise loss, list by list."""
    values = choice.scales.apply(lists.matrix).astype(np.float64)
    total, start = 0.0, 0
    for size in lists.size:
        rows = slice(start, start + size)
        logs = log_softmax(values[rows] @ weight + np.log(lists.weight[rows]))
        total -= lists.grade[rows] @ logs
        start += size
    return total / float(lists.grade.sum()) + 0.0005 * float(weight @ weight)


@given(st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_the_fitted_weights_maximize_the_likelihood(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lists = choices(seed, [1.0, -0.5], 60)
    lists = replace(lists, weight=generator.integers(1, 5, len(lists.weight)).astype(np.float32))
    choice = fit_choice(lists, TWO)
    best = np.array(choice.weight)
    least = cost(lists, choice, best)
    for step in generator.standard_normal((20, 2)):
        assert cost(lists, choice, best + 0.05 * step) > least


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan])
def test_a_row_without_positive_weight_is_refused(weight: float) -> None:
    lists = choices(0, [1.0, -0.5], 20)
    lists.weight[3] = weight
    with pytest.raises(ValueError, match="must be positive"):
        fit_choice(lists, TWO)


def test_a_list_without_a_choice_teaches_nothing() -> None:
    lists = choices(1, [1.0, -1.0], 200)
    silent = replace(lists, grade=np.zeros_like(lists.grade))
    assert fit_choice(RankingGroups.concatenate([lists, silent]), TWO) == fit_choice(lists, TWO)
    nothing = fit_choice(silent, TWO)
    assert nothing.weight == [0.0, 0.0]
    assert not nothing.terms(lists.matrix).any()


def test_an_unknown_value_counts_as_average_and_an_unknown_column_as_nothing() -> None:
    lists = choices(2, [1.0, -1.0, 0.5], 300)
    lists.matrix[:, 2] = np.nan
    lists.matrix[::7, 0] = np.nan
    choice = fit_choice(lists, ("a", "b", "c"))
    assert choice.weight[2] == 0
    terms = choice.terms(lists.matrix)
    assert np.isfinite(terms).all()
    assert not terms[::7, 0].any()


@given(
    st.lists(st.integers(-1000, 1000), min_size=3, max_size=30),
    st.sampled_from([2.0**-20, 2.0**-10, 1.0, 2.0**10]),
)
@settings(deadline=None)
def test_the_fit_does_not_depend_on_the_units_of_columns(values: list[int], unit: float) -> None:
    column = np.array([*values, np.nan], np.float32)[:, None]
    one, other = (FeatureScaler.of(column * np.float32(u)).apply(column * np.float32(u)) for u in (1.0, unit))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    order = np.argsort(column[:-1, 0], kind="stable")
    assert (np.diff(one[order, 0]) >= 0).all()  # what is more stays more
    assert one[-1, 0] == 0  # unknown is average
