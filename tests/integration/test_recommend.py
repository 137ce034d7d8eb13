"""Recommendations work over real gRPC with one process, with three, and without backends."""

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from vitrine.catalog.v1 import event_pb2, filter_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.catalog.bundle import Bundle
from services.catalog.items import item_hash
from services.serving.app import App
from services.serving.loaded_bundle import GATEWAY
from services.serving.settings import Settings
from tests.support.processes import free_port, running_process, wait_until_serving
from tests.support.shop_server import (
    EVENT,
    NOW,
    Shop,
    Stub,
    equals_filter,
    ids,
    purchase,
    session,
    violations,
)
from tests.support.shops import PER_WORLD


async def test_a_session_determines_the_page_and_every_item_lists_its_sources(stub: Stub) -> None:
    request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
    response = await stub.Recommend(request)
    assert not response.degraded
    assert len(set(ids(response))) == 10
    assert all(i.startswith("garden-") and i != "garden-03" for i in ids(response))
    assert all("co_occurrence" in {s.source for s in item.sources} for item in response.items)
    scores = [item.score for item in response.items]
    assert scores == sorted(scores, reverse=True)
    assert response.versions.bundle
    assert response.attribution_token
    anonymous = await stub.Recommend(pb.RecommendRequest(page_size=40))
    assert not anonymous.degraded
    assert len(set(ids(anonymous))) == 40


async def test_an_event_changes_the_next_page_and_purchased_items_are_excluded(stub: Stub) -> None:
    before = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=20))
    event = purchase("e1", "ann", "kitchen-01", "kitchen-02")
    event.occurred_at.FromDatetime(NOW - timedelta(hours=1))
    response = await stub.WriteEvents(pb.WriteEventsRequest(events=[event]))
    assert response.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_RECORDED
    # The clock stands still, and an event of this very moment is not yet the past.
    again = await stub.WriteEvents(pb.WriteEventsRequest(events=[event]))
    assert again.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_DUPLICATE
    same = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=20))
    assert ids(same) == ids(before)


async def test_events_of_a_running_clock_count_at_once(bundle: Path, tmp_path: Path) -> None:
    shop = Shop(bundle, tmp_path / "state", "one", clock=None)
    async with shop.serve() as stub:
        await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("e1", "ann", "kitchen-01")]))
        page = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=10))
        assert all(i.startswith("kitchen-") and i != "kitchen-01" for i in ids(page))
        request = pb.RecommendRequest(
            user_id="ann", page_size=20, purchased_items_policy=pb.PURCHASED_ITEMS_POLICY_KEEP
        )
        assert "kitchen-01" in ids(await stub.Recommend(request))


async def test_filters_exclusions_and_deletions_apply_to_the_page(stub: Stub) -> None:
    request = pb.RecommendRequest(
        session=session("garden-03"),
        page_size=50,
        filter=equals_filter("colour", "red"),
        exclude_item_ids=["garden-00", "nobody"],
    )
    await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["garden-02"]))
    catalog = await stub.ListItems(pb.ListItemsRequest(page_size=1000))
    sequence = max(record.sequence for record in catalog.items) + 1
    request.min_sequence = sequence
    page = ids(await stub.Recommend(request))
    reds = {f"{w}-{n:02}" for w in ("garden", "kitchen") for n in range(0, PER_WORLD, 2)}
    assert set(page) == reds - {"garden-00", "garden-02"}
    nothing = pb.RecommendRequest(filter=equals_filter("colour", "no such colour"))
    assert ids(await stub.Recommend(nothing)) == []


async def test_pages_continue_without_gaps_or_repeats(stub: Stub) -> None:
    whole = ids(await stub.Recommend(pb.RecommendRequest(session=session("garden-03"), page_size=39)))
    request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
    item_ids: list[str] = []
    while True:
        response = await stub.Recommend(request)
        item_ids += ids(response)
        if not response.next_page_token:
            break
        request.page_token = response.next_page_token
    assert item_ids == whole
    assert len(item_ids) == 39
    request.page_token = (await stub.Recommend(pb.RecommendRequest(page_size=1))).next_page_token
    assert await violations(stub.Recommend(request)) == ["page_token"]


async def test_a_new_item_is_found_by_its_text_and_recommended(stub: Stub) -> None:
    item = item_pb2.Item(id="fresh", title="garden thing 3", price=3)
    item.attributes.add(name="world", texts=["garden"])
    outcome = (await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]))).outcomes[0]
    assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_CREATED
    search = pb.SearchItemsRequest(text="garden thing 3", page_size=5, min_sequence=outcome.sequence)
    assert "fresh" in ids(await stub.SearchItems(search))
    request = pb.RecommendRequest(session=session("garden-03"), page_size=100, min_sequence=outcome.sequence)
    page = await stub.Recommend(request)
    fresh = next(item for item in page.items if item.item_id == "fresh")
    assert {"text", "new_arrivals"} <= {s.source for s in fresh.sources}
    similar = await stub.SimilarItems(pb.SimilarItemsRequest(item_id="fresh", page_size=5))
    assert "fresh" not in ids(similar)
    assert len(ids(similar)) == 5
    assert (await stub.GetItem(pb.GetItemRequest(item_id="fresh"))).item.item.title == "garden thing 3"


async def test_one_process_and_three_give_the_same_answers(bundle: Path, tmp_path: Path) -> None:
    requests = [
        pb.RecommendRequest(session=session("garden-03", "kitchen-05"), page_size=30, request_id="r"),
        pb.RecommendRequest(
            page_size=30, filter=equals_filter("world", "garden"), diversity=0.5, request_id="r"
        ),
        pb.RecommendRequest(user_id="nobody", session=session("unknown"), request_id="r"),
    ]
    answers: dict[str, list[Any]] = {}
    for layout in ("one", "three"):
        async with Shop(bundle, tmp_path / layout, layout).serve() as stub:
            responses: list[Any] = [await stub.Recommend(request, timeout=30) for request in requests]
            assert not any(page.degraded for page in responses)
            responses.append(await stub.SimilarItems(pb.SimilarItemsRequest(item_id="kitchen-01")))
            responses.append(await stub.SearchItems(pb.SearchItemsRequest(text="kitchen thing")))
            responses.append(await stub.ListItems(pb.ListItemsRequest(page_size=7)))
        for response in responses:
            for name in ("attribution_token", "next_page_token"):
                if name in response.DESCRIPTOR.fields_by_name:
                    response.ClearField(name)
            for record in response.items:
                if isinstance(record, item_pb2.ItemRecord):
                    record.ClearField("update_time")
        answers[layout] = responses
    assert answers["one"] == answers["three"]


async def test_an_invalid_request_names_its_field_and_an_unknown_id_is_not_found(stub: Stub) -> None:
    wrong = [
        (pb.RecommendRequest(page_size=501), "page_size"),
        (pb.RecommendRequest(page_size=-1), "page_size"),
        (pb.RecommendRequest(user_id="a\tb"), "user_id"),
        (pb.RecommendRequest(page_token="x"), "page_token"),
        (pb.RecommendRequest(session=session("")), "session[0].item_id"),
        (pb.RecommendRequest(session=session(*["a"] * 201)), "session"),
        (pb.RecommendRequest(filter=filter_pb2.Filter()), "filter"),
        (pb.RecommendRequest(diversity=2), "diversity"),
        (pb.RecommendRequest(exclude_item_ids=["a"] * 10_001), "exclude_item_ids"),
        (
            pb.RecommendRequest(session=[event_pb2.SessionItem(item_id="a", type="hug")]),
            "session[0].type",
        ),
    ]
    for request, field in wrong:
        assert await violations(stub.Recommend(request)) == [field]
    assert await violations(stub.SearchItems(pb.SearchItemsRequest())) == ["text"]
    assert await violations(stub.SearchItems(pb.SearchItemsRequest(image=b"x"))) == ["image"]
    assert await violations(stub.WriteEvents(pb.WriteEventsRequest())) == ["events"]
    for call in (
        stub.Recommend(pb.RecommendRequest(scenario="nowhere")),
        stub.SimilarItems(pb.SimilarItemsRequest(item_id="nobody")),
        stub.GetItem(pb.GetItemRequest(item_id="nobody")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_bad_event_fails_alone(stub: Stub) -> None:
    late = purchase("late", "ann", "garden-00")
    late.occurred_at.FromDatetime(NOW + timedelta(days=3))
    events = [
        purchase("good", "ann", "garden-00"),
        EVENT(),
        purchase("kind", "ann", "garden-00", kind="hug"),
        late,
        purchase("good", "ann", "garden-01"),
        purchase("last", "ann", "not-yet-written"),
    ]
    outcomes = (await stub.WriteEvents(pb.WriteEventsRequest(events=events))).outcomes
    assert [o.error.code for o in outcomes] == [0, 3, 3, 3, 6, 0]
    assert "events[3].occurred_at" in outcomes[3].error.message


async def test_viewed_items_can_be_excluded(shop: Shop, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text('[fresh]\nviewed_items_policy = "VIEWED_ITEMS_POLICY_EXCLUDE"\n')
    viewed_ids = ["garden-01", "garden-02", "kitchen-03"]
    async with Shop(bundle, tmp_path / "state", "one", clock=NOW - timedelta(hours=1)).serve() as stub:
        events = [purchase(f"e{n}", "ann", i, kind="click") for n, i in enumerate(viewed_ids)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=events))
    async with shop.serve(scenarios=file) as stub:

        async def page(**more: Any) -> list[str]:
            return ids(await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=40, **more)))

        exclude, keep = pb.VIEWED_ITEMS_POLICY_EXCLUDE, pb.VIEWED_ITEMS_POLICY_KEEP
        assert set(viewed_ids) <= set(await page())
        for fresh in (await page(scenario="fresh"), await page(viewed_items_policy=exclude)):
            assert len(fresh) == 37
            assert not set(viewed_ids) & set(fresh)
        assert set(viewed_ids) <= set(await page(scenario="fresh", viewed_items_policy=keep))
        item_ids = [*viewed_ids, "garden-05"]
        assert set(await page(scenario="fresh", item_ids=item_ids)) == set(item_ids)
        assert await page(item_ids=item_ids, viewed_items_policy=exclude) == ["garden-05"]
        request = pb.RecommendRequest(user_id="ann", scenario="fresh")
        why = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=viewed_ids[0]))
        assert why.item_status == pb.ITEM_STATUS_VIEWED


async def test_context_items_count_as_the_latest_of_the_session(stub: Stub) -> None:
    by_session = pb.RecommendRequest(session=session("garden-03", "kitchen-04"))
    by_context = pb.RecommendRequest(session=session("garden-03"), context_item_ids=["kitchen-04"])
    assert ids(await stub.Recommend(by_session)) == ids(await stub.Recommend(by_context))


async def test_the_popular_scenario_orders_by_popularity_for_every_user(bundle: Path, stub: Stub) -> None:
    numbers = np.load(Bundle(bundle).directory / "popular" / "numbers.npy").tolist()
    anonymous = pb.RecommendRequest(scenario="popular", page_size=15)
    by_user = pb.RecommendRequest(
        scenario="popular", page_size=15, user_id="ann", session=session("garden-03")
    )
    for request in (anonymous, by_user):
        page = await stub.Recommend(request)
        expected = [n for n in numbers if request is anonymous or n != item_hash("garden-03")]
        assert [item_hash(i) for i in ids(page)] == expected[:15]


async def test_without_both_backends_a_page_comes_from_the_bundle(bundle: Path, tmp_path: Path) -> None:
    unused_address = f"127.0.0.1:{free_port()}"
    settings = Settings(
        bundle=bundle,
        state=tmp_path,
        address="127.0.0.1:0",
        embedding=unused_address,
        ranking=unused_address,
        fixed_time=NOW,
    )
    app = App(settings, (GATEWAY,))
    await app.start()
    try:
        await wait_until_serving(app.port, GATEWAY)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            stub = pb_grpc.RecommendationServiceStub(channel)
            request = pb.RecommendRequest(
                session=session("garden-00"),
                filter=equals_filter("colour", "red"),
                exclude_item_ids=["garden-02"],
            )
            response = await stub.Recommend(request, timeout=20)
            assert len(ids(response)) == PER_WORLD - 2
            assert {"garden-00", "garden-02"}.isdisjoint(ids(response))
            assert {d.stage for d in response.degraded} == {"retrieve", "search"}
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.WriteEvents(
                    pb.WriteEventsRequest(events=[purchase("e", "ann", "garden-00")]), timeout=20
                )
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await app.stop()


async def test_acknowledged_writes_survive_a_kill_and_sigterm_drains(bundle: Path, tmp_path: Path) -> None:
    port, state = free_port(), tmp_path / "state"
    item = item_pb2.Item(id="fresh", title="kitchen thing 1")
    events = pb.WriteEventsRequest(events=[purchase("e", "ann", "garden-00")])
    async with running_process(bundle, state, port) as process:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = pb_grpc.RecommendationServiceStub(channel)
            await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]))
            await stub.WriteEvents(events)
        command = [sys.executable, "-m", "cli.main", "serve", "--bundle", str(bundle)]
        second = subprocess.run(
            [*command, "--state", str(state), "--address", "127.0.0.1:0"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert second.returncode == 1
        assert f"is in use by process {process.pid}" in second.stderr
        process.kill()
        process.wait()
    async with running_process(bundle, state, port) as restart:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = pb_grpc.RecommendationServiceStub(channel)
            assert (await stub.GetItem(pb.GetItemRequest(item_id="fresh"))).item.item.id == "fresh"
            again = await stub.WriteEvents(events)
            assert again.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_DUPLICATE
            page = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=10))
            assert all(i.startswith("garden-") for i in ids(page))
        restart.send_signal(signal.SIGTERM)
        assert restart.wait(60) == 0


def test_an_unusable_bundle_is_refused_with_a_reason(bundle: Path, tmp_path: Path) -> None:
    empty = subprocess.run(
        [sys.executable, "-m", "cli.main", "serve", "--bundle", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert empty.returncode == 1
    assert "contains no bundle" in empty.stderr
