"""A request of a dialogue has limits, and its token works only for its user."""

from pathlib import Path

import grpc
import pytest
from vitrine.catalog.v1 import filter_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from tests.support.dialogues import Talk
from tests.support.shop_server import Shop, Stub, equals_filter, ids, violations
from tests.support.shops import is_red, price

RELAXED = pb.DEGRADATION_CODE_RULE_RELAXED


async def test_a_conversation_token_works_only_for_its_user(all_in_one_stub: Stub) -> None:
    talk = Talk(all_in_one_stub, user_id="ann")
    answer = await talk.say("in red")
    page = await all_in_one_stub.Recommend(pb.RecommendRequest(page_size=3))
    half = answer.conversation_token[:20]
    for token, user, visitor in [
        (answer.conversation_token, "bob", ""),
        (answer.conversation_token, "", "ann"),
        (answer.conversation_token, "", ""),
        (page.next_page_token, "ann", ""),
        (answer.attribution_token, "ann", ""),
        (half, "ann", ""),
        ("é", "ann", ""),
    ]:
        request = pb.ConverseRequest(conversation_token=token, user_id=user, visitor_id=visitor)
        assert await violations(all_in_one_stub.Converse(request)) == ["conversation_token"]
    # A visitor goes on after signing in, and nobody else with them.
    anonymous = Talk(all_in_one_stub, visitor_id="browser")
    token = (await anonymous.say("in red")).conversation_token
    signed_in = pb.ConverseRequest(conversation_token=token, visitor_id="browser", user_id="ann")
    assert all(is_red(i) for i in ids(await all_in_one_stub.Converse(signed_in)))
    for user, visitor in (("browser", ""), ("", "")):
        request = pb.ConverseRequest(conversation_token=token, user_id=user, visitor_id=visitor)
        assert await violations(all_in_one_stub.Converse(request)) == ["conversation_token"]
    signed_in.visitor_id = "other"
    assert await violations(all_in_one_stub.Converse(signed_in)) == ["conversation_token"]
    nobody = (await Talk(all_in_one_stub).say("in red")).conversation_token
    request = pb.ConverseRequest(conversation_token=nobody, user_id="ann")
    assert await violations(all_in_one_stub.Converse(request)) == ["conversation_token"]


async def test_another_gateway_continues_a_dialogue(bundle: Path, tmp_path: Path) -> None:
    async with Shop(bundle, tmp_path / "a", "one").serve(secret="s" * 32) as stub:
        token = (await Talk(stub).say("in red")).conversation_token
    async with Shop(bundle, tmp_path / "b", "three").serve(secret="s" * 32) as stub:
        talk = Talk(stub)
        talk.token = token
        answer = await talk.say("under 9")
        assert {(is_red(i), price(i) <= 9) for i in ids(answer)} == {(True, True)}


async def test_every_invalid_field_is_named(all_in_one: Shop) -> None:
    deep = equals_filter("world", "garden")
    for _ in range(7):
        deep = filter_pb2.Filter(none_of=deep)

    async with all_in_one.serve() as stub:
        request = pb.ConverseRequest(
            message="x" * 2001,
            liked_item_ids=["a", "b\tc"],
            disliked_item_ids=["a", *["d"] * 49],
            focus_item_id="\n",
            page_size=501,
            conversation_token="none",
            language="tlh",
        )
        assert await violations(stub.Converse(request)) == [
            "message",
            "liked_item_ids[1]",
            "disliked_item_ids[0]",
            "focus_item_id",
            "page_size",
            "language",
            "conversation_token",
        ]
        request.disliked_item_ids.append("d")  # too long a list is told alone, before anything is read
        assert await violations(stub.Converse(request)) == ["disliked_item_ids"]
        assert await violations(stub.Converse(pb.ConverseRequest(filter=deep))) == ["filter"]
        assert await violations(stub.Converse(pb.ConverseRequest(user_id="a\tb"))) == ["user_id"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Converse(pb.ConverseRequest(scenario="nowhere"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "message", ["😀😀😀", "x" * 2000, "\u202eקצת יותר זול", "\x00\x07\x1b", " \n", "'; DROP TABLE", "…!?"]
)
async def test_no_message_breaks_a_dialogue(all_in_one_stub: Stub, message: str) -> None:
    answer = await Talk(all_in_one_stub).say(message)
    assert len(answer.items) == 10
    assert answer.reply
    assert not answer.degraded


async def test_a_long_dialogue_is_bounded_and_reports_what_it_drops(all_in_one_stub: Stub) -> None:
    names = [f"part{n}" for n in range(18)]
    texts = [item_pb2.Attribute(name=name, texts=[f"value {name}"]) for name in names]
    item = item_pb2.Item(id="all", title="all parts", attributes=texts)
    await all_in_one_stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]))
    talk = Talk(all_in_one_stub)
    for name in names[:16]:
        answer = await talk.say(f"value {name}")
        assert (ids(answer), list(answer.degraded)) == (["all"], [])
    answer = await talk.say(f"value {names[16]}")
    assert len(answer.active_constraints) == 16
    assert [(d.stage, d.code) for d in answer.degraded] == [("conversation", RELAXED)]
    assert "I no longer keep to part0 value part0." in answer.reply
    for n in range(5):
        answer = await talk.say(disliked_item_ids=[f"none-{n}-{m}" for m in range(50)])
    assert len([u for u in answer.active_constraints if u.item_id]) == 200
    assert len(answer.conversation_token) < 8000
