"""Exploration: Thompson sampling fills its slots of a page, with known probabilities.

A draw's probability is conditional on the samples. A share of it goes to each item in proportion to how
often the item has the highest sample; the rest is spread evenly, so that every item has a chance. The
outcome of a page can be weighted by these probabilities without bias (Horvitz and Thompson, 1952).
"""

from dataclasses import dataclass

import numpy as np

_SAMPLES = 64
_UNIFORM_SHARE = 0.2
# The prior of an item without data: the weight in impressions, and the highest rate of interactions.
_PRIOR_IMPRESSIONS, _MAX_RATE = 20.0, 0.1


@dataclass(frozen=True)
class ExplorationDraw:
    """The item drawn for a slot, from 0: its index in the pool; `excluded` indices were not allowed."""

    slot: int
    pool_index: int
    excluded: tuple[int, ...]
    propensity: float


@dataclass(frozen=True)
class ExplorationPool:
    """E items to explore: `positions` int64 (E,) in a slate, `samples` float (S, E) of their rates.

    `explore_only` bool (E,) marks items that may fill no other slot. `uniforms` float (depth,), 0 to 1, has a
    random number for each slot.
    """

    positions: np.ndarray
    explore_only: np.ndarray
    samples: np.ndarray
    uniforms: np.ndarray

    def probabilities(self, possible: np.ndarray) -> np.ndarray:
        """The probability of each item, float64 (E,): 0 unless `possible`, bool (E,)."""
        best = np.where(possible, self.samples, -np.inf).argmax(1)
        wins = np.bincount(best, minlength=len(possible)) / len(self.samples)
        return np.asarray((1 - _UNIFORM_SHARE) * wins + _UNIFORM_SHARE * possible / possible.sum())

    def draw(self, slot: int, allowed: np.ndarray) -> ExplorationDraw | None:
        """Draw an item for a slot, at positions that are `allowed`, bool (C,); None if there is none."""
        possible = allowed[self.positions]
        if not possible.any():
            return None
        probabilities = self.probabilities(possible)
        index = int(np.searchsorted(np.cumsum(probabilities), self.uniforms[slot], side="right"))
        if index == len(probabilities) or not possible[index]:  # where the sum is not quite 1
            index = int(np.flatnonzero(possible)[-1])
        excluded = tuple(np.flatnonzero(~possible).tolist())
        return ExplorationDraw(slot, index, excluded, float(probabilities[index]))


def sample_pool(
    positions: np.ndarray,
    explore_only: np.ndarray,
    impressions: np.ndarray,
    interactions: np.ndarray,
    expected: np.ndarray,
    *,
    seed: int,
    depth: int,
) -> ExplorationPool:
    """Sample the rates of E items from their impressions and interactions, both float (E,).

    `expected` float (E,), 0 to 1, is the mean of the prior: P(event | shown) where the ranking service knows
    it.
    """
    rng = np.random.default_rng(seed)
    successes = np.minimum(interactions, impressions)
    prior = np.clip(expected, 0.02, 0.98) * _PRIOR_IMPRESSIONS
    failures = _PRIOR_IMPRESSIONS - prior + impressions - successes
    samples = rng.beta(prior + successes, failures, (_SAMPLES, len(positions)))
    # A longer page begins with the same numbers.
    return ExplorationPool(positions, explore_only, samples, rng.random(depth))


def expected_rate(relevance: np.ndarray) -> np.ndarray:
    """The expected rate, float (E,), of items of a relevance, 0 to 1, whose probability is unknown."""
    return _MAX_RATE * relevance
