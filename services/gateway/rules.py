"""What a shop wants of a page beside its order: caps, boosts, quotas, diversity, a least relevance, trials.

A page is filled slot by slot, each with the best item that the rules allow there, so that a longer page
begins with a shorter one. Knows arrays of items, neither messages nor where items come from.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from services.filters import Filter
from services.gateway.trial import Draw, Trial

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
class Exploration:
    """Of the first n slots floor(`share` * n) are for trying what is new.

    At most `max_age_days` old, 0 for any age, and shown so less than `showings` times; of a scenario at most
    `per_day` slots a day. Only what people engaged with at most `max_engagements`, by weight; None: any.
    """

    share: float = 0.0
    max_age_days: int = 30
    showings: int = 100
    per_day: int | None = None
    max_engagements: float | None = None


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
    exploration: Exploration = Exploration()
    variety: float = 0.0

    @property
    def reorder(self) -> bool:
        """Whether a page may differ from the order of its scores."""
        return bool(
            self.caps
            or self.boosts
            or self.quotas
            or self.min_relevance
            or self.diversity
            or self.rotation
            or self.exploration.share
            or self.variety
        )


@dataclass(frozen=True)
class Slate:
    """What may be shown, best first: C items that were ranked, then F that only fill a page.

    `scores` float32 (C,), -inf for unknown. `outside` bool (C + F,): not under the filter. `values` holds for
    each cap the codes int32 (C + F, W) of its attribute, -1 for none; `boosts` float32 (C + F,) the sum of
    what lifts an item; `quotas` bool (Q, C + F); `shown` float32 (C,), how often of late; `vectors` float32
    (C, D) of unit length, zeros for none. `lots` float32 (C,), 0 to 1, lift items by so much of the variety.
    """

    scores: np.ndarray
    outside: np.ndarray
    values: Sequence[np.ndarray]
    boosts: np.ndarray
    quotas: np.ndarray
    shown: np.ndarray
    vectors: np.ndarray | None = None
    trial: Trial | None = None
    lots: np.ndarray | None = None

    def apart(self) -> np.ndarray:
        """What is there for being tried alone, bool (C,)."""
        found = np.zeros(len(self.scores), bool)
        if self.trial is not None:
            found[self.trial.places[self.trial.only]] = True
        return found

    def relevance(self) -> np.ndarray:
        """Of what was ranked from the worst candidate, 0, to the best, 1, float32 (C,)."""
        return relevance(self.scores, self.apart())


@dataclass(frozen=True)
class Arranged:
    """`places` int64 (K,) in the slate, in the order to be shown; which rules moved what, by its place."""

    places: np.ndarray
    moved: dict[int, tuple[str, ...]] = field(default_factory=dict)
    relaxed: tuple[str, ...] = ()
    draws: tuple[Draw, ...] = ()


def relevance(scores: np.ndarray, apart: np.ndarray | None = None) -> np.ndarray:
    """Scores from the worst candidate, 0, to the best, 1: float32 (C,). Where all are equal they are best.

    What is `apart`, bool (C,), is no candidate: it is on the others' scale, at its ends where it is beyond.
    """
    measured = np.isfinite(scores) if apart is None else np.isfinite(scores) & ~apart
    known = scores[measured] if measured.any() else scores[np.isfinite(scores)]
    if not len(known):
        return np.zeros(len(scores), np.float32)
    span = float(np.ptp(known))
    part = (scores - known.min()) / span if span else (scores >= known.min()).astype(np.float32)
    return np.where(np.isfinite(scores), np.clip(part, 0, 1), 0).astype(np.float32)


def arrange(
    slate: Slate, rules: Rules, depth: int, *, more: bool = False, last: bool = False
) -> Arranged | None:
    """The first `depth` slots, or fewer where the rules leave no more.

    None where there is `more` to fill with, which the slate lacks, and a slot needs it: so what a slot holds
    depends neither on `depth` nor on when the rest was brought. What is there for being tried alone takes
    other slots where all else is used up, and as a `last` resort only.
    """
    page = _Page(slate, rules)
    while len(page.chosen) < depth:
        allowed, given_up = page.allowed()
        quota, lacking = (None, False) if allowed is None else page.quota(allowed)
        drawn = page.drawn() if quota is None else None
        if drawn is not None and slate.trial:
            if more and lacking:
                return None
            page.draws.append(drawn)
            page.take(int(slate.trial.places[drawn.drawn]), "exploration")
            continue
        if more and (allowed is None or given_up or lacking):
            return None
        if allowed is None and last:
            allowed, given_up = page.allowed(last=True)
        if allowed is None:
            break
        page.relaxed.update(given_up)
        among = allowed if quota is None else allowed & slate.quotas[quota]
        page.take(page.best(among), *(["quota"] if quota is not None else []))
    relaxed = tuple(n for n in rules.relax if n in page.relaxed)
    return Arranged(np.array(page.chosen, np.int64), page.moved, relaxed, tuple(page.draws))


class _Page:
    """A page that is being filled: places of the slate in `chosen`, and what that leaves to come."""

    def __init__(self, slate: Slate, rules: Rules) -> None:
        self._slate, self._rules = slate, rules
        ranked, count = len(slate.scores), len(slate.outside)
        plain = slate.relevance()
        sunk = 1 - np.exp2(-slate.shown / _SHOWINGS) if rules.rotation else np.zeros(ranked)
        # Below any candidate, whatever lifts the one and sinks the other, in their own order.
        filling = -5 - np.arange(count - ranked, dtype=np.float32) / max(count - ranked, 1)
        if slate.lots is not None:
            sunk = sunk - rules.variety * slate.lots
        self._worth = np.concatenate([plain - sunk, filling]) + np.clip(slate.boosts, -1, 1)
        fills = np.full(count - ranked, rules.min_relevance > 0)
        self._poor = np.concatenate([plain < rules.min_relevance, fills])
        self._left = np.ones(count, bool)
        self._near = np.concatenate([np.zeros(ranked, np.float32), np.ones(count - ranked, np.float32)])
        self._caps = [_Window(cap, values) for cap, values in zip(rules.caps, slate.values, strict=True)]
        self._filled = [0] * len(rules.quotas)
        self._usual = ~np.concatenate([slate.apart(), np.zeros(count - ranked, bool)])
        self.chosen: list[int] = []
        self.moved: dict[int, tuple[str, ...]] = {}
        self.relaxed: set[str] = set()
        self.draws: list[Draw] = []

    def allowed(self, *, last: bool = False) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """What may come next, bool (C + F,), and the rules given up for there to be any; None: nothing.

        What is there for being tried alone is not among it, but as a `last` resort.
        """
        left = self._left if last else self._left & self._usual
        return _allowed(left, self._caps, self._poor, self._slate.outside, self._rules.relax)

    def quota(self, allowed: np.ndarray) -> tuple[int | None, bool]:
        """The quota that the next slot is for, and whether one whose items can be brought lacks them."""
        slots = len(self.chosen) + 1
        promised = enumerate(self._rules.quotas)
        due = [n for n, quota in promised if self._filled[n] < int(quota.share * slots + 1e-9)]
        there = {n: bool((allowed & self._slate.quotas[n]).any()) for n in due}
        lacking = any(self._rules.quotas[n].condition is not None and not there[n] for n in due)
        return next((n for n in due if there[n]), None), lacking

    def drawn(self) -> Draw | None:
        """What is tried in the next slot, where that is for trying something; no rule is given up for it."""
        due = int(self._rules.exploration.share * (len(self.chosen) + 1) + 1e-9)
        if self._slate.trial is None or len(self.draws) >= due:
            return None
        allowed, _ = _allowed(self._left, self._caps, self._poor, self._slate.outside, ())
        return None if allowed is None else self._slate.trial.draw(len(self.chosen), allowed)

    def best(self, allowed: np.ndarray) -> int:
        """The place of the best that is allowed."""
        value, diversity = self._worth, self._rules.diversity
        if diversity and len(self.chosen) < _DIVERSE_SLOTS:
            # Maximal marginal relevance (Carbonell and Goldstein, 1998).
            value = (1 - diversity) * self._worth - diversity * self._near
        return int(np.where(allowed, value, -np.inf).argmax())

    def take(self, place: int, *why: str) -> None:
        """Let an item have the next slot."""
        slate, ranked = self._slate, len(self._slate.scores)
        bore = [
            *(["boost"] if slate.boosts[place] else []),
            *(["rotation"] if self._rules.rotation and place < ranked and slate.shown[place] else []),
            *why,
        ]
        if bore:
            self.moved[place] = tuple(bore)
        for n in range(len(self._rules.quotas)):
            self._filled[n] += bool(slate.quotas[n, place])
        self.chosen.append(place)
        self._left[place] = False
        for window in self._caps:
            window.take(place)
        diverse = self._rules.diversity and len(self.chosen) < _DIVERSE_SLOTS
        if diverse and slate.vectors is not None and place < ranked:
            # Not BLAS, whose threads wait for each other in every slot where others need the cores.
            alike = np.einsum("cd,d->c", slate.vectors, slate.vectors[place])
            self._near[:ranked] = np.maximum(self._near[:ranked], alike)


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
