"""Dialogues over the real services narrow the page, and the token carries their state."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as embedding_grpc
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog.items import item_hash
from services.core.errors import Unavailable
from services.embedding.servicer import EmbeddingServicer
from tests.support.dialogues import LAMPS, Talk, stock
from tests.support.shop_server import Shop, Stub, equals_filter, ids, purchase
from tests.support.shops import is_red, price

RELAXED = pb.DEGRADATION_CODE_RULE_RELAXED


async def test_messages_narrow_the_page_until_they_are_withdrawn(stub: Stub) -> None:
    talk = Talk(stub, user_id="ann")
    first = await talk.say(page_size=40)
    assert len(ids(first)) == 40
    assert first.reply == "Here are 40 items."
    cheap = await talk.say("in red, under 9 euros please")
    assert {(is_red(i), price(i) <= 9) for i in ids(cheap)} == {(True, True)}
    assert len(cheap.items) == 10  # 1, 3, .. 9 of two worlds
    kinds = [u.kind for u in cheap.active_constraints]
    assert kinds == [pb.PARSED_CONSTRAINT_KIND_ATTRIBUTE, pb.PARSED_CONSTRAINT_KIND_PRICE]
    assert (list(cheap.active_constraints[0].values), cheap.active_constraints[1].max_price) == (
        ["red"],
        9,
    )
    assert cheap.reply == "Understood: colour red; price at most 9. Here are 10 items."
    # The middle of 1, 1, 3, 3, 5, 5, 7, 7, 9, 9 is 5, and what is cheaper costs 4 at most.
    cheaper = await talk.say("cheaper")
    assert [u.max_price for u in cheaper.parsed_constraints] == [4]
    assert {price(i) for i in ids(cheaper)} == {1, 3}
    blue = await talk.say("rather in blue")
    assert {(is_red(i), price(i)) for i in ids(blue)} == {(False, 2), (False, 4)}
    any_price = await talk.say("forget the price")
    assert len(ids(any_price)) == 10
    assert not any(is_red(i) for i in ids(any_price))
    pricier = await talk.say("more expensive")
    assert min(map(price, ids(pricier))) > 2
    assert [u.HasField("max_price") for u in pricier.active_constraints if u.kind == 2] == [False]
    restart = await talk.say("start again")
    assert (len(restart.active_constraints), {is_red(i) for i in ids(restart)}) == (0, {True, False})


async def test_a_brand_phrase_refers_to_the_mentioned_item(stub: Stub) -> None:
    await stock(stub)
    talk = Talk(stub, visitor_id="browser")
    lamps = await talk.say("lamps")
    assert set(ids(lamps)) == LAMPS
    second = ids(lamps)[1]
    brand = "Nordlicht" if int(second[-1]) < 3 else "Sol y Sombra"
    same = await talk.say("the same brand as the second one")
    assert [list(u.values) for u in same.parsed_constraints] == [[brand]]
    assert all((int(i[-1]) < 3) == (int(second[-1]) < 3) for i in ids(same))
    assert second in ids(same)
    other = await talk.say("not this brand", focus_item_id=second)
    assert {int(i[-1]) < 3 for i in ids(other)} == {int(second[-1]) >= 3}
    last = await talk.say("no SOL Y SOMBRA and not green")
    assert set(ids(last)) == {"lamp-02"} if int(second[-1]) >= 3 else last.degraded
    unknown = await Talk(stub).say("not this brand")
    assert (list(unknown.unrecognized), len(unknown.items)) == (["this", "brand"], 10)
    assert unknown.reply.startswith("I understood nothing of this. ")


async def test_keywords_match_items_and_a_message_can_refer_to_one(stub: Stub) -> None:
    await stock(stub)
    talk = Talk(stub, user_id="ann")
    page = await talk.say("wool winter", page_size=46)
    assert [u.words for u in page.parsed_constraints] == ["wool winter"]
    assert {s.source for s in page.items[0].sources} == {"request"}
    # What the words find and what is ranked for the person, fused by reciprocal rank.
    by_words = ids(await stub.SearchItems(pb.SearchItemsRequest(text="wool winter", page_size=46)))
    for_ann = pb.RecommendRequest(user_id="ann", item_ids=by_words, page_size=46)
    by_person = ids(await stub.Recommend(for_ann))
    worth = {i: 3 / (61 + by_words.index(i)) + 1 / (61 + by_person.index(i)) for i in by_words}
    assert sorted(worth.values(), reverse=True) == pytest.approx([worth[i] for i in ids(page)], rel=1e-6)
    assert len(worth) == 46
    place = ids(page).index("lamp-00")
    like = await talk.say(f"like number {place + 1} but in red", page_size=40)
    assert (like.parsed_constraints[0].item_id, like.parsed_constraints[0].positive) == ("lamp-00", True)
    assert all(i not in LAMPS and is_red(i) for i in ids(like))
    assert "“wool winter lamp”" in like.reply
    correction = await talk.say("not wool, not silk")
    assert [u.words for u in correction.active_constraints if u.words] == ["winter"]
    assert list(correction.unrecognized) == ["silk"]


async def test_liked_items_add_similar_items_to_a_keyword_search(all_in_one_stub: Stub) -> None:
    await stock(all_in_one_stub)
    item_ids = ids(
        await Talk(all_in_one_stub).say("wool winter", liked_item_ids=["kitchen-04"], page_size=46)
    )
    async with grpc.aio.insecure_channel(all_in_one_stub.target) as channel:
        embedding: Any = embedding_grpc.EmbeddingServiceStub(channel)
        near = await embedding.Search(
            embedding_pb.SearchRequest(
                groups=[embedding_pb.QueryGroup(item_ids=["kitchen-04"])],
                text="wool winter",
                limit=400,
                spaces=[item_pb2.SPACE_TEXT],
                exclude_item_hashes=[item_hash("kitchen-04")],
            )
        )
    similar_hashes, keyword_hashes = (list(result.item_hashes) for result in near.results)
    fused_hashes = sorted(
        keyword_hashes,
        key=lambda n: (-1 / (61 + similar_hashes.index(n)) - 1 / (61 + keyword_hashes.index(n)), n),
    )
    ids_by_hash = {item_hash(i): i for i in item_ids}
    by_both = [ids_by_hash[n] for n in fused_hashes]
    request = pb.RecommendRequest(context_item_ids=["kitchen-04"], item_ids=by_both, page_size=45)
    by_person = ids(await all_in_one_stub.Recommend(request))
    worth = [3 / (61 + by_both.index(i)) + 1 / (61 + by_person.index(i)) for i in item_ids]
    assert len(worth) == 45
    assert sorted(worth, reverse=True) == pytest.approx(worth, rel=1e-6)


async def test_constraints_hold_when_the_scenario_relaxes_its_filter(
    all_in_one: Shop, tmp_path: Path
) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text('[home]\nrules.relax = ["filter"]\n')
    async with all_in_one.serve(scenarios=file) as stub:
        page = await Talk(stub).say("in red", filter=equals_filter("world", "garden"), page_size=40)
        assert [is_red(i) for i in ids(page)] == [True] * 20
        assert [d.stage for d in page.degraded] == ["filter"]


async def test_disliked_items_disappear_and_similar_items_rank_lower(stub: Stub) -> None:
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
    response = await talk.say("", liked_item_ids=["lamp-03"])
    assert [(u.item_id, u.positive) for u in response.active_constraints if u.item_id] == [
        ("lamp-03", True),
        ("lamp-00", False),
    ]


async def test_a_constraint_without_matches_is_dropped_and_reported(stub: Stub) -> None:
    talk = Talk(stub)
    await talk.say("in red under 8")
    answer = await talk.say("over 100")  # contradicts: the older bound goes
    assert [(d.stage, d.code) for d in answer.degraded] == [("conversation", RELAXED)]
    assert [(u.text, u.relaxed) for u in answer.active_constraints] == [
        ("colour red", False),
        ("price at least 100", True),
    ]
    assert all(is_red(i) for i in ids(answer))
    assert "set aside: price at least 100." in answer.reply
    chinese = await talk.say("还是要蓝色", language="zh")
    assert "已放宽：价格不低于100" in chinese.reply
    assert all(not is_red(i) for i in ids(await talk.say("in blue")))
    # No other condition than the request's own may be empty.
    empty = await talk.say("", filter=equals_filter("colour", "purple"))
    assert (list(empty.items), empty.reply[-16:]) == ([], "I found nothing.")
    assert not empty.degraded  # what was said was not in the way
    assert not any(u.relaxed for u in empty.active_constraints)


async def test_hard_rules_hold_in_a_dialogue(bundle: Path, tmp_path: Path) -> None:
    for layout in ("one", "three"):
        async with Shop(bundle, tmp_path / layout, layout, clock=None).serve() as stub:
            purchased_ids = [f"garden-{n:02}" for n in range(0, 20, 2)]
            events = [purchase(str(n), "ann", item) for n, item in enumerate(purchased_ids)]
            await stub.WriteEvents(pb.WriteEventsRequest(events=events))
            talk = Talk(stub, user_id="ann")
            narrow = equals_filter("world", "garden")
            page = await talk.say("thing", filter=narrow, page_size=40)
            assert set(ids(page)) == {f"garden-{n:02}" for n in range(1, 20, 2)}
            # All that is red was bought: that is set aside too.
            answer = await talk.say("in red", filter=narrow)
            assert answer.items
            assert not any(is_red(i) for i in ids(answer))
            assert [d.stage for d in answer.degraded] == ["conversation"]
            sequence = (
                (await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["garden-01"]))).outcomes[0].sequence
            )
            later = await talk.say("forget the colour", filter=narrow, page_size=40, min_sequence=sequence)
            assert set(ids(later)) == {f"garden-{n:02}" for n in range(3, 20, 2)}


async def test_a_dialogue_has_the_same_answers_in_both_layouts(bundle: Path, tmp_path: Path) -> None:
    messages = [
        "in red or blue",
        "便宜一点",
        "like the second one but for winter",
        "not the first one",
        "再便宜一点",
    ]
    answers: list[list[tuple[list[str], str, list[str]]]] = []

    for n, layout in enumerate(("one", "one", "three")):
        async with Shop(bundle, tmp_path / str(n), layout).serve() as stub:
            talk = Talk(stub, user_id="ann", session_id="s")
            turns = [await talk.say(message) for message in messages]
            answers.append([(ids(t), t.reply, [str(u) for u in t.active_constraints]) for t in turns])
    assert answers[0] == answers[1]
    assert [a[1:] for a in answers[0]] == [a[1:] for a in answers[2]]
    assert [set(a[0]) for a in answers[0]] == [set(a[0]) for a in answers[2]]
    assert all(page for page, _, _ in answers[0])


async def test_a_dialogue_continues_without_search_and_titles(
    all_in_one: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("away")

    monkeypatch.setattr(EmbeddingServicer, "Search", away)
    monkeypatch.setattr(EmbeddingServicer, "GetItems", away)
    async with all_in_one.serve() as stub:
        answer = await Talk(stub).say("in red for winter", liked_item_ids=["garden-03", "unknown"])
        assert {d.stage for d in answer.degraded} == {"search", "reply"}
        assert len(answer.items) == 10
        assert all(is_red(i) for i in ids(answer))
        assert answer.active_constraints[-1].text == "like “unknown”"


async def test_a_dialogue_page_has_reasons_on_request(all_in_one_stub: Stub) -> None:
    answer = await Talk(all_in_one_stub).say("in red", liked_item_ids=["garden-03"], include_reasons=True)
    assert all(item.explanation for item in answer.items)
    assert {r.history_item_id for i in answer.items for r in i.reasons} - {""} == {"garden-03"}
    assert answer.attribution_token
