"""What exploring tries in its slots of a page: drawn by Thompson sampling, with known probabilities.

The probabilities are those of the draw that was made, given the samples: a share of them is each item's for
being the best of so many samples, the rest is everybody's alike, so none is without a chance. What a page led
to can be weighed by them without bias (Horvitz and Thompson, 1952).
"""

from dataclasses import dataclass

import numpy as np

_SAMPLES = 64
_ALIKE = 0.2
# Before anything was seen of an item: so many showings, and at best so many engagements of them.
_SHOWINGS, _RATE = 20.0, 0.1


@dataclass(frozen=True)
class Draw:
    """A slot, from 0, and the item of the trial drawn into it, of all but those in `left_out`."""

    slot: int
    drawn: int
    left_out: tuple[int, ...]
    propensity: float


@dataclass(frozen=True)
class Trial:
    """`places` int64 (E,) in a slate; `samples` float (S, E) of what each is worth; `picks` (depth,), 0 to 1.

    What has its place for being tried alone, `only` bool (E,), takes no other slot.
    """

    places: np.ndarray
    only: np.ndarray
    samples: np.ndarray
    picks: np.ndarray

    def chances(self, possible: np.ndarray) -> np.ndarray:
        """The probability of each item, float64 (E,), where `possible`, bool (E,), and 0 elsewhere."""
        best = np.where(possible, self.samples, -np.inf).argmax(1)
        first = np.bincount(best, minlength=len(possible)) / len(self.samples)
        return np.asarray((1 - _ALIKE) * first + _ALIKE * possible / possible.sum())

    def draw(self, slot: int, allowed: np.ndarray) -> Draw | None:
        """What comes into a slot, of places that are `allowed`, bool (C,); None when there is none."""
        possible = allowed[self.places]
        if not possible.any():
            return None
        chances = self.chances(possible)
        at = int(np.searchsorted(np.cumsum(chances), self.picks[slot], side="right"))
        if at == len(chances) or not possible[at]:  # where the sum is not quite 1
            at = int(np.flatnonzero(possible)[-1])
        return Draw(slot, at, tuple(np.flatnonzero(~possible).tolist()), float(chances[at]))


def trial(
    places: np.ndarray,
    only: np.ndarray,
    showings: np.ndarray,
    engagements: np.ndarray,
    expected: np.ndarray,
    *,
    seed: int,
    depth: int,
) -> Trial:
    """A trial of E items of which so many showings led to so many engagements, float (E,).

    `expected` float (E,), 0 to 1, is what the ranking makes of them: P(event | shown) where that is known.
    """
    rng = np.random.default_rng(seed)
    led = np.minimum(engagements, showings)
    prior = np.clip(expected, 0.02, 0.98) * _SHOWINGS
    samples = rng.beta(prior + led, _SHOWINGS - prior + showings - led, (_SAMPLES, len(places)))
    return Trial(places, only, samples, rng.random(depth))  # of a longer page these are the first


def expectation(relevance: np.ndarray) -> np.ndarray:
    """What may be expected of items of a relevance, 0 to 1, where no probability is known, float (E,)."""
    return _RATE * relevance
