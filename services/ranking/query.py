"""A person at a moment, as everything in the ranking service reads them."""

from dataclasses import dataclass

import numpy as np

MAX_HISTORY = 200
SEEDS = 30
LONGEST_WALK = 50
_HALF_LIFE_DAYS = 14.0
# Of the latest items each counts so much of the one after it.
_FADING = 0.7


@dataclass(frozen=True)
class Walk:
    """What a person engaged with, oldest first, as a model of sequences reads it.

    `rows` int64 (L,), at most 50; `gaps` float32 (L,), days from each to the next, from the last to the
    moment; `weights` float32 (L,), the event types' own.
    """

    rows: np.ndarray
    gaps: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Query:
    """A person at a moment, in rows of the item table, newest first.

    `session` int64 (S,) and `history` int64 (H,) with `ages` float32 (H,), days before the
    moment, and `weights` float32, the event types' own; `bought` tells which were bought, `channels` int16
    where, -1 unknown.
    """

    session: np.ndarray
    session_weights: np.ndarray
    history: np.ndarray
    ages: np.ndarray
    weights: np.ndarray
    bought: np.ndarray
    channels: np.ndarray

    def interests(self) -> tuple[np.ndarray, np.ndarray]:
        """Seed rows, session first, at most 30 of each, and their weights by type and recency."""
        past = self.weights[:SEEDS] * recency(self.ages[:SEEDS])
        rows = np.concatenate([self.session[:SEEDS], self.history[:SEEDS]])
        weights = np.concatenate([self.session_weights[:SEEDS], past])
        return rows, weights.astype(np.float32)

    def latest(self) -> tuple[np.ndarray, np.ndarray]:
        """At most 30 rows, session first, that weigh the less the more came after them."""
        rows = np.concatenate([self.session, self.history])[:SEEDS]
        weights = np.concatenate([self.session_weights, self.weights])[:SEEDS]
        return rows, (weights * _FADING ** np.arange(len(rows))).astype(np.float32)

    def walk(self) -> Walk:
        """The latest items in their order, the session at the moment itself."""
        rows = np.concatenate([self.session, self.history])[:LONGEST_WALK][::-1]
        weights = np.concatenate([self.session_weights, self.weights])[:LONGEST_WALK][::-1]
        ages = np.concatenate([np.zeros(len(self.session)), self.ages])[:LONGEST_WALK][::-1]
        gaps = np.maximum(ages - np.append(ages[1:], 0), 0)
        return Walk(rows.copy(), gaps.astype(np.float32), weights.astype(np.float32))


def recency(days: np.ndarray) -> np.ndarray:
    """How much an engagement of so many days ago still counts: halved every 14 days."""
    return np.asarray(np.exp2(-days / _HALF_LIFE_DAYS))
