"""`PredictEvents`: what people are likely to do with items they are shown, and whether they buy soon."""

import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

import numpy as np
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import status, wire
from services.catalog import identifier_problem, item_number
from services.errors import FieldViolation, InvalidArgument, VitrineError
from services.gateway.clients import Ranking
from services.gateway.pipeline import Pipeline, person_of
from services.item_table import ItemTable

MAX_ITEMS = 2000
MAX_PEOPLE = 100
MAX_PAIRS = 10_000
_FIRST = "people[0]."


async def predict(
    request: pb.PredictEventsRequest,
    as_of: datetime,
    ranking: Ranking,
    pipeline: Pipeline,
    wait_for: Callable[[int], Awaitable[None]],
) -> pb.PredictEventsResponse:
    """The answer, its versions left open but for the events seen.

    Raises:
        InvalidArgument: the request is wrong, or who it is about where that is one person.
    """
    people = _people(request)
    asked = _items(request.item_ids)
    if (pairs := len(people) * len(asked)) > MAX_PAIRS:
        raise InvalidArgument.of("item_ids", f"times people are {pairs}, at most {MAX_PAIRS} are allowed")
    await wait_for(request.min_sequence)
    known, unknown = _parted(asked, pipeline.table, as_of)
    found = await ranking.predict(
        ranking_pb.PredictRequest(
            people=people,
            as_of=wire.time_to(as_of),
            item_numbers=[item_number(item_id) for item_id in known],
            min_sequence=request.min_sequence,
            bundle=pipeline.bundle,
        )
    )
    if not request.people and found.predictions[0].HasField("error"):
        raise _of_one(status.from_status(found.predictions[0].error))
    return pb.PredictEventsResponse(
        people=[_told(known, prediction) for prediction in found.predictions],
        unknown_item_ids=unknown,
        versions=pb.Versions(event_sequence=found.state_sequence),
    )


def _people(request: pb.PredictEventsRequest) -> list[ranking_pb.Person]:
    if not request.people:
        return [person_of(request.user_id, request.visitor_id, request.session)]
    for name in ("user_id", "visitor_id", "session"):
        if getattr(request, name):
            raise InvalidArgument.of(name, "is for one person: people are given too")
    if len(request.people) > MAX_PEOPLE:
        raise InvalidArgument.of("people", f"has {len(request.people)}, at most {MAX_PEOPLE} are allowed")
    return [person_of(one.user_id, one.visitor_id, one.session) for one in request.people]


def _items(ids: Sequence[str]) -> list[str]:
    """The ids, each once."""
    if len(ids) > MAX_ITEMS:
        raise InvalidArgument.of("item_ids", f"has {len(ids)}, at most {MAX_ITEMS} are allowed")
    for at, item_id in enumerate(ids):
        if problem := identifier_problem(item_id):
            raise InvalidArgument.of(f"item_ids[{at}]", problem)
    return list(dict.fromkeys(ids))


def _parted(ids: Sequence[str], table: ItemTable, as_of: datetime) -> tuple[list[str], list[str]]:
    """The ids that are available, and those that are not."""
    available = np.append(table.available(as_of), False)
    rows = table.rows(item_number(item_id) for item_id in ids)
    live = available[np.where((rows >= 0) & (rows < len(available)), rows, -1)].tolist()
    told = list(zip(ids, live, strict=True))
    return [item_id for item_id, ok in told if ok], [item_id for item_id, ok in told if not ok]


def _told(ids: Sequence[str], prediction: ranking_pb.Prediction) -> pb.PersonPrediction:
    if prediction.HasField("error"):
        return pb.PersonPrediction(error=prediction.error)
    told = pb.PersonPrediction(purchase_propensity=prediction.purchase_propensity)
    for at, (item_id, score) in enumerate(zip(ids, prediction.scores, strict=True)):
        # Ranking follows the catalogue too, and may have lost an item since.
        if math.isnan(score):
            continue
        item = told.items.add(item_id=item_id, score=score)
        for of_type in prediction.probabilities:
            item.probabilities.add(type=of_type.type, probability=of_type.probabilities[at])
    return told


def _of_one(error: VitrineError) -> VitrineError:
    """The error of the only person, without a place among people."""
    if not isinstance(error, InvalidArgument):
        return error
    return InvalidArgument(
        FieldViolation(violation.field.removeprefix(_FIRST), violation.description)
        for violation in error.violations
    )
