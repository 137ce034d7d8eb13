"""The RPCs of `RankingService`: convert the request, call the domain, convert the response."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from vitrine.catalog.v1 import item_pb2, served_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as pb_grpc

from services.catalog.candidate_sources import RANKING_SOURCES
from services.catalog.items import identifier_problem, item_hash
from services.core import slices
from services.core.errors import FailedPrecondition, InvalidArgument, quoted, storage_refusal
from services.ranking.events.events import MAX_CALL_ITEMS
from services.ranking.proto_conversions import (
    event_of,
    exploration_candidates_to,
    exploration_query_of,
    item_hashes_of,
    outcome_to,
    page_of,
    prediction_to,
    probabilities_to,
    profile_to,
    sources_of,
    stored_to,
)
from services.ranking.retrieval.retriever import RetrievalOptions, RetrieveResult
from services.ranking.scoring.explanations import KINDS
from services.ranking.service import RankingService
from services.ranking.state.query_builder import User
from services.rpc import packed_fields, proto_conversions, status
from services.rpc.request_limits import check, checked

_DIGITS = 19
_END = 2**63 - 1
MAX_EVENTS = 1000
MAX_PAGES = 1000
DEFAULT_PAGE = 100
MAX_LIMIT = 2000
MAX_EXCLUDED = 100_000
MAX_CANDIDATES = 10_000
MAX_EXPLAINED = 500
MAX_SESSION = 200
MAX_USERS = 100
# The largest allowed difference between the clocks of a gateway and of this process.
_MAX_SKEW = timedelta(minutes=5)
_SOURCES = {name: pb.Source.Value(f"SOURCE_{name.upper()}") for name in RANKING_SOURCES}
_NAMES = {number: name for name, number in _SOURCES.items()}


@checked(pb.DESCRIPTOR.services_by_name["RankingService"])
class RankingServicer(pb_grpc.RankingServiceServicer):
    """The service over one bundle; calls may name one of `bundles`; `ready` is set once the items are loaded.

    `page_days` is the retention of the impression log.
    """

    def __init__(
        self,
        ranking: RankingService,
        bundle: str,
        bundles: Sequence[str],
        ready: asyncio.Event,
        clock: Callable[[], datetime],
        page_days: int,
    ) -> None:
        self._ranking, self._bundle, self._bundles, self._ready = ranking, bundle, bundles, ready
        self._clock, self._page_age = clock, timedelta(days=max(page_days, 1))
        weights = ranking.profile.event_types
        self._default_type = max(weights, key=lambda name: weights[name])

    async def WriteEvents(self, request: pb.WriteEventsRequest, context: Any) -> pb.WriteEventsResponse:
        """Commit events; the response has an outcome for each."""
        if not 1 <= len(request.events) <= MAX_EVENTS:
            raise InvalidArgument.of("events", f"has {len(request.events)}, 1 to {MAX_EVENTS} are allowed")
        if (count := sum(len(message.items) for message in request.events)) > MAX_CALL_ITEMS:
            raise InvalidArgument.of("events", f"have {count} items, at most {MAX_CALL_ITEMS} are allowed")
        outcomes = await self._ranking.write(await slices.convert(event_of, request.events))
        if refusal := storage_refusal(outcomes):
            raise refusal
        return pb.WriteEventsResponse(
            outcomes=[
                outcome_to(index, message.event_id, outcome)
                for index, (message, outcome) in enumerate(zip(request.events, outcomes, strict=True))
            ]
        )

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Any) -> pb.DeleteUserResponse:
        """Delete all data of a user."""
        _check_ids(request)
        erased = await self._ranking.retention.forget(request.user_id, request.visitor_id)
        return pb.DeleteUserResponse(events=erased.events, ids=erased.ids, pages=erased.pages)

    async def ExportUser(self, request: pb.ExportUserRequest, context: Any) -> pb.ExportUserResponse:
        """One page of the data of a user."""
        _check_ids(request)
        limit = proto_conversions.check_limit(request.page_size, MAX_EVENTS, "page_size", DEFAULT_PAGE)
        user = request.user_id, request.visitor_id
        user_digest = hashlib.blake2b(repr(user).encode(), digest_size=6).hexdigest()
        in_log, after = _export_token(request.page_token, user_digest)
        # The pages of the impression log follow the events.
        ids, events, has_more = await self._ranking.retention.export(*user, _END if in_log else after, limit)
        response = pb.ExportUserResponse(user_ids=ids["user"], visitor_ids=ids["visitor"])
        for stored in events:
            response.events.append(stored_to(stored))
        if has_more:
            response.next_page_token = f"{events[-1].sequence}.{user_digest}"
            return response
        remaining = limit - len(events)
        pages = await self._ranking.retention.export_pages(*user, after if in_log else 0, remaining + 1)
        response.pages.extend(served_pb2.ServedPage.FromString(page.content) for page in pages[:remaining])
        if len(pages) > remaining:
            response.next_page_token = f"p{pages[remaining - 1].sequence if remaining else 0}.{user_digest}"
        return response

    async def LogPages(self, request: pb.LogPagesRequest, context: Any) -> pb.LogPagesResponse:
        """Write answered pages to the impression log."""
        if not 1 <= len(request.pages) <= MAX_PAGES:
            raise InvalidArgument.of("pages", f"has {len(request.pages)}, 1 to {MAX_PAGES} are allowed")
        now = self._clock()
        allowed = now - self._page_age, now + _MAX_SKEW
        pages = await slices.convert(lambda page: page_of(*page, allowed), enumerate(request.pages))
        await self._ranking.retention.log(pages)
        return pb.LogPagesResponse()

    async def GetUserProfile(
        self, request: pb.GetUserProfileRequest, context: Any
    ) -> pb.GetUserProfileResponse:
        """The profile of a user from their events."""
        _check_ids(request)
        self._check_bundle(request.bundle)
        ids, profile = await self._ranking.user_profile(request.user_id, request.visitor_id, _as_of(request))
        return pb.GetUserProfileResponse(profile=profile_to(ids, profile))

    async def Retrieve(self, request: pb.RetrieveRequest, context: Any) -> pb.RetrieveResponse:
        """The history of a user, and candidates."""
        self._check_bundle(request.bundle)
        limit = proto_conversions.check_limit(request.limit, MAX_LIMIT, "limit")
        if len(request.exclude_item_hashes) > MAX_EXCLUDED:
            raise InvalidArgument.of("exclude_item_hashes", f"has more than {MAX_EXCLUDED}")
        if unknown := [s for s in request.sources if s not in _NAMES]:
            raise InvalidArgument.of("sources", f"{unknown[0]} is not a source of this service")
        retrieved = await self._ranking.retrieve(
            self._user(request.user),
            _as_of(request),
            RetrievalOptions(
                limit,
                proto_conversions.filter_from(request.filter) if request.HasField("filter") else None,
                request.exclude_item_hashes,
                request.exclude_purchased,
                [_NAMES[s] for s in request.sources],
                request.include_shown,
                exploration_query_of(request.exploration_query)
                if request.HasField("exploration_query")
                else None,
            ),
            min_sequence=request.min_sequence,
        )
        return self._retrieve_response(retrieved)

    async def Rank(self, request: pb.RankRequest, context: Any) -> pb.RankResponse:
        """Score candidates for a user."""
        self._check_bundle(request.bundle)
        if request.item_hashes:
            item_hashes = item_hashes_of(request.item_hashes)
        else:
            item_hashes = np.array([item_hash(i) for i in request.item_ids], np.int64)
        if not 1 <= len(item_hashes) <= MAX_CANDIDATES:
            raise InvalidArgument.of(
                "item_hashes", f"has {len(item_hashes)}, 1 to {MAX_CANDIDATES} are allowed"
            )
        ranked = await self._ranking.rank(
            self._user(request.user),
            _as_of(request),
            item_hashes,
            request.state_sequence or None,
            sources_of(request, len(item_hashes)),
        )
        response = pb.RankResponse(bundle=self._bundle)
        packed_fields.extend(response, "scores", ranked.scores)
        if ranked.selected is not None:
            packed_fields.extend(response, "second_phase", ranked.selected)
        for name, scores in ranked.components.items():
            packed_fields.extend(response.components.add(component=name), "scores", scores)
        response.probabilities.extend(probabilities_to(ranked))
        if request.view == item_pb2.VIEW_READABLE:
            self._add_rows(response, item_hashes, ranked.scores)
        return response

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """Explain scores by kinds of evidence."""
        self._check_bundle(request.bundle)
        if not 1 <= len(request.item_hashes) <= MAX_EXPLAINED:
            count = len(request.item_hashes)
            raise InvalidArgument.of("item_hashes", f"has {count}, 1 to {MAX_EXPLAINED} are allowed")
        item_hashes = item_hashes_of(request.item_hashes)
        until_sequence = request.state_sequence or None
        explained = await self._ranking.explain(
            self._user(request.user), _as_of(request), item_hashes, until_sequence
        )
        response = pb.ExplainResponse(bundle=self._bundle)
        for column, kind in enumerate(KINDS):
            response.evidence.add(
                kind=kind,
                shares=explained.shares[:, column].tolist(),
                history_item_hashes=explained.item_hashes[:, column].tolist(),
                purchased=explained.purchased[:, column].tolist(),
            )
        return response

    async def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
        """Predict the interactions and purchases of users; the response has a prediction for each."""
        self._check_bundle(request.bundle)
        count, item_hashes = len(request.users), item_hashes_of(request.item_hashes)
        if not 1 <= count <= MAX_USERS:
            raise InvalidArgument.of("users", f"has {count}, 1 to {MAX_USERS} are allowed")
        if count * len(item_hashes) > MAX_CANDIDATES:
            problem = f"times users are {count * len(item_hashes)}, at most {MAX_CANDIDATES} are allowed"
            raise InvalidArgument.of("item_hashes", problem)
        as_of = _as_of(request)
        await self._ranking.view.wait_for(request.min_sequence)
        until_sequence = self._ranking.state.sequence

        async def predict(index: int, message: pb.User) -> pb.Prediction:
            try:
                user = self._user(message, f"users[{index}]")
            except InvalidArgument as error:
                return pb.Prediction(error=status.to_status(error))
            return prediction_to(
                await self._ranking.predict(user, as_of, item_hashes, until_sequence or None)
            )

        # One after the other: all at once would delay the requests of others.
        predictions = [await predict(index, message) for index, message in enumerate(request.users)]
        return pb.PredictResponse(predictions=predictions, state_sequence=until_sequence, bundle=self._bundle)

    def _add_rows(self, response: pb.RankResponse, item_hashes: np.ndarray, scores: np.ndarray) -> None:
        table = self._ranking.view.table
        table_rows = table.rows(item_hashes)
        in_table = table_rows >= 0
        ids = table.ids(table_rows[in_table])
        rows = sorted(zip(ids, scores[in_table].tolist(), strict=True), key=lambda row: -row[1])
        for item_id, score in rows:
            response.rows.add(item_id=item_id, score=score)

    def _retrieve_response(self, retrieved: RetrieveResult) -> pb.RetrieveResponse:
        response = pb.RetrieveResponse(
            history=pb.History(
                item_hashes=retrieved.item_hashes.tolist(),
                types=retrieved.kinds.tolist(),
                ages=retrieved.ages.tolist(),
                weights=retrieved.weights.tolist(),
                event_types=list(self._ranking.profile.event_types),
            ),
            state_sequence=retrieved.sequence,
            purchased_item_hashes=retrieved.purchased.tolist(),
            bundle=self._bundle,
            shown_item_hashes=retrieved.ignored[0].tolist() if retrieved.ignored else (),
            shown_counts=retrieved.ignored[1].tolist() if retrieved.ignored else (),
            exploration_candidates=exploration_candidates_to(retrieved.exploration_candidates)
            if retrieved.exploration_candidates
            else None,
        )
        for name, candidates in retrieved.candidates.items():
            if len(candidates.item_hashes):
                part = response.candidates.add(source=_SOURCES[name])
                packed_fields.extend(part, "item_hashes", candidates.item_hashes)
                packed_fields.extend(part, "scores", candidates.scores)
        return response

    async def ListBundles(self, request: pb.ListBundlesRequest, context: Any) -> pb.ListBundlesResponse:
        """The versions of the bundles that calls may name."""
        return pb.ListBundlesResponse(bundles=self._bundles)

    def _user(self, message: pb.User, path: str = "user") -> User:
        check(message, f"{path}.")
        for field in ("user_id", "visitor_id"):
            value = getattr(message, field)
            if value and (problem := identifier_problem(value)):
                raise InvalidArgument.of(f"{path}.{field}", problem)
        if len(message.session) > MAX_SESSION:
            raise InvalidArgument.of(f"{path}.session", f"has more than {MAX_SESSION} items")
        kinds = self._ranking.state.kinds
        try:
            session = proto_conversions.session_from(message.session, kinds, self._default_type)
        except InvalidArgument as error:
            raise error.under(path) from None
        return User(message.user_id, message.visitor_id, tuple(session))

    def _check_bundle(self, bundle: str) -> None:
        if bundle and bundle != self._bundle:
            raise FailedPrecondition(
                f"bundle {quoted(bundle)} is not loaded; this server has {self._bundle!r}"
            )
        if not self._ready.is_set():
            raise FailedPrecondition("the items are not loaded yet: they come from the embedding service")


def _export_token(token: str, user_digest: str) -> tuple[bool, int]:
    """Whether an export continues in the impression log, and after which sequence number."""
    if not token:
        return False, 0
    digits, _, digest = token.removeprefix("p").partition(".")
    in_log = token.startswith("p")
    if digest != user_digest:
        raise InvalidArgument.of("page_token", "is not a token of this service for this user")
    valid = digits.isascii() and digits.isdecimal() and len(digits) <= _DIGITS
    if not valid or not (0 if in_log else 1) <= int(digits) < _END:
        raise InvalidArgument.of("page_token", "is not a token of this service")
    return in_log, int(digits)


def _as_of(
    request: pb.RetrieveRequest
    | pb.RankRequest
    | pb.ExplainRequest
    | pb.GetUserProfileRequest
    | pb.PredictRequest,
) -> Any:
    if not request.HasField("as_of"):
        raise InvalidArgument.of("as_of", "is required")
    return proto_conversions.time_from(request.as_of, "as_of")


def _check_ids(request: pb.DeleteUserRequest | pb.ExportUserRequest | pb.GetUserProfileRequest) -> None:
    if not (request.user_id or request.visitor_id):
        raise InvalidArgument.of("user_id", "or visitor_id is required")
    for field, value in (("user_id", request.user_id), ("visitor_id", request.visitor_id)):
        if value and (problem := identifier_problem(value)):
            raise InvalidArgument.of(field, problem)
