"""The purchase propensity model is calibrated and does not see the future."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import FailedPrecondition
from services.ranking.models.propensity import (
    Propensity,
    PropensityModel,
    columns_of,
    describe,
    write_propensity,
)
from services.ranking.state.event_columns import EventColumns, EventState
from training.core import metrics
from training.data.config import PropensityTraining, ShopConfig
from training.data.dataset import Events, ShopData
from training.data.images import ShopImages
from training.examples.queries import DAY
from training.ranking.propensity import FILE, PART, cutoffs, evaluate, examples_at, fit, fit_model

TYPES = {"impression": 0.0, "click": 0.3, "purchase": 1.0}
NAMES = list(TYPES)
TARGETS = np.array([NAMES.index("purchase")])
COLUMNS = columns_of(NAMES)
FIRST = 20_000
deeds = st.lists(
    st.tuples(
        st.integers(0, 3),  # who
        st.integers(0, len(TYPES) - 1),
        st.integers(0, 99 * 24),  # the hour
        st.none() | st.floats(0.5, 50),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=40,
)
Deeds = list[tuple[int, int, int, float | None, int]]


def columns(deeds: Deeds) -> EventColumns:
    deeds = sorted(deeds, key=lambda deed: deed[2])
    when = FIRST * DAY + np.array([hour for *_, hour, _, _ in deeds], np.int64) * (DAY // 24)
    return EventColumns(
        user=np.array([who for who, *_ in deeds], np.int64),
        item_hash=np.ones(len(deeds), np.int64),
        kind=np.array([kind for _, kind, *_ in deeds], np.int16),
        channel=np.full(len(deeds), -1, np.int16),
        occurred=when,
        recorded=when,
        price=np.array([math.nan if price is None else price for *_, price, _ in deeds]),
        quantity=np.array([many for *_, many in deeds]),
        sequence=np.arange(1, len(deeds) + 1),
    )


def plain(deeds: Deeds) -> dict[str, float]:
    """What is read of one person's deeds on the hundredth day, one by one."""
    ago = [100 - hour / 24 for *_, hour, _, _ in deeds]
    purchases = [deed for deed in deeds if NAMES[deed[1]] == "purchase"]
    days = sorted({hour // 24 for *_, hour, _, _ in purchases})
    buys = [100 - hour / 24 for *_, hour, _, _ in purchases]
    paid = [price * many for *_, price, many in purchases if price is not None]
    features = {
        "never_bought": float(not purchases),
        "purchase_recency": math.log1p(min(buys)) if purchases else math.nan,
        "purchase_days": math.log1p(len(days)),
        "purchase_tenure": math.log1p(max(buys)) if purchases else math.nan,
        "spent": math.log1p(sum(paid)) if paid else math.nan,
        "overdue": math.nan,
        "recency": math.log1p(min(ago)),
        "tenure": math.log1p(max(ago)),
        "active_days": math.log1p(len({hour // 24 for *_, hour, _, _ in deeds})),
    }
    if len(days) > 1:
        gap = (max(buys) - min(buys)) / (len(days) - 1)
        features["overdue"] = math.log1p(min(buys)) - math.log1p(gap)
    for kind, name in enumerate(NAMES):
        mine_of_kind = [when for when, deed in zip(ago, deeds, strict=True) if deed[1] == kind]
        for within in (1, 7, 30):
            features[f"{name}_{within}d"] = math.log1p(sum(when < within for when in mine_of_kind))
        features[f"{name}_ever"] = math.log1p(len(mine_of_kind))
    return features


@given(deeds)
@settings(max_examples=150, deadline=None)
def test_user_features_equal_a_plain_count(events: Deeds) -> None:
    past = columns(events)
    who, user = np.unique(past.user, return_inverse=True)
    matrix = describe(past, user, len(who), len(NAMES), TARGETS, (FIRST + 100) * DAY)
    assert matrix.shape == (len(who), len(COLUMNS))
    for key, row in zip(who.tolist(), matrix, strict=True):
        expected = plain([deed for deed in events if deed[0] == key])
        features = dict(zip(COLUMNS, row.tolist(), strict=True))
        assert features == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


@given(deeds, deeds, st.integers(1, 90))
@settings(max_examples=150, deadline=None)
def test_a_training_row_does_not_see_its_label_period(events: Deeds, others: Deeds, day: int) -> None:
    """Whatever happens from the moment on, the rows stay; the answers follow the purchases of those days."""
    early = [deed for deed in events if deed[2] < day * 24] or [(0, 1, 0, None, 1)]
    late = [deed for deed in others if deed[2] >= day * 24]
    moment = (FIRST + day) * DAY
    alone, whole = (
        examples_at(columns(some), len(NAMES), TARGETS, moment, 7) for some in (early, [*early, *late])
    )
    np.testing.assert_array_equal(alone.users, whole.users)
    np.testing.assert_array_equal(alone.matrix, whole.matrix)
    assert not alone.purchased.any()
    buyers = {who for who, kind, hour, *_ in late if NAMES[kind] == "purchase" and hour < (day + 7) * 24}
    assert set(whole.users[whole.purchased].tolist()) == buyers & set(whole.users.tolist())


@given(st.integers(0, 50), st.integers(0, 200), st.sampled_from([1, 7, 30]), st.integers(2, 6))
def test_the_training_period_ends_before_the_evaluation_period(
    first: int, length: int, days: int, most: int
) -> None:
    times = cutoffs(first * DAY, (first + length) * DAY + 5, days, most)
    assert len(times) <= most
    assert (len(times) > 1) == (length >= 3 * days)
    for moment in times[1:]:
        assert moment + days * DAY <= times[0]
    for moment in times:
        assert moment - first * DAY >= days * DAY
        assert moment + days * DAY <= (first + length) * DAY


def rates(users: int) -> np.ndarray:
    """Purchases a day of each, known as the truth: most buy seldom, few often."""
    return np.random.default_rng(1).gamma(0.6, 0.05, users)


def past_of(rate: np.ndarray, days: int, seed: int) -> EventColumns:
    """Everybody looks once at the beginning and buys at their own rate, independently of what they did."""
    choice = np.random.default_rng(seed)
    count = choice.poisson(rate * days)
    user = np.concatenate([np.arange(len(rate)), np.repeat(np.arange(len(rate)), count)])
    when = np.concatenate([choice.random(len(rate)) * 10, choice.random(count.sum()) * days])
    kind = np.repeat([NAMES.index("click"), NAMES.index("purchase")], [len(rate), count.sum()])
    order = np.argsort(when)
    at = FIRST * DAY + (when[order] * DAY).astype(np.int64)
    many = len(order)
    return EventColumns(
        user=user[order].astype(np.int64),
        item_hash=np.ones(many, np.int64),
        kind=kind[order].astype(np.int16),
        channel=np.full(many, -1, np.int16),
        occurred=at,
        recorded=at,
        price=np.full(many, np.nan),
        quantity=np.ones(many, np.int64),
        sequence=np.arange(1, many + 1),
    )


def shop_of(past: EventColumns, **more: object) -> ShopData:
    many, users = len(past.user), int(past.user.max()) + 1
    none, nothing = np.full(many, -1, np.int32), np.zeros(many, np.int32)
    events = Events(
        event_ids=np.arange(many).astype(object),
        user=past.user.astype(np.int32),
        user_ids=[f"p{n}" for n in range(users)],
        item=nothing,
        item_ids=["i"],
        number=past.item_hash,
        kind=past.kind,
        time=past.occurred,
        price=past.price,
        position=nothing,
        session=none,
        session_ids=[],
        channel=none,
        channel_names=[],
    )
    settings = ShopConfig(event_types=TYPES).model_copy(update=more)
    return ShopData(settings, [], events, ShopImages(Path("none")), {})


@pytest.mark.parametrize("days", [7, 30])
def test_probabilities_match_a_known_truth(days: int) -> None:
    """4,000 people: calibrated within .04, and a quarter as far from the truth as the rate alone at most."""
    rate = rates(4000)
    past = past_of(rate, 160, seed=2)
    times = cutoffs(FIRST * DAY, (FIRST + 159) * DAY, days, 5)
    unseen, *windows = (examples_at(past, len(NAMES), TARGETS, moment, days) for moment in times)
    model = fit_model(windows, COLUMNS, days)
    assert model is not None
    chance = 1 / (1 + np.exp(-model.logits(unseen.matrix)))
    truth = 1 - np.exp(-rate[unseen.users] * days)
    assert metrics.classification_metrics(chance, unseen.purchased)["ece"] < 0.04
    assert abs(chance.mean() - truth.mean()) < 0.02
    assert np.mean((chance - truth) ** 2) < np.var(truth) / 4
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 1)):
        in_bin = (chance >= low) & (chance < high)
        assert in_bin.sum() > 50
        assert abs(chance[in_bin].mean() - truth[in_bin].mean()) < 0.05
    report = evaluate(model, unseen, float(windows[0].purchased.mean()))
    assert report["published"]
    assert report["model"]["log_loss"] < report["base rate"]["log_loss"]


def test_a_model_without_signal_is_not_published(tmp_path: Path) -> None:
    """Where everybody buys at one rate no past tells who will; in the same shop of unequal people it does."""
    verdicts = {}
    for name, rate in (("equal", np.full(1500, 0.02)), ("unequal", rates(1500))):
        shop = shop_of(past_of(rate, 80, seed=3))
        (tmp_path / name).mkdir()
        fit(tmp_path / name, shop, shop.settings)
        verdicts[name] = json.loads((tmp_path / name / FILE).read_text())
    assert not verdicts["equal"]["7 days"]["published"]
    assert verdicts["equal"]["7 days"]["reason"] == "it does not beat the base rate"
    assert verdicts["equal"]["30 days"]["reason"] == "the events cover too few days"
    assert not (tmp_path / "equal" / PART).exists()
    assert verdicts["unequal"]["7 days"]["published"]
    chances = Propensity(tmp_path / "unequal" / PART, NAMES)
    assert list(chances.of(past_of(rates(3), 80, seed=4), TARGETS, (FIRST + 80) * DAY)) == [7]


def test_too_few_buyers_give_no_model(tmp_path: Path) -> None:
    shop = shop_of(past_of(np.full(30, 0.01), 80, seed=5))
    fit(tmp_path, shop, shop.settings)
    assert json.loads((tmp_path / FILE).read_text())["7 days"]["reason"].startswith("too few users bought")


def test_a_single_user_is_scored_as_in_a_batch(tmp_path: Path) -> None:
    past = past_of(rates(1000), 100, seed=6)
    moment = (FIRST + 90) * DAY
    model = fit_model([examples_at(past, len(NAMES), TARGETS, moment, 7)], COLUMNS, 7)
    assert model is not None
    write_propensity(tmp_path, [model])
    chances = Propensity(tmp_path, NAMES)
    state = EventState(TYPES)
    state.append(past, {("user", f"p{n}"): n for n in range(1000)})
    among = examples_at(past, len(NAMES), TARGETS, moment, 7)
    probabilities = 1 / (1 + np.exp(-model.logits(among.matrix)))
    for key, expected in list(zip(among.users.tolist(), probabilities.tolist(), strict=True))[:50]:
        events = state.everything(f"p{key}", "", moment, 10_000)
        assert chances.of(events, TARGETS, moment) == {7: pytest.approx(expected, rel=1e-9)}
    assert chances.of(state.everything("nobody", "", moment, 9), TARGETS, moment) == {}
    with pytest.raises(FailedPrecondition, match="impression_1d"):
        Propensity(tmp_path, ["click", "purchase"])


def test_a_model_ignores_the_order_of_event_types(tmp_path: Path) -> None:
    past = past_of(rates(1000), 100, seed=6)
    moment = (FIRST + 90) * DAY
    model = fit_model([examples_at(past, len(NAMES), TARGETS, moment, 7)], COLUMNS, 7)
    assert model is not None
    write_propensity(tmp_path, [model])
    events = past.take(np.flatnonzero((past.user == 3) & (past.recorded < moment)))
    probabilities = Propensity(tmp_path, NAMES).of(events, TARGETS, moment)
    reversed_types = replace(events, kind=(len(NAMES) - 1 - events.kind).astype(np.int16))
    assert Propensity(tmp_path, NAMES[::-1]).of(reversed_types, len(NAMES) - 1 - TARGETS, moment) == {
        7: pytest.approx(probabilities[7], rel=1e-9)
    }


def test_training_samples_many_users(tmp_path: Path) -> None:
    past = past_of(rates(600), 80, seed=7)
    some = shop_of(past, propensity=PropensityTraining(users=400, days=(7,)))
    fit(tmp_path, some, some.settings)
    report = json.loads((tmp_path / FILE).read_text())
    assert list(report) == ["7 days"]
    assert 0 < report["7 days"]["rows"] <= 400


def test_an_unknown_value_counts_as_the_mean() -> None:
    model = PropensityModel(7, ["a", "b"], mean=[1.0, 2.0], scale=[1.0, 2.0], weights=[3.0, 4.0], bias=0.5)
    rows = np.array([[1.0, 2.0], [np.nan, 4.0], [2.0, np.nan]])
    np.testing.assert_allclose(model.logits(rows), [0.5, 4.5, 3.5])
