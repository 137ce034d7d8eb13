"""A page satisfies its rules, as a slow reference implementation does."""

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.filters import AllOf
from services.gateway.rules.exploration import ExplorationPool, sample_pool
from services.gateway.rules.page_builder import (
    ArrangedSlate,
    Cap,
    Exploration,
    Quota,
    Rules,
    Slate,
    arrange,
    relevance,
)

ANY = AllOf(())


def trials(positions: np.ndarray, only: np.ndarray, seed: int) -> ExplorationPool:
    zero = np.zeros(len(positions))
    return sample_pool(positions, only, zero, zero, zero + 0.1, seed=seed, depth=30)


@st.composite
def slates(draw: st.DrawFn, apart: bool = False) -> tuple[Slate, Rules, int]:
    """A slate with rules and a depth; `apart` lets it have what is there for being tried alone."""
    rank_count, filling = draw(st.integers(0, 12)), draw(st.integers(0, 6))
    count = rank_count + filling
    scores = sorted(
        draw(st.lists(st.integers(-5, 5), min_size=rank_count, max_size=rank_count)), reverse=True
    )
    caps = draw(st.lists(st.builds(Cap, st.just("a"), st.integers(1, 3), st.integers(2, 6)), max_size=2))
    quotas = draw(
        st.lists(st.builds(Quota, st.sampled_from([0.1, 0.25, 0.4, 0.5]), st.just("new")), max_size=2)
    )
    codes = st.lists(st.integers(-1, 3), min_size=2 * count, max_size=2 * count)

    def flags(size: int) -> np.ndarray:
        return np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)

    vectors = (
        np.random.default_rng(draw(st.integers(0, 9))).standard_normal((rank_count, 3)).astype(np.float32)
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    outside = flags(count)
    outside[:rank_count] = False
    positions = np.flatnonzero(flags(rank_count))
    only = flags(len(positions)) & apart
    slate = Slate(
        exploration=trials(positions, only, draw(st.integers(0, 99))) if len(positions) else None,
        scores=np.array(scores, np.float32),
        filtered_out=outside,
        cap_values=[np.array(draw(codes)).reshape(count, 2) for _ in caps],
        boosts=np.array(draw(st.lists(st.sampled_from([0.0, 0.5, -2.0]), min_size=count, max_size=count))),
        quotas=np.array([flags(count) for _ in quotas], bool).reshape(len(quotas), count),
        impressions=np.array(
            draw(st.lists(st.integers(0, 4), min_size=rank_count, max_size=rank_count)), np.float32
        ),
        vectors=vectors,
    )
    rules = Rules(
        caps=tuple(caps),
        quotas=tuple(quotas),
        min_relevance=draw(st.sampled_from([0.0, 0.0, 0.3])),
        diversity=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        rotation=draw(st.booleans()),
        exploration=Exploration(draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))),
        relax=tuple(draw(st.permutations(["caps", "min_relevance", "filter"]))[: draw(st.integers(0, 3))]),
    )
    return slate, rules, draw(st.integers(0, count + 2))


def holds(cap: Cap, values: np.ndarray, order: list[int]) -> bool:
    """Whether no window of the order has too many of one value."""
    for start in range(len(order)):
        window = order[start : start + cap.window]
        counts = Counter(code for place in window for code in set(values[place].tolist()) - {-1})
        if counts and max(counts.values()) > cap.max_count:
            return False
    return True


def is_allowed(slate: Slate, rules: Rules, order: list[int], place: int, given_up: tuple[str, ...]) -> bool:
    """Whether an item may come next when some rules are given up."""
    rank_count = len(slate.scores)
    if "filter" not in given_up and slate.filtered_out[place]:
        return False
    least = 0.0 if "min_relevance" in given_up else rules.min_relevance
    if least and (place >= rank_count or slate.relevance()[place] < least):
        return False
    if "caps" in given_up:
        return True
    for cap, values in zip(rules.caps, slate.cap_values, strict=True):
        window = [*order[-(cap.window - 1) :], place]
        counts = Counter(code for p in window for code in set(values[p].tolist()) - {-1})
        if any(counts[code] > cap.max_count for code in set(values[place].tolist()) - {-1}):
            return False
    return True


@given(slates())
@settings(max_examples=400, deadline=None)
def test_a_page_follows_its_rules_and_is_full_if_they_permit(case: tuple[Slate, Rules, int]) -> None:
    slate, rules, depth = case
    page = arrange(slate, rules, depth)
    assert page is not None
    order, count = page.positions.tolist(), len(slate.filtered_out)
    assert len(set(order)) == len(order) <= depth
    if "caps" not in page.relaxed:
        assert all(
            holds(cap, values, order) for cap, values in zip(rules.caps, slate.cap_values, strict=True)
        )
    if "filter" not in page.relaxed:
        assert not slate.filtered_out[order].any()
    given_up: tuple[str, ...] = ()
    for at, place in enumerate(order):
        here, remaining = order[:at], set(range(count)) - set(order[:at])
        steps = [rules.relax[:n] for n in range(len(rules.relax) + 1)]
        step = next(s for s in steps if any(is_allowed(slate, rules, here, p, s) for p in remaining))
        assert is_allowed(slate, rules, here, place, step)  # nothing was given up without need
        given_up += step
    assert set(page.relaxed) == set(given_up)
    if len(order) < depth:
        remaining = set(range(count)) - set(order)
        assert not any(is_allowed(slate, rules, order, p, rules.relax) for p in remaining)


@given(slates())
@settings(max_examples=200, deadline=None)
def test_a_longer_page_starts_with_the_shorter_one(case: tuple[Slate, Rules, int]) -> None:
    slate, rules, depth = case
    shorter, longer = (arrange(slate, rules, d) for d in (depth, depth + 3))
    assert shorter is not None
    assert longer is not None
    np.testing.assert_array_equal(longer.positions[: len(shorter.positions)], shorter.positions)


@given(slates())
@settings(max_examples=300, deadline=None)
def test_fill_candidates_load_on_demand_and_change_no_earlier_slot(
    case: tuple[Slate, Rules, int],
) -> None:
    slate, rules, depth = case
    rules = replace(rules, quotas=tuple(Quota(q.share, condition=ANY) for q in rules.quotas))
    rank_count = len(slate.scores)
    alone = replace(
        slate,
        filtered_out=slate.filtered_out[:rank_count],
        cap_values=[values[:rank_count] for values in slate.cap_values],
        boosts=slate.boosts[:rank_count],
        quotas=slate.quotas[:, :rank_count],
    )
    page, whole = arrange(alone, rules, depth, can_backfill=True), arrange(slate, rules, depth)
    assert whole is not None
    if page is not None:
        np.testing.assert_array_equal(page.positions, whole.positions)
        assert not page.relaxed


@given(slates())
@settings(max_examples=200, deadline=None)
def test_quotas_get_their_share_while_items_qualify(case: tuple[Slate, Rules, int]) -> None:
    slate, rules, depth = case
    slate, rules = replace(slate, cap_values=[], exploration=None), Rules(quotas=rules.quotas)
    order = places(slate, rules, depth)
    for at in range(1, len(order) + 1):
        for quota, members in zip(rules.quotas, slate.quotas, strict=True):
            minimum, count = int(quota.share * at + 1e-9), int(members[order[:at]].sum())
            remaining = [
                p for p in np.flatnonzero(members & ~slate.filtered_out).tolist() if p not in order[:at]
            ]
            # Of two that fall due in one slot one waits for the next.
            assert count >= minimum - (len(rules.quotas) > 1) or not remaining


@given(slates(apart=True), st.booleans())
@settings(max_examples=300, deadline=None)
def test_exploration_slots_get_their_share_and_exploration_items_no_other(
    case: tuple[Slate, Rules, int], last: bool
) -> None:
    slate, rules, depth = case
    rules = replace(rules, quotas=(), relax=())
    slate = replace(slate, quotas=slate.quotas[:0])
    page = arrange(slate, rules, depth, is_final=last)
    assert page is not None
    order, slots = page.positions.tolist(), {draw.slot: draw for draw in page.draws}
    positions = slate.exploration.positions.tolist() if slate.exploration else []
    apart = set(np.flatnonzero(slate.explore_only()).tolist())
    for at, place in enumerate([*order, None]):
        possible = [p for p in range(len(slate.filtered_out)) if p not in order[:at]]
        possible = [p for p in possible if is_allowed(slate, rules, order[:at], p, ())]
        before = sum(slot < at for slot in slots)
        due = int(rules.exploration.share * (at + 1) + 1e-9) > before and any(
            p in positions for p in possible
        )
        if place is None:
            assert at == depth or not (due or set(possible) - (set() if last else apart))
        elif at in slots:
            draw = slots[at]
            assert due
            assert place == positions[draw.pool_index]
            assert {positions[n] for n in range(len(positions)) if n not in draw.excluded} == set(
                positions
            ) & set(possible)
            assert 0.2 / len(positions) <= draw.propensity <= 1
            assert "exploration" in page.applied_rules[place]
        else:
            assert not due
            assert place not in apart or (last and set(possible) <= apart)


@given(slates(apart=True))
@settings(max_examples=200, deadline=None)
def test_relevance_is_scaled_without_exploration_items(case: tuple[Slate, Rules, int]) -> None:
    slate, _, _ = case
    is_own = ~slate.explore_only()
    if is_own.any():
        np.testing.assert_array_equal(slate.relevance()[is_own], relevance(slate.scores[is_own]))
    assert ((slate.relevance() >= 0) & (slate.relevance() <= 1)).all()


def plain(scores: list[float], **more: object) -> Slate:
    count = len(scores)
    base: dict[str, object] = {
        "scores": np.array(scores, np.float32),
        "filtered_out": np.zeros(count, bool),
        "cap_values": [],
        "boosts": np.zeros(count, np.float32),
        "quotas": np.zeros((0, count), bool),
        "impressions": np.zeros(count, np.float32),
    }
    return Slate(**(base | more))  # type: ignore[arg-type]


def places(slate: Slate, rules: Rules, depth: int) -> list[int]:
    page = arrange(slate, rules, depth)
    assert page is not None
    positions: list[int] = page.positions.tolist()
    return positions


def moves_of(page: ArrangedSlate | None) -> tuple[list[int], dict[int, tuple[str, ...]]]:
    assert page is not None
    return page.positions.tolist(), page.applied_rules


def test_boosts_raise_by_the_score_range_and_are_reported() -> None:
    slate = plain([30, 20, 10, 0], boosts=np.array([0, 0, 0, 0.5], np.float32))
    assert moves_of(arrange(slate, Rules(), 4)) == ([0, 1, 3, 2], {3: ("boost",)})
    slate = plain([30, 20, 10, 0], boosts=np.array([-1, 0, 0, 0], np.float32))
    assert moves_of(arrange(slate, Rules(), 4)) == ([1, 2, 0, 3], {0: ("boost",)})


def test_five_ignored_impressions_lower_an_item_by_half_the_score_range() -> None:
    slate = plain([10, 8, 4, 0], impressions=np.array([5, 0, 0, 0], np.float32))
    assert moves_of(arrange(slate, Rules(rotation=True), 4)) == ([1, 0, 2, 3], {0: ("rotation",)})
    assert moves_of(arrange(slate, Rules(), 4)) == ([0, 1, 2, 3], {})
    slate = plain([7, 7], impressions=np.array([1, 0], np.float32))
    assert places(slate, Rules(rotation=True), 2) == [1, 0]


def test_jitter_raises_an_item_by_at_most_its_share() -> None:
    for lots, order in (
        ((0, 1, 0, 0), [1, 0, 2, 3]),
        ((0, 0, 0, 1), [0, 1, 3, 2]),
        ((0, 0.5, 0, 0), [0, 1, 2, 3]),
    ):
        slate = plain([30, 20, 10, 0], jitter=np.array(lots, np.float32))
        assert moves_of(arrange(slate, Rules(anonymous_jitter=0.5), 4)) == (order, {})
        assert places(slate, Rules(), 4) == [0, 1, 2, 3]


def test_diversity_separates_similar_items() -> None:
    east, north = [1.0, 0.0], [0.0, 1.0]
    slate = plain([3, 2, 1, 0], vectors=np.array([east, east, north, east], np.float32))
    assert places(slate, Rules(diversity=0.6), 4) == [0, 2, 1, 3]
    assert places(slate, Rules(), 4) == [0, 1, 2, 3]


def test_items_without_scores_come_last_and_count_for_quotas() -> None:
    slate = plain([2, 1, -np.inf], quotas=np.array([[False, False, True]]))
    assert places(slate, Rules(), 3) == [0, 1, 2]
    quota = Rules(quotas=(Quota(0.5, condition=ANY),))
    assert moves_of(arrange(slate, quota, 3)) == ([0, 2, 1], {2: ("quota",)})
