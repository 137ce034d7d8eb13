"""The setting `index_backend`: which index it gives, and what it says where something is missing."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, get_args

import faiss
import numpy as np
import pytest

from services.core.errors import FailedPrecondition, InvalidArgument
from services.embedding.index import backends, placement
from services.embedding.index.builder import Builder
from services.embedding.index.device_segment import DeviceBuilder
from services.embedding.index.gpu_flat import GpuBuilder
from services.embedding.index.segmented_index import SegmentedIndex
from services.serving.settings import Settings, settings_of

_SPACE = backends.VectorSpace("text", "digest", 16, lambda hashes: {})


def options(tmp_path: Path, **changes: Any) -> backends.IndexOptions:
    defaults: dict[str, Any] = {
        "backend": "auto",
        "device": "cpu",
        "directory": tmp_path,
        "storage": "fp16",
        "hnsw_min_items": 200_000,
        "exact": False,
        "milvus": "",
        "milvus_token": "",
    }
    return backends.IndexOptions(**(defaults | changes))


def build_of(options: backends.IndexOptions) -> Any:
    indexes, close = backends.make_indexes(options, "store", [_SPACE])
    close()
    index = indexes["text"]
    assert isinstance(index, SegmentedIndex)
    return index._build


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAISS looks as if it were built for GPUs, and saw one."""
    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE GPU NVIDIA_CUVS")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)


def test_every_value_of_the_setting_is_a_backend() -> None:
    setting = Settings.model_fields["index_backend"].annotation
    assert get_args(setting) == get_args(backends.Backend)


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "faiss-cpu"),
        ({"device": "cuda"}, "torch"),
        ({"device": "cuda:1"}, "torch"),
        ({"device": "cuda", "milvus": "http://m:1"}, "milvus"),
        ({"device": "cuda", "backend": "faiss-cpu"}, "faiss-cpu"),
        ({"backend": "torch"}, "torch"),
        ({"backend": "milvus", "milvus": "http://m:1"}, "milvus"),
    ],
)
def test_auto_takes_what_is_fastest_on_the_device(
    tmp_path: Path, changes: dict[str, Any], backend: str
) -> None:
    assert backends.resolve(options(tmp_path, **changes)) == backend


def test_each_backend_builds_its_segments(tmp_path: Path, gpu_build: None) -> None:
    assert isinstance(build_of(options(tmp_path)), Builder)
    assert isinstance(build_of(options(tmp_path, backend="torch")), GpuBuilder)
    by_storage = {}
    for storage in ("fp16", "pq"):
        for exact in (False, True):
            chosen = options(tmp_path, backend="faiss-gpu", device="cuda", storage=storage, exact=exact)
            assert backends.resolve(chosen) == "faiss-gpu"
            build = build_of(chosen)
            assert isinstance(build, DeviceBuilder)
            by_storage[storage, exact] = [build.kind(count) for count in (20_000, 5_000_000)]
    assert by_storage == {
        ("fp16", False): ["flat", "graph"],
        ("fp16", True): ["flat", "flat"],
        ("pq", False): ["pq", "pq"],
        ("pq", True): ["flat", "flat"],
    }


def test_a_backend_without_its_device_or_package_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FailedPrecondition, match=r"faiss-gpu: it searches on a GPU.* is cpu"):
        backends.resolve(options(tmp_path, backend="faiss-gpu"))
    chosen = options(tmp_path, backend="faiss-gpu", device="cuda")
    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE AVX2")
    installed: list[str] = ["faiss-cpu"]

    def version(package: str) -> str:
        if package in installed:
            return "1.15.1"
        raise PackageNotFoundError(package)

    monkeypatch.setattr(placement, "version", version)
    with pytest.raises(FailedPrecondition, match="needs faiss-gpu-cuvs in place of faiss-cpu"):
        backends.resolve(chosen)
    installed.append("faiss-gpu-cuvs")
    with pytest.raises(FailedPrecondition, match="faiss-cpu has overwritten faiss-gpu-cuvs"):
        backends.resolve(chosen)
    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE GPU NVIDIA_CUVS")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(FailedPrecondition, match="finds no GPU"):
        backends.resolve(chosen)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"index_backend": "milvus"}, "needs --milvus http://HOST:PORT"),
        ({"index_backend": "torch", "milvus": "http://m:1"}, "this backend does not use it"),
        ({"index_backend": "annoy"}, "'annoy'.*'faiss-gpu'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, flags: dict[str, str], problem: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"^--index-backend: .*{problem}"):
        settings_of({"bundle": tmp_path, **flags})


def test_indexes_of_one_machine_give_the_same_hits_by_any_backend(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    drawn = random.standard_normal((3000, 16))
    vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    found = []
    for backend in ("faiss-cpu", "torch"):
        indexes, _ = backends.make_indexes(options(tmp_path, backend=backend), "store", [_SPACE])
        index = indexes["text"]
        index.open()
        index.reconcile(np.empty(0, np.int64), np.arange(3000), vectors, 1)
        found.append([hits.hashes.tolist() for hits in index.search(vectors[:5].astype(np.float32), 30)])
        index.close()
    assert found[0] == found[1]
