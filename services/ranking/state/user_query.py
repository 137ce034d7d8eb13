"""The user of a request, in rows of the item table: the input of sources, features and models."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

MAX_HISTORY = 200
SEEDS = 30
MAX_SEQUENCE = 50
_HALF_LIFE_DAYS = 14.0
# The weight of each of the latest items, relative to the item after it.
_STEP_DECAY = 0.7


@dataclass(frozen=True)
class ItemSequence:
    """The items of a user's interactions, oldest first: the input of the sequence model.

    `rows` int64 (L,), at most 50; `gaps` float32 (L,), days from each to the next, from the last to the time
    of the query; `weights` float32 (L,), those of the event types.
    """

    rows: np.ndarray
    gaps: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Impressions:
    """The latest impressions of a user, I items that were shown, newest first.

    `rows` int64 (I,); `occurred` int64, microseconds since 1970; `engaged` bool (I,), whether an interaction
    with the item followed within a day, and `strong` bool (I,), whether one of more weight than the
    `lightest` interaction did.
    """

    rows: np.ndarray
    occurred: np.ndarray
    engaged: np.ndarray
    strong: np.ndarray
    lightest: float = np.inf
    as_of: int = 0
    """The time of the request, microseconds since 1970."""

    @classmethod
    def none(cls) -> "Impressions":
        """No impressions."""
        number, flag = np.empty(0, np.int64), np.empty(0, bool)
        return cls(number, number, flag, flag)


@dataclass(frozen=True)
class UserQuery:
    """A user at a point in time, in rows of the item table, newest first.

    `session` int64 (S,) and `history` int64 (H,) with `ages` float32 (H,), in days, and `weights` float32,
    those of the event types; `purchased` bool says which were purchased, `channels` int16 by which channel,
    -1 unknown. `impressions` are empty where no model reads them. `derived` keeps what models derive from a
    user, by model, so that Rank does not compute again what Retrieve has computed.
    """

    session: np.ndarray
    session_weights: np.ndarray
    history: np.ndarray
    ages: np.ndarray
    weights: np.ndarray
    purchased: np.ndarray
    channels: np.ndarray
    impressions: Impressions = field(default_factory=Impressions.none)
    derived: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def seeds(self) -> tuple[np.ndarray, np.ndarray]:
        """Seed rows, session first, at most 30 of each, and their weights by event type and recency."""
        return self._seeds

    def latest_seeds(self) -> tuple[np.ndarray, np.ndarray]:
        """At most 30 rows, session first; each later item lowers the weight of those before it."""
        return self._latest_seeds

    @cached_property
    def _seeds(self) -> tuple[np.ndarray, np.ndarray]:
        past = self.weights[:SEEDS] * recency(self.ages[:SEEDS])
        rows = np.concatenate([self.session[:SEEDS], self.history[:SEEDS]])
        weights = np.concatenate([self.session_weights[:SEEDS], past])
        return rows, weights.astype(np.float32)

    @cached_property
    def _latest_seeds(self) -> tuple[np.ndarray, np.ndarray]:
        rows = np.concatenate([self.session, self.history])[:SEEDS]
        weights = np.concatenate([self.session_weights, self.weights])[:SEEDS]
        return rows, (weights * _STEP_DECAY ** np.arange(len(rows))).astype(np.float32)

    def item_sequence(self) -> ItemSequence:
        """The latest items in their order; those of the session have age 0."""
        rows = np.concatenate([self.session, self.history])[:MAX_SEQUENCE][::-1]
        weights = np.concatenate([self.session_weights, self.weights])[:MAX_SEQUENCE][::-1]
        ages = np.concatenate([np.zeros(len(self.session)), self.ages])[:MAX_SEQUENCE][::-1]
        gaps = np.maximum(ages - np.append(ages[1:], 0), 0)
        return ItemSequence(rows.copy(), gaps.astype(np.float32), weights.astype(np.float32))


def recency(days: np.ndarray) -> np.ndarray:
    """The weight of an interaction so many days ago: halved every 14 days."""
    return np.asarray(np.exp2(-days / _HALF_LIFE_DAYS))
