"""A small shop behind real gRPC, in one process' worth of services or in three, and words to ask it with."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from vitrine.catalog.v1 import event_pb2, filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.generation import ALL, EMBEDDING, GATEWAY, RANKING
from services.server import CHANNEL_OPTIONS
from services.settings import Settings
from services.wiring import App
from tests.processes import serving
from tests.shops import UNTIL

NOW = UNTIL + timedelta(hours=12)
EVENT = event_pb2.Event
Body = Callable[[Any], Awaitable[None]]
HALVES = """
[garden]
filter = { equals = { attribute = "world", text = "garden" } }
[kitchen]
filter = { equals = { attribute = "world", text = "kitchen" } }
[experiments.worlds]
scenario = "home"
"""
SPLIT = HALVES + 'arms = [{ name = "a", scenario = "garden" }, { name = "b", scenario = "kitchen" }]\n'


class Shop:
    """Runs bodies against one state, hosted in one process' worth of services or in three."""

    def __init__(self, bundle: Path, state: Path, layout: str, clock: datetime | None = NOW) -> None:
        self._bundle, self._state, self.layout, self._clock = bundle, state, layout, clock

    def settings(self, **more: Any) -> Settings:
        base: dict[str, Any] = {"bundle": self._bundle, "state": self._state, "address": "127.0.0.1:0"}
        return Settings(**(base | {"clock": self._clock} | more))

    def run(self, body: Body, **more: Any) -> None:
        """Start, let the body ask, stop; `more` are settings of whoever has the gateway."""
        asyncio.run(self._run(body, more))

    async def _run(self, body: Body, gateway: dict[str, Any]) -> None:
        async with AsyncExitStack() as stack:

            async def start(hosted: tuple[str, ...], **more: Any) -> App:
                app = App(self.settings(**more), hosted)
                stack.push_async_callback(app.stop)
                await app.start()
                return app

            if self.layout == "one":
                app = await start(ALL, **gateway)
            else:
                embedding = f"127.0.0.1:{(await start((EMBEDDING,))).port}"
                ranking_app = await start((RANKING,), embedding=embedding)
                await serving(ranking_app.port, RANKING)
                ranking = f"127.0.0.1:{ranking_app.port}"
                app = await start((GATEWAY,), **({"embedding": embedding, "ranking": ranking} | gateway))
            target = f"127.0.0.1:{app.port}"
            channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            stack.push_async_callback(channel.close)
            stub: Any = pb_grpc.RecommendationServiceStub(channel)
            stub.target = target
            await body(stub)


def session(*ids: str) -> list[event_pb2.SessionItem]:
    return [event_pb2.SessionItem(item_id=i) for i in ids]


def ids(response: Any) -> list[str]:
    return [item.item_id for item in response.items]


def purchase(event_id: str, user: str, *items: str, kind: str = "purchase") -> Any:
    wanted = [event_pb2.EventItem(item_id=i) for i in items]
    return EVENT(event_id=event_id, user_id=user, type=kind, items=wanted)


def only(attribute: str, text: str) -> filter_pb2.Filter:
    return filter_pb2.Filter(equals=filter_pb2.Equals(attribute=attribute, text=text))


async def violations(call: Awaitable[Any]) -> list[str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    details = rpc_status.from_call(caught.value).details
    return [v.field for d in details if d.Unpack(bad) for v in bad.field_violations]


def knows(state: Path, text: bytes) -> bool:
    """Whether any file of a state directory holds a text, deleted rows included."""
    return any(text in path.read_bytes() for path in state.rglob("*") if path.is_file())
