"""Writes the result of a turn as a `ConverseResponse`."""

from collections.abc import Mapping, Sequence

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.gateway.conversation.language.dialogue_state import (
    AttributeConstraint,
    Change,
    DialogueState,
    Forget,
    ItemPreference,
    PriceConstraint,
    Reset,
    SearchWords,
)
from services.gateway.conversation.language.reply_text import phrase, reply
from services.gateway.conversation.turn import Turn
from services.gateway.recommend.explanation_text import LANGUAGES
from services.gateway.recommend.handler import PublishedPage
from services.gateway.recommend.response_builder import build_degraded


def converse_response(
    request: pb.ConverseRequest, turn: Turn, page: PublishedPage, titles: Mapping[str, str], token: str
) -> pb.ConverseResponse:
    """The response; `titles` has the titles of the items that the reply names, `token` the new state."""
    language = request.language or LANGUAGES[0]

    def phrases(changes: Sequence[Change]) -> list[str]:
        return [phrase(change, language, titles) for change in changes]

    understood, relaxed, dropped = phrases(turn.changes), phrases(turn.relaxed), phrases(turn.dropped)
    response = pb.ConverseResponse(
        items=page.items,
        parsed_constraints=map(_parsed_constraint, turn.changes, understood),
        conversation_token=token,
        unrecognized=turn.unrecognized,
        attribution_token=page.attribution_token,
        versions=page.versions,
        degraded=build_degraded(turn.degraded),
        request_id=page.request_id,
        reply=reply(
            language,
            understood,
            turn.unrecognized,
            relaxed,
            dropped,
            len(page.items),
            has_message=bool(request.message.strip()),
        ),
    )
    for change in _active_changes(turn.state):
        constraint = _parsed_constraint(change, phrase(change, language, titles))
        constraint.relaxed = change in turn.relaxed
        response.active_constraints.append(constraint)
    for texts, problem in (
        (relaxed, "was relaxed: no item meets all constraints"),
        (dropped, "was dropped: the dialogue has too many constraints"),
    ):
        for text in texts:
            response.degraded.add(
                stage="conversation", code=pb.DEGRADATION_CODE_RULE_RELAXED, message=f"{text} {problem}"
            )
    return response


def _active_changes(state: DialogueState) -> list[Change]:
    """The changes that lead to a state."""
    words = [SearchWords(state.words)] if state.words else []
    liked = [ItemPreference(item_id) for item_id in state.liked_ids]
    disliked = [ItemPreference(item_id, positive=False) for item_id in state.disliked_ids]
    return [*state.constraints, *words, *liked, *disliked]


def _parsed_constraint(change: Change, text: str) -> pb.ParsedConstraint:
    message = pb.ParsedConstraint(text=text, positive=True)
    match change:
        case AttributeConstraint(attribute, texts, positive):
            message.kind, message.positive = pb.PARSED_CONSTRAINT_KIND_ATTRIBUTE, positive
            message.attribute = attribute
            message.values.extend(texts)
        case PriceConstraint(low, high, _):
            message.kind = pb.PARSED_CONSTRAINT_KIND_PRICE
            if low is not None:
                message.min_price = low
            if high is not None:
                message.max_price = high
        case ItemPreference(item_id, positive):
            message.kind, message.positive = pb.PARSED_CONSTRAINT_KIND_ITEM, positive
            message.item_id = item_id
        case SearchWords(words, positive):
            message.kind, message.positive = pb.PARSED_CONSTRAINT_KIND_WORDS, positive
            message.words = " ".join(words)
        case Forget(attribute):
            message.kind, message.attribute = pb.PARSED_CONSTRAINT_KIND_FORGET, attribute
        case Reset():
            message.kind = pb.PARSED_CONSTRAINT_KIND_RESET
    return message
