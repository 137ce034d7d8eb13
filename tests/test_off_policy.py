"""What other ways to explore would have led to: the estimators against a world whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.analysis.off_policy import POLICIES, Draws, alike, greedy, judged, logged, proportional
from services.gateway.trial import trial

relevances = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(relevances, st.data())
@settings(max_examples=200)
def test_a_policy_is_a_distribution_over_what_is_possible(
    relevance: list[float], data: st.DataObject
) -> None:
    count = len(relevance)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any)))
    values = np.array(relevance)
    for policy in POLICIES.values():
        chances = policy(values, mask)
        assert chances.sum() == pytest.approx(1)
        assert (chances >= 0).all()
        assert (chances[~mask] == 0).all()
    assert (values[greedy(values, mask) > 0] == values[mask].max()).all()


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=6), st.data())
@settings(max_examples=100)
def test_weighed_by_what_was_drawn_the_mean_is_the_policys_own(
    weights: list[float], data: st.DataObject
) -> None:
    chances = np.array(weights) / sum(weights)
    count = len(weights)
    reward = np.array(data.draw(st.lists(st.floats(0, 5), min_size=count, max_size=count)))
    relevance = np.linspace(0, 1, count)
    possible = np.ones(count, bool)
    for policy in (alike, greedy, proportional):
        truth = (policy(relevance, possible) * reward).sum()
        # Over all that may be drawn, as often as it is.
        each = [
            judged(draws_of([at], [relevance], [chances[at]], [reward[at]]), policy) for at in range(count)
        ]
        ips = sum(p * one.estimates["ips"].mean for p, one in zip(chances, each, strict=True))
        assert ips == pytest.approx(truth, abs=1e-9)


def draws_of(
    drawn: list[int], pools: list[np.ndarray], propensities: list[float], rewards: list[float]
) -> Draws:
    possible = [np.ones(len(pool), bool) for pool in pools]
    return Draws(pools, possible, np.array(drawn), np.array(propensities), np.array(rewards, float))


def world(seed: int, many: int = 1500) -> tuple[Draws, dict[str, float]]:
    """Draws as exploring makes them, where the chance of a click is .05 + .4 * relevance, and the truth."""
    rng = np.random.default_rng(seed)
    drawn, pools, propensities, rewards = [], [], [], []
    earned: dict[str, list[float]] = {name: [] for name in POLICIES}
    for n in range(many):
        relevance = rng.random(8)
        zero = np.zeros(8)
        made = trial(np.arange(8), zero > 0, zero, zero, 0.1 * relevance, seed=seed * many + n, depth=1)
        draw = made.draw(0, np.ones(8, bool))
        assert draw is not None
        chance = 0.05 + 0.4 * relevance
        drawn.append(draw.drawn)
        pools.append(relevance)
        propensities.append(draw.propensity)
        rewards.append(float(rng.random() < chance[draw.drawn]))
        for name, policy in POLICIES.items():
            earned[name].append(float((policy(relevance, np.ones(8, bool)) * chance).sum()))
    return draws_of(drawn, pools, propensities, rewards), {n: float(np.mean(e)) for n, e in earned.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_intervals_hold_the_truth_about_as_often_as_they_say(policy: str) -> None:
    held = {"ips": 0, "snips": 0, "dr": 0}
    widths = dict.fromkeys(held, 0.0)
    worlds = 40
    for seed in range(worlds):
        draws, truth = world(seed)
        found = judged(draws, POLICIES[policy])
        assert 1 <= found.worth <= len(draws.drawn)
        for name, one in found.estimates.items():
            held[name] += one.low <= truth[policy] <= one.high
            widths[name] += one.high - one.low
    # 95 % of 40 are 38; fewer than 33 are once in a thousand.
    assert min(held.values()) >= 33
    assert widths["dr"] < widths["ips"]


def test_what_was_served_is_its_own_mean() -> None:
    draws, _ = world(3, many=400)
    found = logged(draws)
    assert found.low < found.mean == draws.rewards.mean() < found.high
