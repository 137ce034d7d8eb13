"""The metrics of a served process parse with the Prometheus client."""

import asyncio
from datetime import timedelta
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.core.errors import FailedPrecondition, Unavailable
from services.core.telemetry import Gauge, Telemetry
from tests.support.catalogs import NAME, item, nearest, serve_app, upsert
from tests.support.shops import UNTIL, make_bundle


def read_samples(port: int) -> dict[tuple[str, str], float]:
    """Every sample by its name and its labels' values."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return {
        (sample.name, " ".join(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_calls_encoders_index_and_the_next_bundle_have_metrics(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    async with serve_app(tmp_path, metrics="127.0.0.1:0", bundle_poll_seconds=0.02) as (app, stub, _):

        async def ask() -> dict[tuple[str, str], float]:
            return await asyncio.to_thread(read_samples, app.metrics_port)

        before = await ask()
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}") for n in range(30)))
        assert await nearest(stub, "zebra 3") == "own-3"
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Search(pb.SearchRequest(limit=-1))
        # Of a stream that the caller writes, the server may see only that it ended: such a call may be OK.
        watch = stub.WatchItems(pb.WatchItemsRequest())
        await watch.read()
        watch.cancel()
        while ("vitrine_rpc_duration_seconds_count", f"CANCELLED {NAME}/WatchItems") not in (
            samples := await ask()
        ):
            await asyncio.sleep(0.02)
        calls = {
            labels: n for (name, labels), n in samples.items() if name == "vitrine_rpc_duration_seconds_count"
        }
        assert calls == {
            f"OK {NAME}/UpsertItems": 1,
            f"OK {NAME}/Search": 1,
            f"INVALID_ARGUMENT {NAME}/Search": 1,
            f"CANCELLED {NAME}/WatchItems": 1,
        }
        assert samples["vitrine_encoded_total", "text"] == 31
        items = ("vitrine_index_items", "text")
        assert samples[items] == before[items] + 30
        assert samples["vitrine_catalog_sequence", "searchable"] == app.current.view.sequence
        assert samples["vitrine_encoder_queue_size", "text"] == 0
        assert samples["vitrine_encoder_device", app.device] == 1
        assert samples["vitrine_images_decoded_total", "thread"] == 0
        assert samples["process_resident_memory_bytes", ""] > 0
        make_bundle(tmp_path, seed=1, until=UNTIL + timedelta(days=1))
        while (samples := await ask()).get(("vitrine_next_bundle_contents", "done")) != 30:
            await asyncio.sleep(0.02)
        assert samples["vitrine_next_bundle_contents", "left"] == 0


def test_a_failing_metric_does_not_hide_the_others() -> None:
    def away() -> dict[str, float]:
        raise Unavailable("gone for lunch")

    telemetry = Telemetry()
    telemetry.add(Gauge("vitrine_a", "", "of", away), Gauge("vitrine_b", "", "of", lambda: {"x": 2}))
    port, close = telemetry.serve("127.0.0.1:0")
    try:
        samples = read_samples(port)
        assert samples["vitrine_b", "x"] == 2
        assert not [name for name, _ in samples if name == "vitrine_a"]
        for address in (f"127.0.0.1:{port}", "nowhere.invalid:1", "127.0.0.1:x"):
            with pytest.raises(FailedPrecondition, match="metrics cannot be served"):
                Telemetry().serve(address)
    finally:
        close()
