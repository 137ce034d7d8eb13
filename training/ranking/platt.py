"""Calibration of logits."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit


def platt(logit: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Slope and offset (Platt, 1999) that make logits (N,) fit labels (N,), bool or 0 and 1."""
    positives = float(label.sum())
    # Platt's smoothed targets also work with labels of a single class.
    target = np.where(label > 0, (positives + 1) / (positives + 2), 1 / (len(label) - positives + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = parameters[0] * logit + parameters[1]
        residual = expit(scaled) - target
        entropy = float(np.mean(np.logaddexp(0, scaled) - target * scaled))
        return entropy, np.array([np.mean(residual * logit), np.mean(residual)])

    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    return float(slope), float(offset)
