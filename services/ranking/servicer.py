"""`RankingService` over behaviour: decodes, calls, encodes. Raises the domain's errors."""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from vitrine.catalog.v1 import event_pb2, item_pb2, profile_pb2, served_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as pb_grpc

from services import status, wire
from services.catalog import identifier_problem, item_number
from services.errors import FailedPrecondition, InvalidArgument, VitrineError
from services.ranking.behaviour import Event, EventItem, Outcome, Recorded, Stored
from services.ranking.exploring import Explorable, Explore
from services.ranking.people import UserProfile
from services.ranking.ranking import Person, Predicted, Ranked, Ranking, Retrieved
from services.ranking.reasons import KINDS
from services.ranking.served import Served

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DIGITS = 19
_NO_MORE = 2**63 - 1
MAX_EVENTS = 1000
MAX_PAGES = 1000
MAX_EXPLORED = 500
DEFAULT_PAGE = 100
MAX_LIMIT = 2000
MAX_EXCLUDED = 100_000
MAX_CANDIDATES = 10_000
MAX_EXPLAINED = 500
MAX_SESSION = 200
MAX_PEOPLE = 100
_SOURCES = {
    "graph": pb.SOURCE_GRAPH,
    "popular": pb.SOURCE_POPULAR,
    "rising": pb.SOURCE_RISING,
    "new": pb.SOURCE_NEW,
    "family": pb.SOURCE_FAMILY,
    "affinity": pb.SOURCE_AFFINITY,
    "sequence": pb.SOURCE_SEQUENCE,
    "words": pb.SOURCE_WORDS,
}
_NAMES = {number: name for name, number in _SOURCES.items()}


class RankingServicer(pb_grpc.RankingServiceServicer):
    """The service over one bundle."""

    def __init__(self, ranking: Ranking, bundle: str) -> None:
        self._ranking, self._bundle = ranking, bundle
        weights = ranking.profile.event_types
        self._strongest = max(weights, key=lambda name: weights[name])

    async def WriteEvents(self, request: pb.WriteEventsRequest, context: Any) -> pb.WriteEventsResponse:
        """Commit events, an outcome for each."""
        if not 1 <= len(request.events) <= MAX_EVENTS:
            raise InvalidArgument.of("events", f"has {len(request.events)}, 1 to {MAX_EVENTS} are allowed")
        outcomes = await self._ranking.write([_event(message) for message in request.events])
        return pb.WriteEventsResponse(
            outcomes=[
                _outcome(at, message.event_id, outcome)
                for at, (message, outcome) in enumerate(zip(request.events, outcomes, strict=True))
            ]
        )

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserResponse:
        """Forget a person."""
        _check_ids(request)
        forgotten = await self._ranking.forget(request.user_id, request.visitor_id)
        return pb.DeleteUserResponse(events=forgotten.events, ids=forgotten.ids, pages=forgotten.pages)

    async def ExportUser(self, request: pb.ExportUserRequest, context: Any) -> pb.ExportUserResponse:
        """A page of what is known of a person."""
        _check_ids(request)
        limit = wire.check_limit(request.page_size, MAX_EVENTS, "page_size", DEFAULT_PAGE)
        person = request.user_id, request.visitor_id
        own = hashlib.blake2b(repr(person).encode(), digest_size=6).hexdigest()
        of_pages, after = _export_token(request.page_token, own)
        # After a page's place in the log there are no events any more.
        ids, events = await self._ranking.export(*person, _NO_MORE if of_pages else after, limit + 1)
        response = pb.ExportUserResponse(user_ids=ids["user"], visitor_ids=ids["visitor"])
        for stored in events[:limit]:
            response.events.append(_stored(stored))
        if len(events) > limit:
            response.next_page_token = f"{events[limit - 1].sequence}.{own}"
            return response
        left = limit - len(events)
        pages = await self._ranking.export_pages(*person, after if of_pages else 0, left + 1)
        response.pages.extend(served_pb2.ServedPage.FromString(page.content) for page in pages[:left])
        if len(pages) > left:
            response.next_page_token = f"p{pages[left - 1].sequence if left else 0}.{own}"
        return response

    async def LogPages(self, request: pb.LogPagesRequest, context: Any) -> pb.LogPagesResponse:
        """Keep pages that were answered."""
        if not 1 <= len(request.pages) <= MAX_PAGES:
            raise InvalidArgument.of("pages", f"has {len(request.pages)}, 1 to {MAX_PAGES} are allowed")
        await self._ranking.log([_served(at, page) for at, page in enumerate(request.pages)])
        return pb.LogPagesResponse()

    async def GetUserProfile(
        self, request: pb.GetUserProfileRequest, context: Any
    ) -> pb.GetUserProfileResponse:
        """What a person's behaviour says of them."""
        _check_ids(request)
        self._check_bundle(request.bundle)
        ids, found = await self._ranking.user_profile(request.user_id, request.visitor_id, _as_of(request))
        return pb.GetUserProfileResponse(profile=_profile(ids, found))

    async def Retrieve(self, request: pb.RetrieveRequest, context: Any) -> pb.RetrieveResponse:
        """A person's state and behaviour's candidates."""
        self._check_bundle(request.bundle)
        limit = wire.check_limit(request.limit, MAX_LIMIT, "limit")
        if len(request.exclude_item_numbers) > MAX_EXCLUDED:
            raise InvalidArgument.of("exclude_item_numbers", f"has more than {MAX_EXCLUDED}")
        if unknown := [s for s in request.sources if s not in _NAMES]:
            raise InvalidArgument.of("sources", f"{unknown[0]} is no source of this service")
        retrieved = await self._ranking.retrieve(
            self._person(request.person),
            _as_of(request),
            limit,
            condition=wire.filter_from(request.filter) if request.HasField("filter") else None,
            excluded=request.exclude_item_numbers,
            exclude_bought=request.exclude_bought,
            sources=[_NAMES[s] for s in request.sources],
            min_sequence=request.min_sequence,
            include_shown=request.include_shown,
            explore=_explore(request.explore) if request.HasField("explore") else None,
        )
        return self._retrieved(retrieved)

    async def Rank(self, request: pb.RankRequest, context: Any) -> pb.RankResponse:
        """Score candidates for a person."""
        self._check_bundle(request.bundle)
        numbers = list(request.item_numbers) or [item_number(i) for i in request.item_ids]
        if not 1 <= len(numbers) <= MAX_CANDIDATES:
            raise InvalidArgument.of("item_numbers", f"has {len(numbers)}, 1 to {MAX_CANDIDATES} are allowed")
        _signed(request.item_numbers)
        upto = request.state_sequence or None
        ranked = await self._ranking.rank(
            self._person(request.person), _as_of(request), np.array(numbers, np.int64), upto
        )
        response = pb.RankResponse(scores=ranked.scores.tolist(), bundle=self._bundle)
        for name, scores in ranked.components.items():
            response.components.add(component=name, scores=scores.tolist())
        response.probabilities.extend(_probabilities(ranked))
        if request.view == item_pb2.VIEW_READABLE:
            self._add_rows(response, numbers, ranked.scores)
        return response

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """Tell what scores rest on."""
        self._check_bundle(request.bundle)
        if not 1 <= len(request.item_numbers) <= MAX_EXPLAINED:
            many = len(request.item_numbers)
            raise InvalidArgument.of("item_numbers", f"has {many}, 1 to {MAX_EXPLAINED} are allowed")
        numbers = _signed(request.item_numbers)
        upto = request.state_sequence or None
        explained = await self._ranking.explain(self._person(request.person), _as_of(request), numbers, upto)
        response = pb.ExplainResponse(bundle=self._bundle)
        for at, kind in enumerate(KINDS):
            response.evidence.add(
                kind=kind,
                shares=explained.shares[:, at].tolist(),
                history_item_numbers=explained.items[:, at].tolist(),
                bought=explained.bought[:, at].tolist(),
            )
        return response

    async def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
        """What people are likely to do, an outcome for each."""
        self._check_bundle(request.bundle)
        many, numbers = len(request.people), _signed(request.item_numbers)
        if not 1 <= many <= MAX_PEOPLE:
            raise InvalidArgument.of("people", f"has {many}, 1 to {MAX_PEOPLE} are allowed")
        if many * len(numbers) > MAX_CANDIDATES:
            wrong = f"times people are {many * len(numbers)}, at most {MAX_CANDIDATES} are allowed"
            raise InvalidArgument.of("item_numbers", wrong)
        as_of = _as_of(request)
        await self._ranking.view.wait_for(request.min_sequence)
        upto = self._ranking.state.sequence

        async def predicted(at: int, message: pb.Person) -> pb.Prediction:
            try:
                person = self._person(message, f"people[{at}]")
            except InvalidArgument as error:
                return pb.Prediction(error=status.to_status(error))
            return _prediction(await self._ranking.predict(person, as_of, numbers, upto or None))

        # One after the other: all at once would keep everybody else waiting behind them.
        found = [await predicted(at, message) for at, message in enumerate(request.people)]
        return pb.PredictResponse(predictions=found, state_sequence=upto, bundle=self._bundle)

    def _add_rows(self, response: pb.RankResponse, numbers: list[int], scores: np.ndarray) -> None:
        table = self._ranking.view.table
        known = [at for at, row in enumerate(table.rows(numbers)) if row >= 0]
        ids = table.ids(table.rows(numbers[at] for at in known))
        rows = sorted(zip(ids, scores[known].tolist(), strict=True), key=lambda row: -row[1])
        for item_id, score in rows:
            response.rows.add(item_id=item_id, score=score)

    def _retrieved(self, retrieved: Retrieved) -> pb.RetrieveResponse:
        return pb.RetrieveResponse(
            history=pb.History(
                item_numbers=retrieved.numbers.tolist(),
                types=retrieved.kinds.tolist(),
                ages=retrieved.ages.tolist(),
                weights=retrieved.weights.tolist(),
                event_types=list(self._ranking.profile.event_types),
            ),
            candidates=[
                pb.CandidateList(
                    source=_SOURCES[name],
                    item_numbers=found.numbers.tolist(),
                    scores=found.scores.tolist(),
                )
                for name, found in retrieved.candidates.items()
                if len(found.numbers)
            ],
            state_sequence=retrieved.sequence,
            bought_item_numbers=retrieved.bought.tolist(),
            bundle=self._bundle,
            shown_item_numbers=retrieved.shown[0].tolist() if retrieved.shown else (),
            shown_counts=retrieved.shown[1].tolist() if retrieved.shown else (),
            explorable=_explorable(retrieved.explorable) if retrieved.explorable else None,
        )

    def _person(self, message: pb.Person, path: str = "person") -> Person:
        for field in ("user_id", "visitor_id"):
            value = getattr(message, field)
            if value and (problem := identifier_problem(value)):
                raise InvalidArgument.of(f"{path}.{field}", problem)
        if len(message.session) > MAX_SESSION:
            raise InvalidArgument.of(f"{path}.session", f"has more than {MAX_SESSION} items")
        kinds = self._ranking.state.kinds
        try:
            session = wire.session_from(message.session, kinds, self._strongest)
        except InvalidArgument as error:
            raise error.under(path) from None
        return Person(message.user_id, message.visitor_id, tuple(session))

    def _check_bundle(self, bundle: str) -> None:
        if bundle and bundle != self._bundle:
            raise FailedPrecondition(f"bundle {bundle!r} is not loaded; this server has {self._bundle!r}")


def _signed(numbers: Iterable[int]) -> np.ndarray:
    """Item numbers, int64 (C,)."""
    found = list(numbers)
    if wrong := [n for n in found if n >> 63]:
        raise InvalidArgument.of("item_numbers", f"{wrong[0]} is no item number")
    return np.array(found, np.int64)


def _export_token(token: str, person: str) -> tuple[bool, int]:
    """Whether a token of a person goes on among pages, and after which sequence number."""
    if not token:
        return False, 0
    digits, _, whose = token.removeprefix("p").partition(".")
    of_pages = token.startswith("p")
    if whose != person:
        raise InvalidArgument.of("page_token", "is not a token of this service, or another person's")
    known = digits.isascii() and digits.isdecimal() and len(digits) <= _DIGITS
    if not known or not (0 if of_pages else 1) <= int(digits) < _NO_MORE:
        raise InvalidArgument.of("page_token", "is not a token of this service")
    return of_pages, int(digits)


def _served(at: int, page: served_pb2.ServedPage) -> Served:
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
    pool = _signed(page.exploring.item_numbers).tolist()
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


def _explore(message: pb.Explore) -> Explore:
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


def _explorable(found: Explorable) -> pb.Explorable:
    return pb.Explorable(
        item_numbers=found.numbers.tolist(),
        showings=found.showings.tolist(),
        engagements=found.engagements.tolist(),
        upto=found.upto,
    )


def _as_of(
    request: pb.RetrieveRequest
    | pb.RankRequest
    | pb.ExplainRequest
    | pb.GetUserProfileRequest
    | pb.PredictRequest,
) -> Any:
    if not request.HasField("as_of"):
        raise InvalidArgument.of("as_of", "is required")
    return wire.time_from(request.as_of, "as_of")


def _probabilities(ranked: Ranked) -> list[pb.TypeProbabilities]:
    found = ranked.probabilities.items()
    return [pb.TypeProbabilities(type=name, probabilities=values.tolist()) for name, values in found]


def _prediction(predicted: Predicted) -> pb.Prediction:
    ranked = predicted.ranked
    return pb.Prediction(
        scores=ranked.scores.tolist() if ranked else (),
        probabilities=_probabilities(ranked) if ranked else (),
        purchase_propensity=_propensity(predicted.propensity),
    )


def _propensity(chances: Mapping[int, float]) -> list[profile_pb2.PurchasePropensity]:
    found = sorted(chances.items())
    return [profile_pb2.PurchasePropensity(days=days, probability=chance) for days, chance in found]


def _profile(ids: dict[str, list[str]], found: UserProfile) -> profile_pb2.UserProfile:
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


def _check_ids(request: pb.DeleteUserRequest | pb.ExportUserRequest | pb.GetUserProfileRequest) -> None:
    if not (request.user_id or request.visitor_id):
        raise InvalidArgument.of("user_id", "or visitor_id is required")
    for field, value in (("user_id", request.user_id), ("visitor_id", request.visitor_id)):
        if value and (problem := identifier_problem(value)):
            raise InvalidArgument.of(field, problem)


def _stored(stored: Stored) -> event_pb2.StoredEvent:
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


def _event(message: event_pb2.Event) -> Event | VitrineError:
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


def _outcome(at: int, event_id: str, outcome: Recorded | VitrineError) -> event_pb2.EventOutcome:
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
