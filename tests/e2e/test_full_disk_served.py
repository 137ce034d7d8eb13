"""A server whose disk fills up refuses writes by name and continues to serve reads."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from vitrine.catalog.v1 import event_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.rpc.server import CHANNEL_OPTIONS
from services.serving.app import NAMES, WRITES
from services.serving.loaded_bundle import EMBEDDING, RANKING
from tests.support.disks import SmallDisk, page_limit, small_disk
from tests.support.processes import free_port, running_process
from tests.support.shop_server import Shop

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_FAILED = item_pb2.ITEM_OUTCOME_CODE_FAILED
_RECORDED = event_pb2.EVENT_OUTCOME_CODE_RECORDED


class AcknowledgedWrites:
    """What a server acknowledged, and how often it refused."""

    def __init__(self) -> None:
        self.items: set[str] = set()
        self.events: set[str] = set()
        self.refusals = 0

    async def items_of(self, stub: Any, name: str, count: int, size: int) -> None:
        items = [
            item_pb2.Item(id=f"{name}-{n}", title=f"thing {n}", description="word " * (size // 5))
            for n in range(count)
        ]
        try:
            response = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
        except grpc.aio.AioRpcError as error:
            self._count_refusal(error)
            return
        for outcome in response.outcomes:
            if outcome.code == _FAILED:
                assert outcome.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                self.refusals += 1
            else:
                self.items.add(outcome.item_id)

    async def events_of(self, stub: Any, name: str, count: int, items: int) -> None:
        event_items = [event_pb2.EventItem(item_id=f"garden-{n % 20:02}") for n in range(items)]
        events = [
            event_pb2.Event(event_id=f"{name}-{n}", user_id="ann", type="click", items=event_items)
            for n in range(count)
        ]
        try:
            response = await stub.WriteEvents(pb.WriteEventsRequest(events=events))
        except grpc.aio.AioRpcError as error:
            self._count_refusal(error)
            return
        for event, outcome in zip(events, response.outcomes, strict=True):
            if outcome.code == _RECORDED:
                self.events.add(event.event_id)
            else:
                assert outcome.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                self.refusals += 1

    def _count_refusal(self, error: grpc.aio.AioRpcError) -> None:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
        info = error_details_pb2.ErrorInfo()
        assert [info.reason for d in rpc_status.from_call(error).details if d.Unpack(info)] == ["StorageFull"]
        assert "is full" in (error.details() or "")
        self.refusals += 1

    async def check(self, stub: Any) -> None:
        """All that was acknowledged is there."""
        item_ids, token = set(), ""
        while True:
            page = await stub.ListItems(pb.ListItemsRequest(page_size=1000, page_token=token))
            item_ids |= {record.item.id for record in page.items}
            if not (token := page.next_page_token):
                break
        assert self.items <= item_ids
        event_ids, token = set(), ""
        while True:
            user = await stub.ExportUser(
                pb.ExportUserRequest(user_id="ann", page_size=1000, page_token=token)
            )
            event_ids |= {record.event.event_id for record in user.events}
            if not (token := user.next_page_token):
                break
        assert self.events <= event_ids


async def _health(target: str, name: str) -> Any:
    async with grpc.aio.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


async def _until(target: str, name: str, status: Any) -> None:
    async with asyncio.timeout(60):
        while await _health(target, name) != status:
            await asyncio.sleep(0.1)


async def _fill(stub: Any, writes: AcknowledgedWrites, name: str) -> None:
    """Write until items and events are both refused."""
    for n in range(400):
        before = writes.refusals
        await writes.items_of(stub, f"{name}-{n}", 10, 20_000)
        if writes.refusals > before:
            break
    for n in range(400):
        before = writes.refusals
        await writes.events_of(stub, f"{name}-{n}", 20, 100)
        if writes.refusals > before:
            return
    raise AssertionError("never full")


async def test_every_write_names_a_full_disk_and_reads_continue(shop: Shop) -> None:
    writes = AcknowledgedWrites()
    with page_limit() as limit:
        limit.pages = 400
        async with shop.serve() as stub, asyncio.timeout(100):
            await _fill(stub, writes, "first")
            assert writes.refusals
            large = item_pb2.Item(id="large", title="thing", description="w " * 500_000)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[large]))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len((await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=5))).items) == 5
            hits = await stub.SearchItems(pb.SearchItemsRequest(text="garden thing"))
            assert hits.items
            await writes.check(stub)
    async with shop.serve() as stub:
        await writes.check(stub)


async def test_a_process_survives_a_full_disk(bundle: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 12) as disk:
        writes, port = AcknowledgedWrites(), free_port()
        async with running_process(bundle, disk.path / "state", port) as process:
            await _fills_and_comes_back(f"127.0.0.1:{port}", disk, writes)
            process.send_signal(signal.SIGTERM)  # in the middle of it: full again
            assert process.wait(60) == 0
        disk.resize(200)
        async with running_process(bundle, disk.path / "state", port):
            await _with_stub(f"127.0.0.1:{port}", writes)


async def _with_stub(target: str, writes: AcknowledgedWrites) -> None:
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        stub: Any = pb_grpc.RecommendationServiceStub(channel)
        await writes.check(stub)
        await writes.items_of(stub, "last", 5, 5_000)
        assert "last-0" in writes.items


async def _fills_and_comes_back(target: str, disk: SmallDisk, writes: AcknowledgedWrites) -> None:
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        stub: Any = pb_grpc.RecommendationServiceStub(channel)
        await _fill(stub, writes, "first")
        for service in (EMBEDDING, RANKING):
            await _until(target, WRITES.format(NAMES[service]), NOT_SERVING)
            assert await _health(target, NAMES[service]) == SERVING
        assert await _health(target, "") == SERVING
        assert (await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=5))).items
        await writes.check(stub)
        disk.resize(24)
        for service in (EMBEDDING, RANKING):
            await _until(target, WRITES.format(NAMES[service]), SERVING)
        before = len(writes.items), len(writes.events), writes.refusals
        await writes.items_of(stub, "back", 5, 5_000)
        await writes.events_of(stub, "back", 5, 10)
        assert (len(writes.items), len(writes.events), writes.refusals) == (
            before[0] + 5,
            before[1] + 5,
            before[2],
        )
        await _fill(stub, writes, "second")
