"""The rules of a page, as properties of any slate; an oracle that is plain and slow fills it slot by slot."""

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.filters import AllOf
from services.gateway.rules import Arranged, Cap, Exploration, Quota, Rules, Slate, arrange, relevance
from services.gateway.trial import Trial, trial

ANY = AllOf(())


def trials(tried: np.ndarray, only: np.ndarray, seed: int) -> Trial:
    zero = np.zeros(len(tried))
    return trial(tried, only, zero, zero, zero + 0.1, seed=seed, depth=30)


@st.composite
def slates(draw: st.DrawFn, apart: bool = False) -> tuple[Slate, Rules, int]:
    """A slate with rules and a depth; `apart` lets it have what is there for being tried alone."""
    ranked, filling = draw(st.integers(0, 12)), draw(st.integers(0, 6))
    count = ranked + filling
    scores = sorted(draw(st.lists(st.integers(-5, 5), min_size=ranked, max_size=ranked)), reverse=True)
    caps = draw(st.lists(st.builds(Cap, st.just("a"), st.integers(1, 3), st.integers(2, 6)), max_size=2))
    quotas = draw(
        st.lists(st.builds(Quota, st.sampled_from([0.1, 0.25, 0.4, 0.5]), st.just("new")), max_size=2)
    )
    codes = st.lists(st.integers(-1, 3), min_size=2 * count, max_size=2 * count)

    def flags(size: int) -> np.ndarray:
        return np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)

    vectors = np.random.default_rng(draw(st.integers(0, 9))).standard_normal((ranked, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    outside = flags(count)
    outside[:ranked] = False
    tried = np.flatnonzero(flags(ranked))
    only = flags(len(tried)) & apart
    slate = Slate(
        trial=trials(tried, only, draw(st.integers(0, 99))) if len(tried) else None,
        scores=np.array(scores, np.float32),
        outside=outside,
        values=[np.array(draw(codes)).reshape(count, 2) for _ in caps],
        boosts=np.array(draw(st.lists(st.sampled_from([0.0, 0.5, -2.0]), min_size=count, max_size=count))),
        quotas=np.array([flags(count) for _ in quotas], bool).reshape(len(quotas), count),
        shown=np.array(draw(st.lists(st.integers(0, 4), min_size=ranked, max_size=ranked)), np.float32),
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
        window = order[start : start + cap.among]
        counts = Counter(code for place in window for code in set(values[place].tolist()) - {-1})
        if counts and max(counts.values()) > cap.most:
            return False
    return True


def allowed(slate: Slate, rules: Rules, order: list[int], place: int, given_up: tuple[str, ...]) -> bool:
    """Whether an item may come next when some rules are given up."""
    ranked = len(slate.scores)
    if "filter" not in given_up and slate.outside[place]:
        return False
    least = 0.0 if "min_relevance" in given_up else rules.min_relevance
    if least and (place >= ranked or slate.relevance()[place] < least):
        return False
    if "caps" in given_up:
        return True
    for cap, values in zip(rules.caps, slate.values, strict=True):
        mine = [*order[-(cap.among - 1) :], place]
        counts = Counter(code for p in mine for code in set(values[p].tolist()) - {-1})
        if any(counts[code] > cap.most for code in set(values[place].tolist()) - {-1}):
            return False
    return True


@given(slates())
@settings(max_examples=400, deadline=None)
def test_a_page_keeps_to_its_rules_and_is_full_whenever_they_let_it(drawn: tuple[Slate, Rules, int]) -> None:
    slate, rules, depth = drawn
    found = arrange(slate, rules, depth)
    assert found is not None
    order, count = found.places.tolist(), len(slate.outside)
    assert len(set(order)) == len(order) <= depth
    if "caps" not in found.relaxed:
        assert all(holds(cap, values, order) for cap, values in zip(rules.caps, slate.values, strict=True))
    if "filter" not in found.relaxed:
        assert not slate.outside[order].any()
    given_up: tuple[str, ...] = ()
    for at, place in enumerate(order):
        here, left = order[:at], set(range(count)) - set(order[:at])
        steps = [rules.relax[:n] for n in range(len(rules.relax) + 1)]
        needed = next(s for s in steps if any(allowed(slate, rules, here, p, s) for p in left))
        assert allowed(slate, rules, here, place, needed)  # nothing was given up without need
        given_up += needed
    assert set(found.relaxed) == set(given_up)
    if len(order) < depth:
        left = set(range(count)) - set(order)
        assert not any(allowed(slate, rules, order, p, rules.relax) for p in left)


@given(slates())
@settings(max_examples=200, deadline=None)
def test_a_longer_page_begins_with_a_shorter_one(drawn: tuple[Slate, Rules, int]) -> None:
    slate, rules, depth = drawn
    shorter, longer = (arrange(slate, rules, d) for d in (depth, depth + 3))
    assert shorter is not None
    assert longer is not None
    np.testing.assert_array_equal(longer.places[: len(shorter.places)], shorter.places)


@given(slates())
@settings(max_examples=300, deadline=None)
def test_what_only_fills_is_brought_when_a_slot_needs_it_and_changes_no_slot_before(
    drawn: tuple[Slate, Rules, int],
) -> None:
    slate, rules, depth = drawn
    rules = replace(rules, quotas=tuple(Quota(q.share, condition=ANY) for q in rules.quotas))
    ranked = len(slate.scores)
    alone = replace(
        slate,
        outside=slate.outside[:ranked],
        values=[values[:ranked] for values in slate.values],
        boosts=slate.boosts[:ranked],
        quotas=slate.quotas[:, :ranked],
    )
    found, whole = arrange(alone, rules, depth, more=True), arrange(slate, rules, depth)
    assert whole is not None
    if found is not None:
        np.testing.assert_array_equal(found.places, whole.places)
        assert not found.relaxed


@given(slates())
@settings(max_examples=200, deadline=None)
def test_quotas_get_their_share_as_long_as_there_are_any(drawn: tuple[Slate, Rules, int]) -> None:
    slate, rules, depth = drawn
    slate, rules = replace(slate, values=[], trial=None), Rules(quotas=rules.quotas)
    order = places(slate, rules, depth)
    for at in range(1, len(order) + 1):
        for quota, mine in zip(rules.quotas, slate.quotas, strict=True):
            wanted, got = int(quota.share * at + 1e-9), int(mine[order[:at]].sum())
            left = [p for p in np.flatnonzero(mine & ~slate.outside).tolist() if p not in order[:at]]
            # Of two that fall due in one slot one waits for the next.
            assert got >= wanted - (len(rules.quotas) > 1) or not left


@given(slates(apart=True), st.booleans())
@settings(max_examples=300, deadline=None)
def test_slots_for_trying_have_their_share_and_what_is_only_tried_takes_no_other(
    drawn: tuple[Slate, Rules, int], last: bool
) -> None:
    slate, rules, depth = drawn
    rules = replace(rules, quotas=(), relax=())
    slate = replace(slate, quotas=slate.quotas[:0])
    found = arrange(slate, rules, depth, last=last)
    assert found is not None
    order, slots = found.places.tolist(), {draw.slot: draw for draw in found.draws}
    tried = slate.trial.places.tolist() if slate.trial else []
    apart = set(np.flatnonzero(slate.apart()).tolist())
    for at, place in enumerate([*order, None]):
        possible = [p for p in range(len(slate.outside)) if p not in order[:at]]
        possible = [p for p in possible if allowed(slate, rules, order[:at], p, ())]
        before = sum(slot < at for slot in slots)
        due = int(rules.exploration.share * (at + 1) + 1e-9) > before and any(p in tried for p in possible)
        if place is None:
            assert at == depth or not (due or set(possible) - (set() if last else apart))
        elif at in slots:
            draw = slots[at]
            assert due
            assert place == tried[draw.drawn]
            assert {tried[n] for n in range(len(tried)) if n not in draw.left_out} == set(tried) & set(
                possible
            )
            assert 0.2 / len(tried) <= draw.propensity <= 1
            assert "exploration" in found.moved[place]
        else:
            assert not due
            assert place not in apart or (last and set(possible) <= apart)


@given(slates(apart=True))
@settings(max_examples=200, deadline=None)
def test_the_rest_is_on_the_scale_of_what_would_be_there_without(drawn: tuple[Slate, Rules, int]) -> None:
    slate, _, _ = drawn
    own = ~slate.apart()
    if own.any():
        np.testing.assert_array_equal(slate.relevance()[own], relevance(slate.scores[own]))
    assert ((slate.relevance() >= 0) & (slate.relevance() <= 1)).all()


def plain(scores: list[float], **more: object) -> Slate:
    count = len(scores)
    base: dict[str, object] = {
        "scores": np.array(scores, np.float32),
        "outside": np.zeros(count, bool),
        "values": [],
        "boosts": np.zeros(count, np.float32),
        "quotas": np.zeros((0, count), bool),
        "shown": np.zeros(count, np.float32),
    }
    return Slate(**(base | more))  # type: ignore[arg-type]


def places(slate: Slate, rules: Rules, depth: int) -> list[int]:
    found = arrange(slate, rules, depth)
    assert found is not None
    shown: list[int] = found.places.tolist()
    return shown


def moved(found: Arranged | None) -> tuple[list[int], dict[int, tuple[str, ...]]]:
    assert found is not None
    return found.places.tolist(), found.moved


def test_boosts_lift_by_the_span_of_the_scores_and_say_so() -> None:
    slate = plain([30, 20, 10, 0], boosts=np.array([0, 0, 0, 0.5], np.float32))
    assert moved(arrange(slate, Rules(), 4)) == ([0, 1, 3, 2], {3: ("boost",)})
    slate = plain([30, 20, 10, 0], boosts=np.array([-1, 0, 0, 0], np.float32))
    assert moved(arrange(slate, Rules(), 4)) == ([1, 2, 0, 3], {0: ("boost",)})


def test_five_showings_without_an_answer_sink_an_item_by_half_the_span() -> None:
    slate = plain([10, 8, 4, 0], shown=np.array([5, 0, 0, 0], np.float32))
    assert moved(arrange(slate, Rules(rotation=True), 4)) == ([1, 0, 2, 3], {0: ("rotation",)})
    assert moved(arrange(slate, Rules(), 4)) == ([0, 1, 2, 3], {})
    slate = plain([7, 7], shown=np.array([1, 0], np.float32))
    assert places(slate, Rules(rotation=True), 2) == [1, 0]


def test_a_lot_lifts_by_its_part_of_the_variety_and_no_more() -> None:
    for lots, order in (
        ((0, 1, 0, 0), [1, 0, 2, 3]),
        ((0, 0, 0, 1), [0, 1, 3, 2]),
        ((0, 0.5, 0, 0), [0, 1, 2, 3]),
    ):
        slate = plain([30, 20, 10, 0], lots=np.array(lots, np.float32))
        assert moved(arrange(slate, Rules(variety=0.5), 4)) == (order, {})
        assert places(slate, Rules(), 4) == [0, 1, 2, 3]


def test_diversity_puts_likenesses_apart_and_alone_orders_by_difference() -> None:
    east, north = [1.0, 0.0], [0.0, 1.0]
    slate = plain([3, 2, 1, 0], vectors=np.array([east, east, north, east], np.float32))
    assert places(slate, Rules(diversity=0.6), 4) == [0, 2, 1, 3]
    assert places(slate, Rules(), 4) == [0, 1, 2, 3]


def test_unknown_scores_are_last_and_a_quota_reaches_them() -> None:
    slate = plain([2, 1, -np.inf], quotas=np.array([[False, False, True]]))
    assert places(slate, Rules(), 3) == [0, 1, 2]
    quota = Rules(quotas=(Quota(0.5, condition=ANY),))
    assert moved(arrange(slate, quota, 3)) == ([0, 2, 1], {2: ("quota",)})
