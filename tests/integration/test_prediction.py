"""Predictions over the real services equal the models and the ranking."""

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from vitrine.catalog.v1 import event_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.catalog.item_table import ItemTable
from services.gateway.offers.prediction_handler import predict
from tests.support.prediction_models import ITEMS, purchase_probability, write_history
from tests.support.shop_server import Shop, Stub, session, violations
from tests.support.shops import UNTIL, items, make_bundle


def scores_of(user: Any) -> dict[str, tuple[float, dict[str, float]]]:
    return {i.item_id: (i.score, {p.type: p.probability for p in i.probabilities}) for i in user.items}


async def test_items_score_as_in_recommend_and_users_as_in_the_model(prediction_stub: Stub) -> None:
    await write_history(prediction_stub)
    await prediction_stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["kitchen-03"]))
    catalog = await prediction_stub.ListItems(pb.ListItemsRequest(page_size=1000))
    sequence = max(record.sequence for record in catalog.items) + 1
    item_ids = [*ITEMS, "nothing", ITEMS[0]]
    request = pb.PredictEventsRequest(
        user_id="ann", item_ids=item_ids, min_sequence=sequence, session=session("garden-05")
    )
    answer = await prediction_stub.PredictEvents(request)
    assert sorted(answer.unknown_item_ids) == ["kitchen-03", "nothing"]
    (ann,) = answer.users
    assert [i.item_id for i in ann.items] == [i for i in ITEMS if i != "kitchen-03"]
    page = await prediction_stub.Recommend(
        pb.RecommendRequest(
            user_id="ann", item_ids=ITEMS, page_size=100, session=session("garden-05"), min_sequence=1
        )
    )
    assert not page.degraded
    scores = scores_of(ann)
    assert len(page.items) == len(scores)
    for item in page.items:
        score, probabilities = scores[item.item_id]
        assert score == pytest.approx(item.score, rel=1e-3, abs=1e-3)
        assert probabilities == pytest.approx({p.type: p.probability for p in item.probabilities}, rel=1e-3)
        assert set(probabilities) == {"click", "purchase"}
    assert len({score for score, _ in scores.values()}) > 10
    assert {p.days: p.probability for p in ann.purchase_propensity} == pytest.approx(
        {7: purchase_probability(2, -2.0), 30: purchase_probability(2, -1.0)}
    )
    profile = (await prediction_stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
    assert list(profile.purchase_propensity) == list(ann.purchase_propensity)
    assert answer.versions.bundle == page.versions.bundle
    assert answer.versions.event_sequence == page.versions.event_sequence > 0


async def test_each_user_of_a_batch_has_a_separate_outcome(prediction_stub: Stub) -> None:
    await write_history(prediction_stub)
    users = [
        pb.UserRef(user_id="ann"),
        pb.UserRef(user_id="ends with a space "),
        pb.UserRef(user_id="bob", session=[event_pb2.SessionItem(item_id="a", type="stare")]),
        pb.UserRef(user_id="bob"),
        pb.UserRef(visitor_id="nobody"),
    ]
    answer = await prediction_stub.PredictEvents(pb.PredictEventsRequest(users=users, item_ids=ITEMS[:5]))
    assert len(answer.users) == len(users)
    wrong = []
    for at in (1, 2):
        assert answer.users[at].error.code == code_pb2.INVALID_ARGUMENT
        assert not answer.users[at].items
        assert not answer.users[at].purchase_propensity
        bad = error_details_pb2.BadRequest()
        details = answer.users[at].error.details
        wrong += [v.field for d in details if d.Unpack(bad) for v in bad.field_violations]
    assert wrong == ["users[1].user_id", "users[2].session[0].type"]
    for at, name in ((0, "ann"), (3, "bob")):
        alone = await prediction_stub.PredictEvents(pb.PredictEventsRequest(user_id=name, item_ids=ITEMS[:5]))
        assert not alone.users[0].HasField("error")
        one, among = scores_of(alone.users[0]), scores_of(answer.users[at])
        assert {i: s for i, (s, _) in one.items()} == pytest.approx(
            {i: s for i, (s, _) in among.items()}, rel=1e-3, abs=1e-3
        )
        assert alone.users[0].purchase_propensity == answer.users[at].purchase_propensity
    buyer, viewer, nobody = (answer.users[at].purchase_propensity for at in (0, 3, 4))
    assert [p.probability for p in viewer] == pytest.approx(
        [purchase_probability(0, -2.0), purchase_probability(0, -1.0)]
    )
    assert buyer[0].probability > viewer[0].probability
    assert not nobody
    assert len(answer.users[4].items) == 5
    only_people = await prediction_stub.PredictEvents(pb.PredictEventsRequest(user_id="ann"))
    assert not only_people.users[0].items
    assert only_people.users[0].purchase_propensity == buyer


async def test_an_invalid_request_is_named_and_the_service_stays_up(prediction_stub: Stub) -> None:
    ask, users = pb.PredictEventsRequest, [pb.UserRef(user_id="ann")]
    stare = [event_pb2.SessionItem(item_id="a", type="stare")]
    response = await prediction_stub.BatchUpsertItems(
        pb.BatchUpsertItemsRequest(items=[item_pb2.Item(id=f"x{n}", title=f"x {n}") for n in range(101)])
    )
    for request, fields in (
        (ask(user_id="ends with a space "), ["user_id"]),
        (ask(session=stare), ["session[0].type"]),
        (ask(item_ids=["ok", ""]), ["item_ids[1]"]),
        (ask(item_ids=[f"i{n}" for n in range(2001)]), ["item_ids"]),
        (ask(users=users * 101), ["users"]),
        (ask(users=users, user_id="bob"), ["user_id"]),
        (ask(users=users * 100, item_ids=[f"x{n}" for n in range(101)], min_sequence=1), ["item_ids"]),
    ):
        assert await violations(prediction_stub.PredictEvents(request)) == fields
    last = max(outcome.sequence for outcome in response.outcomes)
    item_ids = [f"x{n}" for n in range(100)]
    whole = await prediction_stub.PredictEvents(ask(users=users * 100, item_ids=item_ids, min_sequence=last))
    assert [len(user.items) for user in whole.users] == [100] * 100


async def test_an_untrained_model_gives_no_prediction(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "plain")
    async with Shop(plain, tmp_path / "state", "one", clock=None).serve() as stub:
        await write_history(stub)
        (ann,) = (await stub.PredictEvents(pb.PredictEventsRequest(user_id="ann", item_ids=ITEMS[:3]))).users
        assert len(ann.items) == 3
        assert not any(item.probabilities for item in ann.items)
        assert not ann.purchase_propensity
        profile = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
        assert not profile.purchase_propensity


async def test_an_item_unknown_to_ranking_is_omitted() -> None:
    table = ItemTable.of(items(), {}, {}, [UNTIL] * len(ITEMS))

    class Behind:
        """A ranking service that knows the second item alone."""

        async def predict(self, request: ranking_pb.PredictRequest) -> ranking_pb.PredictResponse:
            assert len(request.item_hashes) == 2
            probabilities = ranking_pb.TypeProbabilities(type="click", probabilities=[math.nan, 0.25])
            one = ranking_pb.Prediction(scores=[math.nan, 2.0], probabilities=[probabilities])
            return ranking_pb.PredictResponse(predictions=[one])

    pipeline: Any = SimpleNamespace(table=table, bundle="b")
    request = pb.PredictEventsRequest(item_ids=ITEMS[:2])
    behind: Any = Behind()
    response = await predict(request, UNTIL, behind, pipeline, lambda sequence: asyncio.sleep(0))
    (user,) = response.users
    assert scores_of(user) == {ITEMS[1]: (2.0, {"click": 0.25})}


async def test_without_a_ranking_service_there_is_no_prediction(
    prediction_bundle: Path, tmp_path: Path
) -> None:
    alone = Shop(prediction_bundle, tmp_path / "state", "three", clock=None)
    async with alone.serve(ranking="127.0.0.1:1") as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PredictEvents(pb.PredictEventsRequest(user_id="ann"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
