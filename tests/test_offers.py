"""Offers: worth by the formula, chosen as brute force chooses, each in one list; and over real services."""

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

from services.gateway import offers
from services.gateway.offers import (
    SEGMENTS,
    Offer,
    Reason,
    Shopper,
    Worth,
    barred,
    choose,
    masses,
    worth,
)
from services.ranking.people import Rfm, segment
from tests.foretelling import ITEMS, chance, remember
from tests.recommending import Shop, only, purchase, session, violations

NOW = datetime(2026, 3, 1, tzinfo=UTC)
ANN = Shopper("loyal", bought=True, basket=20.0, chance=0.5, days=7)
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
def test_the_choice_is_the_best_that_trying_all_finds(
    drawn: tuple[list[float], list[float], float, int],
) -> None:
    values, costs, budget, limit = drawn
    best, left = choose(values, costs, budget, limit)
    every = (
        sum(values[at] for at in some)
        for size in range(min(limit, len(values)) + 1)
        for some in itertools.combinations(range(len(values)), size)
        if sum(costs[at] for at in some) <= budget * (1 + 1e-9)
    )
    assert sum(values[at] for at in best) == pytest.approx(max(every))
    assert sum(costs[at] for at in best) <= budget * (1 + 1e-8)
    assert len(best) <= limit
    assert sorted([*best, *left]) == list(range(len(values)))
    assert [values[at] for at in best] == sorted((values[at] for at in best), reverse=True)


def test_two_hundred_offers_of_one_worth_for_their_cost_are_chosen_soon_and_nearly_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hardest: where value follows cost no choice is ruled out, and only a full budget is the best."""
    choices, left_over = offers._Choices, list[int]()
    both = choices.or_of

    def watched(self: Any, other: Any, most: int) -> Any:
        found = both(self, other, most)
        left_over.append(len(found.cost) - most)
        return found

    monkeypatch.setattr(choices, "or_of", watched)
    generator = np.random.default_rng(0)
    costs = generator.uniform(1, 10, 200).tolist()
    for limit, budget in ((200, 300.0), (20, 150.0), (100, 350.0)):
        best, left = choose([3 * cost for cost in costs], costs, budget, limit)
        spent = sum(costs[at] for at in best)
        assert len(best) <= limit
        assert 0.995 * budget < spent <= budget * (1 + 1e-8)
        assert len(best) + len(left) == 200
    assert max(left_over) == 0  # as many as are kept at most, so the work is bounded


def test_without_a_budget_the_limit_decides_and_says_so() -> None:
    assert choose([1, 5, 3], [9, 9, 9], math.inf, 2) == ([1, 2], {0: Reason.LIMIT})
    # One that the budget keeps off is among the best; the other would not be there anyway.
    assert choose([1, 5, 3], [1, 9, 3], 4, 1) == ([2], {1: Reason.BUDGET, 0: Reason.LIMIT})
    assert choose([1, 1], [0, 0], 0, 1) == ([0], {1: Reason.LIMIT})
    assert choose([2, 1], [1, 1], 0, 5) == ([], {0: Reason.BUDGET, 1: Reason.BUDGET})
    assert choose([2, 2, 2], [1, 1, 1], 0, 1) == ([], dict.fromkeys(range(3), Reason.BUDGET))
    assert choose([], [], 0, 5) == ([], {})


@given(st.integers(0, 30), st.integers(0, 30))
def test_relevance_falls_with_the_place_and_the_unranked_share_the_rest(ranked: int, others: int) -> None:
    places = np.array([*range(1, ranked + 1), *[0] * others], np.int64)
    found = masses(places)
    whole = sum(1 / place for place in range(1, ranked + others + 1))
    if not len(places):
        assert not len(found)
        return
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found[:ranked], [1 / p / whole for p in range(1, ranked + 1)])
    assert len(set(np.round(found[ranked:], 12))) <= 1


def parts(found: Worth | Reason) -> tuple[float, float, float]:
    assert isinstance(found, Worth)
    return found.redemption, found.cost, found.value


def test_worth_is_the_formula() -> None:
    found = worth(TEN_OFF, ANN, HALF, PRICES, NOW)
    assert parts(found) == pytest.approx((0.5 * 0.5, 0.25 * 0.1 * 20, 0.25 * 0.9 * 20))
    asking = replace(TEN_OFF, min_spend=30.0, margin=0.4)
    used = 0.25 * math.exp(-30 / 20)
    assert parts(worth(asking, ANN, HALF, PRICES, NOW)) == pytest.approx((used, used * 5, used * 15))
    fixed = replace(TEN_OFF, share=None, amount=8.0)
    assert parts(worth(fixed, ANN, HALF, PRICES, NOW)) == pytest.approx((0.25, 2, 3))
    # Of who is not known to buy the items' prices tell: (.3 * 5 + .2 * 10) / .5.
    new = replace(ANN, basket=None, chance=None)
    assert parts(worth(TEN_OFF, new, HALF, PRICES, NOW)) == pytest.approx((0.5, 0.35, 0.5 * 0.9 * 7))
    ends = replace(TEN_OFF, end=NOW + timedelta(days=3.5))
    assert parts(worth(ends, ANN, HALF, PRICES, NOW))[0] == pytest.approx((1 - math.sqrt(0.5)) * 0.5)
    assert parts(worth(ends, new, HALF, PRICES, NOW))[0] == pytest.approx(0.25)
    # The budget is kept as if everybody bought, whenever it ends.
    assert parts(worth(ends, new, HALF, PRICES, NOW))[1] == pytest.approx(0.35)
    assert worth(replace(TEN_OFF, end=NOW + timedelta(days=70)), ANN, HALF, PRICES, NOW) == found


def test_what_is_worth_nothing_says_why() -> None:
    nobody = replace(ANN, basket=None)
    none = np.empty(0)
    assert worth(TEN_OFF, ANN, none, none, NOW) is Reason.NO_ITEMS
    assert worth(TEN_OFF, nobody, HALF, np.full(2, np.nan), NOW) is Reason.NO_PRICE
    assert worth(replace(TEN_OFF, budget=1.99), ANN, HALF, PRICES, NOW) is Reason.OFFER_BUDGET
    assert isinstance(worth(replace(TEN_OFF, budget=2.0), ANN, HALF, PRICES, NOW), Worth)
    assert worth(replace(TEN_OFF, margin=0.1), ANN, HALF, PRICES, NOW) is Reason.NO_VALUE
    assert worth(replace(TEN_OFF, share=1.0), ANN, HALF, PRICES, NOW) is Reason.NO_VALUE
    assert worth(replace(TEN_OFF, min_spend=1e6), ANN, HALF, PRICES, NOW) is Reason.NO_VALUE


def test_who_and_when_an_offer_is_for() -> None:
    day = timedelta(days=1)
    assert barred(TEN_OFF, ANN, NOW) is None
    assert barred(replace(TEN_OFF, start=NOW, end=NOW + day), ANN, NOW) is None
    assert barred(replace(TEN_OFF, start=NOW + day), ANN, NOW) is Reason.OUTSIDE_WINDOW
    assert barred(replace(TEN_OFF, end=NOW), ANN, NOW) is Reason.OUTSIDE_WINDOW
    for_lost = replace(TEN_OFF, segments=frozenset(["lost", "at_risk"]))
    assert barred(for_lost, ANN, NOW) is Reason.NOT_ELIGIBLE_SEGMENT
    assert barred(for_lost, replace(ANN, segment="lost"), NOW) is None
    first = replace(TEN_OFF, bought=False)
    assert barred(first, ANN, NOW) is Reason.NOT_ELIGIBLE_AUDIENCE
    assert barred(first, replace(ANN, bought=False), NOW) is None
    unknown = replace(ANN, segment=None, bought=False)
    assert barred(first, unknown, NOW) is Reason.ELIGIBILITY_UNKNOWN
    assert barred(for_lost, unknown, NOW) is Reason.ELIGIBILITY_UNKNOWN
    assert barred(TEN_OFF, unknown, NOW) is None


def test_reasons_and_segments_are_those_of_the_contract_and_of_profiles() -> None:
    assert {f"OFFER_REASON_{reason.name}": reason.value for reason in Reason} | {
        "OFFER_REASON_UNSPECIFIED": 0
    } == dict(pb.OfferReason.items())
    told = {
        segment(Rfm(1.0, days, 1.0, (r, f, 3)), seen=True)
        for r in range(1, 6) for f in range(1, 6) for days in (1, 3)
    }  # fmt: skip
    assert set(SEGMENTS) == told | {segment(None, seen=True), segment(None, seen=False)}


def reasons(answer: Any) -> dict[str, str]:
    return {
        left.offer_id: pb.OfferReason.Name(left.reason).removeprefix("OFFER_REASON_")
        for left in answer.left_out
    }


async def ranking(stub: Any, **person: Any) -> list[str]:
    """Every item in the person's own order, what was bought among them."""
    keep = pb.BOUGHT_POLICY_KEEP
    page = await stub.Recommend(pb.RecommendRequest(page_size=40, bought_policy=keep, **person))
    return [item.item_id for item in page.items]


def test_offers_follow_the_person_and_each_is_in_one_list(foretelling: Shop) -> None:
    async def body(stub: Any) -> None:
        await remember(stub)
        past, ahead = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 30))
        garden, red = only("world", "garden"), only("colour", "red")
        later = pb.Offer(offer_id="later", percent=10)
        later.available_from.FromDatetime(ahead)
        over = pb.Offer(offer_id="over", percent=10)
        over.available_until.FromDatetime(past)
        asked = [
            pb.Offer(offer_id="all", percent=10),
            pb.Offer(offer_id="garden", percent=10, filter=garden),
            pb.Offer(offer_id="dear", percent=10, filter=garden, min_spend=100),
            pb.Offer(offer_id="red", amount=1, filter=red, remaining_budget=1),
            later,
            over,
            pb.Offer(offer_id="prospects", percent=5, segments=["prospect", "stranger"]),
            pb.Offer(offer_id="first", percent=5, audience=pb.OFFER_AUDIENCE_NEVER_BOUGHT),
            pb.Offer(offer_id="again", percent=5, audience=pb.OFFER_AUDIENCE_BOUGHT),
            pb.Offer(offer_id="nothing", percent=5, filter=only("colour", "none")),
            pb.Offer(offer_id="spent", amount=2, remaining_budget=1.5),
            pb.Offer(offer_id="loss", percent=50, margin=0.3),
        ]
        answer = await stub.RecommendOffers(pb.RecommendOffersRequest(user_id="ann", offers=asked))
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
        found = {offer.offer_id: offer for offer in answer.offers}
        assert sorted([*found, *reasons(answer)]) == sorted(offer.offer_id for offer in asked)
        assert [o.score for o in answer.offers] == sorted((o.score for o in answer.offers), reverse=True)
        order = await ranking(stub, user_id="ann")
        assert sorted(order) == sorted(ITEMS)
        whole = sum(1 / place for place in range(1, 41))
        share = {
            "all": 1.0,
            "garden": sum(1 / p for p, i in enumerate(order, 1) if i.startswith("garden")) / whole,
            "red": sum(1 / p for p, i in enumerate(order, 1) if int(i[-2:]) % 2 == 0) / whole,
        }
        # Neither event has a price: what she pays is told by the catalogue's prices of what she engages with.
        profile = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
        basket = profile.price.mean
        buys = chance(2, -2.0)
        for name, used in (
            ("all", buys),
            ("garden", buys * share["garden"]),
            ("dear", buys * share["garden"] * math.exp(-100 / basket)),
            ("red", buys * share["red"]),
        ):
            spent = basket + (100 if name == "dear" else 0)
            off = 1 if name == "red" else spent / 10
            assert found[name].expected_redemption == pytest.approx(used, rel=1e-3)
            assert found[name].expected_cost == pytest.approx(used * off, rel=1e-3)
            assert found[name].score == pytest.approx(used * (spent - off), rel=1e-3)
        assert share["garden"] > 0.6  # else the order of the items would hardly count
        assert list(found["garden"].item_ids) == [i for i in order if i.startswith("garden")][:3]
        assert list(found["red"].item_ids) == [i for i in order if int(i[-2:]) % 2 == 0][:3]
        assert answer.versions.event_sequence == 3

    foretelling.run(body)


def test_a_budget_buys_the_best_and_a_stranger_gets_an_order_alone(foretelling: Shop) -> None:
    async def body(stub: Any) -> None:
        await remember(stub)
        asked = [
            pb.Offer(offer_id=f"{world}-{percent}", percent=percent, filter=only("world", world))
            for world in ("garden", "kitchen")
            for percent in (5, 10, 20)
        ]
        ask = pb.RecommendOffersRequest(user_id="ann", offers=asked)
        free = {offer.offer_id: offer for offer in (await stub.RecommendOffers(ask)).offers}
        assert len(free) == len(asked)
        budget = 0.6 * sum(offer.expected_cost for offer in free.values())
        for limit in (2, 6):
            ask.budget, ask.limit = budget, limit
            answer = await stub.RecommendOffers(ask)
            best = max(
                sum(o.score for o in some)
                for size in range(limit + 1)
                for some in itertools.combinations(free.values(), size)
                if sum(o.expected_cost for o in some) <= budget
            )
            assert sum(o.score for o in answer.offers) == pytest.approx(best, rel=1e-4)
            assert sum(o.expected_cost for o in answer.offers) <= budget * (1 + 1e-6)
            assert set(reasons(answer).values()) <= {"BUDGET", "LIMIT"}
            assert len(answer.offers) + len(answer.left_out) == len(asked)
        ask = pb.RecommendOffersRequest(session=session("kitchen-04"), offers=asked)
        answer = await stub.RecommendOffers(ask)
        assert answer.offers[0].offer_id == "kitchen-5"
        assert all(i.startswith("kitchen") for i in answer.offers[0].item_ids)
        assert not any(offer.HasField("expected_redemption") for offer in answer.offers)
        assert not any(offer.HasField("expected_cost") for offer in answer.offers)
        ask = pb.RecommendOffersRequest(user_id="ann", offers=asked, days=14)  # none is trained for these
        assert not (await stub.RecommendOffers(ask)).offers[0].HasField("expected_redemption")
        ask.days = 30
        longer = {offer.offer_id: offer for offer in (await stub.RecommendOffers(ask)).offers}
        for name, offer in longer.items():
            ratio = chance(2, -1.0) / chance(2, -2.0)
            assert offer.expected_redemption == pytest.approx(
                ratio * free[name].expected_redemption, rel=1e-3
            )

    foretelling.run(body)


def test_what_somebody_paid_tells_what_they_will(foretelling: Shop) -> None:
    async def body(stub: Any) -> None:
        for at, price in enumerate((30.0, 50.0)):
            event = purchase(f"e{at}", "cat", "garden-01")
            event.items[0].price, event.items[0].quantity = price, 2
            event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(days=at + 1))
            await stub.WriteEvents(pb.WriteEventsRequest(events=[event]))
        asked = [pb.Offer(offer_id="o", percent=10)]
        answer = await stub.RecommendOffers(pb.RecommendOffersRequest(user_id="cat", offers=asked))
        assert answer.offers[0].expected_cost == pytest.approx(chance(2, -2.0) * 0.1 * 80, rel=1e-3)

    foretelling.run(body)


def test_a_malformed_offer_is_named_and_the_service_stays_up(foretelling: Shop) -> None:
    async def body(stub: Any) -> None:
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
            assert await violations(stub.RecommendOffers(ask)) == [f"offers[1].{field}"]
        both = [pb.Offer(offer_id="o"), good, pb.Offer(offer_id="p", percent=1, margin=2, min_spend=-1)]
        assert await violations(stub.RecommendOffers(pb.RecommendOffersRequest(offers=both))) == [
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
            (pb.RecommendOffersRequest(offers=[good], user_id="has space"), "user_id"),
            (pb.RecommendOffersRequest(offers=[good], session=session(*["i"] * 201)), "session"),
            (pb.RecommendOffersRequest(offers=[good], session=session("i", "")), "session[1].item_id"),
        ):
            assert await violations(stub.RecommendOffers(ask)) == [field]
        answer = await stub.RecommendOffers(pb.RecommendOffersRequest(offers=many[:200], limit=200))
        assert len(answer.offers) == 200

    foretelling.run(body)


def test_without_ranking_there_is_still_an_order_and_who_is_eligible_is_not_guessed(
    foretelling_bundle: Path, tmp_path: Path
) -> None:
    alone = Shop(foretelling_bundle, tmp_path / "state", "three", clock=None)

    async def body(stub: Any) -> None:
        asked = [
            pb.Offer(offer_id="all", percent=10),
            pb.Offer(offer_id="first", percent=10, audience=pb.OFFER_AUDIENCE_NEVER_BOUGHT),
        ]
        ask = pb.RecommendOffersRequest(user_id="ann", offers=asked)
        answer = await stub.RecommendOffers(ask, timeout=10)
        assert [offer.offer_id for offer in answer.offers] == ["all"]
        assert not answer.offers[0].HasField("expected_redemption")
        assert reasons(answer) == {"first": "ELIGIBILITY_UNKNOWN"}
        assert {"retrieve", "profile"} <= {one.stage for one in answer.degraded}

    alone.run(body, ranking="127.0.0.1:1")
