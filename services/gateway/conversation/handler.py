"""`Converse`: one turn of a dialogue, whose state travels in a signed token."""

import hashlib
from collections.abc import Awaitable, Callable
from datetime import datetime

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import InvalidArgument
from services.gateway.conversation import request_parser
from services.gateway.conversation.language.dialogue_state import (
    DialogueState,
    state_from_json,
    state_to_json,
)
from services.gateway.conversation.language.interpreter_runner import InterpreterRunner
from services.gateway.conversation.response_builder import converse_response
from services.gateway.conversation.turn import TurnRunner
from services.gateway.experiments.scenarios import Scenarios
from services.gateway.query import RecommendQuery
from services.gateway.recommend.handler import DEFAULT_PAGE, MAX_PAGE, RecommendHandler
from services.gateway.recommend.request_parser import parse_query
from services.gateway.recommend.signed_tokens import SignedTokens
from services.rpc import proto_conversions

_DIALOGUE = "talk"


class ConverseHandler:
    """Answers `Converse` by the pipeline of `recommend`; `wait_for` waits for a catalog change."""

    def __init__(
        self,
        recommend: RecommendHandler,
        tokens: SignedTokens,
        wait_for: Callable[[int], Awaitable[None]],
        scenarios: Scenarios,
        interpreter: InterpreterRunner,
    ) -> None:
        self._recommend, self._tokens, self._wait_for = recommend, tokens, wait_for
        self._scenarios, self._turns = scenarios, TurnRunner(recommend.pipeline, interpreter)

    async def converse(self, request: pb.ConverseRequest, now: datetime) -> pb.ConverseResponse:
        """One turn; InvalidArgument names all invalid fields."""
        size, query, state = self._parse(request, now)
        await self._wait_for(request.min_sequence)
        turn = await self._turns.run(request, query, state)
        page = await self._recommend.publish(
            request_parser.recommend_request(request),
            turn.query,
            turn.page,
            slice(0, size),
            now,
            turn.degraded,
            include_reasons=request.include_reasons,
        )
        titles = await self._turns.titles(turn)
        return converse_response(request, turn, page, titles, self._token(request, turn.state, now))

    def _parse(self, request: pb.ConverseRequest, now: datetime) -> tuple[int, RecommendQuery, DialogueState]:
        """The page size, the query without the dialogue, and the dialogue state."""
        violations = request_parser.violations(request)
        size, query, state = DEFAULT_PAGE, None, None
        try:
            size = proto_conversions.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        except InvalidArgument as error:
            violations += error.violations
        try:
            plain = request_parser.recommend_request(request)
            query = parse_query(plain, self._scenarios.find(plain.scenario), now, size)
            if query.condition is not None:
                request_parser.check_filter_size(query.condition)
        except InvalidArgument as error:
            violations += error.violations
        try:
            state = self._state(request, now)
        except InvalidArgument as error:
            violations += error.violations
        if violations or query is None or state is None:
            raise InvalidArgument(violations)
        return size, query, state

    def _state(self, request: pb.ConverseRequest, now: datetime) -> DialogueState:
        """The state in the token; InvalidArgument if the token is another user's."""
        if not request.conversation_token:
            return DialogueState()
        content = self._tokens.read(_DIALOGUE, request.conversation_token, now, "conversation_token")
        user, visitor = _digests(request)
        matches = content["u"] == user
        if not content["u"]:  # a visitor who signs in continues the dialogue
            matches = content["v"] == visitor and bool(visitor or not user)
        if not matches:
            raise InvalidArgument.of("conversation_token", "is of another user's dialogue")
        return state_from_json(content["d"])

    def _token(self, request: pb.ConverseRequest, state: DialogueState, now: datetime) -> str:
        user, visitor = _digests(request)
        return self._tokens.sign(_DIALOGUE, {"u": user, "v": visitor, "d": state_to_json(state)}, now)


def _digests(request: pb.ConverseRequest) -> tuple[str, str]:
    """The digests of the user id and the visitor id that a token stores; empty for an empty id."""
    user, visitor = (
        hashlib.blake2b(value.encode(), digest_size=8).hexdigest() if value else ""
        for value in (request.user_id, request.visitor_id)
    )
    return user, visitor
