"""`PredictEvents`: event probabilities of users on items they are shown, and their purchase propensity."""

import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

import numpy as np
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.catalog.item_table import ItemTable
from services.catalog.items import identifier_problem, item_hash
from services.core.errors import FieldViolation, InvalidArgument, VitrineError
from services.gateway.clients.backends import RankingBackend
from services.gateway.recommend.pipeline import Pipeline
from services.rpc import proto_conversions, status

MAX_ITEMS = 2000
MAX_USERS = 100
MAX_PAIRS = 10_000
_FIRST_USER = "users[0]."


async def predict(
    request: pb.PredictEventsRequest,
    as_of: datetime,
    ranking: RankingBackend,
    pipeline: Pipeline,
    wait_for: Callable[[int], Awaitable[None]],
) -> pb.PredictEventsResponse:
    """The response; of its versions only the event sequence is set.

    Raises:
        InvalidArgument: a field is invalid. In a request with `users` an invalid user fails alone.
    """
    users = _parse_users(request)
    item_ids = _parse_item_ids(request.item_ids)
    if (pairs := len(users) * len(item_ids)) > MAX_PAIRS:
        raise InvalidArgument.of("item_ids", f"times users are {pairs}, at most {MAX_PAIRS} are allowed")
    await wait_for(request.min_sequence)
    available, unknown = _split_by_availability(item_ids, pipeline.table, as_of)
    response = await ranking.predict(
        ranking_pb.PredictRequest(
            users=users,
            as_of=proto_conversions.time_to(as_of),
            item_hashes=[item_hash(item_id) for item_id in available],
            min_sequence=request.min_sequence,
            bundle=pipeline.bundle,
        )
    )
    if not request.users and response.predictions[0].HasField("error"):
        raise _without_user_index(status.from_status(response.predictions[0].error))
    return pb.PredictEventsResponse(
        users=[_user_prediction(available, prediction) for prediction in response.predictions],
        unknown_item_ids=unknown,
        versions=pb.Versions(event_sequence=response.state_sequence),
    )


def _parse_users(request: pb.PredictEventsRequest) -> list[ranking_pb.User]:
    if not request.users:
        return [_user(request)]
    for name in ("user_id", "visitor_id", "session"):
        if getattr(request, name):
            raise InvalidArgument.of(name, "is for a request without users")
    if len(request.users) > MAX_USERS:
        raise InvalidArgument.of("users", f"has {len(request.users)}, at most {MAX_USERS} are allowed")
    return [_user(one) for one in request.users]


def _user(fields: pb.PredictEventsRequest | pb.UserRef) -> ranking_pb.User:
    return ranking_pb.User(user_id=fields.user_id, visitor_id=fields.visitor_id, session=fields.session)


def _parse_item_ids(ids: Sequence[str]) -> list[str]:
    """The distinct ids, in their order."""
    if len(ids) > MAX_ITEMS:
        raise InvalidArgument.of("item_ids", f"has {len(ids)}, at most {MAX_ITEMS} are allowed")
    for index, item_id in enumerate(ids):
        if problem := identifier_problem(item_id):
            raise InvalidArgument.of(f"item_ids[{index}]", problem)
    return list(dict.fromkeys(ids))


def _split_by_availability(
    ids: Sequence[str], table: ItemTable, as_of: datetime
) -> tuple[list[str], list[str]]:
    """The ids of available items, and the others."""
    available = np.append(table.available(as_of), False)
    rows = table.rows(item_hash(item_id) for item_id in ids)
    mask = available[np.where((rows >= 0) & (rows < len(available)), rows, -1)].tolist()
    pairs = list(zip(ids, mask, strict=True))
    return [item_id for item_id, ok in pairs if ok], [item_id for item_id, ok in pairs if not ok]


def _user_prediction(ids: Sequence[str], prediction: ranking_pb.Prediction) -> pb.UserPrediction:
    if prediction.HasField("error"):
        return pb.UserPrediction(error=prediction.error)
    message = pb.UserPrediction(purchase_propensity=prediction.purchase_propensity)
    for index, (item_id, score) in enumerate(zip(ids, prediction.scores, strict=True)):
        # The ranking service follows the catalog too, and may have deleted the item meanwhile.
        if math.isnan(score):
            continue
        item = message.items.add(item_id=item_id, score=score)
        for of_type in prediction.probabilities:
            item.probabilities.add(type=of_type.type, probability=of_type.probabilities[index])
    return message


def _without_user_index(error: VitrineError) -> VitrineError:
    """The error of the only user, with the fields of a request for one user."""
    if not isinstance(error, InvalidArgument):
        return error
    return InvalidArgument(
        FieldViolation(violation.field.removeprefix(_FIRST_USER), violation.description)
        for violation in error.violations
    )
