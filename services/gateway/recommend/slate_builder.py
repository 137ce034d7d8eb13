"""From ranked candidates to the page: builds the slate's arrays and applies the shop's rules to them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from services.catalog import filters
from services.catalog.candidate_sources import BACKFILL, EXPLORE
from services.catalog.item_table import ItemTable
from services.gateway.experiments.assignment import unit
from services.gateway.query import (
    MAX_DEPTH,
    Degradation,
    DegradationCode,
    RankedPage,
    RequestContext,
)
from services.gateway.recommend.eligibility import EligibilityFilter
from services.gateway.rules.exploration import ExplorationPool, expected_rate, sample_pool
from services.gateway.rules.page_builder import Slate, arrange, relevance


class SlateBuilder:
    """Arranges pages over an item table; `eligibility` has the items that fill a page."""

    def __init__(self, table: ItemTable, eligibility: EligibilityFilter) -> None:
        self._table, self._eligibility = table, eligibility

    def arrange(self, context: RequestContext, ranked: RankedPage) -> RankedPage:
        """The candidates in the order of the rules; other eligible items follow if the page is short."""
        query = context.query
        depth = min(query.depth, MAX_DEPTH)
        if not query.rules.reorder and (len(ranked.item_hashes) >= depth or not query.fill):
            return ranked
        backfill: list[int] = []
        slate = self._slate(context, ranked, backfill)
        arranged = arrange(slate, query.rules, depth, can_backfill=query.fill)
        if arranged is None:
            backfill = self._eligibility.backfill(context, ranked.item_hashes)
            slate = self._slate(context, ranked, backfill)
            arranged = arrange(slate, query.rules, depth, is_final=True)
        assert arranged is not None  # noqa: S101 - None asks for backfill, which the slate has
        item_hashes = [*ranked.item_hashes, *backfill]
        scores = [*ranked.scores, *[0.0] * len(backfill)]
        shown = [item_hashes[position] for position in arranged.positions]
        exploration = slate.exploration
        pool = [item_hashes[position] for position in exploration.positions.tolist()] if exploration else []
        added = [item_hashes[p] for p in arranged.positions if p >= len(ranked.item_hashes)]
        relaxed = [
            Degradation(
                name,
                DegradationCode.RULE_RELAXED,
                f"{name} was relaxed so that the page has {len(shown)} items",
            )
            for name in arranged.relaxed
        ]
        state = context.user_state
        return replace(
            ranked,
            item_hashes=shown,
            scores=[scores[position] for position in arranged.positions],
            candidates=ranked.candidates.with_source(BACKFILL, added, [0.0] * len(added)),
            degraded=[*ranked.degraded, *relaxed],
            applied_rules={item_hashes[p]: rules for p, rules in arranged.applied_rules.items()},
            draws=arranged.draws,
            pool=pool,
            propensities={pool[draw.pool_index]: draw.propensity for draw in arranged.draws},
            relevances=slate.relevance()[exploration.positions].tolist() if exploration else (),
            exploration_log_position=state.exploration.log_position if state else 0,
        )

    def _slate(self, context: RequestContext, ranked: RankedPage, backfill: Sequence[int]) -> Slate:
        rules = context.query.rules
        item_hashes = [*ranked.item_hashes, *backfill]
        rows, count = self._table.rows(item_hashes), len(ranked.item_hashes)
        cap_values = []
        for cap in rules.caps:
            texts = self._table.texts_of_rows(cap.attribute, rows)
            cap_values.append(np.full((len(rows), 1), -1) if texts is None else texts[0])
        boosts = np.zeros(len(rows), np.float32)
        for boost in rules.boosts:
            boosts += boost.amount * filters.evaluate(boost.condition, self._table)[rows]
        quotas = np.zeros((len(rules.quotas), len(rows)), bool)
        for of_quota, quota in zip(quotas, rules.quotas, strict=True):
            if quota.condition is not None:
                of_quota[:] = filters.evaluate(quota.condition, self._table)[rows]
            else:
                of_quota[:count] = ranked.candidates.proposed_by(quota.source)
        impressions = context.user_state.impressions if context.user_state else {}
        column = self._table.vectors("text") or self._table.vectors("image")
        return Slate(
            scores=np.array(ranked.scores, np.float32),
            filtered_out=self._filtered_out(context.query.condition, rows),
            cap_values=cap_values,
            boosts=boosts,
            quotas=quotas,
            impressions=np.array([impressions.get(item, 0.0) for item in ranked.item_hashes], np.float32)
            if impressions
            else np.zeros(count, np.float32),
            vectors=column[0][rows[:count]].astype(np.float32) if column and rules.diversity else None,
            exploration=_exploration(context, ranked) if rules.exploration.share else None,
            jitter=_jitter(context.query.jitter_key, ranked.item_hashes)
            if rules.anonymous_jitter and _is_anonymous(context)
            else None,
        )

    def _filtered_out(self, condition: filters.Filter | None, rows: np.ndarray) -> np.ndarray:
        if condition is None:
            return np.zeros(len(rows), bool)
        qualify: np.ndarray = filters.evaluate(condition, self._table)[rows]
        return ~qualify


def _is_anonymous(context: RequestContext) -> bool:
    """Whether the user has no history and no session."""
    user, state = context.query.user, context.user_state
    has_past = bool(user.user_id or user.visitor_id) if state is None else bool(state.history)
    return not user.session and not has_past


def _jitter(key: str, item_hashes: Sequence[int]) -> np.ndarray:
    """A number for each item that depends on the key alone, float32 (N,), 0 to 1."""
    return np.array([unit(key, str(item)) for item in item_hashes], np.float32)


def _exploration(context: RequestContext, ranked: RankedPage) -> ExplorationPool | None:
    """The ranked items that exploration may show; None for none."""
    if context.user_state is None:
        return None
    offered, position_of = context.user_state.exploration, dict[int, int]()
    if offered.item_hashes:
        position_of = {item: position for position, item in enumerate(ranked.item_hashes)}
    indices = [index for index, item in enumerate(offered.item_hashes) if item in position_of]
    if not indices:
        return None
    item_hashes = [offered.item_hashes[index] for index in indices]
    positions = np.array([position_of[item] for item in item_hashes], np.int64)
    explore_only = ranked.candidates.only_by(EXPLORE)[positions]
    of_ranked = np.zeros(len(ranked.item_hashes), bool)
    of_ranked[positions[explore_only]] = True
    expected = expected_rate(relevance(np.array(ranked.scores, np.float32), of_ranked)[positions])
    if ranked.probabilities:  # those of the first event type that has any
        probabilities = next(iter(ranked.probabilities.values()))
        expected = np.array([probabilities.get(item, np.nan) for item in item_hashes])
    return sample_pool(
        positions,
        explore_only,
        np.array(offered.impressions, np.float64)[indices],
        np.array(offered.interactions, np.float64)[indices],
        np.nan_to_num(expected),
        seed=context.query.seed,
        depth=context.query.depth,
    )
