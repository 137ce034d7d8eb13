"""Logistic regression of a few columns."""

import numpy as np
from scipy.special import expit

_RIDGE = 1e-3
_ITERATIONS = 50
_MAX_STEP, _CONVERGED = 0.5, 1e-6


def fit_logistic(columns: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The coefficient of each column, float64 (K,), by Newton's method with a small ridge penalty.

    `columns` are float (N, K), one of them constant if there is to be an intercept; `label` (N,) bool or 0
    and 1.
    """
    design, target = columns.astype(np.float64), label.astype(np.float64)
    coefficients = np.zeros(design.shape[1])
    for _ in range(_ITERATIONS):
        probability = expit(design @ coefficients)
        gradient = design.T @ (target - probability) - _RIDGE * coefficients
        curvature = (design * (probability * (1 - probability))[:, None]).T @ design
        step = np.linalg.solve(curvature + _RIDGE * np.eye(len(curvature)), gradient)
        coefficients += step * min(1.0, _MAX_STEP / max(float(np.abs(step).max()), _CONVERGED))
        if np.abs(step).max() < _CONVERGED:
            break
    return coefficients
