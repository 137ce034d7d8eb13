"""Who buys soon: read as a plain count reads it, blind to the future, calibrated where the truth is known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.errors import FailedPrecondition
from services.ranking.propensity import Model, Propensity, columns_of, describe, write_propensity
from services.ranking.state import BehaviourState, Columns
from training import metrics
from training.dataset import Events, Shop
from training.photographs import Photographs
from training.propensity import FILE, PART, fit, fit_model, judge, moments, window
from training.queries import DAY
from training.shop_settings import PropensityTraining, ShopSettings

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


def columns(done: Deeds) -> Columns:
    done = sorted(done, key=lambda deed: deed[2])
    when = FIRST * DAY + np.array([hour for *_, hour, _, _ in done], np.int64) * (DAY // 24)
    return Columns(
        user=np.array([who for who, *_ in done], np.int64),
        number=np.ones(len(done), np.int64),
        kind=np.array([kind for _, kind, *_ in done], np.int16),
        channel=np.full(len(done), -1, np.int16),
        occurred=when,
        recorded=when,
        price=np.array([math.nan if price is None else price for *_, price, _ in done]),
        quantity=np.array([many for *_, many in done]),
        sequence=np.arange(1, len(done) + 1),
    )


def plain(mine: Deeds) -> dict[str, float]:
    """What is read of one person's deeds on the hundredth day, one by one."""
    ago = [100 - hour / 24 for *_, hour, _, _ in mine]
    bought = [deed for deed in mine if NAMES[deed[1]] == "purchase"]
    days = sorted({hour // 24 for *_, hour, _, _ in bought})
    buys = [100 - hour / 24 for *_, hour, _, _ in bought]
    paid = [price * many for *_, price, many in bought if price is not None]
    found = {
        "never_bought": float(not bought),
        "purchase_recency": math.log1p(min(buys)) if bought else math.nan,
        "purchase_days": math.log1p(len(days)),
        "purchase_tenure": math.log1p(max(buys)) if bought else math.nan,
        "spent": math.log1p(sum(paid)) if paid else math.nan,
        "overdue": math.nan,
        "recency": math.log1p(min(ago)),
        "tenure": math.log1p(max(ago)),
        "active_days": math.log1p(len({hour // 24 for *_, hour, _, _ in mine})),
    }
    if len(days) > 1:
        gap = (max(buys) - min(buys)) / (len(days) - 1)
        found["overdue"] = math.log1p(min(buys)) - math.log1p(gap)
    for kind, name in enumerate(NAMES):
        mine_of_kind = [when for when, deed in zip(ago, mine, strict=True) if deed[1] == kind]
        for within in (1, 7, 30):
            found[f"{name}_{within}d"] = math.log1p(sum(when < within for when in mine_of_kind))
        found[f"{name}_ever"] = math.log1p(len(mine_of_kind))
    return found


@given(deeds)
@settings(max_examples=150, deadline=None)
def test_people_are_described_as_a_plain_count_says(done: Deeds) -> None:
    past = columns(done)
    who, person = np.unique(past.user, return_inverse=True)
    matrix = describe(past, person, len(who), len(NAMES), TARGETS, (FIRST + 100) * DAY)
    assert matrix.shape == (len(who), len(COLUMNS))
    for key, row in zip(who.tolist(), matrix, strict=True):
        wanted = plain([deed for deed in done if deed[0] == key])
        told = dict(zip(COLUMNS, row.tolist(), strict=True))
        assert told == pytest.approx(wanted, rel=1e-9, abs=1e-9, nan_ok=True)


@given(deeds, deeds, st.integers(1, 90))
@settings(max_examples=150, deadline=None)
def test_a_training_row_does_not_see_what_its_answer_is_made_of(done: Deeds, others: Deeds, day: int) -> None:
    """Whatever happens from the moment on, the rows stay; the answers follow the purchases of those days."""
    early = [deed for deed in done if deed[2] < day * 24] or [(0, 1, 0, None, 1)]
    late = [deed for deed in others if deed[2] >= day * 24]
    moment = (FIRST + day) * DAY
    alone, whole = (
        window(columns(some), len(NAMES), TARGETS, moment, 7) for some in (early, [*early, *late])
    )
    np.testing.assert_array_equal(alone.who, whole.who)
    np.testing.assert_array_equal(alone.matrix, whole.matrix)
    assert not alone.bought.any()
    buyers = {who for who, kind, hour, *_ in late if NAMES[kind] == "purchase" and hour < (day + 7) * 24}
    assert set(whole.who[whole.bought].tolist()) == buyers & set(whole.who.tolist())


@given(st.integers(0, 50), st.integers(0, 200), st.sampled_from([1, 7, 30]), st.integers(2, 6))
def test_what_is_learned_ends_before_what_is_judged_begins(
    first: int, length: int, days: int, most: int
) -> None:
    found = moments(first * DAY, (first + length) * DAY + 5, days, most)
    assert len(found) <= most
    assert (len(found) > 1) == (length >= 3 * days)
    for moment in found[1:]:
        assert moment + days * DAY <= found[0]
    for moment in found:
        assert moment - first * DAY >= days * DAY
        assert moment + days * DAY <= (first + length) * DAY


def rates(people: int) -> np.ndarray:
    """Purchases a day of each, known as the truth: most buy seldom, few often."""
    return np.random.default_rng(1).gamma(0.6, 0.05, people)


def past_of(rate: np.ndarray, days: int, seed: int) -> Columns:
    """Everybody looks once at the beginning and buys at their own rate, independently of what they did."""
    choice = np.random.default_rng(seed)
    count = choice.poisson(rate * days)
    user = np.concatenate([np.arange(len(rate)), np.repeat(np.arange(len(rate)), count)])
    when = np.concatenate([choice.random(len(rate)) * 10, choice.random(count.sum()) * days])
    kind = np.repeat([NAMES.index("click"), NAMES.index("purchase")], [len(rate), count.sum()])
    order = np.argsort(when)
    at = FIRST * DAY + (when[order] * DAY).astype(np.int64)
    many = len(order)
    return Columns(
        user=user[order].astype(np.int64),
        number=np.ones(many, np.int64),
        kind=kind[order].astype(np.int16),
        channel=np.full(many, -1, np.int16),
        occurred=at,
        recorded=at,
        price=np.full(many, np.nan),
        quantity=np.ones(many, np.int64),
        sequence=np.arange(1, many + 1),
    )


def shop_of(past: Columns, **more: object) -> Shop:
    many, people = len(past.user), int(past.user.max()) + 1
    none, nothing = np.full(many, -1, np.int32), np.zeros(many, np.int32)
    events = Events(
        event_ids=np.arange(many).astype(object),
        user=past.user.astype(np.int32),
        user_ids=[f"p{n}" for n in range(people)],
        item=nothing,
        item_ids=["i"],
        number=past.number,
        kind=past.kind,
        time=past.occurred,
        price=past.price,
        position=nothing,
        session=none,
        session_ids=[],
        channel=none,
        channel_names=[],
    )
    made = ShopSettings(event_types=TYPES).model_copy(update=more)
    return Shop(made, [], events, Photographs(Path("none")), {})


@pytest.mark.parametrize("days", [7, 30])
def test_chances_fit_the_truth_where_it_is_known(days: int) -> None:
    """4,000 people: calibrated within .04, and a quarter as far from the truth as the rate alone at most."""
    rate = rates(4000)
    past = past_of(rate, 160, seed=2)
    found = moments(FIRST * DAY, (FIRST + 159) * DAY, days, 5)
    unseen, *windows = (window(past, len(NAMES), TARGETS, moment, days) for moment in found)
    model = fit_model(windows, COLUMNS, days)
    assert model is not None
    chance = 1 / (1 + np.exp(-model.logits(unseen.matrix)))
    truth = 1 - np.exp(-rate[unseen.who] * days)
    assert metrics.classification_metrics(chance, unseen.bought)["ece"] < 0.04
    assert abs(chance.mean() - truth.mean()) < 0.02
    assert np.mean((chance - truth) ** 2) < np.var(truth) / 4
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 1)):
        mine = (chance >= low) & (chance < high)
        assert mine.sum() > 50
        assert abs(chance[mine].mean() - truth[mine].mean()) < 0.05
    said = judge(model, unseen, float(windows[0].bought.mean()))
    assert said["kept"]
    assert said["model"]["log_loss"] < said["base rate"]["log_loss"]


def test_it_is_left_out_where_the_past_says_nothing(tmp_path: Path) -> None:
    """Where everybody buys at one rate no past tells who will; in the same shop of unequal people it does."""
    found = {}
    for name, rate in (("equal", np.full(1500, 0.02)), ("unequal", rates(1500))):
        shop = shop_of(past_of(rate, 80, seed=3))
        (tmp_path / name).mkdir()
        fit(shop, shop.settings, tmp_path / name)
        found[name] = json.loads((tmp_path / name / FILE).read_text())
    assert not found["equal"]["7 days"]["kept"]
    assert found["equal"]["7 days"]["why"] == "it does not beat the base rate"
    assert found["equal"]["30 days"]["why"] == "the events are of too few days"
    assert not (tmp_path / "equal" / PART).exists()
    assert found["unequal"]["7 days"]["kept"]
    chances = Propensity(tmp_path / "unequal" / PART, NAMES)
    assert list(chances.of(past_of(rates(3), 80, seed=4), TARGETS, (FIRST + 80) * DAY)) == [7]


def test_few_who_bought_are_too_few(tmp_path: Path) -> None:
    shop = shop_of(past_of(np.full(30, 0.01), 80, seed=5))
    fit(shop, shop.settings, tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["7 days"]["why"].startswith("too few people bought")


def test_who_is_asked_for_alone_is_read_as_among_all_and_nobody_is_nobody(tmp_path: Path) -> None:
    past = past_of(rates(1000), 100, seed=6)
    moment = (FIRST + 90) * DAY
    model = fit_model([window(past, len(NAMES), TARGETS, moment, 7)], COLUMNS, 7)
    assert model is not None
    write_propensity(tmp_path, [model])
    chances = Propensity(tmp_path, NAMES)
    state = BehaviourState(TYPES)
    state.append(past, {("user", f"p{n}"): n for n in range(1000)})
    among = window(past, len(NAMES), TARGETS, moment, 7)
    told = 1 / (1 + np.exp(-model.logits(among.matrix)))
    for key, wanted in list(zip(among.who.tolist(), told.tolist(), strict=True))[:50]:
        mine = state.everything(f"p{key}", "", moment, 10_000)
        assert chances.of(mine, TARGETS, moment) == {7: pytest.approx(wanted, rel=1e-9)}
    assert chances.of(state.everything("nobody", "", moment, 9), TARGETS, moment) == {}
    with pytest.raises(FailedPrecondition, match="impression_1d"):
        Propensity(tmp_path, ["click", "purchase"])


def test_the_order_of_the_event_types_is_nothing_to_a_model(tmp_path: Path) -> None:
    past = past_of(rates(1000), 100, seed=6)
    moment = (FIRST + 90) * DAY
    model = fit_model([window(past, len(NAMES), TARGETS, moment, 7)], COLUMNS, 7)
    assert model is not None
    write_propensity(tmp_path, [model])
    mine = past.take(np.flatnonzero((past.user == 3) & (past.recorded < moment)))
    told = Propensity(tmp_path, NAMES).of(mine, TARGETS, moment)
    turned = replace(mine, kind=(len(NAMES) - 1 - mine.kind).astype(np.int16))
    assert Propensity(tmp_path, NAMES[::-1]).of(turned, len(NAMES) - 1 - TARGETS, moment) == {
        7: pytest.approx(told[7], rel=1e-9)
    }


def test_some_of_many_people_are_learned_from(tmp_path: Path) -> None:
    past = past_of(rates(600), 80, seed=7)
    some = shop_of(past, propensity=PropensityTraining(people=400, days=(7,)))
    fit(some, some.settings, tmp_path)
    said = json.loads((tmp_path / FILE).read_text())
    assert list(said) == ["7 days"]
    assert 0 < said["7 days"]["rows"] <= 400


def test_what_is_unknown_counts_as_the_mean() -> None:
    model = Model(7, ["a", "b"], mean=[1.0, 2.0], scale=[1.0, 2.0], weights=[3.0, 4.0], bias=0.5)
    known = np.array([[1.0, 2.0], [np.nan, 4.0], [2.0, np.nan]])
    np.testing.assert_allclose(model.logits(known), [0.5, 4.5, 3.5])
