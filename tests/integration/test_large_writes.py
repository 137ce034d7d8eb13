"""Large writes over gRPC do not delay small calls."""

import asyncio
from datetime import timedelta
from typing import Any

import grpc
import pytest
from vitrine.catalog.v1 import event_pb2, served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services.core.errors import StorageFull
from services.ranking.events import event_writer
from services.ranking.events.events import MAX_CALL_ITEMS, MAX_EVENT_ITEMS
from services.ranking.service import RankingService
from services.rpc.proto_conversions import time_to
from services.rpc.server import CHANNEL_OPTIONS
from tests.support.shop_server import NOW, Shop, Stub, purchase, violations

FAILED, RECORDED = event_pb2.EVENT_OUTCOME_CODE_FAILED, event_pb2.EVENT_OUTCOME_CODE_RECORDED


def order(event_id: str, lines: int) -> Any:
    return purchase(event_id, "firm", *(f"part-{n % 1000}" for n in range(lines)))


async def test_small_calls_are_answered_before_a_large_one_that_came_first(all_in_one_stub: Stub) -> None:
    async with grpc.aio.insecure_channel(all_in_one_stub.target, options=CHANNEL_OPTIONS) as channel:
        ranking: Any = ranking_grpc.RankingServiceStub(channel)
        events = [order(f"large-{n}", 500) for n in range(200)]
        large = asyncio.ensure_future(all_in_one_stub.WriteEvents(pb.WriteEventsRequest(events=events)))
        await asyncio.sleep(0)
        small = pb.WriteEventsRequest(events=[purchase("small", "ann", "garden-01")])
        page = served_pb2.ServedPage(request_id="r", served_at=time_to(NOW), visitor_id="v")
        response, _, _ = await asyncio.gather(
            all_in_one_stub.WriteEvents(small),
            all_in_one_stub.DeleteUser(pb.DeleteUserRequest(user_id="nobody")),
            ranking.LogPages(ranking_pb.LogPagesRequest(pages=[page])),
        )
        assert not large.done()
        assert response.outcomes[0].code == RECORDED
        assert {outcome.code for outcome in (await large).outcomes} == {RECORDED}


async def purchases(stub: Stub, user: str) -> int:
    """How many purchases the answers to a person rest on."""
    later = time_to(NOW + timedelta(days=1))
    async with grpc.aio.insecure_channel(stub.target, options=CHANNEL_OPTIONS) as channel:
        ranking: Any = ranking_grpc.RankingServiceStub(channel)
        answer = await ranking.GetUserProfile(ranking_pb.GetUserProfileRequest(user_id=user, as_of=later))
    return sum(activity.items for activity in answer.profile.activity if activity.type == "purchase")


async def test_an_uncommitted_batch_fails_alone(all_in_one: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    record = event_writer.record

    def full(connection: Any, batch: Any) -> Any:
        if any(stamped.event.event_id == "order-3" for stamped in batch):
            raise StorageFull("the disk is full")
        return record(connection, batch)

    monkeypatch.setattr(event_writer, "record", full)
    async with all_in_one.serve() as stub:
        events = [order(f"order-{n}", 500) for n in range(8)]
        answer = await stub.WriteEvents(pb.WriteEventsRequest(events=events))
        codes = [outcome.code for outcome in answer.outcomes]
        assert codes == [FAILED if n in (2, 3) else RECORDED for n in range(8)]
        assert {o.error.code for o in answer.outcomes} == {0, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}
        assert await purchases(stub, "firm") == 6 * 500
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.WriteEvents(pb.WriteEventsRequest(events=events[2:4]))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_duplicate_of_an_unapplied_event_is_detected(
    all_in_one: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with all_in_one.serve() as stub:
        request = pb.WriteEventsRequest(events=[purchase("e", "ann", "garden-01")])
        with monkeypatch.context() as patch:  # as when the first caller leaves after the commit
            patch.setattr(RankingService, "advance", lambda ranking: None)
            await stub.WriteEvents(request)
            assert await purchases(stub, "ann") == 0
        [outcome] = (await stub.WriteEvents(request)).outcomes
        assert outcome.code == event_pb2.EVENT_OUTCOME_CODE_DUPLICATE
        assert await purchases(stub, "ann") == 1


async def test_a_large_order_reads_back_complete(stub: Stub) -> None:
    sizes = [501, MAX_EVENT_ITEMS, MAX_EVENT_ITEMS + 1, 1, MAX_EVENT_ITEMS, MAX_EVENT_ITEMS, MAX_EVENT_ITEMS]
    events = [order(f"order-{n}", size) for n, size in enumerate(sizes)]
    answer = await stub.WriteEvents(pb.WriteEventsRequest(events=events))
    codes = [RECORDED if size <= MAX_EVENT_ITEMS else FAILED for size in sizes]
    assert [outcome.code for outcome in answer.outcomes] == codes
    assert f"has {MAX_EVENT_ITEMS + 1}, at most {MAX_EVENT_ITEMS} are allowed" in str(
        answer.outcomes[2].error
    )
    lines: list[int] = []
    request = pb.ExportUserRequest(user_id="firm", page_size=1000)
    while True:
        page = await stub.ExportUser(request)
        assert sum(len(record.event.items) for record in page.events) <= 20_000
        lines += [len(record.event.items) for record in page.events]
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert lines == [size for size in sizes if size <= MAX_EVENT_ITEMS]
    recommendation = await stub.Recommend(pb.RecommendRequest(user_id="firm", page_size=10))
    assert len(recommendation.items) == 10


async def test_a_call_with_too_many_items_is_refused_completely(all_in_one_stub: Stub) -> None:
    each = MAX_CALL_ITEMS // 100
    events = [order(f"order-{n}", each) for n in range(101)]
    call = all_in_one_stub.WriteEvents(pb.WriteEventsRequest(events=events))
    assert await violations(call) == ["events[100].items"]
    export = await all_in_one_stub.ExportUser(pb.ExportUserRequest(user_id="firm"))
    assert not export.events
