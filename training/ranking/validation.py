"""Held-out groups, and what they decide."""

import math

import numpy as np

from training.examples.queries import DAY
from training.examples.ranking_groups import RankingGroups

_VALIDATION_SHARE = 0.2
# The least number of groups for a standard error.
MIN_GROUPS = 2


def validation_mask(groups: RankingGroups) -> np.ndarray:
    """The validation groups, bool (Q,): the last fifth, cut between days; none of a single group.

    If most groups are of the first day, a random fifth.
    """
    count = len(groups.size)
    start = int(count * (1 - _VALIDATION_SHARE))
    if not start:
        return np.zeros(count, bool)
    edge = groups.time[start] // DAY * DAY
    if groups.time[0] < edge:
        return np.asarray(groups.time >= edge)
    return np.random.default_rng(0).permutation(count) >= start


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


def best_count(counts: np.ndarray, gains: np.ndarray) -> tuple[int, np.ndarray]:
    """The best of `counts`, (K,), by the gain in each group, (K, Q), and what it gains in each, (Q,).

    The best of many numbers gains by chance as well, so each half of the groups is measured with the number
    that is best for the other half. Fewer than two groups have no gains.
    """
    if gains.shape[1] < MIN_GROUPS:
        return 0, np.empty(0)
    half = np.random.default_rng(0).permutation(gains.shape[1]) % 2 == 0
    crossed = np.empty(gains.shape[1])
    for in_half in (half, ~half):
        crossed[in_half] = gains[gains[:, ~in_half].mean(1).argmax(), in_half]
    return int(counts[gains.mean(1).argmax()]), crossed
