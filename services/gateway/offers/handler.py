"""`RecommendOffers`: values the offers of a request for a user and selects the best."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial

import numpy as np
from vitrine.catalog.v1.profile_pb2 import UserProfile
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog import filters
from services.catalog.item_table import ItemTable
from services.catalog.items import identifier_problem
from services.core import deadline
from services.core.errors import FieldViolation, InvalidArgument
from services.gateway.offers import valuation
from services.gateway.offers.valuation import Offer, OfferReason, OfferValue, Shopper
from services.gateway.query import Degradation, RecommendQuery, User
from services.gateway.recommend.pipeline import Pipeline
from services.gateway.recommend.request_parser import check_user, parse_user
from services.gateway.recommend.response_builder import build_degraded
from services.rpc import proto_conversions

MAX_OFFERS = 200
DEFAULT_OFFERS = 20
MAX_DAYS = 365
DEFAULT_DAYS = 7
MAX_SEGMENTS = 8
_MAX_FILTER_BYTES = 256 * 1024
_PERCENT = 100.0
_AUDIENCES = {
    pb.OFFER_AUDIENCE_UNSPECIFIED: None,
    pb.OFFER_AUDIENCE_NEVER_PURCHASED: False,
    pb.OFFER_AUDIENCE_PURCHASED: True,
}
_ANONYMOUS_PROFILE = UserProfile(segment="unknown")


async def recommend(
    request: pb.RecommendOffersRequest,
    now: datetime,
    pipeline: Pipeline,
    wait_for: Callable[[int], Awaitable[None]],
) -> pb.RecommendOffersResponse:
    """The response; of its versions only the event sequence is set.

    Raises:
        InvalidArgument: names every invalid field of the offers, or the first other one.
    """
    check_user(request)
    user = parse_user(request.user_id, request.visitor_id, request.session)
    offers = _parse_offers(request.offers)
    limit = proto_conversions.check_limit(request.limit, MAX_OFFERS, "limit", DEFAULT_OFFERS)
    days = proto_conversions.check_limit(request.days, MAX_DAYS, "days", DEFAULT_DAYS)
    if not request.budget >= 0:
        raise InvalidArgument.of("budget", "must be 0 or more")
    budget = request.budget if request.HasField("budget") else math.inf
    await wait_for(request.min_sequence)
    degraded: list[Degradation] = []
    query = RecommendQuery(user=user, as_of=now, exclude_purchased=False, min_sequence=request.min_sequence)
    page, profile = await asyncio.gather(pipeline.run(query), _profile(user, now, pipeline, degraded))
    shopper = _shopper(profile, days)
    evaluate = partial(_evaluate, offers, shopper, page.item_hashes, pipeline.table, now)
    values, rejected, best_items = await deadline.wait(pipeline.pool.run(evaluate))
    candidates = list(values)
    select = partial(
        valuation.select_offers,
        [values[index].value for index in candidates],
        [values[index].cost for index in candidates],
        budget,
        limit,
    )
    selected, others = await deadline.wait(pipeline.pool.run(select))
    rejected |= {candidates[index]: reason for index, reason in others.items()}
    return pb.RecommendOffersResponse(
        offers=[
            _recommended(offers[index], values[index], best_items[index], shopper)
            for index in (candidates[index] for index in selected)
        ],
        rejected=[
            pb.RejectedOffer(offer_id=offers[index].id, reason=pb.OfferReason.ValueType(reason))
            for index, reason in sorted(rejected.items())
        ],
        versions=pb.Versions(event_sequence=page.state_sequence),
        degraded=build_degraded([*page.degraded, *degraded]),
    )


def _evaluate(
    offers: Sequence[Offer], shopper: Shopper, ranking: Sequence[int], table: ItemTable, as_of: datetime
) -> tuple[dict[int, OfferValue], dict[int, OfferReason], dict[int, list[str]]]:
    """By offer index: the values, the reasons of offers without one, and the ids of an offer's best items.

    `ranking` are the user's ranked items, as hashes.
    """
    rows = np.flatnonzero(table.available(as_of))
    positions = np.zeros(table.length, np.int64)
    positions[table.rows(ranking)] = np.arange(1, len(ranking) + 1)
    positions = positions[rows]
    # Unranked items follow the ranked ones, in an order that is the same in every process.
    order = np.lexsort((table.item_hashes[rows], np.where(positions > 0, positions, len(rows) + 1)))
    rows, relevance = rows[order], valuation.relevance_shares(positions[order])
    column = table.numbers("price")
    prices = np.full(len(rows), np.nan) if column is None else column[rows, 0]
    values: dict[int, OfferValue] = {}
    rejected: dict[int, OfferReason] = {}
    best_items: dict[int, list[str]] = {}
    for index, offer in enumerate(offers):
        if reason := valuation.ineligibility(offer, shopper, as_of):
            rejected[index] = reason
            continue
        mask = np.ones(len(rows), bool)
        if offer.condition is not None:
            mask = filters.evaluate(offer.condition, table)[rows]
        value = valuation.offer_value(offer, shopper, relevance[mask], prices[mask], as_of)
        if isinstance(value, OfferReason):
            rejected[index] = value
            continue
        values[index] = value
        best_items[index] = table.ids(rows[mask][: valuation.BEST_ITEMS])
    return values, rejected, best_items


async def _profile(
    user: User, now: datetime, pipeline: Pipeline, degraded: list[Degradation]
) -> UserProfile | None:
    if not (user.user_id or user.visitor_id):
        return _ANONYMOUS_PROFILE
    return await pipeline.profile(user, now, degraded)


def _shopper(profile: UserProfile | None, days: int) -> Shopper:
    if profile is None:
        return Shopper(None, is_buyer=False, basket_value=None, purchase_probability=None, days=days)
    basket_value = profile.price.mean if profile.HasField("price") else None
    if profile.HasField("rfm") and profile.rfm.monetary > 0:
        basket_value = profile.rfm.monetary / profile.rfm.frequency
    probabilities = {one.days: one.probability for one in profile.purchase_propensity}
    return Shopper(profile.segment, profile.HasField("rfm"), basket_value, probabilities.get(days), days)


def _recommended(
    offer: Offer, value: OfferValue, item_ids: Sequence[str], shopper: Shopper
) -> pb.RecommendedOffer:
    message = pb.RecommendedOffer(offer_id=offer.id, score=value.value, item_ids=item_ids)
    if shopper.purchase_probability is not None:
        message.expected_redemption, message.expected_cost = value.redemption, value.cost
    return message


def _parse_offers(messages: Sequence[pb.Offer]) -> list[Offer]:
    if not 1 <= len(messages) <= MAX_OFFERS:
        raise InvalidArgument.of("offers", f"has {len(messages)}, 1 to {MAX_OFFERS} are allowed")
    if sum(message.filter.ByteSize() for message in messages) > _MAX_FILTER_BYTES:
        raise InvalidArgument.of("offers", f"have filters of more than {_MAX_FILTER_BYTES} bytes in all")
    offers: dict[str, Offer] = {}
    violations: list[FieldViolation] = []
    for index, message in enumerate(messages):
        try:
            if message.offer_id in offers:
                raise InvalidArgument.of("offer_id", "is a duplicate")
            offers[message.offer_id] = _parse_offer(message)
        except InvalidArgument as error:
            violations += error.under(f"offers[{index}]").violations
    if violations:
        raise InvalidArgument(violations)
    return list(offers.values())


def _parse_offer(message: pb.Offer) -> Offer:
    violations = [FieldViolation(name, problem) for name, problem in _problems(message).items() if problem]
    if violations:
        raise InvalidArgument(violations)
    window = {
        name: proto_conversions.time_from(getattr(message, name), name)
        for name in ("available_from", "available_until")
        if message.HasField(name)
    }
    start, end = window.get("available_from"), window.get("available_until")
    if start and end and end <= start:
        raise InvalidArgument.of("available_until", "must be later than available_from")
    return Offer(
        id=message.offer_id,
        share=message.percent / _PERCENT if message.HasField("percent") else None,
        amount=message.amount,
        condition=proto_conversions.filter_from(message.filter) if message.HasField("filter") else None,
        min_spend=message.min_spend,
        segments=frozenset(message.segments),
        for_buyers=_AUDIENCES[message.audience],
        start=start,
        end=end,
        budget=message.remaining_budget if message.HasField("remaining_budget") else math.inf,
        margin=message.margin if message.HasField("margin") else 1.0,
    )


def _problems(message: pb.Offer) -> dict[str, str]:
    """The problem of each field; empty if it is valid."""
    problems = {
        "offer_id": identifier_problem(message.offer_id),
        "discount": _discount_problem(message),
        "min_spend": "" if 0 <= message.min_spend < math.inf else "must be 0 or more",
        "audience": "" if message.audience in _AUDIENCES else "is not an OfferAudience",
        "remaining_budget": "" if message.remaining_budget >= 0 else "must be 0 or more",
        "margin": "" if 0 <= message.margin <= 1 else "must be between 0 and 1",
    }
    if len(message.segments) > MAX_SEGMENTS:
        problems["segments"] = f"has {len(message.segments)}, at most {MAX_SEGMENTS} are allowed"
    for index, segment in enumerate(message.segments[:MAX_SEGMENTS]):
        problems[f"segments[{index}]"] = (
            "" if segment in valuation.SEGMENTS else f"is not one of {', '.join(valuation.SEGMENTS)}"
        )
    return problems


def _discount_problem(message: pb.Offer) -> str:
    match message.WhichOneof("discount"):
        case "percent":
            return "" if 0 < message.percent <= _PERCENT else "must be above 0 and at most 100 percent"
        case "amount":
            return "" if 0 < message.amount < math.inf else "must be above 0 and finite"
        case _:
            return "is required: percent or amount"
