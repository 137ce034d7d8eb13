"""Conversions between the messages of the contract and the domain values of ranking."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
from vitrine.catalog.v1 import event_pb2, profile_pb2, served_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as pb

from services.catalog.items import identifier_problem
from services.core.errors import InvalidArgument, VitrineError
from services.ranking.events.event_store import StoredEvent
from services.ranking.events.events import Event, EventItem, EventOutcome, RecordResult
from services.ranking.events.impression_log import LoggedPage
from services.ranking.models.first_phase import SourceColumn
from services.ranking.retrieval.exploration import ExplorationCandidates, ExplorationQuery
from services.ranking.service import PredictResult, RankResult
from services.ranking.users.profiles import UserProfile
from services.rpc import packed_fields, proto_conversions, status
from services.rpc.request_limits import check

MAX_EXPLORED = 500
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def item_hashes_of(item_hashes: Sequence[int]) -> np.ndarray:
    """Item hashes, int64 (C,), of a checked request."""
    return np.array(item_hashes, np.int64)


def page_of(index: int, page: served_pb2.ServedPage, allowed: tuple[datetime, datetime]) -> LoggedPage:
    """A page for the log; its ids are apart from its content, where they can be found and erased.

    Raises:
        InvalidArgument: a field of `pages[index]` is wrong, or its time is outside the `allowed` range.
    """
    check(page, f"pages[{index}].")
    for field in ("user_id", "visitor_id", "session_id"):
        value = getattr(page, field)
        if value and (problem := identifier_problem(value)):
            raise InvalidArgument.of(f"pages[{index}].{field}", problem)
    if not page.request_id:
        raise InvalidArgument.of(f"pages[{index}].request_id", "is required")
    served_at = proto_conversions.time_from(page.served_at, f"pages[{index}].served_at")
    if not allowed[0] <= served_at <= allowed[1]:
        first, last = (time.isoformat(timespec="seconds") for time in allowed)
        problem = (
            f"is {served_at.isoformat(timespec='seconds')}, {first} to {last} is allowed: check the clocks"
        )
        raise InvalidArgument.of(f"pages[{index}].served_at", problem)
    content = served_pb2.ServedPage()
    content.CopyFrom(page)
    content.ClearField("user_id")
    content.ClearField("visitor_id")
    pool = item_hashes_of(page.exploring.item_hashes).tolist()
    for position, draw in enumerate(page.exploring.draws):
        if not 0 <= draw.item_index < len(pool):
            problem = f"is {draw.item_index}, which is not an index of item_hashes"
            raise InvalidArgument.of(f"pages[{index}].exploring.draws[{position}].item_index", problem)
    explored = {pool[draw.item_index] for draw in page.exploring.draws if not page.shadow}
    # A shop may use one request id for all requests of a page of its site.
    key = page.request_id, page.scenario, page.user_id, page.visitor_id, page.start, page.arm, page.shadow
    return LoggedPage(
        key=hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest(),
        user_id=page.user_id,
        visitor_id=page.visitor_id,
        scenario=page.scenario,
        served_at=(served_at - _EPOCH) // timedelta(microseconds=1),
        content=content.SerializeToString() if page.item_ids else b"",
        explored=tuple(sorted(explored)),
    )


def exploration_query_of(message: pb.ExplorationQuery) -> ExplorationQuery:
    """The conditions of an exploration; InvalidArgument names the field."""
    if not 1 <= message.limit <= MAX_EXPLORED:
        raise InvalidArgument.of(
            "exploration_query.limit", f"is {message.limit}, 1 to {MAX_EXPLORED} are allowed"
        )
    return ExplorationQuery(
        scenario=message.scenario,
        limit=message.limit,
        seed=message.seed,
        max_age_days=max(message.max_age_days, 0),
        max_impressions=message.max_impressions,
        max_slots_per_day=message.max_slots_per_day if message.HasField("max_slots_per_day") else None,
        max_interactions=message.max_interactions if message.HasField("max_interactions") else None,
        log_position=message.log_position if message.HasField("log_position") else None,
    )


def exploration_candidates_to(candidates: ExplorationCandidates) -> pb.ExplorationCandidates:
    """The message of candidates to explore."""
    return pb.ExplorationCandidates(
        item_hashes=candidates.item_hashes.tolist(),
        impressions=candidates.impressions.tolist(),
        interactions=candidates.interactions.tolist(),
        log_position=candidates.log_position,
    )


def probabilities_to(ranked: RankResult) -> list[pb.TypeProbabilities]:
    """The probabilities of each type of event."""
    messages = []
    for name, values in ranked.probabilities.items():
        messages.append(pb.TypeProbabilities(type=name))
        packed_fields.extend(messages[-1], "probabilities", values)
    return messages


def prediction_to(prediction: PredictResult) -> pb.Prediction:
    """The message of a prediction."""
    ranked = prediction.ranked
    return pb.Prediction(
        scores=ranked.scores.tolist() if ranked else (),
        probabilities=probabilities_to(ranked) if ranked else (),
        purchase_propensity=_propensity(prediction.propensity),
    )


def _propensity(propensity: Mapping[int, float]) -> list[profile_pb2.PurchasePropensity]:
    by_days = sorted(propensity.items())
    return [profile_pb2.PurchasePropensity(days=days, probability=p) for days, p in by_days]


def profile_to(ids: dict[str, list[str]], profile: UserProfile) -> profile_pb2.UserProfile:
    """The message of the profile of a user with these ids."""
    message = profile_pb2.UserProfile(
        user_ids=ids["user"],
        visitor_ids=ids["visitor"],
        active_days=profile.active_days,
        segment=profile.segment,
        purchase_propensity=_propensity(profile.propensity),
    )
    for affinity in profile.affinities:
        message.affinities.add(
            attribute=affinity.attribute, text=affinity.text, share=affinity.share, lift=affinity.lift
        )
    if price := profile.price:
        message.price.CopyFrom(
            profile_pb2.PriceAffinity(mean=price.mean, percentile=price.percentile, band=price.band)
        )
    for activity in profile.activity:
        first, last = (
            proto_conversions.time_to(_EPOCH + timedelta(microseconds=t))
            for t in (activity.first, activity.last)
        )
        message.activity.add(type=activity.type, items=activity.items, first_at=first, last_at=last)
    if rfm := profile.rfm:
        message.rfm.recency_days, message.rfm.frequency = rfm.recency, rfm.frequency
        message.rfm.monetary = rfm.monetary
        scores = ("recency_score", "frequency_score", "monetary_score")
        for name, score in zip(scores, rfm.scores, strict=True):
            setattr(message.rfm, name, score)
    for channel, share in profile.channels.items():
        message.channels.add(channel=channel, share=share)
    return message


def stored_to(stored: StoredEvent) -> event_pb2.StoredEvent:
    """The message of a stored event."""
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
        message.occurred_at.CopyFrom(proto_conversions.time_to(event.occurred))
    recorded = proto_conversions.time_to(stored.recorded)
    return event_pb2.StoredEvent(event=message, recorded_at=recorded, sequence=stored.sequence)


def event_of(message: event_pb2.Event) -> Event | VitrineError:
    """An event, or the error if it is too large or has a wrong time."""
    try:
        check(message)
        occurred = (
            proto_conversions.time_from(message.occurred_at, "occurred_at")
            if message.HasField("occurred_at")
            else None
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


def outcome_to(index: int, event_id: str, outcome: RecordResult | VitrineError) -> event_pb2.EventOutcome:
    """The outcome of the event at an index of its batch."""
    if isinstance(outcome, VitrineError):
        error = outcome.under(f"events[{index}]") if isinstance(outcome, InvalidArgument) else outcome
        return event_pb2.EventOutcome(
            event_id=event_id, code=event_pb2.EVENT_OUTCOME_CODE_FAILED, error=status.to_status(error)
        )
    codes = {
        EventOutcome.RECORDED: event_pb2.EVENT_OUTCOME_CODE_RECORDED,
        EventOutcome.DUPLICATE: event_pb2.EVENT_OUTCOME_CODE_DUPLICATE,
    }
    return event_pb2.EventOutcome(event_id=event_id, code=codes[outcome.outcome], sequence=outcome.sequence)


def sources_of(request: pb.RankRequest, count: int) -> list[SourceColumn]:
    """The sources of `count` candidates.

    Raises:
        InvalidArgument: an index is none of a candidate or has no score, the indices do not ascend, or a
            source occurs twice.
    """
    columns, names = list[SourceColumn](), set[str]()
    for position, message in enumerate(request.sources):
        indices = np.asarray(message.indices, np.int64)
        scores = np.asarray(message.scores, np.float32)
        if len(indices) != len(scores):
            raise InvalidArgument.of(f"sources[{position}].scores", f"needs {len(indices)}, one per index")
        if len(indices) and indices.max() >= count:
            raise InvalidArgument.of(f"sources[{position}].indices", f"must be below {count}")
        if (indices[1:] <= indices[:-1]).any():
            raise InvalidArgument.of(f"sources[{position}].indices", "must ascend, each once")
        if not np.isfinite(scores).all():
            raise InvalidArgument.of(f"sources[{position}].scores", "must be finite")
        if message.source in names:
            raise InvalidArgument.of(f"sources[{position}].source", f"{message.source!r} occurs twice")
        names.add(message.source)
        columns.append((message.source, indices, scores))
    return columns
