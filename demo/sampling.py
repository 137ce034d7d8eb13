"""Seeded choices."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def chance(rng: np.random.Generator, share: float) -> bool:
    """True in this share of all cases."""
    return bool(rng.random() < share)


def pick(rng: np.random.Generator, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """One of the options, evenly or by weights."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    share = np.array(weights, float)
    return options[int(np.searchsorted(np.cumsum(share / share.sum()), rng.random()))]
