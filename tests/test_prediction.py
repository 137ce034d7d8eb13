"""What people are likely to do, over the real services: as Recommend ranks, as the model says, each alone."""

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

from services.gateway.prediction import predict
from services.item_table import ItemTable
from tests.foretelling import ITEMS, chance, remember
from tests.recommending import Shop, session, violations
from tests.shops import UNTIL, items, make_bundle


def told(person: Any) -> dict[str, tuple[float, dict[str, float]]]:
    return {i.item_id: (i.score, {p.type: p.probability for p in i.probabilities}) for i in person.items}


def test_items_are_scored_as_recommend_does_and_people_as_the_model_says(foretelling: Shop) -> None:
    async def body(stub: Any) -> None:
        await remember(stub)
        await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["kitchen-03"]))
        got = await stub.ListItems(pb.ListItemsRequest(page_size=1000))
        sequence = max(record.sequence for record in got.items) + 1
        asked = [*ITEMS, "nothing", ITEMS[0]]
        request = pb.PredictEventsRequest(
            user_id="ann", item_ids=asked, min_sequence=sequence, session=session("garden-05")
        )
        answer = await stub.PredictEvents(request)
        assert sorted(answer.unknown_item_ids) == ["kitchen-03", "nothing"]
        (ann,) = answer.people
        assert [i.item_id for i in ann.items] == [i for i in ITEMS if i != "kitchen-03"]
        page = await stub.Recommend(
            pb.RecommendRequest(
                user_id="ann", item_ids=ITEMS, page_size=100, session=session("garden-05"), min_sequence=1
            )
        )
        assert not page.degraded
        found = told(ann)
        assert len(page.items) == len(found)
        for item in page.items:
            score, probabilities = found[item.item_id]
            assert score == pytest.approx(item.score, rel=1e-3, abs=1e-3)
            assert probabilities == pytest.approx(
                {p.type: p.probability for p in item.probabilities}, rel=1e-3
            )
            assert set(probabilities) == {"click", "purchase"}
        assert len({score for score, _ in found.values()}) > 10
        assert {p.days: p.probability for p in ann.purchase_propensity} == pytest.approx(
            {7: chance(2, -2.0), 30: chance(2, -1.0)}
        )
        profile = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
        assert list(profile.purchase_propensity) == list(ann.purchase_propensity)
        assert answer.versions.bundle == page.versions.bundle
        assert answer.versions.event_sequence == page.versions.event_sequence > 0

    foretelling.run(body)


def test_of_several_people_each_has_an_outcome_of_their_own(foretelling: Shop) -> None:
    async def body(stub: Any) -> None:
        await remember(stub)
        people = [
            pb.PersonReference(user_id="ann"),
            pb.PersonReference(user_id="has space"),
            pb.PersonReference(user_id="bob", session=[event_pb2.SessionItem(item_id="a", type="stare")]),
            pb.PersonReference(user_id="bob"),
            pb.PersonReference(visitor_id="nobody"),
        ]
        answer = await stub.PredictEvents(pb.PredictEventsRequest(people=people, item_ids=ITEMS[:5]))
        assert len(answer.people) == len(people)
        wrong = []
        for at in (1, 2):
            assert answer.people[at].error.code == code_pb2.INVALID_ARGUMENT
            assert not answer.people[at].items
            assert not answer.people[at].purchase_propensity
            bad = error_details_pb2.BadRequest()
            details = answer.people[at].error.details
            wrong += [v.field for d in details if d.Unpack(bad) for v in bad.field_violations]
        assert wrong == ["people[1].user_id", "people[2].session[0].type"]
        for at, name in ((0, "ann"), (3, "bob")):
            alone = await stub.PredictEvents(pb.PredictEventsRequest(user_id=name, item_ids=ITEMS[:5]))
            assert not alone.people[0].HasField("error")
            one, among = told(alone.people[0]), told(answer.people[at])
            assert {i: s for i, (s, _) in one.items()} == pytest.approx(
                {i: s for i, (s, _) in among.items()}, rel=1e-3, abs=1e-3
            )
            assert alone.people[0].purchase_propensity == answer.people[at].purchase_propensity
        bought, looked, nobody = (answer.people[at].purchase_propensity for at in (0, 3, 4))
        assert [p.probability for p in looked] == pytest.approx([chance(0, -2.0), chance(0, -1.0)])
        assert bought[0].probability > looked[0].probability
        assert not nobody
        assert len(answer.people[4].items) == 5
        only_people = await stub.PredictEvents(pb.PredictEventsRequest(user_id="ann"))
        assert not only_people.people[0].items
        assert only_people.people[0].purchase_propensity == bought

    foretelling.run(body)


def test_what_is_wrong_is_named_and_the_service_stays_up(foretelling: Shop) -> None:
    async def body(stub: Any) -> None:
        ask, people = pb.PredictEventsRequest, [pb.PersonReference(user_id="ann")]
        stare = [event_pb2.SessionItem(item_id="a", type="stare")]
        written = await stub.BatchUpsertItems(
            pb.BatchUpsertItemsRequest(items=[item_pb2.Item(id=f"x{n}", title=f"x {n}") for n in range(101)])
        )
        for request, fields in (
            (ask(user_id="has space"), ["user_id"]),
            (ask(session=stare), ["session[0].type"]),
            (ask(item_ids=["ok", ""]), ["item_ids[1]"]),
            (ask(item_ids=[f"i{n}" for n in range(2001)]), ["item_ids"]),
            (ask(people=people * 101), ["people"]),
            (ask(people=people, user_id="bob"), ["user_id"]),
            (ask(people=people * 100, item_ids=[f"x{n}" for n in range(101)], min_sequence=1), ["item_ids"]),
        ):
            assert await violations(stub.PredictEvents(request)) == fields
        last = max(outcome.sequence for outcome in written.outcomes)
        wanted = [f"x{n}" for n in range(100)]
        whole = await stub.PredictEvents(ask(people=people * 100, item_ids=wanted, min_sequence=last))
        assert [len(person.items) for person in whole.people] == [100] * 100

    foretelling.run(body)


def test_what_was_not_trained_is_absent(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "plain")

    async def body(stub: Any) -> None:
        await remember(stub)
        (ann,) = (await stub.PredictEvents(pb.PredictEventsRequest(user_id="ann", item_ids=ITEMS[:3]))).people
        assert len(ann.items) == 3
        assert not any(item.probabilities for item in ann.items)
        assert not ann.purchase_propensity
        profile = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
        assert not profile.purchase_propensity

    Shop(plain, tmp_path / "state", "one", clock=None).run(body)


def test_an_item_that_ranking_lost_meanwhile_is_left_out() -> None:
    table = ItemTable.of(items(), {}, {}, [UNTIL] * len(ITEMS))

    class Behind:
        """A ranking service that knows the second item alone."""

        async def predict(self, request: ranking_pb.PredictRequest) -> ranking_pb.PredictResponse:
            assert len(request.item_numbers) == 2
            known = ranking_pb.TypeProbabilities(type="click", probabilities=[math.nan, 0.25])
            one = ranking_pb.Prediction(scores=[math.nan, 2.0], probabilities=[known])
            return ranking_pb.PredictResponse(predictions=[one])

    async def ask() -> pb.PredictEventsResponse:
        pipeline: Any = SimpleNamespace(table=table, bundle="b")
        request = pb.PredictEventsRequest(item_ids=ITEMS[:2])
        behind: Any = Behind()
        return await predict(request, UNTIL, behind, pipeline, lambda sequence: asyncio.sleep(0))

    (person,) = asyncio.run(ask()).people
    assert told(person) == {ITEMS[1]: (2.0, {"click": 0.25})}


def test_without_a_ranking_service_there_is_no_prediction(foretelling_bundle: Path, tmp_path: Path) -> None:
    alone = Shop(foretelling_bundle, tmp_path / "state", "three", clock=None)

    async def body(stub: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PredictEvents(pb.PredictEventsRequest(user_id="ann"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    alone.run(body, ranking="127.0.0.1:1")
