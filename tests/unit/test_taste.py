"""The taste model: posteriors against an optimizer, columns of a view, and what fitting learns."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.ranking.models.taste import (
    MAX_OBSERVATIONS,
    Observations,
    PriceScale,
    TasteModel,
    TasteSettings,
    TasteView,
    posterior_weights,
    read_taste,
    user_part,
    write_taste,
)
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import DAY, item_stats
from services.ranking.state.query_builder import User, make_query, shown_items
from services.ranking.state.user_query import Impressions, UserQuery
from services.ranking.state.value_codes import AttributeValues
from tests.support.histories import EPOCH, FIRST, HOUR, Interaction, make_shop, shop_config
from training.examples.shop_state import state_of
from training.ranking import taste as taste_fit
from training.ranking.taste import TasteFit, fit_taste

PURCHASES = np.array([2], np.int16)
WEIGHT = {"impression": 0.0, "click": 0.25, "purchase": 1.0}


def observations(random: np.random.Generator, count: int, width: int = 3) -> Observations:
    engaged = random.random(count) < 0.4
    return Observations(
        random.integers(-1, 3, (count, width)).astype(np.int32),
        random.standard_normal(count),
        random.standard_normal(count) - 1,
        engaged,
        engaged & (random.random(count) < 0.5),
        random.random(count) < 0.3,
    )


def kernel_of(one: Observations, other: Observations, variances: np.ndarray) -> np.ndarray:
    """The prior covariance of the user's part for items of both, pair by pair."""
    width = one.codes.shape[1]
    result = np.empty((len(one.price), len(other.price)))
    for i in range(len(result)):
        for j in range(result.shape[1]):
            same = (one.codes[i] == other.codes[j]) & (one.codes[i] >= 0)
            near = max(1 - abs(one.price[i] - other.price[j]) / 2, 0)
            result[i, j] = same @ variances[:width] + near * variances[width] + variances[width + 1]
    return result


@given(st.integers(0, 1 << 30), st.integers(1, 12), st.sampled_from([0.0, 0.7]))
@settings(deadline=None, max_examples=40)
def test_the_part_of_a_user_is_the_mode_of_its_posterior(seed: int, count: int, slope: float) -> None:
    random = np.random.default_rng(seed)
    seen, others = observations(random, count), observations(random, 5)
    variances = np.array([0.8, 0.3, 0.1, 0.4, 0.2])
    covariance = kernel_of(seen, seen, variances) + 1e-9 * np.eye(count)
    precision = np.linalg.inv(covariance)

    def loss(part: np.ndarray) -> float:
        logit = seen.appeal + part
        total = log_expit(np.where(seen.engaged, logit, -logit)).sum()
        if slope:
            judged = seen.engaged & (seen.strong | ~seen.is_open)
            strong = slope * logit[judged] - 0.5
            total += log_expit(np.where(seen.strong[judged], strong, -strong)).sum()
        return float(part @ precision @ part / 2 - total)

    mode = minimize(loss, np.zeros(count), method="BFGS", options={"gtol": 1e-7}).x
    weights = posterior_weights(seen, variances, slope, -0.5)
    part = user_part(seen.codes, seen.price, seen, weights, variances)
    assert loss(part) <= loss(mode) + 1e-4
    for_others = user_part(others.codes, others.price, seen, weights, variances)
    np.testing.assert_allclose(for_others, kernel_of(others, seen, variances) @ weights, atol=1e-10)
    gradient = seen.engaged - expit(seen.appeal + part)
    if slope:
        strong = seen.strong - expit(slope * (seen.appeal + part) - 0.5)
        gradient = gradient + seen.engaged * (seen.strong | ~seen.is_open) * slope * strong
    np.testing.assert_allclose(weights, gradient, atol=0.01)  # which holds at a mode


def item(number: int, color: str = "red", price: float | None = 10.0) -> Item:
    return Item(f"i{number}", f"thing {number}", attributes=(Attribute("colour", (color,)),), price=price)


def table_of(items: list[Item]) -> ItemTable:
    table = ItemTable()
    table.apply(Change(item_hash(one.id), n + 1, one, EPOCH, {}) for n, one in enumerate(items))
    return table


def model_of(items: list[Item]) -> TasteModel:
    """A model in which single items have effects 1, 2, 3 and so on."""
    order = np.argsort([item_hash(one.id) for one in items])
    hashes = np.array([item_hash(items[n].id) for n in order], np.int64)
    parameters = TasteSettings(
        attributes=("colour",),
        variances=(1.0, 0.5, 0.1),
        value_effects={"colour": {"red": 0.25, "blue": -0.5}},
        price_effects=(0.1, -0.2),
        intercept=-1.0,
        strong_slope=0.5,
        strong_intercept=0.0,
        price=PriceScale("colour", {"red": math.log(10)}, math.log(20), 0.5),
    )
    return TasteModel(parameters, hashes, (order + 1).astype(np.float32))


def user(
    session: list[int], history: list[int], shown: list[int], engaged: list[bool], strong: float = 1.0
) -> UserQuery:
    """A user of these rows; all interactions have the weight `strong`, the lightest has .25."""
    rows = np.array(shown, np.int64)
    return UserQuery(
        session=np.array(session, np.int64),
        session_weights=np.full(len(session), strong, np.float32),
        history=np.array(history, np.int64),
        ages=np.ones(len(history), np.float32),
        weights=np.full(len(history), strong, np.float32),
        purchased=np.zeros(len(history), bool),
        channels=np.zeros(len(history), np.int16),
        impressions=Impressions(rows, rows, np.array(engaged, bool), np.zeros(len(rows), bool), 0.25),
    )


class Catalog:
    """Six items, three of each color, the first four with effects of their own."""

    def __init__(self) -> None:
        self.items = [item(n, ("red", "blue")[n % 2], 10.0 * (1 + n)) for n in range(6)]
        self.table, self.model = table_of(self.items), model_of(self.items[:4])
        self.stats = item_stats(EventState(WEIGHT), self.table, FIRST * DAY)
        self.view = TasteView(self.model, self.table, AttributeValues(self.table))

    def columns(self, query: UserQuery) -> list[np.ndarray]:
        return self.view.columns(query, np.arange(self.table.length), self.stats)


def test_the_appeal_is_the_sum_of_effects_and_a_new_item_has_none_of_its_own() -> None:
    catalog = Catalog()
    appeal, as_new, session, history = catalog.columns(user([], [], [], []))
    np.testing.assert_allclose(appeal - as_new, [1, 2, 3, 4, 0, 0], atol=1e-6)
    deviation = (math.log(30) - math.log(10)) / 0.5
    expected = -1 + 0.25 + 0.1 * deviation - 0.2 * deviation**2
    assert as_new[2] == pytest.approx(expected, abs=1e-6)  # of red, 30.0
    assert np.isnan(session).all()
    assert np.isnan(history).all()


def test_items_without_a_price_or_of_an_absurd_one_have_a_finite_appeal() -> None:
    prices = (None, 0.0, 1e30, 1e-30, 10.0)
    items = [item(n, "red", price) for n, price in enumerate(prices)]
    table = table_of(items)
    view = TasteView(model_of(items[:1]), table, AttributeValues(table))
    stats = item_stats(EventState(WEIGHT), table, FIRST * DAY)
    _, as_new, _, _ = view.columns(user([], [], [], []), np.arange(len(items)), stats)
    assert np.isfinite(as_new).all()
    assert as_new[0] == as_new[1] == as_new[4]


def test_an_update_of_an_item_changes_its_columns() -> None:
    catalog = Catalog()
    query = user([0], [], [], [])
    before = catalog.columns(query)
    changed = replace(catalog.items[5], price=15.0)
    catalog.table.apply([Change(item_hash("i5"), 99, changed, EPOCH, {})])
    after = catalog.columns(user([0], [], [], []))
    assert after[1][5] != before[1][5]
    np.testing.assert_array_equal(after[1][:5], before[1][:5])


def test_what_a_user_engages_with_raises_its_kind_and_what_they_pass_over_lowers_it() -> None:
    catalog = Catalog()
    _, _, session, history = catalog.columns(user([0], [], [], []))
    assert session[2] > session[3] >= 0  # red like the item of the session, though of another price
    np.testing.assert_array_equal(history, 0)
    _, _, session, history = catalog.columns(user([], [], [0, 2], [False, False]))
    np.testing.assert_array_equal(session, 0)
    assert history[4] < history[5] <= 0


def test_an_interaction_that_follows_an_impression_counts_once() -> None:
    catalog = Catalog()
    shown = catalog.columns(user([], [], [0], [True]))
    both = catalog.columns(user([], [0], [0], [True]))
    np.testing.assert_array_equal(shown, both)
    twice = catalog.columns(user([], [1, 1, 1], [], []))
    np.testing.assert_array_equal(twice, catalog.columns(user([], [1], [], [])))


@pytest.mark.parametrize("is_recorded", [True, False])
def test_an_item_of_the_session_counts_for_the_session_alone(is_recorded: bool) -> None:
    """Whether or not its event is recorded already: in training it never is."""
    catalog = Catalog()
    history = [0] if is_recorded else []
    columns = catalog.columns(user([0, 0], history, [0, 1], [is_recorded, False]))
    np.testing.assert_array_equal(columns, catalog.columns(user([0], [], [1], [False])))
    np.testing.assert_array_equal(columns[2] > 0, catalog.columns(user([0], [], [], []))[2] > 0)


def test_what_may_still_be_purchased_in_the_session_is_not_passed_over() -> None:
    catalog = Catalog()
    click = catalog.columns(user([0], [], [], [], strong=0.25))[2]
    cart = catalog.columns(user([0], [], [], [], strong=0.5))[2]
    past = catalog.columns(user([], [0], [], [], strong=0.25))[3]
    assert cart[0] > click[0] > past[0] > 0


def test_a_stronger_interaction_says_more() -> None:
    catalog = Catalog()
    click = catalog.columns(user([], [0], [], [], strong=0.25))[3]
    purchase = catalog.columns(user([], [0], [], [], strong=1.0))[3]
    assert purchase[2] > click[2] > 0


def test_only_the_latest_observations_count() -> None:
    catalog = Catalog()
    latest = [0, 1] * (MAX_OBSERVATIONS // 2)
    engaged = [True, False] * (MAX_OBSERVATIONS // 2)
    with_more = user([], [], [*latest, *[1] * 50], [*engaged, *[True] * 50])
    np.testing.assert_array_equal(catalog.columns(with_more), catalog.columns(user([], [], latest, engaged)))


def test_a_model_is_the_same_after_it_is_written_and_read(tmp_path: Path) -> None:
    catalog = Catalog()
    write_taste(tmp_path / "taste", catalog.model)
    again = TasteView(read_taste(tmp_path / "taste"), catalog.table, AttributeValues(catalog.table))
    query = user([0], [1], [2, 3], [True, False])
    expected = catalog.columns(replace(query, derived={}))
    np.testing.assert_array_equal(again.columns(query, np.arange(6), catalog.stats), expected)


events = st.lists(
    st.tuples(
        st.sampled_from(["impression", "click", "purchase"]), st.integers(0, 3), st.integers(0, 60 * 24 * 4)
    ),
    min_size=1,
    max_size=25,
)


@given(events)
@settings(deadline=None)
def test_an_impression_is_engaged_with_if_an_interaction_follows_within_a_day(
    rows: list[tuple[str, int, int]],
) -> None:
    items = [item(n) for n in range(3)]  # the fourth item is none of the catalog
    minute = HOUR // 60
    shop = make_shop(
        items,
        [Interaction("p0", f"i{n}", kind, FIRST * DAY + at * minute) for kind, n, at in rows],
        shop_config("hour"),
    )
    state, table, end = state_of(shop), table_of(items), (FIRST + 9) * DAY
    impressions, past = state.impressions("p0", "", end, 99), state.history("p0", "", end, 99)
    assert len(impressions.user) + len(past.user) == len(rows)
    shown = shown_items(state, table, impressions, past, PURCHASES)
    expected = []
    for kind, number, at in rows:
        if kind != "impression" or number == 3:
            continue
        same = [(k, t) for k, n, t in rows if n == number and k != "impression"]
        if any(k == "purchase" and t < at for k, t in same):
            continue
        later = [k for k, t in same if at <= t < at + 24 * 60]
        row, time = int(table.rows([item_hash(f"i{number}")])[0]), FIRST * DAY + at * minute
        expected.append((row, time, bool(later), "purchase" in later))
    result = zip(
        *(c.tolist() for c in (shown.rows, shown.occurred, shown.engaged, shown.strong)), strict=True
    )
    assert sorted(result) == sorted(expected)
    assert shown.occurred.tolist() == sorted(shown.occurred.tolist(), reverse=True)
    assert shown.lightest == WEIGHT["click"]
    query = make_query(state, table, User("p0"), past, end, PURCHASES, impressions)
    np.testing.assert_array_equal(query.impressions.rows, shown.rows)
    assert not len(make_query(state, table, User("p0"), past, end, PURCHASES).impressions.rows)


def simulated(taste: float, users: int = 150, pages: int = 6, late_items: int = 0) -> TasteFit:
    """Users who like colors by a deviation `taste` and makers not at all; all like cheap and well-made items.

    Six days show ten items to each user, and the first `pages` of them are kept. Half of the items are of
    quality. The last `late_items` are shown on the last day only.
    """
    random = np.random.default_rng(0)
    colors, makers, count = 6, 6, 120
    color, maker = random.integers(0, colors, count), random.integers(0, makers, count)
    deviation, quality = random.standard_normal(count), np.arange(count) % 2
    items = [
        Item(
            f"i{n}",
            f"thing {n}",
            attributes=(Attribute("colour", (f"c{color[n]}",)), Attribute("maker", (f"m{maker[n]}",))),
            price=20 * math.exp(0.4 * deviation[n]),
        )
        for n in range(count)
    ]
    likes = taste * random.standard_normal((users, colors))
    rows = []
    for person in range(users):
        for day in range(6):
            time = (FIRST + day) * DAY + person * HOUR // 10
            for n in random.permutation(count if day == 5 else count - late_items)[:10]:
                rows.append(Interaction(f"p{person}", f"i{n}", "impression", time))
                logit = -1.5 + likes[person, color[n]] - 0.6 * deviation[n] + 1.2 * quality[n]
                if random.random() < expit(logit):
                    rows.append(Interaction(f"p{person}", f"i{n}", "click", time + HOUR // 60))
    rows = [row for row in rows if row.time < (FIRST + pages) * DAY]
    shop = make_shop(items, rows, shop_config("hour"))
    return TasteFit(state_of(shop), table_of(items), shop.events.user_ids, ("colour", "maker"), PURCHASES)


def test_fitting_finds_which_attribute_users_differ_in_and_what_all_like() -> None:
    fit = simulated(taste=1.5)
    model = fit_taste(fit, (FIRST + 9) * DAY)
    assert model is not None
    variance = dict(zip((*model.settings.attributes, "price", "user"), model.settings.variances, strict=True))
    assert variance["colour"] > 0.3
    assert variance["colour"] > 5 * max(variance.get("maker", 0), variance["price"])
    assert model.settings.price_effects[0] < -0.2
    effects = dict(zip(model.item_hashes.tolist(), model.item_effects.tolist(), strict=True))
    good, bad = ([effects[item_hash(f"i{n}")] for n in range(start, 120, 2)] for start in (1, 0))
    assert np.mean(good) > np.mean(bad) + 0.5
    again = fit_taste(fit, (FIRST + 9) * DAY, like=model)
    assert again is not None
    assert again.settings == model.settings
    np.testing.assert_array_equal(again.item_effects, model.item_effects)


def test_an_item_that_is_shown_later_only_counts_by_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it is served: its appeal is that of its color, maker and price."""
    fit, appeals = simulated(taste=1.5, late_items=40), []
    later_impressions = taste_fit._LaterImpressions

    def recorded(catalog: Any, pairs: Any, appeal: np.ndarray) -> Any:
        appeals.append(appeal)
        return later_impressions(catalog, pairs, appeal)

    monkeypatch.setattr(taste_fit, "_LaterImpressions", recorded)
    assert fit_taste(fit, (FIRST + 9) * DAY) is not None
    assert len(appeals) == 2  # one half of the users, and the other
    price = fit.table.numbers("price")
    assert price is not None
    late = np.arange(80, 120)
    assert np.corrcoef(appeals[0][late], np.log(price[late, 0]))[0, 1] < -0.5  # all like what is cheap


def test_events_after_the_end_change_no_model() -> None:
    whole, early = simulated(taste=1.5), simulated(taste=1.5, pages=4)
    model, expected = (fit_taste(fit, (FIRST + 4) * DAY) for fit in (whole, early))
    assert model is not None
    assert expected is not None
    assert model.settings == expected.settings
    np.testing.assert_array_equal(model.item_effects, expected.item_effects)


def test_where_users_do_not_differ_there_is_no_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert fit_taste(simulated(taste=0.0), (FIRST + 9) * DAY) is None
    assert "tastes gain" in caplog.text


def test_too_few_impressions_make_no_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit = simulated(taste=1.5, users=20)
    assert fit_taste(fit, (FIRST + 9) * DAY) is None
    assert "1200 items shown" in caplog.text
    assert fit_taste(fit, FIRST * DAY) is None  # nothing was shown yet
