"""Vectors for a new bundle are computed in the background, and a start on it encodes nothing."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from vitrine.catalog.v1 import item_pb2

from tests.support.catalogs import (
    item,
    nearest,
    next_bundle_status,
    png_bytes,
    serve_app,
    upsert,
    wait_for_next_bundle,
)
from tests.support.shops import UNTIL, make_bundle

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_bundle(tmp_path)
    return tmp_path


async def test_a_start_on_a_prepared_bundle_encodes_nothing(root: Path) -> None:
    async with serve_app(root, bundle_poll_seconds=0.02, hot_swap=False) as (app, stub, health):
        photograph = item_pb2.Image(data=png_bytes("red"))
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}", image=photograph) for n in range(700)))
        encoding = app.current.catalog.encoders
        assert sum(encoding.finished.values()) == 700 + 1
        make_bundle(root, seed=1, until=UNTIL + timedelta(days=1))
        await wait_for_next_bundle(health)
        assert await nearest(stub, "zebra 5") == "own-5"
        sequence, encoded_count = app.current.view.sequence, sum(encoding._batcher.finished.values())
        await upsert(stub, item("later", "walrus"))
        while sum(encoding._batcher.finished.values()) < encoded_count + 2:  # once for each bundle
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)  # its commit
        assert app.current.view.sequence == sequence + 1
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
    async with serve_app(root, bundle_poll_seconds=0.02) as (app, stub, _):
        assert app.bundle.until == UNTIL + timedelta(days=1)
        assert sum(app.current.catalog.encoders.finished.values()) == 0
        assert await nearest(stub, "zebra 5") == "own-5"
        assert await nearest(stub, "walrus") == "later"


async def test_an_interrupted_backfill_resumes_and_a_broken_bundle_changes_nothing(root: Path) -> None:
    async with serve_app(root, bundle_poll_seconds=0.02, hot_swap=False) as (app, stub, _):
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}") for n in range(900)))
        encoding = app.current.catalog.encoders
        make_bundle(root, seed=1, until=UNTIL + timedelta(days=1))
        while (
            sum(encoding._batcher.finished.values()) <= 900 + 512
        ):  # a page of the next bundle is committed by then
            await asyncio.sleep(0.001)
    async with serve_app(root, bundle_poll_seconds=0.02, hot_swap=False) as (app, stub, health):
        assert app.bundle.until == UNTIL + timedelta(days=1)
        assert app.current.catalog.encoders.finished["text"] < 900
        assert await nearest(stub, "zebra 5") == "own-5"
        broken = make_bundle(root, seed=2, until=UNTIL + timedelta(days=2))
        (broken / "text" / "encoder.json").write_text("{}")
        while await next_bundle_status(health) is None:  # until it was looked at
            await asyncio.sleep(0.02)
        for _ in range(10):
            assert await next_bundle_status(health) == health_pb2.HealthCheckResponse.NOT_SERVING
            await asyncio.sleep(0.05)
        assert await nearest(stub, "zebra 7") == "own-7"
