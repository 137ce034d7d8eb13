"""A served catalog is searched by the backend of the settings, and its recall is a metric."""

import asyncio
from pathlib import Path

import faiss
import pytest

from services.core.errors import FailedPrecondition
from services.embedding.index import gpu_flat
from services.embedding.index.gpu_flat import GpuBuilder
from services.embedding.index.segmented_index import SegmentedIndex
from tests.integration.test_telemetry import read_samples
from tests.support.catalogs import item, nearest, serve_app, upsert
from tests.support.shops import make_bundle


async def test_a_catalog_is_searched_by_torch_and_has_a_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_flat, "LARGE_ROWS", 20)
    make_bundle(tmp_path)
    settings = {"metrics": "127.0.0.1:0", "index_backend": "torch", "device": "cpu"}
    async with serve_app(tmp_path, **settings) as (app, stub, _):
        await upsert(stub, *(item(f"own-{n}", f"zebra {n}") for n in range(30)))
        assert await nearest(stub, "zebra 3") == "own-3"
        index = app.current.view.spaces["text"]
        assert isinstance(index, SegmentedIndex)
        assert isinstance(index._build, GpuBuilder)
        while ("vitrine_index_recall", "text") not in (
            samples := await asyncio.to_thread(read_samples, app.metrics_port)
        ):
            await asyncio.sleep(0.05)
        assert samples["vitrine_index_recall", "text"] == 1


async def test_a_server_without_a_gpu_refuses_faiss_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE AVX2")
    make_bundle(tmp_path)
    with pytest.raises(FailedPrecondition, match="--index-backend faiss-gpu"):
        async with serve_app(tmp_path, index_backend="faiss-gpu", device="cpu"):
            raise AssertionError("it serves")
