"""Scenarios and rules over the real services: from a file that changes, and from requests."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from vitrine.catalog.v1 import filter_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.bundle import Bundle
from services.catalog import item_number
from services.errors import InvalidArgument
from services.gateway.scenarios import BUILT_IN, Scenarios
from tests.recommending import NOW, Shop, ids, only, purchase, session, violations


def family(item_id: str) -> str:
    world, number = item_id.split("-")
    return f"{world}-{int(number) // 2}"


def red(item_id: str) -> bool:
    return int(item_id.split("-")[1]) % 2 == 0


def rules(**more: Any) -> Any:
    return pb.Rules(**more)


def test_a_file_says_what_a_place_does_and_a_request_may_say_otherwise(shop: Shop, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text(
        """
        [shelf]
        filter = { equals = { attribute = "world", text = "kitchen" } }
        rules.caps = [{ attribute = "family_id", most = 1, among = 10 }]
        [shut]
        locked = true
        """
    )

    async def body(stub: Any) -> None:
        def asked(**more: Any) -> Any:
            return stub.Recommend(pb.RecommendRequest(scenario="shelf", page_size=10, **more))

        shelf = ids(await asked(session=session("garden-03")))
        assert len({family(i) for i in shelf}) == 10
        assert all(i.startswith("kitchen-") for i in shelf)
        # A filter of the request joins the scenario's; caps of its own replace it.
        assert set(ids(await asked(filter=only("world", "garden")))) == set()
        looser = ids(await asked(rules=rules(caps=[pb.Cap(attribute="colour", most=10)])))
        assert max(Counter(map(family, looser)).values()) == 2
        shut = [
            pb.RecommendRequest(scenario="shut", rules=rules(min_relevance=0.5)),
            pb.RecommendRequest(scenario="shut", diversity=0.0),
            pb.RecommendRequest(scenario="shut", rotation=False),
        ]
        assert [await violations(stub.Recommend(r)) for r in shut] == [["rules"], ["diversity"], ["rotation"]]
        for known in (*BUILT_IN, "shut"):
            assert len((await stub.Recommend(pb.RecommendRequest(scenario=known))).items) == 20
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Recommend(pb.RecommendRequest(scenario="nowhere"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    shop.run(body, scenarios=file)


def test_a_filter_that_is_too_deep_with_the_scenarios_is_refused_at_once(one: Shop, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text('[shelf]\nfilter = { equals = { attribute = "world", text = "kitchen" } }\n')
    deep = only("world", "kitchen")
    for _ in range(7):
        deep = filter_pb2.Filter(none_of=deep)

    async def body(stub: Any) -> None:
        await stub.Recommend(pb.RecommendRequest(filter=deep))
        for check in (True, False):
            request = pb.RecommendRequest(scenario="shelf", filter=deep, validate_only=check)
            assert await violations(stub.Recommend(request)) == ["filter"]

    one.run(body, scenarios=file)


def test_what_was_seen_may_stay_away(shop: Shop, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text('[fresh]\nseen_policy = "SEEN_POLICY_EXCLUDE"\n')
    seen = ["garden-01", "garden-02", "kitchen-03"]

    async def earlier(stub: Any) -> None:
        events = [purchase(f"e{n}", "ann", i, kind="click") for n, i in enumerate(seen)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=events))

    async def body(stub: Any) -> None:
        async def page(**more: Any) -> list[str]:
            return ids(await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=40, **more)))

        exclude, keep = pb.SEEN_POLICY_EXCLUDE, pb.SEEN_POLICY_KEEP
        assert set(seen) <= set(await page())
        for fresh in (await page(scenario="fresh"), await page(seen_policy=exclude)):
            assert len(fresh) == 37
            assert not set(seen) & set(fresh)
        assert set(seen) <= set(await page(scenario="fresh", seen_policy=keep))
        listed = [*seen, "garden-05"]
        assert set(await page(scenario="fresh", item_ids=listed)) == set(listed)
        assert await page(item_ids=listed, seen_policy=exclude) == ["garden-05"]
        request = pb.RecommendRequest(user_id="ann", scenario="fresh")
        why = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=seen[0]))
        assert why.standing == pb.STANDING_SEEN

    Shop(bundle, tmp_path / "state", "one", clock=NOW - timedelta(hours=1)).run(earlier)
    shop.run(body, scenarios=file)


def test_a_changed_file_counts_and_a_broken_one_does_not(
    one: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "scenarios.toml"

    def write(world: str) -> None:
        file.write_text(f'[home]\nfilter = {{ equals = {{ attribute = "world", text = "{world}" }} }}\n')

    async def body(stub: Any) -> None:
        async def worlds() -> set[str]:
            page = await stub.Recommend(pb.RecommendRequest(page_size=40))
            return {i.split("-")[0] for i in ids(page)}

        assert await worlds() == {"garden"}
        write("kitchen")
        async with asyncio.timeout(60):
            while await worlds() != {"kitchen"}:
                await asyncio.sleep(0.1)
            file.write_text("[home]\nsorces = []\n")
            while "stay as they were" not in caplog.text:
                await asyncio.sleep(0.1)
            assert "scenarios.home" in caplog.text
            assert await worlds() == {"kitchen"}
            file.unlink()
            while caplog.text.count("stay as they were") < 2:
                await asyncio.sleep(0.1)
            write("garden")
            while await worlds() != {"garden"}:
                await asyncio.sleep(0.1)

    write("garden")
    one.run(body, scenarios=file)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[home\n", "scenarios: is no TOML"),
        (b"\xff", "scenarios: is no TOML"),
        (b"home = 3\n", "scenarios.home"),
        (b"home = " + b"[" * 20_000, "scenarios: is no TOML"),
        (b"[home]\nsorces = []\n", "sorces"),
        (b'[home]\nsources = ["grave"]\n', "scenarios.home.sources: 'grave'"),
        (b"[home]\ndiversity = 2.0\n", "scenarios.home.diversity"),
        (b'[home]\ndiversity = "much"\n', "scenarios.home: Failed to parse diversity"),
        (b"[home]\nfilter = {}\n", "scenarios.home.filter: has no condition"),
        (b"[home]\nrules.caps = [{ most = 1 }]\n", "scenarios.home.rules.caps[0].attribute"),
        (b'[home]\nordering = "ORDERING_RANDOM"\n', "ordering"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, content: bytes, named: str) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_bytes(content)
    with pytest.raises(InvalidArgument) as caught:
        Scenarios(file)
    assert named in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="scenarios: cannot be read"):
        Scenarios(tmp_path / "nowhere.toml")


def test_wrong_rules_of_a_request_name_their_field(one: Shop) -> None:
    anything = only("world", "garden")
    wrong = [
        (rules(caps=[pb.Cap(attribute="world")]), "rules.caps[0].most"),
        (rules(caps=[pb.Cap(most=1)]), "rules.caps[0].attribute"),
        (rules(caps=[pb.Cap(attribute="world", most=1, among=1)]), "rules.caps[0].among"),
        (rules(caps=[pb.Cap(attribute="world", most=1)] * 17), "rules.caps"),
        (rules(boosts=[pb.Boost(filter=anything)]), "rules.boosts[0].amount"),
        (rules(boosts=[pb.Boost(amount=1)]), "rules.boosts[0].filter"),
        (rules(boosts=[pb.Boost(amount=float("nan"), filter=anything)]), "rules.boosts[0].amount"),
        (rules(quotas=[pb.Quota(source="new")]), "rules.quotas[0].share"),
        (rules(quotas=[pb.Quota(share=0.5)]), "rules.quotas[0]"),
        (rules(quotas=[pb.Quota(source="grave", share=0.5)]), "rules.quotas[0].source"),
        (rules(quotas=[pb.Quota(source="new", share=0.6)] * 2), "rules.quotas"),
        (rules(min_relevance=-1), "rules.min_relevance"),
        (rules(relax=["rules"]), "rules.relax[0]"),
        (rules(relax=["caps", "caps"]), "rules.relax"),
    ]

    async def body(stub: Any) -> None:
        for some, field in wrong:
            assert await violations(stub.Recommend(pb.RecommendRequest(rules=some))) == [field]
        others = [
            (pb.RecommendRequest(item_ids=[""]), "item_ids[0]"),
            (pb.RecommendRequest(item_ids=["a"] * 2001), "item_ids"),
            (pb.RecommendRequest(context_item_ids=["a", "b c"]), "context_item_ids[1]"),
            (pb.RecommendRequest(context_item_ids=["a"] * 51), "context_item_ids"),
        ]
        for request, field in others:
            assert await violations(stub.Recommend(request)) == [field]
            request.validate_only = True
            assert await violations(stub.Recommend(request)) == [field]
        fine = await stub.Recommend(pb.RecommendRequest(validate_only=True, request_id="me"))
        assert (list(fine.items), fine.request_id, bool(fine.versions.bundle)) == ([], "me", True)

    one.run(body)


def test_caps_hold_from_page_to_page_and_a_page_is_full_whenever_enough_qualify(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        # The graph knows 19 items beside this one; the rest of the catalogue follows.
        request = pb.RecommendRequest(scenario="together", session=session("garden-03"), page_size=30)
        response = await stub.Recommend(request)
        assert len(set(ids(response))) == 30
        sources = [{s.source for s in item.sources} for item in response.items]
        assert all("graph" in some for some in sources[:19])
        assert sources[19:] == [{"catalogue"}] * 11
        request = pb.RecommendRequest(page_size=7, rules=rules(caps=[pb.Cap(attribute="family_id", most=1)]))
        seen: list[str] = []
        while True:
            page = await stub.Recommend(request)
            assert not page.degraded
            seen += ids(page)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        assert len(set(seen)) == len(seen)
        assert all(len({family(i) for i in seen[at : at + 20]}) == 20 for at in range(len(seen) - 19))
        assert len(seen) >= 20

    shop.run(body)


@pytest.mark.parametrize(
    "some",
    [
        {"caps": [pb.Cap(attribute="world", most=1)], "relax": ["caps"]},
        {"caps": [pb.Cap(attribute="world", most=3, among=5)], "relax": ["filter", "caps"]},
        {"quotas": [pb.Quota(filter=only("world", "kitchen"), share=0.5)]},
        {
            "quotas": [pb.Quota(filter=only("world", "kitchen"), share=0.3)],
            "caps": [pb.Cap(attribute="family_id", most=1, among=8)],
            "boosts": [pb.Boost(filter=only("colour", "red"), amount=0.3)],
            "relax": ["min_relevance", "filter"],
            "min_relevance": 0.2,
        },
    ],
)
@pytest.mark.parametrize("scenario", ["home", "together"])
def test_pages_one_after_the_other_are_one_long_page(one: Shop, some: dict[str, Any], scenario: str) -> None:
    async def body(stub: Any) -> None:
        request = pb.RecommendRequest(
            scenario=scenario, session=session("garden-03"), rules=rules(**some), filter=only("colour", "red")
        )
        request.page_size = 39
        long = ids(await stub.Recommend(request))
        seen: list[str] = []
        request.page_size = 4
        while len(seen) < len(long):
            page = await stub.Recommend(request)
            seen += ids(page)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        assert seen[: len(long)] == long
        assert len(set(seen)) == len(seen)

    one.run(body)


def test_what_is_relaxed_is_said_and_comes_last(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        def asked(*relax: str, **more: Any) -> Any:
            some = rules(caps=[pb.Cap(attribute="family_id", most=1)], relax=relax, **more)
            request = pb.RecommendRequest(page_size=30, filter=only("world", "garden"), rules=some)
            return stub.Recommend(request)

        strict = await asked()
        assert len(ids(strict)) == 10
        assert not strict.degraded
        caps = await asked("caps")
        assert [d.stage for d in caps.degraded] == ["caps"]
        assert caps.degraded[0].code == pb.DEGRADATION_CODE_RULE_RELAXED
        assert ids(caps)[:10] == ids(strict)
        assert set(map(family, ids(caps))) == set(map(family, ids(strict)))
        assert len(ids(caps)) == 20
        both = await asked("filter", "caps")
        assert [d.stage for d in both.degraded] == ["filter"]
        assert ids(both)[:10] == ids(strict)
        assert len({family(i) for i in ids(both)[:20]}) == 20
        assert len(set(ids(both))) == 30
        request = pb.RecommendRequest(session=session("garden-03"), page_size=30)
        request.rules.min_relevance = 0.5
        least = ids(await stub.Recommend(request))
        assert 0 < len(least) < 10
        assert all(i.startswith("garden-") for i in least)
        request.rules.relax.append("min_relevance")
        whole = await stub.Recommend(request)
        assert [d.stage for d in whole.degraded] == ["min_relevance"]
        assert (ids(whole)[: len(least)], len(ids(whole))) == (least, 30)

    shop.run(body)


def test_boosts_and_quotas_move_items_and_say_so(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        def asked(**more: Any) -> Any:
            request = pb.RecommendRequest(session=session("garden-03"), page_size=10, rules=rules(**more))
            return stub.Recommend(request)

        lifted = await asked(boosts=[pb.Boost(filter=only("colour", "red"), amount=1)])
        assert all(red(i) for i in ids(lifted)[:9])
        assert all(list(item.rules) == ["boost"] for item in lifted.items[:9])
        sunk = await asked(boosts=[pb.Boost(filter=only("colour", "red"), amount=-1)])
        assert not any(red(i) for i in ids(sunk)[:9])
        # What no source would bring for this session.
        promoted = await asked(quotas=[pb.Quota(filter=only("id", "kitchen-07"), share=0.1)])
        assert ids(promoted)[9] == "kitchen-07"
        assert list(promoted.items[9].rules) == ["quota"]
        assert "quota" in {s.source for s in promoted.items[9].sources}
        assert not any(item.rules for item in promoted.items[:9])
        gone = pb.RecommendRequest(
            page_size=40,
            exclude_item_ids=["kitchen-07"],
            rules=rules(quotas=[pb.Quota(filter=only("id", "kitchen-07"), share=1)]),
        )
        assert "kitchen-07" not in ids(await stub.Recommend(gone))

    shop.run(body)


def test_a_list_is_reordered_and_what_cannot_be_shown_is_named(bundle: Path, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        later = item_pb2.Item(id="later", title="garden thing")
        later.available_from.FromDatetime(datetime.now(UTC) + timedelta(days=1))
        await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[later]))
        await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("1", "ann", "garden-01")]))
        given = ["kitchen-01", "garden-05", "later", "nobody", "garden-01", "kitchen-02", "garden-05"]
        request = pb.RecommendRequest(user_id="ann", item_ids=given, session=session("garden-01"))
        found = await stub.Recommend(request)
        assert sorted(ids(found)) == ["garden-01", "garden-05", "kitchen-01", "kitchen-02"]
        assert ids(found)[0].startswith("garden-")
        assert list(found.left_out_item_ids) == ["later", "nobody"]
        request.bought_policy = pb.BOUGHT_POLICY_EXCLUDE
        found = await stub.Recommend(request)
        assert "garden-01" not in ids(found)
        assert set(found.left_out_item_ids) == {"later", "nobody", "garden-01"}

    Shop(bundle, tmp_path / "state", "one", clock=None).run(body)


def test_what_was_shown_and_ignored_sinks_until_it_is_taken_up(bundle: Path, tmp_path: Path) -> None:
    def shown(event_id: str, *items: str, kind: str = "impression", ago: int = 60) -> Any:
        event = purchase(event_id, "ann", *items, kind=kind)
        event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(minutes=ago))
        return event

    async def body(stub: Any) -> None:
        async def page(rotation: bool) -> Any:
            request = pb.RecommendRequest(user_id="ann", page_size=10, rotation=rotation)
            return await stub.Recommend(request)

        first = ids(await page(rotation=True))
        assert first == ids(await page(rotation=False))
        seen = [shown(f"s{n}", first[0], first[1], ago=60 - n) for n in range(9)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=seen))
        assert ids(await page(rotation=False)) == first
        turned = await page(rotation=True)
        assert not {first[0], first[1]} & set(ids(turned)[:2])
        click = shown("c", first[1], kind="click", ago=1)
        await stub.WriteEvents(pb.WriteEventsRequest(events=[click]))
        again = await page(rotation=True)
        assert all("rotation" not in item.rules for item in again.items if item.item_id == first[1])

    Shop(bundle, tmp_path / "state", "three", clock=None).run(body)


def test_what_is_looked_at_counts_as_the_latest_of_the_session(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        told = pb.RecommendRequest(session=session("garden-03", "kitchen-04"))
        shown = pb.RecommendRequest(session=session("garden-03"), context_item_ids=["kitchen-04"])
        assert ids(await stub.Recommend(told)) == ids(await stub.Recommend(shown))

    shop.run(body)


def test_the_popular_are_in_the_order_of_their_popularity_for_everybody(bundle: Path, shop: Shop) -> None:
    numbers = np.load(Bundle(bundle).directory / "popular" / "numbers.npy").tolist()

    async def body(stub: Any) -> None:
        stranger = pb.RecommendRequest(scenario="popular", page_size=15)
        known = pb.RecommendRequest(
            scenario="popular", page_size=15, user_id="ann", session=session("garden-03")
        )
        for request in (stranger, known):
            page = await stub.Recommend(request)
            wanted = [n for n in numbers if request is stranger or n != item_number("garden-03")]
            assert [item_number(i) for i in ids(page)] == wanted[:15]

    shop.run(body)


def test_what_keeps_an_item_off_a_page_is_told(bundle: Path, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        later = item_pb2.Item(id="later", title="garden thing")
        later.available_from.FromDatetime(datetime.now(UTC) + timedelta(days=1))
        await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[later]))
        await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("1", "ann", "garden-01")]))

        async def told(item_id: str, **more: Any) -> Any:
            request = pb.RecommendRequest(
                user_id="ann",
                session=session("garden-03"),
                page_size=5,
                exclude_item_ids=["garden-09"],
                **more,
            )
            page = ids(await stub.Recommend(request))
            found = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=item_id))
            assert (found.standing == pb.STANDING_SHOWN) == (item_id in page)
            if item_id in page:
                assert page[found.place - 1] == item_id
            return found

        for item_id, standing in {
            "nobody": pb.STANDING_UNKNOWN_ITEM,
            "later": pb.STANDING_UNAVAILABLE,
            "garden-09": pb.STANDING_EXCLUDED,
            "garden-03": pb.STANDING_IN_SESSION,
            "garden-01": pb.STANDING_BOUGHT,
        }.items():
            assert (await told(item_id)).standing == standing
        low = await told("kitchen-15")
        assert low.standing == pb.STANDING_RANKED_LOWER
        assert low.ranked_place > 5
        assert low.item.score <= low.last_score
        assert {s.name: s.items for s in low.stages}["rank"] == low.candidates
        filtered = await told("kitchen-15", filter=only("world", "garden"))
        assert filtered.standing == pb.STANDING_FILTERED
        assert "the request's filter" in filtered.message
        assert (await told("kitchen-15", scenario="together")).standing == pb.STANDING_NO_SOURCE
        first, second = ids(await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=2)))
        for item_id in (first, second):
            assert (await told(item_id)).ranked_place > 0
        lifted = rules(boosts=[pb.Boost(filter=only("world", "kitchen"), amount=1)])
        shown = ids(await stub.Recommend(pb.RecommendRequest(user_id="ann", session=session("garden-03"))))
        best = next(i for i in shown if i not in ("garden-09", "garden-03"))
        kept_off = await told(best, rules=lifted)
        assert (kept_off.standing, list(kept_off.rules)) == (pb.STANDING_RULE, ["boosts"])
        # Given up for a full page, it is shown, and that is what is told.
        outside = pb.RecommendRequest(
            page_size=30, filter=only("world", "garden"), rules=rules(relax=["filter"])
        )
        last = ids(await stub.Recommend(outside))[-1]
        asked = pb.ExplainItemRequest(request=outside, item_id=last)
        assert last.startswith("kitchen-")
        assert (await stub.ExplainItem(asked)).standing == pb.STANDING_SHOWN
        capped = rules(caps=[pb.Cap(attribute="world", most=1)])
        second = [i for i in shown if i not in ("garden-09", "garden-03")][1]
        assert second.startswith("garden-")
        assert list((await told(second, rules=capped)).rules) == ["caps"]
        wrong = pb.ExplainItemRequest(request=pb.RecommendRequest(page_size=-1), item_id="a")
        assert await violations(stub.ExplainItem(wrong)) == ["request.page_size"]
        assert await violations(stub.ExplainItem(pb.ExplainItemRequest())) == ["item_id"]
        debugged = await stub.Recommend(pb.RecommendRequest(page_size=3, debug=True))
        assert [s.name for s in debugged.stages] == ["retrieve", "search", "allow", "rank", "rules"]
        assert debugged.stages[-1].items >= 3
        assert all(s.milliseconds >= 0 for s in debugged.stages)

    for layout in ("one", "three"):
        Shop(bundle, tmp_path / layout, layout, clock=None).run(body)
