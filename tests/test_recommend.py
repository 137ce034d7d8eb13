"""The whole path over real gRPC: all in one process, in three, and with neighbours gone."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from vitrine.catalog.v1 import event_pb2, filter_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.generation import GATEWAY
from services.settings import Settings
from services.wiring import App
from tests.processes import free_port, serving, start_process
from tests.recommending import EVENT, NOW, Shop, ids, only, purchase, session, violations
from tests.shops import PER_WORLD


def test_a_session_decides_the_page_and_every_item_says_where_it_came_from(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
        response = await stub.Recommend(request)
        assert not response.degraded
        assert len(set(ids(response))) == 10
        assert all(i.startswith("garden-") and i != "garden-03" for i in ids(response))
        assert all("graph" in {s.source for s in item.sources} for item in response.items)
        scores = [item.score for item in response.items]
        assert scores == sorted(scores, reverse=True)
        assert response.versions.bundle
        assert response.attribution_token
        stranger = await stub.Recommend(pb.RecommendRequest(page_size=40))
        assert not stranger.degraded
        assert len(set(ids(stranger))) == 40

    shop.run(body)


def test_an_event_changes_the_next_page_and_what_was_bought_is_left_out(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        before = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=20))
        event = purchase("e1", "ann", "kitchen-01", "kitchen-02")
        event.occurred_at.FromDatetime(NOW - timedelta(hours=1))
        written = await stub.WriteEvents(pb.WriteEventsRequest(events=[event]))
        assert written.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_RECORDED
        # The clock stands still, and an event of this very moment is not yet the past.
        again = await stub.WriteEvents(pb.WriteEventsRequest(events=[event]))
        assert again.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_DUPLICATE
        same = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=20))
        assert ids(same) == ids(before)

    shop.run(body)


def test_events_of_a_running_clock_count_at_once(bundle: Path, tmp_path: Path) -> None:
    shop = Shop(bundle, tmp_path / "state", "one", clock=None)

    async def body(stub: Any) -> None:
        await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("e1", "ann", "kitchen-01")]))
        page = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=10))
        assert all(i.startswith("kitchen-") and i != "kitchen-01" for i in ids(page))
        kept = pb.RecommendRequest(user_id="ann", page_size=20, bought_policy=pb.BOUGHT_POLICY_KEEP)
        assert "kitchen-01" in ids(await stub.Recommend(kept))

    shop.run(body)


def test_filters_exclusions_and_deletions_hold_on_the_page(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        request = pb.RecommendRequest(
            session=session("garden-03"),
            page_size=50,
            filter=only("colour", "red"),
            exclude_item_ids=["garden-00", "nobody"],
        )
        await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["garden-02"]))
        got = await stub.ListItems(pb.ListItemsRequest(page_size=1000))
        sequence = max(record.sequence for record in got.items) + 1
        request.min_sequence = sequence
        page = ids(await stub.Recommend(request))
        reds = {f"{w}-{n:02}" for w in ("garden", "kitchen") for n in range(0, PER_WORLD, 2)}
        assert set(page) == reds - {"garden-00", "garden-02"}
        nothing = pb.RecommendRequest(filter=only("colour", "no such colour"))
        assert ids(await stub.Recommend(nothing)) == []

    shop.run(body)


def test_pages_follow_one_another_without_gap_or_repeat(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        whole = ids(await stub.Recommend(pb.RecommendRequest(session=session("garden-03"), page_size=39)))
        request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
        seen: list[str] = []
        while True:
            response = await stub.Recommend(request)
            seen += ids(response)
            if not response.next_page_token:
                break
            request.page_token = response.next_page_token
        assert seen == whole
        assert len(seen) == 39
        request.page_token = (await stub.Recommend(pb.RecommendRequest(page_size=1))).next_page_token
        assert await violations(stub.Recommend(request)) == ["page_token"]

    shop.run(body)


def test_a_new_item_is_found_by_its_text_and_recommended(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        item = item_pb2.Item(id="fresh", title="garden thing 3", price=3)
        item.attributes.add(name="world", texts=["garden"])
        outcome = (await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]))).outcomes[0]
        assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_CREATED
        search = pb.SearchItemsRequest(text="garden thing 3", page_size=5, min_sequence=outcome.sequence)
        assert "fresh" in ids(await stub.SearchItems(search))
        request = pb.RecommendRequest(
            session=session("garden-03"), page_size=100, min_sequence=outcome.sequence
        )
        page = await stub.Recommend(request)
        mine = next(item for item in page.items if item.item_id == "fresh")
        assert {"text", "new"} <= {s.source for s in mine.sources}
        similar = await stub.SimilarItems(pb.SimilarItemsRequest(item_id="fresh", page_size=5))
        assert "fresh" not in ids(similar)
        assert len(ids(similar)) == 5
        assert (await stub.GetItem(pb.GetItemRequest(item_id="fresh"))).item.item.title == "garden thing 3"

    shop.run(body)


def test_one_process_and_three_answer_alike(bundle: Path, tmp_path: Path) -> None:
    requests = [
        pb.RecommendRequest(session=session("garden-03", "kitchen-05"), page_size=30, request_id="r"),
        pb.RecommendRequest(page_size=30, filter=only("world", "garden"), diversity=0.5, request_id="r"),
        pb.RecommendRequest(user_id="nobody", session=session("unknown"), request_id="r"),
    ]
    answers: dict[str, list[Any]] = {}
    for layout in ("one", "three"):

        async def body(stub: Any, layout: str = layout) -> None:
            found = [await stub.Recommend(request, timeout=30) for request in requests]
            assert not any(page.degraded for page in found)
            found.append(await stub.SimilarItems(pb.SimilarItemsRequest(item_id="kitchen-01")))
            found.append(await stub.SearchItems(pb.SearchItemsRequest(text="kitchen thing")))
            found.append(await stub.ListItems(pb.ListItemsRequest(page_size=7)))
            for response in found:
                for name in ("attribution_token", "next_page_token"):
                    if name in response.DESCRIPTOR.fields_by_name:
                        response.ClearField(name)
                for record in response.items:
                    if isinstance(record, item_pb2.ItemRecord):
                        record.ClearField("update_time")
            answers[layout] = found

        Shop(bundle, tmp_path / layout, layout).run(body)
    assert answers["one"] == answers["three"]


def test_a_wrong_request_names_its_field_and_an_unknown_thing_is_not_found(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        wrong = [
            (pb.RecommendRequest(page_size=501), "page_size"),
            (pb.RecommendRequest(page_size=-1), "page_size"),
            (pb.RecommendRequest(user_id="a b"), "user_id"),
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

    shop.run(body)


def test_a_bad_event_fails_alone(shop: Shop) -> None:
    async def body(stub: Any) -> None:
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

    shop.run(body)


def test_with_both_neighbours_never_up_a_page_comes_from_the_bundle(bundle: Path, tmp_path: Path) -> None:
    async def main() -> None:
        gone = f"127.0.0.1:{free_port()}"
        settings = Settings(
            bundle=bundle, state=tmp_path, address="127.0.0.1:0", embedding=gone, ranking=gone, clock=NOW
        )
        app = App(settings, (GATEWAY,))
        await app.start()
        try:
            await serving(app.port, GATEWAY)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
                stub = pb_grpc.RecommendationServiceStub(channel)
                request = pb.RecommendRequest(
                    session=session("garden-00"), filter=only("colour", "red"), exclude_item_ids=["garden-02"]
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

    asyncio.run(main())


@pytest.fixture
def served(bundle: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`vitrine serve` in a process of its own."""
    port = free_port()
    process = start_process(bundle, tmp_path / "state", port)
    yield process, port
    process.kill()
    process.wait()


def test_what_was_acknowledged_survives_a_kill_and_sigterm_drains(
    served: tuple[subprocess.Popen[bytes], int], bundle: Path, tmp_path: Path
) -> None:
    process, port = served

    async def write() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = pb_grpc.RecommendationServiceStub(channel)
            item = item_pb2.Item(id="fresh", title="kitchen thing 1")
            await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]))
            await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("e", "ann", "garden-00")]))

    async def read() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = pb_grpc.RecommendationServiceStub(channel)
            assert (await stub.GetItem(pb.GetItemRequest(item_id="fresh"))).item.item.id == "fresh"
            again = await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("e", "ann", "garden-00")]))
            assert again.outcomes[0].code == event_pb2.EVENT_OUTCOME_CODE_DUPLICATE
            page = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=10))
            assert all(i.startswith("garden-") for i in ids(page))

    asyncio.run(write())
    second = [sys.executable, "-m", "services.cli", "serve", "--bundle", str(bundle)]
    refused = subprocess.run(
        [*second, "--state", str(tmp_path / "state"), "--address", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert refused.returncode == 1
    assert f"is in use by process {process.pid}" in refused.stderr
    process.kill()
    process.wait()
    restarted = start_process(bundle, tmp_path / "state", port)
    try:
        asyncio.run(read())
        restarted.send_signal(signal.SIGTERM)
        assert restarted.wait(60) == 0
    finally:
        restarted.kill()


def test_an_unusable_bundle_is_refused_with_a_reason(bundle: Path, tmp_path: Path) -> None:
    empty = subprocess.run(
        [sys.executable, "-m", "services.cli", "serve", "--bundle", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert empty.returncode == 1
    assert "holds no bundle" in empty.stderr
