"""`RecommendOffers`: reads a request, asks who the person is and what they like best, writes the answer."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

import numpy as np
from vitrine.catalog.v1.profile_pb2 import UserProfile
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import deadline, filters, wire
from services.catalog import identifier_problem
from services.errors import FieldViolation, InvalidArgument
from services.gateway import offers
from services.gateway.asking import check_person
from services.gateway.offers import Offer, Reason, Shopper, Worth
from services.gateway.pipeline import Pipeline, person_of
from services.gateway.wish import Wish
from services.item_table import ItemTable

MAX_OFFERS = 200
DEFAULT_OFFERS = 20
MAX_DAYS = 365
DEFAULT_DAYS = 7
MAX_SEGMENTS = 8
_MOST_BYTES = 256 * 1024
_ALL = 100.0
_AUDIENCES = {
    pb.OFFER_AUDIENCE_UNSPECIFIED: None,
    pb.OFFER_AUDIENCE_NEVER_BOUGHT: False,
    pb.OFFER_AUDIENCE_BOUGHT: True,
}
_STRANGER = UserProfile(segment="stranger")


async def recommend(
    request: pb.RecommendOffersRequest,
    now: datetime,
    pipeline: Pipeline,
    wait_for: Callable[[int], Awaitable[None]],
) -> pb.RecommendOffersResponse:
    """The answer, its versions left open but for the events seen.

    Raises:
        InvalidArgument: names every field of an offer that is wrong, or the first of the others.
    """
    check_person(request)
    person = person_of(request.user_id, request.visitor_id, request.session)
    asked = _offers(request.offers)
    limit = wire.check_limit(request.limit, MAX_OFFERS, "limit", DEFAULT_OFFERS)
    days = wire.check_limit(request.days, MAX_DAYS, "days", DEFAULT_DAYS)
    if not request.budget >= 0:
        raise InvalidArgument.of("budget", "must be 0 or more")
    budget = request.budget if request.HasField("budget") else math.inf
    await wait_for(request.min_sequence)
    degraded: list[pb.Degradation] = []
    wish = Wish(person=person, as_of=now, exclude_bought=False, min_sequence=request.min_sequence)
    ordered, profile = await asyncio.gather(pipeline.run(wish), _profile(person, now, pipeline, degraded))
    shopper = _shopper(profile, days)
    judging = asyncio.to_thread(_judged, asked, shopper, ordered.numbers, pipeline.table, now)
    found = await deadline.wait(judging)
    worthy = [at for at, (worth, _) in enumerate(found) if isinstance(worth, Worth)]
    worths = [worth for worth, _ in found if isinstance(worth, Worth)]
    choosing = asyncio.to_thread(
        offers.choose, [one.value for one in worths], [one.cost for one in worths], budget, limit
    )
    best, others = await deadline.wait(choosing)
    reasons = {at: worth for at, (worth, _) in enumerate(found) if isinstance(worth, Reason)}
    reasons |= {worthy[at]: reason for at, reason in others.items()}
    return pb.RecommendOffersResponse(
        offers=[_told(asked[worthy[at]], worths[at], found[worthy[at]][1], shopper) for at in best],
        left_out=[
            pb.LeftOutOffer(offer_id=asked[at].id, reason=pb.OfferReason.ValueType(reason))
            for at, reason in sorted(reasons.items())
        ],
        versions=pb.Versions(event_sequence=ordered.state_sequence),
        degraded=[*ordered.degraded, *degraded],
    )


def _judged(
    asked: Sequence[Offer], shopper: Shopper, numbers: Sequence[int], table: ItemTable, now: datetime
) -> list[tuple[Worth | Reason, list[str]]]:
    """What each offer is worth, or why nothing, and its best items; `numbers` are the person's ranking."""
    live = np.flatnonzero(table.available(now))
    places = np.zeros(table.length, np.int64)
    places[table.rows(numbers)] = np.arange(1, len(numbers) + 1)
    places = places[live]
    # What is not ranked comes after all that is, in an order that every process agrees on.
    order = np.lexsort((table.item_numbers[live], np.where(places > 0, places, len(live) + 1)))
    live, mass = live[order], offers.masses(places[order])
    column = table.numbers("price")
    prices = np.full(len(live), np.nan) if column is None else column[live, 0]
    found: list[tuple[Worth | Reason, list[str]]] = []
    for offer in asked:
        if reason := offers.barred(offer, shopper, now):
            found.append((reason, []))
            continue
        fits = np.ones(len(live), bool)
        if offer.condition is not None:
            fits = filters.evaluate(offer.condition, table)[live]
        worth = offers.worth(offer, shopper, mass[fits], prices[fits], now)
        found.append((worth, table.ids(live[fits][: offers.BEST])))
    return found


async def _profile(
    person: ranking_pb.Person, now: datetime, pipeline: Pipeline, degraded: list[pb.Degradation]
) -> UserProfile | None:
    if not (person.user_id or person.visitor_id):
        return _STRANGER
    return await pipeline.profile(person, now, degraded)


def _shopper(profile: UserProfile | None, days: int) -> Shopper:
    if profile is None:
        return Shopper(None, bought=False, basket=None, chance=None, days=days)
    basket = profile.price.mean if profile.HasField("price") else None
    if profile.HasField("rfm") and profile.rfm.monetary > 0:
        basket = profile.rfm.monetary / profile.rfm.frequency
    chances = {one.days: one.probability for one in profile.purchase_propensity}
    return Shopper(profile.segment, profile.HasField("rfm"), basket, chances.get(days), days)


def _told(offer: Offer, worth: Worth, ids: Sequence[str], shopper: Shopper) -> pb.RecommendedOffer:
    told = pb.RecommendedOffer(offer_id=offer.id, score=worth.value, item_ids=ids)
    if shopper.chance is not None:
        told.expected_redemption, told.expected_cost = worth.redemption, worth.cost
    return told


def _offers(messages: Sequence[pb.Offer]) -> list[Offer]:
    if not 1 <= len(messages) <= MAX_OFFERS:
        raise InvalidArgument.of("offers", f"has {len(messages)}, 1 to {MAX_OFFERS} are allowed")
    if sum(message.filter.ByteSize() for message in messages) > _MOST_BYTES:
        raise InvalidArgument.of("offers", f"have filters of more than {_MOST_BYTES} bytes in all")
    found: dict[str, Offer] = {}
    wrong: list[FieldViolation] = []
    for at, message in enumerate(messages):
        try:
            if message.offer_id in found:
                raise InvalidArgument.of("offer_id", "was there before")
            found[message.offer_id] = _offer(message)
        except InvalidArgument as error:
            wrong += error.under(f"offers[{at}]").violations
    if wrong:
        raise InvalidArgument(wrong)
    return list(found.values())


def _offer(message: pb.Offer) -> Offer:
    wrong = [FieldViolation(name, problem) for name, problem in _problems(message).items() if problem]
    if wrong:
        raise InvalidArgument(wrong)
    window = {
        name: wire.time_from(getattr(message, name), name)
        for name in ("available_from", "available_until")
        if message.HasField(name)
    }
    start, end = window.get("available_from"), window.get("available_until")
    if start and end and end <= start:
        raise InvalidArgument.of("available_until", "must be later than available_from")
    return Offer(
        id=message.offer_id,
        share=message.percent / _ALL if message.HasField("percent") else None,
        amount=message.amount,
        condition=wire.filter_from(message.filter) if message.HasField("filter") else None,
        min_spend=message.min_spend,
        segments=frozenset(message.segments),
        bought=_AUDIENCES[message.audience],
        start=start,
        end=end,
        budget=message.remaining_budget if message.HasField("remaining_budget") else math.inf,
        margin=message.margin if message.HasField("margin") else 1.0,
    )


def _problems(message: pb.Offer) -> dict[str, str]:
    """What is wrong with each field, empty for nothing."""
    found = {
        "offer_id": identifier_problem(message.offer_id),
        "discount": _discount_problem(message),
        "min_spend": "" if 0 <= message.min_spend < math.inf else "must be 0 or more",
        "audience": "" if message.audience in _AUDIENCES else "is no OfferAudience",
        "remaining_budget": "" if message.remaining_budget >= 0 else "must be 0 or more",
        "margin": "" if 0 <= message.margin <= 1 else "must be between 0 and 1",
    }
    if len(message.segments) > MAX_SEGMENTS:
        found["segments"] = f"has {len(message.segments)}, at most {MAX_SEGMENTS} are allowed"
    for at, segment in enumerate(message.segments[:MAX_SEGMENTS]):
        found[f"segments[{at}]"] = (
            "" if segment in offers.SEGMENTS else f"is none of {', '.join(offers.SEGMENTS)}"
        )
    return found


def _discount_problem(message: pb.Offer) -> str:
    match message.WhichOneof("discount"):
        case "percent":
            return "" if 0 < message.percent <= _ALL else "must be above 0 and at most 100 per cent"
        case "amount":
            return "" if 0 < message.amount < math.inf else "must be an amount above 0"
        case _:
            return "is required: percent or amount"
