"""The shop's rules of a page: caps, boosts, quotas, diversity, a minimal relevance, rotation, exploration.

Slots are filled one by one, each with the best item that the rules allow there. A longer page therefore
begins with a shorter one. This module knows arrays of items, no messages and no sources of candidates.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from services.catalog.filters import Filter
from services.gateway.rules.exploration import ExplorationDraw, ExplorationPool

CAPS, MIN_RELEVANCE, FILTER = "caps", "min_relevance", "filter"
RELAXABLE = (CAPS, MIN_RELEVANCE, FILTER)
_DIVERSE_SLOTS = 200
# So many impressions without an interaction lower an item by half the span of the scores.
_HALVING_IMPRESSIONS = 5.0


@dataclass(frozen=True)
class Cap:
    """Of `window` consecutive items at most `max_count` have one value of a text attribute."""

    attribute: str
    max_count: int
    window: int = 20


@dataclass(frozen=True)
class Boost:
    """Adds `amount`, -1 to 1, to the relevance, 0 to 1, of items that meet `condition`."""

    condition: Filter
    amount: float


@dataclass(frozen=True)
class Quota:
    """Of the first n slots at least floor(`share` * n) go to items of a source, or of a condition."""

    share: float
    source: str = ""
    condition: Filter | None = None


@dataclass(frozen=True)
class Exploration:
    """Of the first n slots floor(`share` * n) explore items.

    These are at most `max_age_days` old, 0 for any age, with fewer than `max_impressions` impressions from
    exploration and at most `max_interactions` weighted interactions, None for any number. A scenario
    explores in at most `max_slots_per_day` slots, None for no limit.
    """

    share: float = 0.0
    max_age_days: int = 30
    max_impressions: int = 100
    max_slots_per_day: int | None = None
    max_interactions: float | None = None


@dataclass(frozen=True)
class Rules:
    """All rules of a page. `relax` names the rules to relax, in this order, before a page stays short."""

    caps: tuple[Cap, ...] = ()
    boosts: tuple[Boost, ...] = ()
    quotas: tuple[Quota, ...] = ()
    min_relevance: float = 0.0
    diversity: float = 0.0
    rotation: bool = False
    relax: tuple[str, ...] = ()
    exploration: Exploration = Exploration()
    anonymous_jitter: float = 0.0

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
            or self.anonymous_jitter
        )


@dataclass(frozen=True)
class Slate:
    """The items that may be shown, best first: C ranked candidates, then F that only fill a page.

    `scores` float32 (C,), -inf for unknown. `filtered_out` bool (C + F,) marks items that do not meet the
    filter. `cap_values` holds for each cap the codes int32 (C + F, W) of its attribute, -1 for none.
    `boosts` float32 (C + F,) is the sum of an item's boosts. `quotas` is bool (Q, C + F). `impressions`
    float32 (C,) counts recent ones. `vectors` float32 (C, D) have unit length, zeros for none. `jitter`
    float32 (C,), 0 to 1, is the part of `anonymous_jitter` that lifts an item.
    """

    scores: np.ndarray
    filtered_out: np.ndarray
    cap_values: Sequence[np.ndarray]
    boosts: np.ndarray
    quotas: np.ndarray
    impressions: np.ndarray
    vectors: np.ndarray | None = None
    exploration: ExplorationPool | None = None
    jitter: np.ndarray | None = None

    def explore_only(self) -> np.ndarray:
        """Which candidates only exploration may show, bool (C,)."""
        mask = np.zeros(len(self.scores), bool)
        if self.exploration is not None:
            mask[self.exploration.positions[self.exploration.explore_only]] = True
        return mask

    def relevance(self) -> np.ndarray:
        """The candidates' relevance, 0 for the worst and 1 for the best, float32 (C,)."""
        return relevance(self.scores, self.explore_only())


@dataclass(frozen=True)
class ArrangedSlate:
    """`positions` int64 (K,) in the slate, in the order of the page, and the rules that moved them."""

    positions: np.ndarray
    applied_rules: dict[int, tuple[str, ...]] = field(default_factory=dict)
    relaxed: tuple[str, ...] = ()
    draws: tuple[ExplorationDraw, ...] = ()


def relevance(scores: np.ndarray, explore_only: np.ndarray | None = None) -> np.ndarray:
    """Scores scaled to 0 for the worst candidate and 1 for the best: float32 (C,). Equal scores are all 1.

    Items marked by `explore_only`, bool (C,), do not define the scale; beyond its ends they are clipped.
    """
    measured = np.isfinite(scores) if explore_only is None else np.isfinite(scores) & ~explore_only
    reference = scores[measured] if measured.any() else scores[np.isfinite(scores)]
    if not len(reference):
        return np.zeros(len(scores), np.float32)
    span, lowest = float(np.ptp(reference)), reference.min()
    part = (scores - lowest) / span if span else (scores >= lowest).astype(np.float32)
    return np.where(np.isfinite(scores), np.clip(part, 0, 1), 0).astype(np.float32)


def arrange(
    slate: Slate, rules: Rules, depth: int, *, can_backfill: bool = False, is_final: bool = False
) -> ArrangedSlate | None:
    """Fill the first `depth` slots, or fewer if the rules leave no item.

    With `can_backfill` the slate lacks items that could fill it; the result is None if a slot needs them. A
    slot therefore depends neither on `depth` nor on when those items are added. With `is_final` items that
    only exploration may show fill slots when nothing else is left.
    """
    page = _Page(slate, rules)
    while len(page.order) < depth:
        allowed, relaxed = page.allowed()
        quota, unmet = (None, False) if allowed is None else page.quota(allowed)
        draw = page.draw() if quota is None else None
        if draw is not None and slate.exploration:
            if can_backfill and unmet:
                return None
            page.draws.append(draw)
            page.place(int(slate.exploration.positions[draw.pool_index]), "exploration")
            continue
        if can_backfill and (allowed is None or relaxed or unmet):
            return None
        if allowed is None and is_final:
            allowed, relaxed = page.allowed(include_explore_only=True)
        if allowed is None:
            break
        page.relaxed.update(relaxed)
        if quota is None:
            page.place(page.best(allowed))
        else:
            page.place(page.best(allowed & slate.quotas[quota]), "quota")
    relaxed = tuple(name for name in rules.relax if name in page.relaxed)
    return ArrangedSlate(np.array(page.order, np.int64), page.applied_rules, relaxed, tuple(page.draws))


class _Page:
    """A page in the making: `order` has the slate's positions in its slots so far."""

    def __init__(self, slate: Slate, rules: Rules) -> None:
        self._slate, self._rules = slate, rules
        ranked, count = len(slate.scores), len(slate.filtered_out)
        relevances = slate.relevance()
        penalty = (
            1 - np.exp2(-slate.impressions / _HALVING_IMPRESSIONS) if rules.rotation else np.zeros(ranked)
        )
        # Backfill is below any candidate, in its own order, whatever boosts and penalties do.
        backfill = -5 - np.arange(count - ranked, dtype=np.float32) / max(count - ranked, 1)
        if slate.jitter is not None:
            penalty = penalty - rules.anonymous_jitter * slate.jitter
        self._values = np.concatenate([relevances - penalty, backfill]) + np.clip(slate.boosts, -1, 1)
        irrelevant = np.full(count - ranked, rules.min_relevance > 0)
        self._irrelevant = np.concatenate([relevances < rules.min_relevance, irrelevant])
        self._remaining = np.ones(count, bool)
        self._similarity = np.concatenate([np.zeros(ranked, np.float32), np.ones(count - ranked, np.float32)])
        self._windows = [
            _CapWindow(cap, values) for cap, values in zip(rules.caps, slate.cap_values, strict=True)
        ]
        self._quota_counts = [0] * len(rules.quotas)
        self._ordinary = ~np.concatenate([slate.explore_only(), np.zeros(count - ranked, bool)])
        self.order: list[int] = []
        self.applied_rules: dict[int, tuple[str, ...]] = {}
        self.relaxed: set[str] = set()
        self.draws: list[ExplorationDraw] = []

    def allowed(self, *, include_explore_only: bool = False) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """Which items the next slot may have, bool (C + F,), None for none, and the rules relaxed."""
        mask = self._remaining if include_explore_only else self._remaining & self._ordinary
        return self._relaxing(mask, self._rules.relax)

    def quota(self, allowed: np.ndarray) -> tuple[int | None, bool]:
        """The quota that the next slot is for, and whether a quota is due whose items backfill could add."""
        slots = len(self.order) + 1
        due = [
            index
            for index, quota in enumerate(self._rules.quotas)
            if self._quota_counts[index] < int(quota.share * slots + 1e-9)
        ]
        available = {index: bool((allowed & self._slate.quotas[index]).any()) for index in due}
        unmet = any(self._rules.quotas[index].condition is not None and not available[index] for index in due)
        return next((index for index in due if available[index]), None), unmet

    def draw(self) -> ExplorationDraw | None:
        """Draw an item to explore, if the next slot is for exploration. No rule is relaxed for it."""
        due = int(self._rules.exploration.share * (len(self.order) + 1) + 1e-9)
        if self._slate.exploration is None or len(self.draws) >= due:
            return None
        allowed, _ = self._relaxing(self._remaining, ())
        return None if allowed is None else self._slate.exploration.draw(len(self.order), allowed)

    def best(self, allowed: np.ndarray) -> int:
        """The position of the best allowed item."""
        values, diversity = self._values, self._rules.diversity
        if diversity and len(self.order) < _DIVERSE_SLOTS:
            # Maximal marginal relevance (Carbonell and Goldstein, 1998).
            values = (1 - diversity) * self._values - diversity * self._similarity
        return int(np.where(allowed, values, -np.inf).argmax())

    def place(self, position: int, *rules: str) -> None:
        """Place an item into the next slot; `rules` chose it."""
        slate, ranked = self._slate, len(self._slate.scores)
        rotated = self._rules.rotation and position < ranked and slate.impressions[position]
        applied = [
            *(["boost"] if slate.boosts[position] else []),
            *(["rotation"] if rotated else []),
            *rules,
        ]
        if applied:
            self.applied_rules[position] = tuple(applied)
        for index in range(len(self._rules.quotas)):
            self._quota_counts[index] += bool(slate.quotas[index, position])
        self.order.append(position)
        self._remaining[position] = False
        for window in self._windows:
            window.advance(position)
        diverse = self._rules.diversity and len(self.order) < _DIVERSE_SLOTS
        if diverse and slate.vectors is not None and position < ranked:
            # Not BLAS: its threads wait for each other in every slot if other work needs the cores.
            similarity = np.einsum("cd,d->c", slate.vectors, slate.vectors[position])
            self._similarity[:ranked] = np.maximum(self._similarity[:ranked], similarity)

    def _relaxing(self, mask: np.ndarray, relax: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """The items of `mask` that the rules allow, with as few rules relaxed as it takes to allow any."""
        for steps in range(len(relax) + 1):
            relaxed = tuple(relax[:steps])
            allowed = mask
            if CAPS not in relaxed:
                for window in self._windows:
                    allowed = allowed & (window.full_values == 0)
            if MIN_RELEVANCE not in relaxed:
                allowed = allowed & ~self._irrelevant
            if FILTER not in relaxed:
                allowed = allowed & ~self._slate.filtered_out
            if allowed.any():
                return allowed, relaxed
        return None, ()


class _CapWindow:
    """The latest slots under a cap. `full_values` int32 (C + F,) counts each item's values at the cap."""

    def __init__(self, cap: Cap, values: np.ndarray) -> None:
        self._cap, self._values = cap, values
        self._latest: deque[set[int]] = deque()
        self._counts: Counter[int] = Counter()
        self.full_values = np.zeros(len(values), np.int32)

    def advance(self, position: int) -> None:
        """Move the window on by the item at a position."""
        self._latest.append(set(self._values[position].tolist()) - {-1})
        for code in self._latest[-1]:
            self._counts[code] += 1
            if self._counts[code] == self._cap.max_count:
                self.full_values += (self._values == code).any(1)
        # The next slot is the last of its window.
        if len(self._latest) == self._cap.window:
            for code in self._latest.popleft():
                if self._counts[code] == self._cap.max_count:
                    self.full_values -= (self._values == code).any(1)
                self._counts[code] -= 1
