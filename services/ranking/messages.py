"""The contract's messages as ranking's own words, and back."""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

import numpy as np
from vitrine.catalog.v1 import event_pb2, profile_pb2, served_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as pb

from services import status, wire
from services.catalog import identifier_problem
from services.errors import InvalidArgument, VitrineError
from services.ranking.behaviour import Event, EventItem, Outcome, Recorded, Stored
from services.ranking.exploring import Explorable, Explore
from services.ranking.people import UserProfile
from services.ranking.ranking import Predicted, Ranked
from services.ranking.served import Served

MAX_EXPLORED = 500
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def signed(numbers: Iterable[int]) -> np.ndarray:
    """Item numbers, int64 (C,); InvalidArgument where one is none."""
    found = list(numbers)
    if wrong := [n for n in found if n >> 63]:
        raise InvalidArgument.of("item_numbers", f"{wrong[0]} is no item number")
    return np.array(found, np.int64)


def served_of(at: int, page: served_pb2.ServedPage) -> Served:
    """A page to keep; its ids stand beside it, where they can be found and cleared."""
    for field in ("user_id", "visitor_id", "session_id"):
        value = getattr(page, field)
        if value and (problem := identifier_problem(value)):
            raise InvalidArgument.of(f"pages[{at}].{field}", problem)
    if not page.request_id:
        raise InvalidArgument.of(f"pages[{at}].request_id", "is required")
    when = wire.time_from(page.served_at, f"pages[{at}].served_at")
    kept = served_pb2.ServedPage()
    kept.CopyFrom(page)
    kept.ClearField("user_id")
    kept.ClearField("visitor_id")
    pool = signed(page.exploring.item_numbers).tolist()
    try:
        explored = {pool[draw.drawn] for draw in page.exploring.draws if not page.shadow}
    except IndexError:
        raise InvalidArgument.of(f"pages[{at}].exploring.draws", "draws what is not in the pool") from None
    # A shop may use one request id for all that a page of its site asks for.
    named = page.request_id, page.scenario, page.user_id, page.visitor_id, page.start, page.arm, page.shadow
    return Served(
        key=hashlib.blake2b(repr(named).encode(), digest_size=16).hexdigest(),
        user_id=page.user_id,
        visitor_id=page.visitor_id,
        scenario=page.scenario,
        at=(when - _EPOCH) // timedelta(microseconds=1),
        content=kept.SerializeToString() if page.item_ids else b"",
        explored=tuple(sorted(explored)),
    )


def explore_of(message: pb.Explore) -> Explore:
    """What is asked for to be tried; InvalidArgument names the field."""
    if not 1 <= message.limit <= MAX_EXPLORED:
        raise InvalidArgument.of("explore.limit", f"is {message.limit}, 1 to {MAX_EXPLORED} are allowed")
    return Explore(
        scenario=message.scenario,
        limit=message.limit,
        seed=message.seed,
        max_age_days=max(message.max_age_days, 0),
        showings=message.showings,
        per_day=message.per_day if message.HasField("per_day") else None,
        max_engagements=message.max_engagements if message.HasField("max_engagements") else None,
        upto=message.upto if message.HasField("upto") else None,
    )


def explorable_to(found: Explorable) -> pb.Explorable:
    """What may be tried."""
    return pb.Explorable(
        item_numbers=found.numbers.tolist(),
        showings=found.showings.tolist(),
        engagements=found.engagements.tolist(),
        upto=found.upto,
    )


def probabilities_to(ranked: Ranked) -> list[pb.TypeProbabilities]:
    """The probabilities of each type of event."""
    found = ranked.probabilities.items()
    return [pb.TypeProbabilities(type=name, probabilities=values.tolist()) for name, values in found]


def prediction_to(predicted: Predicted) -> pb.Prediction:
    """What a person is likely to do."""
    ranked = predicted.ranked
    return pb.Prediction(
        scores=ranked.scores.tolist() if ranked else (),
        probabilities=probabilities_to(ranked) if ranked else (),
        purchase_propensity=_propensity(predicted.propensity),
    )


def _propensity(chances: Mapping[int, float]) -> list[profile_pb2.PurchasePropensity]:
    found = sorted(chances.items())
    return [profile_pb2.PurchasePropensity(days=days, probability=chance) for days, chance in found]


def profile_to(ids: dict[str, list[str]], found: UserProfile) -> profile_pb2.UserProfile:
    """What behaviour says of a person of these ids."""
    message = profile_pb2.UserProfile(
        user_ids=ids["user"],
        visitor_ids=ids["visitor"],
        active_days=found.active_days,
        segment=found.segment,
        purchase_propensity=_propensity(found.propensity),
    )
    for one in found.affinities:
        message.affinities.add(attribute=one.attribute, text=one.text, share=one.share, lift=one.lift)
    if price := found.price:
        message.price.CopyFrom(
            profile_pb2.PriceAffinity(mean=price.mean, percentile=price.percentile, band=price.band)
        )
    for done in found.activity:
        first, last = (wire.time_to(_EPOCH + timedelta(microseconds=t)) for t in (done.first, done.last))
        message.activity.add(type=done.type, items=done.items, first_at=first, last_at=last)
    if rfm := found.rfm:
        message.rfm.recency_days, message.rfm.frequency = rfm.recency, rfm.frequency
        message.rfm.monetary = rfm.monetary
        scores = ("recency_score", "frequency_score", "monetary_score")
        for name, score in zip(scores, rfm.scores, strict=True):
            setattr(message.rfm, name, score)
    for channel, share in found.channels.items():
        message.channels.add(channel=channel, share=share)
    return message


def stored_to(stored: Stored) -> event_pb2.StoredEvent:
    """An event as it is kept."""
    event = stored.event
    message = event_pb2.Event(
        event_id=event.event_id,
        type=event.type,
        session_id=event.session_id,
        attribution_token=event.attribution_token,
        channel=event.channel,
        items=[
            event_pb2.EventItem(
                item_id=item.item_id, quantity=item.quantity, price=item.price, position=item.position
            )
            for item in event.items
        ],
    )
    if event.occurred is not None:
        message.occurred_at.CopyFrom(wire.time_to(event.occurred))
    recorded = wire.time_to(stored.recorded)
    return event_pb2.StoredEvent(event=message, recorded_at=recorded, sequence=stored.sequence)


def event_of(message: event_pb2.Event) -> Event | VitrineError:
    """An event, or what is wrong with a field that cannot be read."""
    try:
        occurred = (
            wire.time_from(message.occurred_at, "occurred_at") if message.HasField("occurred_at") else None
        )
    except VitrineError as error:
        return error
    return Event(
        event_id=message.event_id,
        type=message.type,
        items=tuple(
            EventItem(
                item_id=item.item_id,
                quantity=item.quantity if item.HasField("quantity") else 1,
                price=item.price if item.HasField("price") else None,
                position=item.position if item.HasField("position") else None,
            )
            for item in message.items
        ),
        user_id=message.user_id,
        visitor_id=message.visitor_id,
        session_id=message.session_id,
        occurred=occurred,
        attribution_token=message.attribution_token,
        channel=message.channel,
    )


def outcome_to(at: int, event_id: str, outcome: Recorded | VitrineError) -> event_pb2.EventOutcome:
    """What became of the event at a place of its batch."""
    if isinstance(outcome, VitrineError):
        error = outcome.under(f"events[{at}]") if isinstance(outcome, InvalidArgument) else outcome
        return event_pb2.EventOutcome(
            event_id=event_id, code=event_pb2.EVENT_OUTCOME_CODE_FAILED, error=status.to_status(error)
        )
    codes = {
        Outcome.RECORDED: event_pb2.EVENT_OUTCOME_CODE_RECORDED,
        Outcome.DUPLICATE: event_pb2.EVENT_OUTCOME_CODE_DUPLICATE,
    }
    return event_pb2.EventOutcome(event_id=event_id, code=codes[outcome.outcome], sequence=outcome.sequence)
