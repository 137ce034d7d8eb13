"""What a shop wants of a page beside its order: caps, boosts, quotas, diversity, a least relevance.

A page is filled slot by slot, each with the best item that the rules allow there, so that a longer page
begins with a shorter one. Knows arrays of items, neither messages nor where items come from.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from services.filters import Filter

CAPS, MIN_RELEVANCE, FILTER = "caps", "min_relevance", "filter"
RELAXABLE = (CAPS, MIN_RELEVANCE, FILTER)
_DIVERSE_SLOTS = 200
# So many showings that nobody followed up sink an item by half the way from the best to the worst.
_SHOWINGS = 5.0


@dataclass(frozen=True)
class Cap:
    """Of `among` consecutive items at most `most` have one value of a text attribute."""

    attribute: str
    most: int
    among: int = 20


@dataclass(frozen=True)
class Boost:
    """Items of `condition` are worth `amount`, -1 to 1, more: 1 lifts the worst candidate to the best."""

    condition: Filter
    amount: float


@dataclass(frozen=True)
class Quota:
    """Of the first n slots, floor(`share` * n) at least go to items of a source, or of a condition."""

    share: float
    source: str = ""
    condition: Filter | None = None


@dataclass(frozen=True)
class Rules:
    """All rules of a page. `relax` names what is given up, in this order, before a page stays short."""

    caps: tuple[Cap, ...] = ()
    boosts: tuple[Boost, ...] = ()
    quotas: tuple[Quota, ...] = ()
    min_relevance: float = 0.0
    diversity: float = 0.0
    rotation: bool = False
    relax: tuple[str, ...] = ()

    @property
    def reorder(self) -> bool:
        """Whether a page may differ from the order of its scores."""
        return bool(
            self.caps or self.boosts or self.quotas or self.min_relevance or self.diversity or self.rotation
        )


@dataclass(frozen=True)
class Slate:
    """What may be shown, best first: C items that were ranked, then F that only fill a page.

    `scores` float32 (C,), -inf for unknown. `outside` bool (C + F,): not under the filter. `values` holds for
    each cap the codes int32 (C + F, W) of its attribute, -1 for none; `boosts` float32 (C + F,) the sum of
    what lifts an item; `quotas` bool (Q, C + F); `shown` float32 (C,), how often of late; `vectors` float32
    (C, D) of unit length, zeros for none.
    """

    scores: np.ndarray
    outside: np.ndarray
    values: Sequence[np.ndarray]
    boosts: np.ndarray
    quotas: np.ndarray
    shown: np.ndarray
    vectors: np.ndarray | None = None


@dataclass(frozen=True)
class Arranged:
    """`places` int64 (K,) in the slate, in the order to be shown; which rules moved what, by its place."""

    places: np.ndarray
    moved: dict[int, tuple[str, ...]] = field(default_factory=dict)
    relaxed: tuple[str, ...] = ()


def relevance(scores: np.ndarray) -> np.ndarray:
    """Scores from the worst candidate, 0, to the best, 1: float32 (C,). Where all are equal they are best."""
    known = scores[np.isfinite(scores)]
    if not len(known):
        return np.zeros(len(scores), np.float32)
    span = float(np.ptp(known))
    part = (scores - known.min()) / span if span else np.ones(len(scores))
    return np.where(np.isfinite(scores), part, 0).astype(np.float32)


def arrange(slate: Slate, rules: Rules, depth: int, *, more: bool = False) -> Arranged | None:
    """The first `depth` slots, or fewer where the rules leave no more.

    None where there is `more` to fill with, which the slate lacks, and a slot needs it: so what a slot holds
    depends neither on `depth` nor on when the rest was brought.
    """
    ranked, count = len(slate.scores), len(slate.outside)
    plain = relevance(slate.scores)
    sunk = 1 - np.exp2(-slate.shown / _SHOWINGS) if rules.rotation else np.zeros(ranked)
    # Below any candidate, whatever lifts the one and sinks the other, in their own order.
    filling = -5 - np.arange(count - ranked, dtype=np.float32) / max(count - ranked, 1)
    worth = np.concatenate([plain - sunk, filling]) + np.clip(slate.boosts, -1, 1)
    poor = np.concatenate([plain < rules.min_relevance, np.full(count - ranked, rules.min_relevance > 0)])
    left = np.ones(count, bool)
    near = np.concatenate([np.zeros(ranked, np.float32), np.ones(count - ranked, np.float32)])
    caps = [_Window(cap, values) for cap, values in zip(rules.caps, slate.values, strict=True)]
    chosen: list[int] = []
    filled = [0] * len(rules.quotas)
    moved: dict[int, tuple[str, ...]] = {}
    relaxed: set[str] = set()
    while len(chosen) < depth:
        allowed, given_up = _allowed(left, caps, poor, slate.outside, rules.relax)
        if more and (allowed is None or given_up):
            return None
        if allowed is None:
            break
        relaxed.update(given_up)
        due = [n for n, q in enumerate(rules.quotas) if filled[n] < int(q.share * (len(chosen) + 1) + 1e-9)]
        quota = next((n for n in due if (allowed & slate.quotas[n]).any()), None)
        if more and any(
            rules.quotas[n].condition is not None and not (allowed & slate.quotas[n]).any() for n in due
        ):
            return None
        if quota is not None:
            allowed = allowed & slate.quotas[quota]
        value = worth
        if rules.diversity and len(chosen) < _DIVERSE_SLOTS:
            # Maximal marginal relevance (Carbonell and Goldstein, 1998).
            value = (1 - rules.diversity) * worth - rules.diversity * near
        place = int(np.where(allowed, value, -np.inf).argmax())
        why = [
            *(["boost"] if slate.boosts[place] else []),
            *(["rotation"] if rules.rotation and place < ranked and slate.shown[place] else []),
            *(["quota"] if quota is not None else []),
        ]
        if why:
            moved[place] = tuple(why)
        for n in range(len(rules.quotas)):
            filled[n] += bool(slate.quotas[n, place])
        chosen.append(place)
        left[place] = False
        for window in caps:
            window.take(place)
        if rules.diversity and slate.vectors is not None and place < ranked:
            near[:ranked] = np.maximum(near[:ranked], slate.vectors @ slate.vectors[place])
    return Arranged(np.array(chosen, np.int64), moved, tuple(n for n in rules.relax if n in relaxed))


class _Window:
    """What a cap holds back: `held`, int32 (C + F,), by how many of its values that the window is full of."""

    def __init__(self, cap: Cap, values: np.ndarray) -> None:
        self._cap, self._values = cap, values
        self._latest: deque[set[int]] = deque()
        self._counts: Counter[int] = Counter()
        self.held = np.zeros(len(values), np.int32)

    def take(self, place: int) -> None:
        """Let the window move on by the item at a place."""
        self._latest.append(set(self._values[place].tolist()) - {-1})
        for code in self._latest[-1]:
            self._counts[code] += 1
            if self._counts[code] == self._cap.most:
                self.held += (self._values == code).any(1)
        # The next slot is the last of a window of `among`.
        if len(self._latest) == self._cap.among:
            for code in self._latest.popleft():
                if self._counts[code] == self._cap.most:
                    self.held -= (self._values == code).any(1)
                self._counts[code] -= 1


def _allowed(
    left: np.ndarray, caps: Sequence[_Window], poor: np.ndarray, outside: np.ndarray, relax: Sequence[str]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """What may come next, bool, and the rules that had to be given up for there to be any; None: nothing."""
    for steps in range(len(relax) + 1):
        given_up = tuple(relax[:steps])
        allowed = left
        if CAPS not in given_up:
            for window in caps:
                allowed = allowed & (window.held == 0)
        if MIN_RELEVANCE not in given_up:
            allowed = allowed & ~poor
        if FILTER not in given_up:
            allowed = allowed & ~outside
        if allowed.any():
            return allowed, given_up
    return None, ()
