"""Feature columns on one scale, for models that add them up: long tails shortened, unknown is average."""

from collections.abc import Sequence

import numpy as np

_CLIP = 5.0


def scales(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float64 (F,), of what is finite in columns (N, F) after their signed logarithm."""
    values = signed_log(columns.astype(np.float64))
    values[~np.isfinite(values)] = np.nan
    known = ~np.isnan(values).all(0)
    mean, scale = np.zeros(values.shape[1]), np.ones(values.shape[1])
    mean[known], scale[known] = np.nanmean(values[:, known], 0), np.nanstd(values[:, known], 0)
    return mean, np.maximum(scale, 1e-3)


def standardised(columns: np.ndarray, mean: Sequence[float], scale: Sequence[float]) -> np.ndarray:
    """Columns (…, F) after their signed logarithm in deviations from the mean, float32, 0 for unknown."""
    scaled = (signed_log(columns) - np.asarray(mean, np.float32)) / np.asarray(scale, np.float32)
    return np.asarray(np.clip(np.nan_to_num(scaled), -_CLIP, _CLIP), np.float32)


def signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|): long tails, shortened."""
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))
