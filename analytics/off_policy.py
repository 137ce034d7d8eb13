"""Off-policy evaluation: the reward of another exploration policy, from logged draws with their propensities.

Inverse propensity scoring (Horvitz and Thompson, 1952), its self-normalized form (Swaminathan and Joachims,
2015) and doubly robust estimates (Dudik et al., 2011). Knows arrays of draws, not the log.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analytics.estimates import Estimate

_BINS = 10
_PRIOR_DRAWS = 1.0


@dataclass(frozen=True)
class LoggedDraws:
    """N draws, each from its own pool of E items.

    Per draw: `relevances` float (E,) of the pool and `available` bool (E,), the items that can be drawn.
    Of all draws: `actions` int64 (N,), the indices of the drawn items in their pools; their `propensities`
    float64 (N,); `rewards` float64 (N,).
    """

    relevances: Sequence[np.ndarray]
    available: Sequence[np.ndarray]
    actions: np.ndarray
    propensities: np.ndarray
    rewards: np.ndarray


@dataclass(frozen=True)
class PolicyEstimate:
    """A policy's mean reward per draw by each estimator, and the effective sample size (Kish, 1965)."""

    estimates: Mapping[str, Estimate]
    effective_draws: float


Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The probability of each item of a pool, float64 (E,), from its relevances and which items are available."""


def uniform(relevance: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Equal probabilities for all available items."""
    return np.asarray(available / available.sum())


def greedy(relevance: np.ndarray, available: np.ndarray) -> np.ndarray:
    """The most relevant available item; ties share the probability."""
    best = available & (relevance == relevance[available].max())
    return np.asarray(best / best.sum())


def proportional(relevance: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Probabilities in proportion to relevance, mixed with a tenth of the uniform policy."""
    weights = np.where(available, relevance, 0.0)
    share = weights / weights.sum() if weights.sum() else uniform(relevance, available)
    return np.asarray(0.9 * share + 0.1 * uniform(relevance, available))


POLICIES: Mapping[str, Policy] = {"uniform": uniform, "proportional": proportional, "greedy": greedy}


def evaluate_policy(draws: LoggedDraws, policy: Policy) -> PolicyEstimate:
    """The estimated reward per draw of a policy."""
    probabilities = [policy(r, a) for r, a in zip(draws.relevances, draws.available, strict=True)]
    weights = _at_actions(probabilities, draws) / draws.propensities
    expected = _expected_rewards(draws)
    direct = np.array([(p * reward).sum() for p, reward in zip(probabilities, expected, strict=True)])
    residuals = draws.rewards - _at_actions(expected, draws)
    weighted = weights * draws.rewards
    scale = weights.mean() or 1.0
    mean = weighted.mean() / scale
    return PolicyEstimate(
        {
            "ips": _estimate(weighted),
            # Its error is by the delta method.
            "snips": _estimate(mean + weights * (draws.rewards - mean) / scale),
            "dr": _estimate(direct + weights * residuals),
        },
        float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0,
    )


def logged_reward(draws: LoggedDraws) -> Estimate:
    """The reward per draw of the policy that drew them."""
    return _estimate(draws.rewards)


def _at_actions(values: Sequence[np.ndarray], draws: LoggedDraws) -> np.ndarray:
    """The value of each drawn item, float64 (N,), from `values` float (E,) per draw."""
    return np.array([pool[action] for pool, action in zip(values, draws.actions, strict=True)])


def _estimate(values: np.ndarray) -> Estimate:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return Estimate.of(float(values.mean()), float(error))


def _expected_rewards(draws: LoggedDraws) -> list[np.ndarray]:
    """The expected reward of each item of each pool by relevance, fitted on the other half of the draws."""
    half = np.arange(len(draws.actions)) % 2
    relevance = _at_actions(draws.relevances, draws)
    tables = []
    for own_half in (0, 1):
        others = half != own_half
        bins = _bin(relevance[others])
        total = np.bincount(bins, draws.rewards[others], _BINS)
        count = np.bincount(bins, minlength=_BINS)
        mean = draws.rewards[others].mean() if others.any() else 0.0
        tables.append((total + _PRIOR_DRAWS * mean) / (count + _PRIOR_DRAWS))
    return [tables[own_half][_bin(r)] for own_half, r in zip(half.tolist(), draws.relevances, strict=True)]


def _bin(relevance: np.ndarray) -> np.ndarray:
    return np.clip((relevance * _BINS).astype(np.int64), 0, _BINS - 1)
