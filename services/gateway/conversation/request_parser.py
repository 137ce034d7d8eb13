"""Validates the fields of a `ConverseRequest`."""

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog import filters
from services.catalog.items import identifier_problem
from services.core.errors import FieldViolation, InvalidArgument
from services.gateway.conversation.language.dialogue_state import MAX_CONSTRAINTS, MAX_LIKED

MAX_MESSAGE = 2000
# The largest filter that a dialogue adds to the request's own.
_MAX_DIALOGUE_FILTER = [filters.NoneOf(filters.In("", frozenset()))] * MAX_CONSTRAINTS


def violations(request: pb.ConverseRequest) -> list[FieldViolation]:
    """The violations of the fields that only `Converse` has."""
    violations = []
    if len(request.message) > MAX_MESSAGE:
        problem = f"has {len(request.message)} characters, at most {MAX_MESSAGE} are allowed"
        violations.append(FieldViolation("message", problem))
    for name in ("liked_item_ids", "disliked_item_ids"):
        ids = getattr(request, name)
        if len(ids) > MAX_LIKED:
            violations.append(FieldViolation(name, f"has {len(ids)}, at most {MAX_LIKED} are allowed"))
        for index, item_id in enumerate(ids):
            if problem := identifier_problem(item_id):
                violations.append(FieldViolation(f"{name}[{index}]", problem))
    liked = set(request.liked_item_ids)
    for index, item_id in enumerate(request.disliked_item_ids):
        if item_id in liked:
            violations.append(FieldViolation(f"disliked_item_ids[{index}]", "is liked as well"))
    if request.focus_item_id and (problem := identifier_problem(request.focus_item_id)):
        violations.append(FieldViolation("focus_item_id", problem))
    return violations


def check_filter_size(condition: filters.Filter) -> None:
    """Reject a filter that leaves no room for the dialogue's constraints; InvalidArgument names `filter`."""
    try:
        filters.check_size(filters.AllOf((condition, *_MAX_DIALOGUE_FILTER)))
    except InvalidArgument as error:
        raise InvalidArgument.of("filter", f"with the constraints of the dialogue: {error}") from None


def recommend_request(request: pb.ConverseRequest) -> pb.RecommendRequest:
    """The `RecommendRequest` of a turn, without the dialogue."""
    return pb.RecommendRequest(
        scenario=request.scenario,
        user_id=request.user_id,
        visitor_id=request.visitor_id,
        session_id=request.session_id,
        filter=request.filter if request.HasField("filter") else None,
        min_sequence=request.min_sequence,
        request_id=request.request_id,
        language=request.language,
    )
