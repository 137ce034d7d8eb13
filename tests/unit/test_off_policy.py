"""Off-policy estimators are unbiased in a simulated world."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analytics.off_policy import (
    POLICIES,
    LoggedDraws,
    evaluate_policy,
    greedy,
    logged_reward,
    proportional,
    uniform,
)
from services.gateway.rules.exploration import sample_pool

relevances = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(relevances, st.data())
@settings(max_examples=200)
def test_a_policy_is_a_distribution_over_the_possible_items(
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
def test_the_importance_weighted_mean_is_that_of_the_policy(
    weights: list[float], data: st.DataObject
) -> None:
    chances = np.array(weights) / sum(weights)
    count = len(weights)
    reward = np.array(data.draw(st.lists(st.floats(0, 5), min_size=count, max_size=count)))
    relevance = np.linspace(0, 1, count)
    possible = np.ones(count, bool)
    for policy in (uniform, greedy, proportional):
        truth = (policy(relevance, possible) * reward).sum()
        # Over all that may be drawn, as often as it is.
        each = [
            evaluate_policy(draws_of([at], [relevance], [chances[at]], [reward[at]]), policy)
            for at in range(count)
        ]
        ips = sum(p * one.estimates["ips"].mean for p, one in zip(chances, each, strict=True))
        assert ips == pytest.approx(truth, abs=1e-9)


def draws_of(
    choices: list[int], pools: list[np.ndarray], propensities: list[float], rewards: list[float]
) -> LoggedDraws:
    possible = [np.ones(len(pool), bool) for pool in pools]
    return LoggedDraws(pools, possible, np.array(choices), np.array(propensities), np.array(rewards, float))


def world(seed: int, many: int = 1500) -> tuple[LoggedDraws, dict[str, float]]:
    """Draws as exploring makes them, where the chance of a click is .05 + .4 * relevance, and the truth."""
    rng = np.random.default_rng(seed)
    choices, pools, propensities, rewards = [], [], [], []
    rewards_by_policy: dict[str, list[float]] = {name: [] for name in POLICIES}
    for n in range(many):
        relevance = rng.random(8)
        zero = np.zeros(8)
        pool = sample_pool(np.arange(8), zero > 0, zero, zero, 0.1 * relevance, seed=seed * many + n, depth=1)
        draw = pool.draw(0, np.ones(8, bool))
        assert draw is not None
        chance = 0.05 + 0.4 * relevance
        choices.append(draw.pool_index)
        pools.append(relevance)
        propensities.append(draw.propensity)
        rewards.append(float(rng.random() < chance[draw.pool_index]))
        for name, policy in POLICIES.items():
            rewards_by_policy[name].append(float((policy(relevance, np.ones(8, bool)) * chance).sum()))
    return draws_of(choices, pools, propensities, rewards), {
        n: float(np.mean(e)) for n, e in rewards_by_policy.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_intervals_have_about_their_nominal_coverage(policy: str) -> None:
    coverage = {"ips": 0, "snips": 0, "dr": 0}
    widths = dict.fromkeys(coverage, 0.0)
    worlds = 40
    for seed in range(worlds):
        draws, truth = world(seed)
        estimate = evaluate_policy(draws, POLICIES[policy])
        assert 1 <= estimate.effective_draws <= len(draws.actions)
        for name, one in estimate.estimates.items():
            coverage[name] += one.low <= truth[policy] <= one.high
            widths[name] += one.high - one.low
    # 95 % of 40 are 38; fewer than 33 are once in a thousand.
    assert min(coverage.values()) >= 33
    assert widths["dr"] < widths["ips"]


def test_the_estimate_of_the_logging_policy_is_the_observed_mean() -> None:
    draws, _ = world(3, many=400)
    estimate = logged_reward(draws)
    assert estimate.low < estimate.mean == draws.rewards.mean() < estimate.high
