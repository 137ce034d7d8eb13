"""Offers are valued by the formula and selected optimally, also over the real services."""

import itertools
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.gateway.offers import valuation
from services.gateway.offers.valuation import (
    SEGMENTS,
    Offer,
    OfferReason,
    OfferValue,
    Shopper,
    ineligibility,
    offer_value,
    relevance_shares,
    select_offers,
)
from services.ranking.users.profiles import Rfm, segment
from tests.support.prediction_models import ITEMS, purchase_probability, write_history
from tests.support.shop_server import Shop, Stub, equals_filter, purchase, session, violations

NOW = datetime(2026, 3, 1, tzinfo=UTC)
ANN = Shopper("loyal", is_buyer=True, basket_value=20.0, purchase_probability=0.5, days=7)
TEN_OFF = Offer("o", share=0.1, amount=0.0)
HALF = np.array([0.3, 0.2])
PRICES = np.array([5.0, 10.0])


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[float], list[float], float, int]:
    count = draw(st.integers(1, 10))
    amounts = st.integers(1, 30) if draw(st.booleans()) else st.floats(0.01, 30)
    values = draw(st.lists(amounts, min_size=count, max_size=count))
    # Costs may follow the values: then no choice is worth more for its cost than another.
    costs = draw(st.just(values) | st.lists(amounts, min_size=count, max_size=count))
    return values, costs, draw(st.integers(0, 90)), draw(st.integers(1, 12))


@given(choices())
@settings(max_examples=300, deadline=None)
def test_the_selection_equals_exhaustive_search(
    case: tuple[list[float], list[float], float, int],
) -> None:
    values, costs, budget, limit = case
    best, rejects = select_offers(values, costs, budget, limit)
    every = (
        sum(values[at] for at in some)
        for size in range(min(limit, len(values)) + 1)
        for some in itertools.combinations(range(len(values)), size)
        if sum(costs[at] for at in some) <= budget * (1 + 1e-9)
    )
    assert sum(values[at] for at in best) == pytest.approx(max(every))
    assert sum(costs[at] for at in best) <= budget * (1 + 1e-8)
    assert len(best) <= limit
    assert sorted([*best, *rejects]) == list(range(len(values)))
    assert [values[at] for at in best] == sorted((values[at] for at in best), reverse=True)


def test_two_hundred_offers_of_equal_value_per_cost_are_selected_nearly_optimally(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hardest: where value follows cost no choice is ruled out, and only a full budget is the best."""
    choices, left_over = valuation._OfferSets, list[int]()
    both = choices.merge

    def count_sets(self: Any, other: Any, max_sets: int) -> Any:
        sets = both(self, other, max_sets)
        left_over.append(len(sets.cost) - max_sets)
        return sets

    monkeypatch.setattr(choices, "merge", count_sets)
    generator = np.random.default_rng(0)
    costs = generator.uniform(1, 10, 200).tolist()
    for limit, budget in ((200, 300.0), (20, 150.0), (100, 350.0)):
        best, rejects = select_offers([3 * cost for cost in costs], costs, budget, limit)
        spent = sum(costs[at] for at in best)
        assert len(best) <= limit
        assert 0.995 * budget < spent <= budget * (1 + 1e-8)
        assert len(best) + len(rejects) == 200
    assert max(left_over) == 0  # as many as are kept at most, so the work is bounded


def test_without_a_budget_the_limit_decides_and_is_the_reason() -> None:
    assert select_offers([1, 5, 3], [9, 9, 9], math.inf, 2) == ([1, 2], {0: OfferReason.LIMIT})
    # One that the budget keeps off is among the best; the other would not be there anyway.
    assert select_offers([1, 5, 3], [1, 9, 3], 4, 1) == ([2], {1: OfferReason.BUDGET, 0: OfferReason.LIMIT})
    assert select_offers([1, 1], [0, 0], 0, 1) == ([0], {1: OfferReason.LIMIT})
    assert select_offers([2, 1], [1, 1], 0, 5) == ([], {0: OfferReason.BUDGET, 1: OfferReason.BUDGET})
    assert select_offers([2, 2, 2], [1, 1, 1], 0, 1) == ([], dict.fromkeys(range(3), OfferReason.BUDGET))
    assert select_offers([], [], 0, 5) == ([], {})


@given(st.integers(0, 30), st.integers(0, 30))
def test_relevance_falls_with_rank_and_unranked_offers_share_the_rest(rank_count: int, others: int) -> None:
    places = np.array([*range(1, rank_count + 1), *[0] * others], np.int64)
    shares = relevance_shares(places)
    whole = sum(1 / place for place in range(1, rank_count + others + 1))
    if not len(places):
        assert not len(shares)
        return
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares[:rank_count], [1 / p / whole for p in range(1, rank_count + 1)])
    assert len(set(np.round(shares[rank_count:], 12))) <= 1


def parts(outcome: OfferValue | OfferReason) -> tuple[float, float, float]:
    assert isinstance(outcome, OfferValue)
    return outcome.redemption, outcome.cost, outcome.value


def test_value_follows_the_formula() -> None:
    value = offer_value(TEN_OFF, ANN, HALF, PRICES, NOW)
    assert parts(value) == pytest.approx((0.5 * 0.5, 0.25 * 0.1 * 20, 0.25 * 0.9 * 20))
    asking = replace(TEN_OFF, min_spend=30.0, margin=0.4)
    used = 0.25 * math.exp(-30 / 20)
    assert parts(offer_value(asking, ANN, HALF, PRICES, NOW)) == pytest.approx((used, used * 5, used * 15))
    fixed = replace(TEN_OFF, share=None, amount=8.0)
    assert parts(offer_value(fixed, ANN, HALF, PRICES, NOW)) == pytest.approx((0.25, 2, 3))
    # Of who is not known to buy the items' prices tell: (.3 * 5 + .2 * 10) / .5.
    new = replace(ANN, basket_value=None, purchase_probability=None)
    assert parts(offer_value(TEN_OFF, new, HALF, PRICES, NOW)) == pytest.approx((0.5, 0.35, 0.5 * 0.9 * 7))
    ends = replace(TEN_OFF, end=NOW + timedelta(days=3.5))
    assert parts(offer_value(ends, ANN, HALF, PRICES, NOW))[0] == pytest.approx((1 - math.sqrt(0.5)) * 0.5)
    assert parts(offer_value(ends, new, HALF, PRICES, NOW))[0] == pytest.approx(0.25)
    # The budget is kept as if everybody bought, whenever it ends.
    assert parts(offer_value(ends, new, HALF, PRICES, NOW))[1] == pytest.approx(0.35)
    assert offer_value(replace(TEN_OFF, end=NOW + timedelta(days=70)), ANN, HALF, PRICES, NOW) == value


def test_an_offer_without_value_has_a_reason() -> None:
    nobody = replace(ANN, basket_value=None)
    none = np.empty(0)
    assert offer_value(TEN_OFF, ANN, none, none, NOW) is OfferReason.NO_ITEMS
    assert offer_value(TEN_OFF, nobody, HALF, np.full(2, np.nan), NOW) is OfferReason.NO_PRICE
    assert offer_value(replace(TEN_OFF, budget=1.99), ANN, HALF, PRICES, NOW) is OfferReason.OFFER_BUDGET
    assert isinstance(offer_value(replace(TEN_OFF, budget=2.0), ANN, HALF, PRICES, NOW), OfferValue)
    assert offer_value(replace(TEN_OFF, margin=0.1), ANN, HALF, PRICES, NOW) is OfferReason.NO_VALUE
    assert offer_value(replace(TEN_OFF, share=1.0), ANN, HALF, PRICES, NOW) is OfferReason.NO_VALUE
    assert offer_value(replace(TEN_OFF, min_spend=1e6), ANN, HALF, PRICES, NOW) is OfferReason.NO_VALUE


def test_an_offer_applies_to_its_segments_and_period() -> None:
    day = timedelta(days=1)
    assert ineligibility(TEN_OFF, ANN, NOW) is None
    assert ineligibility(replace(TEN_OFF, start=NOW, end=NOW + day), ANN, NOW) is None
    assert ineligibility(replace(TEN_OFF, start=NOW + day), ANN, NOW) is OfferReason.OUTSIDE_WINDOW
    assert ineligibility(replace(TEN_OFF, end=NOW), ANN, NOW) is OfferReason.OUTSIDE_WINDOW
    for_lost = replace(TEN_OFF, segments=frozenset(["lost", "at_risk"]))
    assert ineligibility(for_lost, ANN, NOW) is OfferReason.NOT_ELIGIBLE_SEGMENT
    assert ineligibility(for_lost, replace(ANN, segment="lost"), NOW) is None
    first = replace(TEN_OFF, for_buyers=False)
    assert ineligibility(first, ANN, NOW) is OfferReason.NOT_ELIGIBLE_AUDIENCE
    assert ineligibility(first, replace(ANN, is_buyer=False), NOW) is None
    unknown = replace(ANN, segment=None, is_buyer=False)
    assert ineligibility(first, unknown, NOW) is OfferReason.ELIGIBILITY_UNKNOWN
    assert ineligibility(for_lost, unknown, NOW) is OfferReason.ELIGIBILITY_UNKNOWN
    assert ineligibility(TEN_OFF, unknown, NOW) is None


def test_reasons_and_segments_match_the_contract_and_the_profiles() -> None:
    assert {f"OFFER_REASON_{reason.name}": reason.value for reason in OfferReason} | {
        "OFFER_REASON_UNSPECIFIED": 0
    } == dict(pb.OfferReason.items())
    names = {
        segment(Rfm(1.0, days, 1.0, (r, f, 3)), has_events=True)
        for r in range(1, 6) for f in range(1, 6) for days in (1, 3)
    }  # fmt: skip
    assert set(SEGMENTS) == names | {segment(None, has_events=True), segment(None, has_events=False)}


def reasons(answer: Any) -> dict[str, str]:
    return {
        rejection.offer_id: pb.OfferReason.Name(rejection.reason).removeprefix("OFFER_REASON_")
        for rejection in answer.rejected
    }


async def ranking(stub: Stub, **user: Any) -> list[str]:
    """Every item in the person's own order, what was bought among them."""
    keep = pb.PURCHASED_ITEMS_POLICY_KEEP
    page = await stub.Recommend(pb.RecommendRequest(page_size=40, purchased_items_policy=keep, **user))
    return [item.item_id for item in page.items]


async def test_offers_depend_on_the_user_and_each_is_in_one_list(prediction_stub: Stub) -> None:
    await write_history(prediction_stub)
    past, ahead = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 30))
    garden, red = equals_filter("world", "garden"), equals_filter("colour", "red")
    later = pb.Offer(offer_id="later", percent=10)
    later.available_from.FromDatetime(ahead)
    over = pb.Offer(offer_id="over", percent=10)
    over.available_until.FromDatetime(past)
    offers = [
        pb.Offer(offer_id="all", percent=10),
        pb.Offer(offer_id="garden", percent=10, filter=garden),
        pb.Offer(offer_id="dear", percent=10, filter=garden, min_spend=100),
        pb.Offer(offer_id="red", amount=1, filter=red, remaining_budget=1),
        later,
        over,
        pb.Offer(offer_id="prospects", percent=5, segments=["prospect", "unknown"]),
        pb.Offer(offer_id="first", percent=5, audience=pb.OFFER_AUDIENCE_NEVER_PURCHASED),
        pb.Offer(offer_id="again", percent=5, audience=pb.OFFER_AUDIENCE_PURCHASED),
        pb.Offer(offer_id="nothing", percent=5, filter=equals_filter("colour", "none")),
        pb.Offer(offer_id="spent", amount=2, remaining_budget=1.5),
        pb.Offer(offer_id="loss", percent=50, margin=0.3),
    ]
    answer = await prediction_stub.RecommendOffers(pb.RecommendOffersRequest(user_id="ann", offers=offers))
    assert not answer.degraded
    assert reasons(answer) == {
        "later": "OUTSIDE_WINDOW",
        "over": "OUTSIDE_WINDOW",
        "prospects": "NOT_ELIGIBLE_SEGMENT",
        "first": "NOT_ELIGIBLE_AUDIENCE",
        "nothing": "NO_ITEMS",
        "spent": "OFFER_BUDGET",
        "loss": "NO_VALUE",
    }
    selection = {offer.offer_id: offer for offer in answer.offers}
    assert sorted([*selection, *reasons(answer)]) == sorted(offer.offer_id for offer in offers)
    assert [o.score for o in answer.offers] == sorted((o.score for o in answer.offers), reverse=True)
    order = await ranking(prediction_stub, user_id="ann")
    assert sorted(order) == sorted(ITEMS)
    whole = sum(1 / place for place in range(1, 41))
    share = {
        "all": 1.0,
        "garden": sum(1 / p for p, i in enumerate(order, 1) if i.startswith("garden")) / whole,
        "red": sum(1 / p for p, i in enumerate(order, 1) if int(i[-2:]) % 2 == 0) / whole,
    }
    # Neither event has a price: what she pays is told by the catalog's prices of what she engages with.
    profile = (await prediction_stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
    basket = profile.price.mean
    buys = purchase_probability(2, -2.0)
    for name, used in (
        ("all", buys),
        ("garden", buys * share["garden"]),
        ("dear", buys * share["garden"] * math.exp(-100 / basket)),
        ("red", buys * share["red"]),
    ):
        spent = basket + (100 if name == "dear" else 0)
        off = 1 if name == "red" else spent / 10
        assert selection[name].expected_redemption == pytest.approx(used, rel=1e-3)
        assert selection[name].expected_cost == pytest.approx(used * off, rel=1e-3)
        assert selection[name].score == pytest.approx(used * (spent - off), rel=1e-3)
    assert share["garden"] > 0.6  # else the order of the items would hardly count
    assert list(selection["garden"].item_ids) == [i for i in order if i.startswith("garden")][:3]
    assert list(selection["red"].item_ids) == [i for i in order if int(i[-2:]) % 2 == 0][:3]
    assert answer.versions.event_sequence == 3


async def test_a_budget_selects_the_best_and_an_anonymous_user_gets_only_an_order(
    prediction_stub: Stub,
) -> None:
    await write_history(prediction_stub)
    offers = [
        pb.Offer(offer_id=f"{world}-{percent}", percent=percent, filter=equals_filter("world", world))
        for world in ("garden", "kitchen")
        for percent in (5, 10, 20)
    ]
    ask = pb.RecommendOffersRequest(user_id="ann", offers=offers)
    free = {offer.offer_id: offer for offer in (await prediction_stub.RecommendOffers(ask)).offers}
    assert len(free) == len(offers)
    budget = 0.6 * sum(offer.expected_cost for offer in free.values())
    for limit in (2, 6):
        ask.budget, ask.limit = budget, limit
        answer = await prediction_stub.RecommendOffers(ask)
        best = max(
            sum(o.score for o in some)
            for size in range(limit + 1)
            for some in itertools.combinations(free.values(), size)
            if sum(o.expected_cost for o in some) <= budget
        )
        assert sum(o.score for o in answer.offers) == pytest.approx(best, rel=1e-4)
        assert sum(o.expected_cost for o in answer.offers) <= budget * (1 + 1e-6)
        assert set(reasons(answer).values()) <= {"BUDGET", "LIMIT"}
        assert len(answer.offers) + len(answer.rejected) == len(offers)
    ask = pb.RecommendOffersRequest(session=session("kitchen-04"), offers=offers)
    answer = await prediction_stub.RecommendOffers(ask)
    assert answer.offers[0].offer_id == "kitchen-5"
    assert all(i.startswith("kitchen") for i in answer.offers[0].item_ids)
    assert not any(offer.HasField("expected_redemption") for offer in answer.offers)
    assert not any(offer.HasField("expected_cost") for offer in answer.offers)
    ask = pb.RecommendOffersRequest(user_id="ann", offers=offers, days=14)  # none is trained for these
    assert not (await prediction_stub.RecommendOffers(ask)).offers[0].HasField("expected_redemption")
    ask.days = 30
    longer = {offer.offer_id: offer for offer in (await prediction_stub.RecommendOffers(ask)).offers}
    for name, offer in longer.items():
        ratio = purchase_probability(2, -1.0) / purchase_probability(2, -2.0)
        assert offer.expected_redemption == pytest.approx(ratio * free[name].expected_redemption, rel=1e-3)


async def test_past_prices_predict_the_expected_cost(prediction_stub: Stub) -> None:
    for at, price in enumerate((30.0, 50.0)):
        event = purchase(f"e{at}", "cat", "garden-01")
        event.items[0].price, event.items[0].quantity = price, 2
        event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(days=at + 1))
        await prediction_stub.WriteEvents(pb.WriteEventsRequest(events=[event]))
    offers = [pb.Offer(offer_id="o", percent=10)]
    answer = await prediction_stub.RecommendOffers(pb.RecommendOffersRequest(user_id="cat", offers=offers))
    assert answer.offers[0].expected_cost == pytest.approx(purchase_probability(2, -2.0) * 0.1 * 80, rel=1e-3)


async def test_a_malformed_offer_is_named_and_the_service_stays_up(prediction_stub: Stub) -> None:
    good = pb.Offer(offer_id="good", percent=10)
    window = pb.Offer(offer_id="w", percent=10)
    window.available_from.FromSeconds(2000)
    window.available_until.FromSeconds(1000)
    nan, many = math.nan, [pb.Offer(offer_id=f"o{n}", percent=1) for n in range(201)]
    for wrong, field in (
        (pb.Offer(offer_id="o"), "discount"),
        (pb.Offer(offer_id="o", percent=0), "discount"),
        (pb.Offer(offer_id="o", percent=101), "discount"),
        (pb.Offer(offer_id="o", percent=nan), "discount"),
        (pb.Offer(offer_id="o", amount=-1), "discount"),
        (pb.Offer(offer_id="o", amount=math.inf), "discount"),
        (pb.Offer(percent=1), "offer_id"),
        (pb.Offer(offer_id="good", percent=1), "offer_id"),
        (pb.Offer(offer_id="o", percent=1, min_spend=-1), "min_spend"),
        (pb.Offer(offer_id="o", percent=1, min_spend=nan), "min_spend"),
        (pb.Offer(offer_id="o", percent=1, segments=["loyal", "loyals"]), "segments[1]"),
        (pb.Offer(offer_id="o", percent=1, segments=["lost"] * 9), "segments"),
        (pb.Offer(offer_id="o", percent=1, remaining_budget=-1), "remaining_budget"),
        (pb.Offer(offer_id="o", percent=1, margin=1.5), "margin"),
        (pb.Offer(offer_id="o", percent=1, audience=7), "audience"),  # type: ignore[arg-type]
        (pb.Offer(offer_id="o", percent=1, filter=filter_pb2.Filter()), "filter"),
        (window, "available_until"),
    ):
        ask = pb.RecommendOffersRequest(offers=[good, wrong])
        assert await violations(prediction_stub.RecommendOffers(ask)) == [f"offers[1].{field}"]
    both = [pb.Offer(offer_id="o"), good, pb.Offer(offer_id="p", percent=1, margin=2, min_spend=-1)]
    assert await violations(prediction_stub.RecommendOffers(pb.RecommendOffersRequest(offers=both))) == [
        "offers[0].discount",
        "offers[2].min_spend",
        "offers[2].margin",
    ]
    long = filter_pb2.Filter()
    getattr(long, "in").attribute = "colour"
    getattr(long, "in").texts.extend(f"colour {n:06}" for n in range(20_000))
    for ask, field in (
        (pb.RecommendOffersRequest(), "offers"),
        (pb.RecommendOffersRequest(offers=many), "offers"),
        (pb.RecommendOffersRequest(offers=[pb.Offer(offer_id="o", percent=1, filter=long)]), "offers"),
        (pb.RecommendOffersRequest(offers=[good], budget=-1), "budget"),
        (pb.RecommendOffersRequest(offers=[good], budget=nan), "budget"),
        (pb.RecommendOffersRequest(offers=[good], limit=201), "limit"),
        (pb.RecommendOffersRequest(offers=[good], days=366), "days"),
        (pb.RecommendOffersRequest(offers=[good], user_id="ends with a space "), "user_id"),
        (pb.RecommendOffersRequest(offers=[good], session=session(*["i"] * 201)), "session"),
        (pb.RecommendOffersRequest(offers=[good], session=session("i", "")), "session[1].item_id"),
    ):
        assert await violations(prediction_stub.RecommendOffers(ask)) == [field]
    answer = await prediction_stub.RecommendOffers(pb.RecommendOffersRequest(offers=many[:200], limit=200))
    assert len(answer.offers) == 200


async def test_without_ranking_offers_are_ordered_and_segments_are_not_guessed(
    prediction_bundle: Path, tmp_path: Path
) -> None:
    alone = Shop(prediction_bundle, tmp_path / "state", "three", clock=None)
    async with alone.serve(ranking="127.0.0.1:1") as stub:
        offers = [
            pb.Offer(offer_id="all", percent=10),
            pb.Offer(offer_id="first", percent=10, audience=pb.OFFER_AUDIENCE_NEVER_PURCHASED),
        ]
        ask = pb.RecommendOffersRequest(user_id="ann", offers=offers)
        answer = await stub.RecommendOffers(ask, timeout=10)
        assert [offer.offer_id for offer in answer.offers] == ["all"]
        assert not answer.offers[0].HasField("expected_redemption")
        assert reasons(answer) == {"first": "ELIGIBILITY_UNKNOWN"}
        assert {"retrieve", "profile"} <= {one.stage for one in answer.degraded}
