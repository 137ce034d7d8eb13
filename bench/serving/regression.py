"""Whether one set of measurements is higher than another by more than their noise. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """New measurements over old ones: the ratio of their geometric means, with its confidence interval."""

    ratio: float
    low: float
    high: float

    def is_regression(self, tolerance: float) -> bool:
        """Whether the whole interval lies above 1 + `tolerance`: they are higher beyond noise."""
        return self.low > 1 + tolerance

    def is_improvement(self) -> bool:
        """Whether the whole interval lies below 1."""
        return self.high < 1


def compare(old: Sequence[float], new: Sequence[float]) -> Comparison:
    """Compare positive measurements, at least two on each side.

    The interval is Welch's (1947) for the difference of the means of logarithms, because noise is a factor:
    the two sides may differ in their number and in their noise.
    """
    if min(len(old), len(new)) < 2:  # noqa: PLR2004 - one measurement has no noise
        raise ValueError("at least two measurements are needed on each side")
    logs = [np.log(np.asarray(values, float)) for values in (old, new)]
    difference = float(logs[1].mean() - logs[0].mean())
    parts = [float(values.var(ddof=1)) / len(values) for values in logs]
    variance = sum(parts)
    if not variance:
        return Comparison(*(math.exp(difference),) * 3)
    freedom = variance**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, logs, strict=True))
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return Comparison(math.exp(difference), math.exp(difference - margin), math.exp(difference + margin))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of positive measurements, and its confidence interval by Student's t.

    The interval of a single measurement is infinite.
    """
    logs = np.log(np.asarray(values, float))
    mean = float(logs.mean())
    if len(logs) < 2:  # noqa: PLR2004 - one measurement has no noise
        return math.exp(mean), 0.0, math.inf
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1)) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - margin), math.exp(mean + margin)
