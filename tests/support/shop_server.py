"""Serves a small shop over gRPC, from one app or from three, with helpers that build requests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from vitrine.catalog.v1 import event_pb2, filter_pb2, served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.rpc.server import CHANNEL_OPTIONS
from services.serving.app import App
from services.serving.loaded_bundle import ALL, EMBEDDING, GATEWAY, RANKING
from services.serving.settings import Settings
from tests.support.processes import wait_until_serving
from tests.support.shops import UNTIL

NOW = UNTIL + timedelta(hours=12)
EVENT = event_pb2.Event
TWO_SCENARIOS = """
[garden]
filter = { equals = { attribute = "world", text = "garden" } }
[kitchen]
filter = { equals = { attribute = "world", text = "kitchen" } }
[experiments.worlds]
scenario = "home"
"""
AB_EXPERIMENT = (
    TWO_SCENARIOS + 'arms = [{ name = "a", scenario = "garden" }, { name = "b", scenario = "kitchen" }]\n'
)

if TYPE_CHECKING:
    _AsyncStub = pb_grpc.RecommendationServiceAsyncStub
else:
    _AsyncStub = pb_grpc.RecommendationServiceStub  # the generated code has the async class as a type only


class Stub(_AsyncStub):
    """A client of the gateway; `target` is the address that it calls."""

    def __init__(self, channel: grpc.aio.Channel, target: str) -> None:
        super().__init__(channel)
        self.target = target


class Shop:
    """A bundle and a state, served by one app with all services or by three apps."""

    def __init__(self, bundle: Path, state: Path, layout: str, clock: datetime | None = NOW) -> None:
        self._bundle, self._state, self.layout, self._clock = bundle, state, layout, clock

    def settings(self, **more: Any) -> Settings:
        base: dict[str, Any] = {"bundle": self._bundle, "state": self._state, "address": "127.0.0.1:0"}
        return Settings(**(base | {"fixed_time": self._clock} | more))

    @asynccontextmanager
    async def serve(self, **more: Any) -> AsyncIterator[Stub]:
        """Start the services, yield a stub, stop them.

        `more` are settings of the app with the gateway; its clock is that of all.

        A later call serves the same state again, as after a restart.
        """
        async with AsyncExitStack() as stack:

            async def start(hosted: tuple[str, ...], **settings: Any) -> App:
                app = App(self.settings(**settings), hosted)
                stack.push_async_callback(app.stop)
                await app.start()
                return app

            if self.layout == "one":
                app = await start(ALL, **more)
            else:
                clock = {name: value for name, value in more.items() if name == "fixed_time"}
                embedding = f"127.0.0.1:{(await start((EMBEDDING,), **clock)).port}"
                ranking_app = await start((RANKING,), embedding=embedding, **clock)
                await wait_until_serving(ranking_app.port, RANKING)
                ranking = f"127.0.0.1:{ranking_app.port}"
                app = await start((GATEWAY,), **({"embedding": embedding, "ranking": ranking} | more))
            target = f"127.0.0.1:{app.port}"
            channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            stack.push_async_callback(channel.close)
            yield Stub(channel, target)


def session(*ids: str) -> list[event_pb2.SessionItem]:
    return [event_pb2.SessionItem(item_id=i) for i in ids]


def ids(response: Any) -> list[str]:
    return [item.item_id for item in response.items]


def purchase(event_id: str, user: str, *items: str, kind: str = "purchase") -> Any:
    event_items = [event_pb2.EventItem(item_id=i) for i in items]
    return EVENT(event_id=event_id, user_id=user, type=kind, items=event_items)


def equals_filter(attribute: str, text: str) -> filter_pb2.Filter:
    return filter_pb2.Filter(equals=filter_pb2.Equals(attribute=attribute, text=text))


async def violations(call: Awaitable[Any]) -> list[str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    details = rpc_status.from_call(caught.value).details
    return [v.field for d in details if d.Unpack(bad) for v in bad.field_violations]


async def logged_pages(stub: Stub, count: int, user_id: str) -> list[served_pb2.ServedPage]:
    """The pages of a user, once the log has at least `count`: it is written in the background."""
    async with asyncio.timeout(60):
        while True:
            pages = (await stub.ExportUser(pb.ExportUserRequest(user_id=user_id))).pages
            if len(pages) >= count:
                return list(pages)
            await asyncio.sleep(0.05)


def contains_text(state: Path, text: bytes) -> bool:
    """Whether any file of a state directory contains a text, deleted rows included."""
    return any(text in path.read_bytes() for path in state.rglob("*") if path.is_file())
