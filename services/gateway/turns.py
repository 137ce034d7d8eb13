"""What a turn of a dialogue asks for by its fields, checked."""

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services import filters
from services.catalog import identifier_problem
from services.errors import FieldViolation, InvalidArgument
from services.gateway.dialogue import MAX_CONDITIONS, MAX_LIKED

MAX_MESSAGE = 2000
# What is sent beside a request's own filter has at most this shape.
_MOST_BESIDE = [filters.NoneOf(filters.In("", frozenset()))] * MAX_CONDITIONS


def violations(request: pb.ConverseRequest) -> list[FieldViolation]:
    """What is wrong with the fields that only a turn has."""
    found = []
    if len(request.message) > MAX_MESSAGE:
        many = len(request.message)
        found.append(FieldViolation("message", f"has {many} characters, at most {MAX_MESSAGE} are allowed"))
    for name in ("liked_item_ids", "disliked_item_ids"):
        ids = getattr(request, name)
        if len(ids) > MAX_LIKED:
            found.append(FieldViolation(name, f"has {len(ids)}, at most {MAX_LIKED} are allowed"))
        for at, item_id in enumerate(ids):
            if problem := identifier_problem(item_id):
                found.append(FieldViolation(f"{name}[{at}]", problem))
    both = set(request.liked_item_ids)
    for at, item_id in enumerate(request.disliked_item_ids):
        if item_id in both:
            found.append(FieldViolation(f"disliked_item_ids[{at}]", "is liked as well"))
    if request.focus_item_id and (problem := identifier_problem(request.focus_item_id)):
        found.append(FieldViolation("focus_item_id", problem))
    return found


def check_room(condition: filters.Filter) -> None:
    """Refuse a filter beside which not all that can be said has room; InvalidArgument names `filter`."""
    try:
        filters.check_size(filters.AllOf((condition, *_MOST_BESIDE)))
    except InvalidArgument as error:
        raise InvalidArgument.of("filter", f"with what is said in the dialogue: {error}") from None


def recommend_of(request: pb.ConverseRequest) -> pb.RecommendRequest:
    """What a turn asks for before anything is said."""
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
