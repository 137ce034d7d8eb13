"""`RankingService` over behaviour: decodes, calls, encodes. Raises the domain's errors."""

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from vitrine.catalog.v1 import item_pb2, served_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as pb_grpc

from services import status, wire
from services.catalog import identifier_problem, item_number
from services.errors import FailedPrecondition, InvalidArgument
from services.ranking.messages import (
    event_of,
    explorable_to,
    explore_of,
    outcome_to,
    prediction_to,
    probabilities_to,
    profile_to,
    served_of,
    signed,
    stored_to,
)
from services.ranking.ranking import Person, Ranking, Retrieved
from services.ranking.reasons import KINDS

_DIGITS = 19
_NO_MORE = 2**63 - 1
MAX_EVENTS = 1000
MAX_PAGES = 1000
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
    """The service over one bundle; calls may name one of `bundles`, `ready` is set once items are known."""

    def __init__(self, ranking: Ranking, bundle: str, bundles: Sequence[str], ready: asyncio.Event) -> None:
        self._ranking, self._bundle, self._bundles, self._ready = ranking, bundle, bundles, ready
        weights = ranking.profile.event_types
        self._strongest = max(weights, key=lambda name: weights[name])

    async def WriteEvents(self, request: pb.WriteEventsRequest, context: Any) -> pb.WriteEventsResponse:
        """Commit events, an outcome for each."""
        if not 1 <= len(request.events) <= MAX_EVENTS:
            raise InvalidArgument.of("events", f"has {len(request.events)}, 1 to {MAX_EVENTS} are allowed")
        outcomes = await self._ranking.write([event_of(message) for message in request.events])
        return pb.WriteEventsResponse(
            outcomes=[
                outcome_to(at, message.event_id, outcome)
                for at, (message, outcome) in enumerate(zip(request.events, outcomes, strict=True))
            ]
        )

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserResponse:
        """Forget a person."""
        _check_ids(request)
        forgotten = await self._ranking.keeping.forget(request.user_id, request.visitor_id)
        return pb.DeleteUserResponse(events=forgotten.events, ids=forgotten.ids, pages=forgotten.pages)

    async def ExportUser(self, request: pb.ExportUserRequest, context: Any) -> pb.ExportUserResponse:
        """A page of what is known of a person."""
        _check_ids(request)
        limit = wire.check_limit(request.page_size, MAX_EVENTS, "page_size", DEFAULT_PAGE)
        person = request.user_id, request.visitor_id
        own = hashlib.blake2b(repr(person).encode(), digest_size=6).hexdigest()
        of_pages, after = _export_token(request.page_token, own)
        # After a page's place in the log there are no events any more.
        ids, events = await self._ranking.keeping.export(*person, _NO_MORE if of_pages else after, limit + 1)
        response = pb.ExportUserResponse(user_ids=ids["user"], visitor_ids=ids["visitor"])
        for stored in events[:limit]:
            response.events.append(stored_to(stored))
        if len(events) > limit:
            response.next_page_token = f"{events[limit - 1].sequence}.{own}"
            return response
        left = limit - len(events)
        pages = await self._ranking.keeping.export_pages(*person, after if of_pages else 0, left + 1)
        response.pages.extend(served_pb2.ServedPage.FromString(page.content) for page in pages[:left])
        if len(pages) > left:
            response.next_page_token = f"p{pages[left - 1].sequence if left else 0}.{own}"
        return response

    async def LogPages(self, request: pb.LogPagesRequest, context: Any) -> pb.LogPagesResponse:
        """Keep pages that were answered."""
        if not 1 <= len(request.pages) <= MAX_PAGES:
            raise InvalidArgument.of("pages", f"has {len(request.pages)}, 1 to {MAX_PAGES} are allowed")
        await self._ranking.keeping.log([served_of(at, page) for at, page in enumerate(request.pages)])
        return pb.LogPagesResponse()

    async def GetUserProfile(
        self, request: pb.GetUserProfileRequest, context: Any
    ) -> pb.GetUserProfileResponse:
        """What a person's behaviour says of them."""
        _check_ids(request)
        self._check_bundle(request.bundle)
        ids, found = await self._ranking.user_profile(request.user_id, request.visitor_id, _as_of(request))
        return pb.GetUserProfileResponse(profile=profile_to(ids, found))

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
            explore=explore_of(request.explore) if request.HasField("explore") else None,
        )
        return self._retrieved(retrieved)

    async def Rank(self, request: pb.RankRequest, context: Any) -> pb.RankResponse:
        """Score candidates for a person."""
        self._check_bundle(request.bundle)
        numbers = list(request.item_numbers) or [item_number(i) for i in request.item_ids]
        if not 1 <= len(numbers) <= MAX_CANDIDATES:
            raise InvalidArgument.of("item_numbers", f"has {len(numbers)}, 1 to {MAX_CANDIDATES} are allowed")
        signed(request.item_numbers)
        upto = request.state_sequence or None
        ranked = await self._ranking.rank(
            self._person(request.person), _as_of(request), np.array(numbers, np.int64), upto
        )
        response = pb.RankResponse(scores=ranked.scores.tolist(), bundle=self._bundle)
        for name, scores in ranked.components.items():
            response.components.add(component=name, scores=scores.tolist())
        response.probabilities.extend(probabilities_to(ranked))
        if request.view == item_pb2.VIEW_READABLE:
            self._add_rows(response, numbers, ranked.scores)
        return response

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """Tell what scores rest on."""
        self._check_bundle(request.bundle)
        if not 1 <= len(request.item_numbers) <= MAX_EXPLAINED:
            many = len(request.item_numbers)
            raise InvalidArgument.of("item_numbers", f"has {many}, 1 to {MAX_EXPLAINED} are allowed")
        numbers = signed(request.item_numbers)
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
        many, numbers = len(request.people), signed(request.item_numbers)
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
            return prediction_to(await self._ranking.predict(person, as_of, numbers, upto or None))

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
            explorable=explorable_to(retrieved.explorable) if retrieved.explorable else None,
        )

    async def ListBundles(self, request: pb.ListBundlesRequest, context: Any) -> pb.ListBundlesResponse:
        """The bundles that calls may name."""
        return pb.ListBundlesResponse(bundles=self._bundles)

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
        if not self._ready.is_set():
            raise FailedPrecondition("the items are not known yet: the embedding service has to tell of them")


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


def _check_ids(request: pb.DeleteUserRequest | pb.ExportUserRequest | pb.GetUserProfileRequest) -> None:
    if not (request.user_id or request.visitor_id):
        raise InvalidArgument.of("user_id", "or visitor_id is required")
    for field, value in (("user_id", request.user_id), ("visitor_id", request.visitor_id)):
        if value and (problem := identifier_problem(value)):
            raise InvalidArgument.of(field, problem)
