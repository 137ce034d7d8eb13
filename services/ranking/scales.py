"""Feature columns on one scale, for models that add them up: long tails shortened, unknown is average."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CLIP = 20.0
_LEAST = 1e-12


@dataclass(frozen=True)
class Scales:
    """How F columns are read: in units of what is usual, their logarithm in deviations from its mean.

    `unit` is the median of what is not zero, so that a column of small numbers, such as the weights
    of edges, is shortened like one of counts, and its highest values stay apart.
    """

    unit: Sequence[float]
    mean: Sequence[float]
    scale: Sequence[float]

    @classmethod
    def of(cls, columns: np.ndarray) -> "Scales":
        """The scales of what is finite in columns (N, F)."""
        values = columns.astype(np.float64)
        values[~np.isfinite(values)] = np.nan
        unit, mean, scale = np.ones(values.shape[1]), np.zeros(values.shape[1]), np.ones(values.shape[1])
        for at, column in enumerate(values.T):
            known = column[~np.isnan(column)]
            used = np.abs(known[known != 0])
            if len(used):
                unit[at] = max(float(np.median(used)), _LEAST)
            if len(known):
                shortened = _signed_log(known / unit[at])
                mean[at], scale[at] = shortened.mean(), shortened.std()
        return cls(unit.tolist(), mean.tolist(), np.maximum(scale, 1e-3).tolist())

    @classmethod
    def plain(cls, count: int) -> "Scales":
        """Scales that only take the logarithm."""
        return cls([1.0] * count, [0.0] * count, [1.0] * count)

    def apply(self, columns: np.ndarray) -> np.ndarray:
        """Columns (…, F) in deviations from their mean, float32, 0 for unknown."""
        unit, mean, scale = (np.asarray(part, np.float32) for part in (self.unit, self.mean, self.scale))
        scaled = (_signed_log(columns / unit) - mean) / scale
        return np.asarray(np.clip(np.nan_to_num(scaled), -_CLIP, _CLIP), np.float32)


def _signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|)."""
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))
