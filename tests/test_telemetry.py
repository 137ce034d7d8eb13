"""What Prometheus reads of a served process, over HTTP, by Prometheus' own parser."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.errors import FailedPrecondition, Unavailable
from services.telemetry import Reading, Telemetry
from services.wiring import App
from tests.catalogues import NAME, item, nearest, served, upsert
from tests.shops import UNTIL, make_bundle


def told(port: int) -> dict[tuple[str, str], float]:
    """Every sample by its name and its labels' values."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return {
        (sample.name, " ".join(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_calls_encoders_index_and_the_next_bundle_are_told(tmp_path: Path) -> None:
    make_bundle(tmp_path)

    async def body(app: App, stub: Any, health: Any) -> None:
        async def ask() -> dict[tuple[str, str], float]:
            return await asyncio.to_thread(told, app.metrics_port)

        before = await ask()
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}") for n in range(30)))
        assert await nearest(stub, "zebra 3") == "own-3"
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Search(pb.SearchRequest(limit=-1))
        # Of a stream that the caller writes, the server may see only that it ended: such a call may be OK.
        hung = stub.WatchItems(pb.WatchItemsRequest())
        await hung.read()
        hung.cancel()
        while ("vitrine_call_seconds_count", f"CANCELLED {NAME}/WatchItems") not in (found := await ask()):
            await asyncio.sleep(0.02)
        calls = {labels: n for (name, labels), n in found.items() if name == "vitrine_call_seconds_count"}
        assert calls == {
            f"OK {NAME}/UpsertItems": 1,
            f"OK {NAME}/Search": 1,
            f"INVALID_ARGUMENT {NAME}/Search": 1,
            f"CANCELLED {NAME}/WatchItems": 1,
        }
        assert found["vitrine_encoded_total", "text"] == 31
        items = ("vitrine_index_items", "text")
        assert found[items] == before[items] + 30
        assert found["vitrine_catalogue_sequence", "searchable"] == app.now.view.sequence
        assert found["vitrine_encoding_waiting", "text"] == 0
        assert found["process_resident_memory_bytes", ""] > 0
        make_bundle(tmp_path, seed=1, until=UNTIL + timedelta(days=1))
        while (found := await ask()).get(("vitrine_next_bundle_contents", "done")) != 30:
            await asyncio.sleep(0.02)
        assert found["vitrine_next_bundle_contents", "left"] == 0

    served(tmp_path, body, metrics="127.0.0.1:0", look_every=0.02)


def test_a_figure_that_cannot_be_read_does_not_hide_the_others() -> None:
    def away() -> dict[str, float]:
        raise Unavailable("gone for lunch")

    telemetry = Telemetry()
    telemetry.add(Reading("vitrine_a", "", "of", away), Reading("vitrine_b", "", "of", lambda: {"x": 2}))
    port, close = telemetry.serve("127.0.0.1:0")
    try:
        found = told(port)
        assert found["vitrine_b", "x"] == 2
        assert not [name for name, _ in found if name == "vitrine_a"]
        for address in (f"127.0.0.1:{port}", "nowhere.invalid:1", "127.0.0.1:x"):
            with pytest.raises(FailedPrecondition, match="metrics cannot be served"):
                Telemetry().serve(address)
    finally:
        close()
