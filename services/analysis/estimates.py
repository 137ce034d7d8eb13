"""A figure and how sure it is."""

from dataclasses import dataclass

WIDTH_95 = 1.959964
"""So many standard errors to both sides hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, error: float) -> "Estimate":
        """By a standard error, which may be infinite."""
        half = WIDTH_95 * error
        return cls(mean, mean - half, mean + half)
