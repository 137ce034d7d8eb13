"""Feature columns on one scale, for linear models: long tails are compressed, unknown values are the mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_CLIP = 20.0
_MIN_UNIT = 1e-12


@dataclass(frozen=True)
class FeatureScaler:
    """The scales of F columns: the signed logarithm of value / `unit`, standardized by `mean` and `scale`.

    `unit` is the median of the nonzero values: a column of small numbers, such as the weights of edges, is
    compressed like one of counts, and its highest values stay distinct.
    """

    unit: Sequence[float]
    mean: Sequence[float]
    scale: Sequence[float]

    @classmethod
    def of(cls, columns: np.ndarray) -> "FeatureScaler":
        """The scales of the finite values of columns (N, F)."""
        values = columns.astype(np.float64)
        values[~np.isfinite(values)] = np.nan
        unit, mean, scale = np.ones(values.shape[1]), np.zeros(values.shape[1]), np.ones(values.shape[1])
        for index, column in enumerate(values.T):
            finite = column[~np.isnan(column)]
            used = np.abs(finite[finite != 0])
            if len(used):
                unit[index] = max(float(np.median(used)), _MIN_UNIT)
            if len(finite):
                compressed = _signed_log(finite / unit[index])
                mean[index], scale[index] = compressed.mean(), compressed.std()
        return cls(unit.tolist(), mean.tolist(), np.maximum(scale, 1e-3).tolist())

    @classmethod
    def plain(cls, count: int) -> "FeatureScaler":
        """Scales that only take the signed logarithm."""
        return cls([1.0] * count, [0.0] * count, [1.0] * count)

    def apply(self, columns: np.ndarray) -> np.ndarray:
        """Standardized columns (…, F), float32, 0 for unknown."""
        return standardize(np.asarray(columns, np.float32), *self._arrays)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        unit, mean, scale = (np.asarray(part, np.float32) for part in (self.unit, self.mean, self.scale))
        return unit, mean, scale


def standardize(values: np.ndarray, unit: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Values by the scales of their columns, whose shapes broadcast; 0 for unknown. See `FeatureScaler`."""
    scaled = (_signed_log(values / unit) - mean) / scale
    scaled[np.isnan(scaled)] = 0
    return np.asarray(np.clip(scaled, -_CLIP, _CLIP, out=scaled))


def _signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|)."""
    return np.asarray(np.copysign(np.log1p(np.abs(values)), values))
