"""Logistic regression of a few columns."""

import logging

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

_RIDGE = 1e-6  # for a row, of standardized columns
_log = logging.getLogger(__name__)


def fit_logistic(columns: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The coefficient of each column, float64 (K,), by a trust-region Newton method.

    `columns` are float (N, K), one of them constant, or several that sum up to one, if there is to be an
    intercept; `label` (N,) bool or 0 and 1. A small ridge penalty keeps separable labels finite.
    """
    target, count = label.astype(np.float64), max(len(label), 1)
    unit = np.sqrt(np.mean(np.square(columns, dtype=np.float64), axis=0)) if len(columns) else None
    unit = np.ones(columns.shape[1]) if unit is None else np.where(unit > 0, unit, 1.0)
    design = columns / unit

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logit = design @ weights
        value = float(np.sum(np.logaddexp(0, logit) - target * logit)) / count
        gradient = design.T @ (expit(logit) - target) / count + _RIDGE * weights
        return value + _RIDGE / 2 * float(weights @ weights), gradient

    def hessian(weights: np.ndarray) -> np.ndarray:
        probability = expit(design @ weights)
        scaled = design * (probability * (1 - probability))[:, None]
        return np.asarray(scaled.T @ design / count + _RIDGE * np.eye(len(weights)))

    start, options = np.zeros(columns.shape[1]), {"gtol": 1e-7, "maxiter": 200}
    result = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options=options)
    if not result.success:
        _log.warning("a logistic regression did not converge: %s", result.message)
    return np.asarray(result.x / unit)
