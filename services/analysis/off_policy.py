"""What another way to explore would have led to, from draws with known probabilities.

Inverse propensity scoring (Horvitz and Thompson, 1952), its self-normalised form (Swaminathan and Joachims,
2015) and doubly robust estimates (Dudik et al., 2011). Knows arrays of draws, not where they are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.analysis.estimates import Estimate

_BINS = 10
_SMOOTH = 1.0


@dataclass(frozen=True)
class Draws:
    """N draws, each from a pool of its own.

    `relevances` float (E,) of the pool's items and `possible` bool (E,), which could be drawn, per draw;
    `drawn` int64 (N,) into the pool; `propensities` float64 (N,) of what was drawn; `rewards` float64 (N,).
    """

    relevances: Sequence[np.ndarray]
    possible: Sequence[np.ndarray]
    drawn: np.ndarray
    propensities: np.ndarray
    rewards: np.ndarray


@dataclass(frozen=True)
class Judged:
    """A policy's mean reward per draw by each estimator; how many own draws that is worth (Kish, 1965)."""

    estimates: Mapping[str, Estimate]
    worth: float


Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The probability of each item of a pool, float64 (E,), from its relevances and which are possible."""


def alike(relevance: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Every possible item alike."""
    return np.asarray(possible / possible.sum())


def greedy(relevance: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """The most relevant possible item; of several alike each."""
    best = possible & (relevance == relevance[possible].max())
    return np.asarray(best / best.sum())


def proportional(relevance: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """In proportion to relevance, with a tenth for everybody alike."""
    weights = np.where(possible, relevance, 0.0)
    share = weights / weights.sum() if weights.sum() else alike(relevance, possible)
    return np.asarray(0.9 * share + 0.1 * alike(relevance, possible))


POLICIES: Mapping[str, Policy] = {
    "alike": alike,
    "by relevance": proportional,
    "the most relevant": greedy,
}


def judged(draws: Draws, policy: Policy) -> Judged:
    """What a policy would have earned per draw, had it drawn instead."""
    chances = [policy(r, p) for r, p in zip(draws.relevances, draws.possible, strict=True)]
    taken = np.array([mine[at] for mine, at in zip(chances, draws.drawn, strict=True)])
    weights = taken / draws.propensities
    expected = _expected_rewards(draws)
    of_policy = np.array([(mine * q).sum() for mine, q in zip(chances, expected, strict=True)])
    of_drawn = np.array([q[at] for q, at in zip(expected, draws.drawn, strict=True)])
    plain = weights * draws.rewards
    scale = weights.mean() or 1.0
    mean = plain.mean() / scale
    return Judged(
        {
            "ips": _estimate(plain),
            # By the delta method.
            "snips": _estimate(mean + weights * (draws.rewards - mean) / scale),
            "dr": _estimate(of_policy + weights * (draws.rewards - of_drawn)),
        },
        float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0,
    )


def logged(draws: Draws) -> Estimate:
    """What the draws that were made earned."""
    return _estimate(draws.rewards)


def _estimate(values: np.ndarray) -> Estimate:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return Estimate.of(float(values.mean()), float(error))


def _expected_rewards(draws: Draws) -> list[np.ndarray]:
    """What each item of each pool can be expected to earn, by relevance, learned from the other half."""
    half = np.arange(len(draws.drawn)) % 2
    relevance = np.array([mine[at] for mine, at in zip(draws.relevances, draws.drawn, strict=True)])
    tables = []
    for mine in (0, 1):
        others = half != mine
        bins = _bin(relevance[others])
        earned = np.bincount(bins, draws.rewards[others], _BINS)
        count = np.bincount(bins, minlength=_BINS)
        mean = draws.rewards[others].mean() if others.any() else 0.0
        tables.append((earned + _SMOOTH * mean) / (count + _SMOOTH))
    return [tables[mine][_bin(r)] for mine, r in zip(half.tolist(), draws.relevances, strict=True)]


def _bin(relevance: np.ndarray) -> np.ndarray:
    return np.clip((relevance * _BINS).astype(np.int64), 0, _BINS - 1)
