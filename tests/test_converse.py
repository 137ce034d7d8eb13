"""Dialogues over the real services: what is said narrows the page, and the token carries it on."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from vitrine.catalog.v1 import filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as embedding_grpc
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog import item_number
from services.embedding.servicer import EmbeddingServicer
from services.errors import FailedPrecondition, Unavailable
from services.gateway.dialogue import Liking, Price, Values, Words
from services.gateway.interpreter import Heard, Phrases, Reading
from services.gateway.readers import load
from tests.recommending import Shop, ids, only, purchase, violations

RELAXED = pb.DEGRADATION_CODE_RULE_RELAXED


class Talk:
    """A dialogue of a person with a shop; every turn goes on from the one before."""

    def __init__(self, stub: Any, **person: str) -> None:
        self.stub, self.person, self.token = stub, person, ""

    async def say(self, message: str = "", **more: Any) -> Any:
        request = pb.ConverseRequest(
            message=message, conversation_token=self.token, **({"page_size": 10} | self.person | more)
        )
        answer = await self.stub.Converse(request)
        self.token = answer.conversation_token
        return answer


def red(item_id: str) -> bool:
    return int(item_id.split("-")[1]) % 2 == 0


def price(item_id: str) -> int:
    return int(item_id.split("-")[1]) + 1


async def stock(stub: Any) -> None:
    """Six lamps of two brands, described alike two by two, beside what the bundle has."""
    items = []
    for n, (brand, colour, title) in enumerate(
        [
            ("Nordlicht", "green", "wool winter lamp"),
            ("Nordlicht", "green", "wool winter lamp"),
            ("Nordlicht", "红色", "steel summer lamp"),
            ("Sol y Sombra", "green", "steel summer lamp"),
            ("Sol y Sombra", "红色", "glass evening lamp"),
            ("Sol y Sombra", "green", "glass evening lamp"),
        ]
    ):
        named = {"brand_name": brand, "colour": colour, "world": "lamps"}
        texts = [item_pb2.Attribute(name=name, texts=[text]) for name, text in named.items()]
        items.append(item_pb2.Item(id=f"lamp-{n:02}", title=title, price=10.0 * (n + 1), attributes=texts))
    done = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
    assert all(outcome.sequence for outcome in done.outcomes)
    await stub.Recommend(pb.RecommendRequest(min_sequence=done.outcomes[-1].sequence))


LAMPS = {f"lamp-{n:02}" for n in range(6)}


def test_what_is_said_narrows_the_page_until_it_is_taken_back(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        talk = Talk(stub, user_id="ann")
        first = await talk.say(page_size=40)
        assert len(ids(first)) == 40
        assert first.reply == "Here are 40 items."
        cheap = await talk.say("in red, under 9 euros please")
        assert {(red(i), price(i) <= 9) for i in ids(cheap)} == {(True, True)}
        assert len(cheap.items) == 10  # 1, 3, .. 9 of two worlds
        kinds = [u.kind for u in cheap.in_force]
        assert kinds == [pb.UNDERSTANDING_KIND_ATTRIBUTE, pb.UNDERSTANDING_KIND_PRICE]
        assert (list(cheap.in_force[0].values), cheap.in_force[1].max_price) == (["red"], 9)
        assert cheap.reply == "Understood: colour red; price at most 9. Here are 10 items."
        # The middle of 1, 1, 3, 3, 5, 5, 7, 7, 9, 9 is 5, and what is cheaper costs 4 at most.
        cheaper = await talk.say("cheaper")
        assert [u.max_price for u in cheaper.understood] == [4]
        assert {price(i) for i in ids(cheaper)} == {1, 3}
        blue = await talk.say("rather in blue")
        assert {(red(i), price(i)) for i in ids(blue)} == {(False, 2), (False, 4)}
        free = await talk.say("forget the price")
        assert len(ids(free)) == 10
        assert not any(red(i) for i in ids(free))
        dear = await talk.say("more expensive")
        assert min(map(price, ids(dear))) > 2
        assert [u.HasField("max_price") for u in dear.in_force if u.kind == 2] == [False]
        anew = await talk.say("start again")
        assert (len(anew.in_force), {red(i) for i in ids(anew)}) == (0, {True, False})

    shop.run(body)


def test_a_brand_is_that_of_the_item_that_is_meant(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        await stock(stub)
        talk = Talk(stub, visitor_id="browser")
        lamps = await talk.say("lamps")
        assert set(ids(lamps)) == LAMPS
        second = ids(lamps)[1]
        brand = "Nordlicht" if int(second[-1]) < 3 else "Sol y Sombra"
        same = await talk.say("the same brand as the second one")
        assert [list(u.values) for u in same.understood] == [[brand]]
        assert all((int(i[-1]) < 3) == (int(second[-1]) < 3) for i in ids(same))
        assert second in ids(same)
        other = await talk.say("not this brand", focus_item_id=second)
        assert {int(i[-1]) < 3 for i in ids(other)} == {int(second[-1]) >= 3}
        named = await talk.say("no SOL Y SOMBRA and not green")
        assert set(ids(named)) == {"lamp-02"} if int(second[-1]) >= 3 else named.degraded
        unknown = await Talk(stub).say("not this brand")
        assert (list(unknown.not_understood), len(unknown.items)) == (["this", "brand"], 10)
        assert unknown.reply.startswith("I understood nothing of this. ")

    shop.run(body)


def test_words_find_items_and_a_message_may_point_at_one(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        await stock(stub)
        talk = Talk(stub, user_id="ann")
        found = await talk.say("wool winter", page_size=46)
        assert [u.words for u in found.understood] == ["wool winter"]
        assert {s.source for s in found.items[0].sources} == {"request"}
        # What the words find and what is ranked for the person, fused by reciprocal rank.
        by_words = ids(await stub.SearchItems(pb.SearchItemsRequest(text="wool winter", page_size=46)))
        for_ann = pb.RecommendRequest(user_id="ann", item_ids=by_words, page_size=46)
        by_person = ids(await stub.Recommend(for_ann))
        worth = {i: 3 / (61 + by_words.index(i)) + 1 / (61 + by_person.index(i)) for i in by_words}
        assert sorted(worth.values(), reverse=True) == pytest.approx([worth[i] for i in ids(found)], rel=1e-6)
        assert len(worth) == 46
        place = ids(found).index("lamp-00")
        like = await talk.say(f"like number {place + 1} but in red", page_size=40)
        assert (like.understood[0].item_id, like.understood[0].wanted) == ("lamp-00", True)
        assert all(i not in LAMPS and red(i) for i in ids(like))
        assert "“wool winter lamp”" in like.reply
        gone = await talk.say("not wool, not silk")
        assert [u.words for u in gone.in_force if u.words] == ["winter"]
        assert list(gone.not_understood) == ["silk"]

    shop.run(body)


def test_beside_words_liked_items_lead_to_their_like(one: Shop) -> None:
    async def body(stub: Any) -> None:
        await stock(stub)
        found = ids(await Talk(stub).say("wool winter", liked_item_ids=["kitchen-04"], page_size=46))
        async with grpc.aio.insecure_channel(stub.target) as channel:
            embedding: Any = embedding_grpc.EmbeddingServiceStub(channel)
            near = await embedding.Search(
                embedding_pb.SearchRequest(
                    groups=[embedding_pb.InterestGroup(item_ids=["kitchen-04"])],
                    text="wool winter",
                    limit=400,
                    spaces=[item_pb2.SPACE_TEXT],
                    exclude_item_numbers=[item_number("kitchen-04")],
                )
            )
        liked, worded = (list(result.item_numbers) for result in near.results)
        led = sorted(worded, key=lambda n: (-1 / (61 + liked.index(n)) - 1 / (61 + worded.index(n)), n))
        numbers = {item_number(i): i for i in found}
        by_both = [numbers[n] for n in led]
        ranked = pb.RecommendRequest(context_item_ids=["kitchen-04"], item_ids=by_both, page_size=45)
        by_person = ids(await stub.Recommend(ranked))
        worth = [3 / (61 + by_both.index(i)) + 1 / (61 + by_person.index(i)) for i in found]
        assert len(worth) == 45
        assert sorted(worth, reverse=True) == pytest.approx(worth, rel=1e-6)

    one.run(body)


def test_what_is_said_holds_where_a_shop_gives_up_the_filter(one: Shop, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text('[home]\nrules.relax = ["filter"]\n')

    async def body(stub: Any) -> None:
        page = await Talk(stub).say("in red", filter=only("world", "garden"), page_size=40)
        assert [red(i) for i in ids(page)] == [True] * 20
        assert [d.stage for d in page.degraded] == ["filter"]

    one.run(body, scenarios=file)


def test_disliked_items_never_come_again_and_their_like_sink(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        await stock(stub)
        talk = Talk(stub, user_id="ann")
        before = [i for i in ids(await talk.say(page_size=46)) if i != "lamp-00"]
        worse = await talk.say(disliked_item_ids=["lamp-00"], page_size=46)
        assert set(ids(worse)) == set(before)
        # Described word for word like it.
        assert ids(worse).index("lamp-01") > before.index("lamp-01")
        assert "boost" in next(i for i in worse.items if i.item_id == "lamp-01").rules
        await talk.say(disliked_item_ids=["lamp-03"])
        for message in ("lamps in green", "forget the colour", "start again with lamps", "wool winter lamp"):
            again = await talk.say(message, page_size=46)
            assert set(ids(again)) <= LAMPS - {"lamp-00", "lamp-03"}
            assert again.items
        loved = await talk.say("", liked_item_ids=["lamp-03"])
        assert [(u.item_id, u.wanted) for u in loved.in_force if u.item_id] == [
            ("lamp-03", True),
            ("lamp-00", False),
        ]

    shop.run(body)


def test_what_leaves_nothing_is_set_aside_and_said(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        talk = Talk(stub)
        await talk.say("in red under 8")
        answer = await talk.say("over 100")  # contradicts: the older bound goes
        assert [(d.stage, d.code) for d in answer.degraded] == [("conversation", RELAXED)]
        assert [(u.text, u.relaxed) for u in answer.in_force] == [
            ("colour red", False),
            ("price at least 100", True),
        ]
        assert all(red(i) for i in ids(answer))
        assert "set aside: price at least 100." in answer.reply
        chinese = await talk.say("还是要蓝色", language="zh")
        assert "已放宽：价格不低于100" in chinese.reply
        assert all(not red(i) for i in ids(await talk.say("in blue")))
        # No other condition than the request's own may be empty.
        empty = await talk.say("", filter=only("colour", "purple"))
        assert (list(empty.items), empty.reply[-16:]) == ([], "I found nothing.")
        assert not empty.degraded  # what was said was not in the way
        assert not any(u.relaxed for u in empty.in_force)

    shop.run(body)


def test_the_hard_rules_hold_in_a_dialogue(bundle: Path, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        bought = [f"garden-{n:02}" for n in range(0, 20, 2)]
        events = [purchase(str(n), "ann", item) for n, item in enumerate(bought)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=events))
        talk = Talk(stub, user_id="ann")
        narrow = only("world", "garden")
        page = await talk.say("thing", filter=narrow, page_size=40)
        assert set(ids(page)) == {f"garden-{n:02}" for n in range(1, 20, 2)}
        # All that is red was bought: that is set aside too.
        answer = await talk.say("in red", filter=narrow)
        assert answer.items
        assert not any(red(i) for i in ids(answer))
        assert [d.stage for d in answer.degraded] == ["conversation"]
        gone = (await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["garden-01"]))).outcomes[0].sequence
        later = await talk.say("forget the colour", filter=narrow, page_size=40, min_sequence=gone)
        assert set(ids(later)) == {f"garden-{n:02}" for n in range(3, 20, 2)}

    for layout in ("one", "three"):
        Shop(bundle, tmp_path / layout, layout, clock=None).run(body)


def test_the_same_dialogue_has_the_same_answers_in_both_layouts(bundle: Path, tmp_path: Path) -> None:
    said = [
        "in red or blue",
        "便宜一点",
        "like the second one but for winter",
        "not the first one",
        "再便宜一点",
    ]
    answers: list[list[tuple[list[str], str, list[str]]]] = []

    async def body(stub: Any) -> None:
        talk = Talk(stub, user_id="ann", session_id="s")
        turns = [await talk.say(message) for message in said]
        answers.append([(ids(t), t.reply, [str(u) for u in t.in_force]) for t in turns])

    for n, layout in enumerate(("one", "one", "three")):
        Shop(bundle, tmp_path / str(n), layout).run(body)
    assert answers[0] == answers[1]
    assert [a[1:] for a in answers[0]] == [a[1:] for a in answers[2]]
    assert [set(a[0]) for a in answers[0]] == [set(a[0]) for a in answers[2]]
    assert all(page for page, _, _ in answers[0])


def test_a_token_is_for_its_person_and_for_dialogues_alone(one: Shop) -> None:
    async def body(stub: Any) -> None:
        talk = Talk(stub, user_id="ann")
        answer = await talk.say("in red")
        page = await stub.Recommend(pb.RecommendRequest(page_size=3))
        halved = answer.conversation_token[:20]
        for token, user, visitor in [
            (answer.conversation_token, "bob", ""),
            (answer.conversation_token, "", "ann"),
            (answer.conversation_token, "", ""),
            (page.next_page_token, "ann", ""),
            (answer.attribution_token, "ann", ""),
            (halved, "ann", ""),
            ("é", "ann", ""),
        ]:
            request = pb.ConverseRequest(conversation_token=token, user_id=user, visitor_id=visitor)
            assert await violations(stub.Converse(request)) == ["conversation_token"]
        # A visitor goes on after signing in, and nobody else with them.
        stranger = Talk(stub, visitor_id="browser")
        token = (await stranger.say("in red")).conversation_token
        signed_in = pb.ConverseRequest(conversation_token=token, visitor_id="browser", user_id="ann")
        assert all(red(i) for i in ids(await stub.Converse(signed_in)))
        for user, visitor in (("browser", ""), ("", "")):
            request = pb.ConverseRequest(conversation_token=token, user_id=user, visitor_id=visitor)
            assert await violations(stub.Converse(request)) == ["conversation_token"]
        signed_in.visitor_id = "other"
        assert await violations(stub.Converse(signed_in)) == ["conversation_token"]
        nobody = (await Talk(stub).say("in red")).conversation_token
        request = pb.ConverseRequest(conversation_token=nobody, user_id="ann")
        assert await violations(stub.Converse(request)) == ["conversation_token"]

    one.run(body)


def test_another_gateway_of_the_shop_goes_on(bundle: Path, tmp_path: Path) -> None:
    tokens: list[str] = []

    async def begin(stub: Any) -> None:
        tokens.append((await Talk(stub).say("in red")).conversation_token)

    async def go_on(stub: Any) -> None:
        talk = Talk(stub)
        talk.token = tokens[0]
        answer = await talk.say("under 9")
        assert {(red(i), price(i) <= 9) for i in ids(answer)} == {(True, True)}

    Shop(bundle, tmp_path / "a", "one").run(begin, secret="s")
    Shop(bundle, tmp_path / "b", "three").run(go_on, secret="s")


def test_every_wrong_field_is_named(one: Shop) -> None:
    deep = only("world", "garden")
    for _ in range(7):
        deep = filter_pb2.Filter(none_of=deep)

    async def body(stub: Any) -> None:
        request = pb.ConverseRequest(
            message="x" * 2001,
            liked_item_ids=["a", "b c"],
            disliked_item_ids=["a", *["d"] * 50],
            focus_item_id="\n",
            page_size=501,
            conversation_token="none",
            language="tlh",
        )
        assert await violations(stub.Converse(request)) == [
            "message",
            "liked_item_ids[1]",
            "disliked_item_ids",
            "disliked_item_ids[0]",
            "focus_item_id",
            "page_size",
            "language",
            "conversation_token",
        ]
        assert await violations(stub.Converse(pb.ConverseRequest(filter=deep))) == ["filter"]
        assert await violations(stub.Converse(pb.ConverseRequest(user_id="a b"))) == ["user_id"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Converse(pb.ConverseRequest(scenario="nowhere"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    one.run(body)


@pytest.mark.parametrize(
    "message", ["😀😀😀", "x" * 2000, "\u202eקצת יותר זול", "\x00\x07\x1b", " \n", "'; DROP TABLE", "…!?"]
)
def test_nothing_that_is_said_breaks_a_dialogue(one: Shop, message: str) -> None:
    async def body(stub: Any) -> None:
        answer = await Talk(stub).say(message)
        assert len(answer.items) == 10
        assert answer.reply
        assert not answer.degraded

    one.run(body)


def test_a_long_dialogue_stays_bounded_and_says_what_it_lets_go(one: Shop) -> None:
    async def body(stub: Any) -> None:
        names = [f"part{n}" for n in range(18)]
        texts = [item_pb2.Attribute(name=name, texts=[f"value {name}"]) for name in names]
        item = item_pb2.Item(id="all", title="all parts", attributes=texts)
        await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]))
        talk = Talk(stub)
        for name in names[:16]:
            answer = await talk.say(f"value {name}")
            assert (ids(answer), list(answer.degraded)) == (["all"], [])
        answer = await talk.say(f"value {names[16]}")
        assert len(answer.in_force) == 16
        assert [(d.stage, d.code) for d in answer.degraded] == [("conversation", RELAXED)]
        assert "I no longer keep to part0 value part0." in answer.reply
        for n in range(5):
            answer = await talk.say(disliked_item_ids=[f"none-{n}-{m}" for m in range(50)])
        assert len([u for u in answer.in_force if u.item_id]) == 200
        assert len(answer.conversation_token) < 8000

    one.run(body)


def test_a_dialogue_goes_on_without_search_and_titles(one: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("away")

    monkeypatch.setattr(EmbeddingServicer, "Search", away)
    monkeypatch.setattr(EmbeddingServicer, "GetItems", away)

    async def body(stub: Any) -> None:
        answer = await Talk(stub).say("in red for winter", liked_item_ids=["garden-03", "unknown"])
        assert {d.stage for d in answer.degraded} == {"search", "reply"}
        assert len(answer.items) == 10
        assert all(red(i) for i in ids(answer))
        assert answer.in_force[-1].text == "like “unknown”"

    one.run(body)


def test_a_page_of_a_dialogue_has_reasons_when_asked(one: Shop) -> None:
    async def body(stub: Any) -> None:
        answer = await Talk(stub).say("in red", liked_item_ids=["garden-03"], include_reasons=True)
        assert all(item.explanation for item in answer.items)
        assert {r.history_item_id for i in answer.items for r in i.reasons} - {""} == {"garden-03"}
        assert answer.attribution_token

    one.run(body)


class Fixed:
    """An interpreter that says the same of everything."""

    def __init__(self, reading: Callable[[Heard], Any]) -> None:
        self._reading = reading

    def read(self, heard: Heard) -> Reading:
        reading: Reading = self._reading(heard)
        return reading


RELEASE = threading.Event()


def obliging() -> Fixed:
    return Fixed(lambda heard: Reading((Price(high=5.0), Words((heard.message[:3],)))))


def raising() -> Fixed:
    return Fixed(lambda heard: 1 / 0)


def hanging() -> Fixed:
    return Fixed(lambda heard: RELEASE.wait(60))


def lying() -> Fixed:
    return Fixed(lambda heard: Reading((Values("colour", ("plaid",)),)))


def babbling() -> Fixed:
    return Fixed(lambda heard: "cheaper")


def inverted() -> Fixed:
    return Fixed(lambda heard: Reading((Price(9.0, 1.0),)))


def pointing() -> Fixed:
    return Fixed(lambda heard: Reading((Liking("not shown"),)))


def test_a_shop_may_bring_its_own_interpreter(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        answer = await Talk(stub).say("whatever is said")
        assert max(map(price, ids(answer))) == 5
        assert ([u.words for u in answer.in_force][1], list(answer.degraded)) == ("wha", [])

    shop.run(body, interpreter="tests.test_converse:obliging")


@pytest.mark.parametrize("name", ["raising", "hanging", "lying", "babbling", "inverted", "pointing"])
def test_an_interpreter_that_fails_is_stood_in_for(one: Shop, name: str) -> None:
    RELEASE.clear()
    late = name == "hanging"

    async def body(stub: Any) -> None:
        for _ in range(2):
            answer = await asyncio.wait_for(Talk(stub).say("in red"), 30)
            assert [(d.stage, d.code) for d in answer.degraded] == [
                ("interpret", pb.DEGRADATION_CODE_TIMEOUT if late else pb.DEGRADATION_CODE_FAILED)
            ]
            assert all(red(i) for i in ids(answer))
            assert len(answer.items) == 10

    try:
        one.run(body, interpreter=f"tests.test_converse:{name}")
    finally:
        RELEASE.set()


@pytest.mark.parametrize(
    "named", ["nowhere:it", "tests.test_converse:nothing", "tests.test_converse:red", "json"]
)
def test_an_interpreter_that_cannot_be_loaded_is_refused_at_the_start(one: Shop, named: str) -> None:
    async def body(stub: Any) -> None:
        raise AssertionError("it started")

    with pytest.raises(FailedPrecondition, match=f"interpreter '{named}'"):
        one.run(body, interpreter=named)


def test_the_built_in_interpreter_can_be_named() -> None:
    assert isinstance(load("services.gateway.interpreter:Phrases"), Phrases)
