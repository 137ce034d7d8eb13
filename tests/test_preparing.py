"""A newer bundle: its vectors are made beside the calls, and a start on it encodes nothing."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from vitrine.catalog.v1 import item_pb2

from services.wiring import App
from tests.catalogues import item, nearest, next_bundle, picture, prepared, served, upsert
from tests.shops import UNTIL, make_bundle

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_bundle(tmp_path)
    return tmp_path


def test_a_start_on_a_bundle_that_was_prepared_encodes_nothing(root: Path) -> None:
    async def before(app: App, stub: Any, health: Any) -> None:
        photograph = item_pb2.Image(data=picture("red"))
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}", image=photograph) for n in range(700)))
        encoding = app.now.catalogue.encoding
        assert sum(encoding.finished.values()) == 700 + 1
        make_bundle(root, seed=1, until=UNTIL + timedelta(days=1))
        await prepared(health)
        assert await nearest(stub, "zebra 5") == "own-5"
        sequence, done = app.now.view.sequence, sum(encoding._batcher.finished.values())
        await upsert(stub, item("later", "walrus"))
        while sum(encoding._batcher.finished.values()) < done + 2:  # once for each bundle
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)  # its commit
        assert app.now.view.sequence == sequence + 1
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING

    async def after(app: App, stub: Any, health: Any) -> None:
        assert app.bundle.until == UNTIL + timedelta(days=1)
        assert sum(app.now.catalogue.encoding.finished.values()) == 0
        assert await nearest(stub, "zebra 5") == "own-5"
        assert await nearest(stub, "walrus") == "later"

    served(root, before, look_every=0.02, exchange=False)
    served(root, after, look_every=0.02)


def test_an_interrupted_preparation_goes_on_and_a_broken_bundle_changes_nothing(root: Path) -> None:
    async def interrupted(app: App, stub: Any, health: Any) -> None:
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}") for n in range(900)))
        encoding = app.now.catalogue.encoding
        make_bundle(root, seed=1, until=UNTIL + timedelta(days=1))
        while (
            sum(encoding._batcher.finished.values()) <= 900 + 512
        ):  # a page of the next bundle is committed by then
            await asyncio.sleep(0.001)

    async def goes_on(app: App, stub: Any, health: Any) -> None:
        assert app.bundle.until == UNTIL + timedelta(days=1)
        assert app.now.catalogue.encoding.finished["text"] < 900
        assert await nearest(stub, "zebra 5") == "own-5"
        broken = make_bundle(root, seed=2, until=UNTIL + timedelta(days=2))
        (broken / "text" / "encoder.json").write_text("{}")
        while await next_bundle(health) is None:  # until it was looked at
            await asyncio.sleep(0.02)
        for _ in range(10):
            assert await next_bundle(health) == health_pb2.HealthCheckResponse.NOT_SERVING
            await asyncio.sleep(0.05)
        assert await nearest(stub, "zebra 7") == "own-7"

    served(root, interrupted, look_every=0.02, exchange=False)
    served(root, goes_on, look_every=0.02, exchange=False)
