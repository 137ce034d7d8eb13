"""A mean with its confidence interval."""

from dataclasses import dataclass

Z_95 = 1.959964
"""The half-width of the 95 % interval of a normal distribution, in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, error: float) -> "Estimate":
        """An estimate with a standard error, which may be infinite."""
        half = Z_95 * error
        return cls(mean, mean - half, mean + half)
