"""Scenarios and page rules come from a file that is reloaded, and from requests."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.gateway.experiments.scenarios import BUILT_IN
from tests.support.shop_server import Shop, Stub, equals_filter, ids, purchase, session, violations
from tests.support.shops import family, is_red


async def test_the_file_defines_scenarios_and_a_request_overrides_them(shop: Shop, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text(
        """
        [shelf]
        filter = { equals = { attribute = "world", text = "kitchen" } }
        rules.caps = [{ attribute = "family_id", max_count = 1, window = 10 }]
        [shut]
        allow_overrides = false
        """
    )
    async with shop.serve(scenarios=file) as stub:

        def make_request(**more: Any) -> Any:
            return stub.Recommend(pb.RecommendRequest(scenario="shelf", page_size=10, **more))

        shelf = ids(await make_request(session=session("garden-03")))
        assert len({family(i) for i in shelf}) == 10
        assert all(i.startswith("kitchen-") for i in shelf)
        # A filter of the request joins the scenario's; caps of its own replace it.
        assert set(ids(await make_request(filter=equals_filter("world", "garden")))) == set()
        looser = ids(await make_request(rules=pb.Rules(caps=[pb.Cap(attribute="colour", max_count=10)])))
        assert max(Counter(map(family, looser)).values()) == 2
        shut = [
            pb.RecommendRequest(scenario="shut", rules=pb.Rules(min_relevance=0.5)),
            pb.RecommendRequest(scenario="shut", diversity=0.0),
            pb.RecommendRequest(scenario="shut", rotation=False),
        ]
        assert [await violations(stub.Recommend(r)) for r in shut] == [["rules"], ["diversity"], ["rotation"]]
        for name in (*BUILT_IN, "shut"):
            assert len((await stub.Recommend(pb.RecommendRequest(scenario=name))).items) == 20
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Recommend(pb.RecommendRequest(scenario="nowhere"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_changed_file_is_loaded_and_a_broken_one_is_not(
    all_in_one: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "scenarios.toml"

    def write(world: str) -> None:
        file.write_text(f'[home]\nfilter = {{ equals = {{ attribute = "world", text = "{world}" }} }}\n')

    write("garden")
    async with all_in_one.serve(scenarios=file) as stub:

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


async def test_invalid_rules_of_a_request_name_their_field(all_in_one_stub: Stub) -> None:
    anything = equals_filter("world", "garden")
    wrong = [
        (pb.Rules(caps=[pb.Cap(attribute="world")]), "rules.caps[0].max_count"),
        (pb.Rules(caps=[pb.Cap(max_count=1)]), "rules.caps[0].attribute"),
        (pb.Rules(caps=[pb.Cap(attribute="world", max_count=1, window=1)]), "rules.caps[0].window"),
        (pb.Rules(caps=[pb.Cap(attribute="world", max_count=1)] * 17), "rules.caps"),
        (pb.Rules(boosts=[pb.Boost(filter=anything)]), "rules.boosts[0].amount"),
        (pb.Rules(boosts=[pb.Boost(amount=1)]), "rules.boosts[0].filter"),
        (pb.Rules(boosts=[pb.Boost(amount=float("nan"), filter=anything)]), "rules.boosts[0].amount"),
        (pb.Rules(quotas=[pb.Quota(source="new_arrivals")]), "rules.quotas[0].share"),
        (pb.Rules(quotas=[pb.Quota(share=0.5)]), "rules.quotas[0]"),
        (pb.Rules(quotas=[pb.Quota(source="grave", share=0.5)]), "rules.quotas[0].source"),
        (pb.Rules(quotas=[pb.Quota(source="new_arrivals", share=0.6)] * 2), "rules.quotas"),
        (pb.Rules(min_relevance=-1), "rules.min_relevance"),
        (pb.Rules(relax=["rules"]), "rules.relax[0]"),
        (pb.Rules(relax=["caps", "caps"]), "rules.relax"),
    ]
    for some, field in wrong:
        assert await violations(all_in_one_stub.Recommend(pb.RecommendRequest(rules=some))) == [field]
    others = [
        (pb.RecommendRequest(item_ids=[""]), "item_ids[0]"),
        (pb.RecommendRequest(item_ids=["a"] * 2001), "item_ids"),
        (pb.RecommendRequest(context_item_ids=["a", "b\tc"]), "context_item_ids[1]"),
        (pb.RecommendRequest(context_item_ids=["a"] * 51), "context_item_ids"),
    ]
    for request, field in others:
        assert await violations(all_in_one_stub.Recommend(request)) == [field]
        request.validate_only = True
        assert await violations(all_in_one_stub.Recommend(request)) == [field]
    fine = await all_in_one_stub.Recommend(pb.RecommendRequest(validate_only=True, request_id="me"))
    assert (list(fine.items), fine.request_id, bool(fine.versions.bundle)) == ([], "me", True)


async def test_caps_hold_across_pages_and_pages_are_full_if_enough_items_qualify(stub: Stub) -> None:
    # The graph knows 19 items beside this one; the rest of the catalog follows.
    request = pb.RecommendRequest(scenario="together", session=session("garden-03"), page_size=30)
    response = await stub.Recommend(request)
    assert len(set(ids(response))) == 30
    sources = [{s.source for s in item.sources} for item in response.items]
    assert all("co_occurrence" in some for some in sources[:19])
    assert sources[19:] == [{"backfill"}] * 11
    request = pb.RecommendRequest(
        page_size=7, rules=pb.Rules(caps=[pb.Cap(attribute="family_id", max_count=1)])
    )
    item_ids: list[str] = []
    while True:
        page = await stub.Recommend(request)
        assert not page.degraded
        item_ids += ids(page)
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert len(set(item_ids)) == len(item_ids)
    assert all(len({family(i) for i in item_ids[at : at + 20]}) == 20 for at in range(len(item_ids) - 19))
    assert len(item_ids) >= 20


@pytest.mark.parametrize(
    "some",
    [
        {"caps": [pb.Cap(attribute="world", max_count=1)], "relax": ["caps"]},
        {"caps": [pb.Cap(attribute="world", max_count=3, window=5)], "relax": ["filter", "caps"]},
        {"quotas": [pb.Quota(filter=equals_filter("world", "kitchen"), share=0.5)]},
        {
            "quotas": [pb.Quota(filter=equals_filter("world", "kitchen"), share=0.3)],
            "caps": [pb.Cap(attribute="family_id", max_count=1, window=8)],
            "boosts": [pb.Boost(filter=equals_filter("colour", "red"), amount=0.3)],
            "relax": ["min_relevance", "filter"],
            "min_relevance": 0.2,
        },
    ],
)
@pytest.mark.parametrize("scenario", ["home", "together"])
async def test_consecutive_pages_equal_one_long_page(
    all_in_one_stub: Stub, some: dict[str, Any], scenario: str
) -> None:
    request = pb.RecommendRequest(
        scenario=scenario,
        session=session("garden-03"),
        rules=pb.Rules(**some),
        filter=equals_filter("colour", "red"),
    )
    request.page_size = 39
    long = ids(await all_in_one_stub.Recommend(request))
    item_ids: list[str] = []
    request.page_size = 4
    while len(item_ids) < len(long):
        page = await all_in_one_stub.Recommend(request)
        item_ids += ids(page)
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert item_ids[: len(long)] == long
    assert len(set(item_ids)) == len(item_ids)


async def test_relaxed_items_are_marked_and_come_last(stub: Stub) -> None:
    def make_request(*relax: str, **more: Any) -> Any:
        some = pb.Rules(caps=[pb.Cap(attribute="family_id", max_count=1)], relax=relax, **more)
        request = pb.RecommendRequest(page_size=30, filter=equals_filter("world", "garden"), rules=some)
        return stub.Recommend(request)

    strict = await make_request()
    assert len(ids(strict)) == 10
    assert not strict.degraded
    caps = await make_request("caps")
    assert [d.stage for d in caps.degraded] == ["caps"]
    assert caps.degraded[0].code == pb.DEGRADATION_CODE_RULE_RELAXED
    assert ids(caps)[:10] == ids(strict)
    assert set(map(family, ids(caps))) == set(map(family, ids(strict)))
    assert len(ids(caps)) == 20
    both = await make_request("filter", "caps")
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


async def test_boosts_and_quotas_move_items_and_are_reported(stub: Stub) -> None:
    def make_request(**more: Any) -> Any:
        request = pb.RecommendRequest(session=session("garden-03"), page_size=10, rules=pb.Rules(**more))
        return stub.Recommend(request)

    boost_page = await make_request(boosts=[pb.Boost(filter=equals_filter("colour", "red"), amount=1)])
    assert all(is_red(i) for i in ids(boost_page)[:9])
    assert all(list(item.rules) == ["boost"] for item in boost_page.items[:9])
    sunk = await make_request(boosts=[pb.Boost(filter=equals_filter("colour", "red"), amount=-1)])
    assert not any(is_red(i) for i in ids(sunk)[:9])
    # What no source would bring for this session.
    quota_page = await make_request(quotas=[pb.Quota(filter=equals_filter("id", "kitchen-07"), share=0.1)])
    assert ids(quota_page)[9] == "kitchen-07"
    assert list(quota_page.items[9].rules) == ["quota"]
    assert "quota" in {s.source for s in quota_page.items[9].sources}
    assert not any(item.rules for item in quota_page.items[:9])
    quota_request = pb.RecommendRequest(
        page_size=40,
        exclude_item_ids=["kitchen-07"],
        rules=pb.Rules(quotas=[pb.Quota(filter=equals_filter("id", "kitchen-07"), share=1)]),
    )
    assert "kitchen-07" not in ids(await stub.Recommend(quota_request))


async def test_a_list_is_reranked_and_ineligible_items_are_named(bundle: Path, tmp_path: Path) -> None:
    async with Shop(bundle, tmp_path / "state", "one", clock=None).serve() as stub:
        later = item_pb2.Item(id="later", title="garden thing")
        later.available_from.FromDatetime(datetime.now(UTC) + timedelta(days=1))
        await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[later]))
        await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("1", "ann", "garden-01")]))
        item_ids = ["kitchen-01", "garden-05", "later", "nobody", "garden-01", "kitchen-02", "garden-05"]
        request = pb.RecommendRequest(user_id="ann", item_ids=item_ids, session=session("garden-01"))
        response = await stub.Recommend(request)
        assert sorted(ids(response)) == ["garden-01", "garden-05", "kitchen-01", "kitchen-02"]
        assert ids(response)[0].startswith("garden-")
        assert list(response.excluded_item_ids) == ["later", "nobody"]
        request.purchased_items_policy = pb.PURCHASED_ITEMS_POLICY_EXCLUDE
        response = await stub.Recommend(request)
        assert "garden-01" not in ids(response)
        assert set(response.excluded_item_ids) == {"later", "nobody", "garden-01"}


async def test_ignored_impressions_demote_an_item_until_an_interaction(bundle: Path, tmp_path: Path) -> None:
    def impression(event_id: str, *items: str, kind: str = "impression", ago: int = 60) -> Any:
        event = purchase(event_id, "ann", *items, kind=kind)
        event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(minutes=ago))
        return event

    async with Shop(bundle, tmp_path / "state", "three", clock=None).serve() as stub:

        async def page(rotation: bool) -> Any:
            request = pb.RecommendRequest(user_id="ann", page_size=10, rotation=rotation)
            return await stub.Recommend(request)

        first = ids(await page(rotation=True))
        assert first == ids(await page(rotation=False))
        impressions = [impression(f"s{n}", first[0], first[1], ago=60 - n) for n in range(9)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=impressions))
        assert ids(await page(rotation=False)) == first
        rotated_page = await page(rotation=True)
        assert not {first[0], first[1]} & set(ids(rotated_page)[:2])
        click = impression("c", first[1], kind="click", ago=1)
        await stub.WriteEvents(pb.WriteEventsRequest(events=[click]))
        again = await page(rotation=True)
        assert all("rotation" not in item.rules for item in again.items if item.item_id == first[1])


async def test_diagnosis_tells_why_an_item_is_not_on_a_page(bundle: Path, tmp_path: Path) -> None:
    for layout in ("one", "three"):
        async with Shop(bundle, tmp_path / layout, layout, clock=None).serve() as stub:
            later = item_pb2.Item(id="later", title="garden thing")
            later.available_from.FromDatetime(datetime.now(UTC) + timedelta(days=1))
            await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[later]))
            await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("1", "ann", "garden-01")]))

            async def diagnose(item_id: str, **more: Any) -> Any:
                request = pb.RecommendRequest(
                    user_id="ann",
                    session=session("garden-03"),
                    page_size=5,
                    exclude_item_ids=["garden-09"],
                    **more,
                )
                page = ids(await stub.Recommend(request))
                response = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=item_id))
                assert (response.item_status == pb.ITEM_STATUS_SHOWN) == (item_id in page)
                if item_id in page:
                    assert page[response.position - 1] == item_id
                return response

            for item_id, item_status in {
                "nobody": pb.ITEM_STATUS_UNKNOWN_ITEM,
                "later": pb.ITEM_STATUS_UNAVAILABLE,
                "garden-09": pb.ITEM_STATUS_EXCLUDED,
                "garden-03": pb.ITEM_STATUS_IN_SESSION,
                "garden-01": pb.ITEM_STATUS_PURCHASED,
            }.items():
                assert (await diagnose(item_id)).item_status == item_status
            low = await diagnose("kitchen-15")
            assert low.item_status == pb.ITEM_STATUS_RANKED_LOWER
            assert low.ranked_position > 5
            assert low.item.score <= low.last_score
            assert {s.name: s.items for s in low.stages}["rank"] == low.candidates
            diagnosis = await diagnose("kitchen-15", filter=equals_filter("world", "garden"))
            assert diagnosis.item_status == pb.ITEM_STATUS_FILTERED
            assert "the request's filter" in diagnosis.message
            assert (await diagnose("kitchen-15", scenario="together")).item_status == pb.ITEM_STATUS_NO_SOURCE
            first, second = ids(await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=2)))
            for item_id in (first, second):
                assert (await diagnose(item_id)).ranked_position > 0
            boosts = pb.Rules(boosts=[pb.Boost(filter=equals_filter("world", "kitchen"), amount=1)])
            item_ids = ids(
                await stub.Recommend(pb.RecommendRequest(user_id="ann", session=session("garden-03")))
            )
            best = next(i for i in item_ids if i not in ("garden-09", "garden-03"))
            kept_off = await diagnose(best, rules=boosts)
            assert (kept_off.item_status, list(kept_off.rules)) == (pb.ITEM_STATUS_RULE, ["boosts"])
            # Given up for a full page, it is shown, and that is what is told.
            outside = pb.RecommendRequest(
                page_size=30, filter=equals_filter("world", "garden"), rules=pb.Rules(relax=["filter"])
            )
            last = ids(await stub.Recommend(outside))[-1]
            diagnosis_request = pb.ExplainItemRequest(request=outside, item_id=last)
            assert last.startswith("kitchen-")
            assert (await stub.ExplainItem(diagnosis_request)).item_status == pb.ITEM_STATUS_SHOWN
            caps = pb.Rules(caps=[pb.Cap(attribute="world", max_count=1)])
            second = [i for i in item_ids if i not in ("garden-09", "garden-03")][1]
            assert second.startswith("garden-")
            assert list((await diagnose(second, rules=caps)).rules) == ["caps"]
            wrong = pb.ExplainItemRequest(request=pb.RecommendRequest(page_size=-1), item_id="a")
            assert await violations(stub.ExplainItem(wrong)) == ["request.page_size"]
            assert await violations(stub.ExplainItem(pb.ExplainItemRequest())) == ["item_id"]
            debug_page = await stub.Recommend(pb.RecommendRequest(page_size=3, debug=True))
            assert [s.name for s in debug_page.stages] == ["retrieve", "search", "allow", "rank", "rules"]
            assert debug_page.stages[-1].items >= 3
            assert all(s.milliseconds >= 0 for s in debug_page.stages)
