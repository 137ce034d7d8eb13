"""Logistic regression finds the likeliest coefficients, whatever the units of its columns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit

from training.ranking.logistic import fit_logistic


@given(st.integers(0, 1 << 30), st.floats(-3, 3), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(deadline=None, max_examples=30)
def test_the_gradient_is_zero_at_the_coefficients(seed: int, slope: float, unit: float) -> None:
    random = np.random.default_rng(seed)
    columns = np.column_stack([unit * random.standard_normal(500), np.ones(500)])
    label = random.random(500) < expit(slope * columns[:, 0] / unit - 1)
    coefficients = fit_logistic(columns, label)
    residual = label - expit(columns @ coefficients)
    assert np.abs(columns.T @ residual / [unit, 1]).max() / 500 < 1e-4


def test_large_slopes_of_small_columns_are_found() -> None:
    random = np.random.default_rng(0)
    score = 0.01 * random.standard_normal(50_000)
    label = random.random(50_000) < expit(100 * score - 1.5)
    slope, intercept = fit_logistic(np.column_stack([score, np.ones(50_000)]), label)
    assert slope == pytest.approx(100, rel=0.05)
    assert intercept == pytest.approx(-1.5, abs=0.05)


@pytest.mark.parametrize("label", [[0] * 8, [1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]])
def test_labels_that_are_alike_or_separable_give_finite_coefficients(label: list[int]) -> None:
    columns = np.column_stack([np.arange(8), np.zeros(8), np.ones(8)])
    coefficients = fit_logistic(columns, np.array(label))
    assert np.isfinite(coefficients).all()
    logit = columns @ coefficients
    assert (log_expit(np.where(np.array(label) > 0, logit, -logit)) > np.log(0.6)).all()


def test_no_rows_give_zeros() -> None:
    assert fit_logistic(np.empty((0, 2)), np.empty(0)).tolist() == [0, 0]
