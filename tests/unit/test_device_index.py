"""Segments of the backend faiss-gpu, in their CPU form where FAISS finds no GPU."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from services.embedding.index import device_segment, placement
from services.embedding.index.builder import Builder
from services.embedding.index.device_segment import DeviceBuilder, DeviceSegment
from services.embedding.index.persistence import load, save
from services.embedding.index.placement import HostPlacement
from services.embedding.index.refine_depth import RefineDepth
from services.embedding.index.segmented_index import SegmentedIndex, SegmentFile, sample_recall
from tests.conftest import skip_without
from tests.support.index_backends import builder, place

N, D, K = 6000, 32, 50
# Of faiss-gpu-cuvs 1.15.1. Where it is installed, a test checks that it still has them.
_GPU_NAMES = {
    "Float16",
    "GpuClonerOptions",
    "GpuIndexCagra",
    "GpuIndexCagraConfig",
    "METRIC_INNER_PRODUCT",
    "SearchParametersCagra",
    "StandardGpuResources",
    "get_num_gpus",
    "graph_build_algo_NN_DESCENT",
    "index_cpu_to_gpu",
    "index_gpu_to_cpu",
}
_IS_GPU_BUILD = "CUVS" in faiss.get_compile_options()


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    random = np.random.default_rng(1)
    drawn = random.standard_normal((60, D))[random.integers(0, 60, N)] + 0.6 * random.standard_normal((N, D))
    unit: np.ndarray = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    return unit.astype(np.float32)


@pytest.fixture(scope="module", params=["flat", "graph", "pq"])
def segment(request: pytest.FixtureRequest, vectors: np.ndarray) -> Iterator[DeviceSegment]:
    built = builder(request.param)(np.arange(N) + 10, vectors)
    assert isinstance(built, DeviceSegment)
    assert built.kind == request.param
    yield built


def exact(vectors: np.ndarray, queries: np.ndarray, live: np.ndarray | None, count: int) -> np.ndarray:
    scores = queries @ vectors.T
    best: np.ndarray = -np.sort(-(scores if live is None else np.where(live, scores, -np.inf)), axis=1)
    return best[:, :count]


def recall(segment: DeviceSegment, vectors: np.ndarray, live: np.ndarray | None) -> float:
    queries = vectors[:40]
    scores, rows, estimated = segment.search(queries, K, live)
    assert not estimated
    assert (rows >= 0).all()
    assert live is None or live[rows].all()
    assert all(len(set(row)) == rows.shape[1] for row in rows.tolist())
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, rows, 1), atol=1e-5)
    assert (np.diff(scores) <= 0).all()
    return float(np.mean(scores >= exact(vectors, queries, live, rows.shape[1])[:, -1:] - 1e-5))


@pytest.mark.parametrize("share", [None, 1, 0.5, 0.1, 0.01, 0.001])
def test_the_nearest_are_found_under_any_filter(
    segment: DeviceSegment, vectors: np.ndarray, share: float | None
) -> None:
    live = None if share is None else np.random.default_rng(2).random(N) < share
    assert recall(segment, vectors, live) >= (1 if segment.kind == "flat" else 0.97)


def test_a_graph_and_codes_answer_alone_where_they_are_made_for_it(
    vectors: np.ndarray, segment: DeviceSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the exact scans behind them, most queries are answered with recall."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an exact scan was needed")

    if segment.kind != "flat":
        monkeypatch.setattr(DeviceSegment, "_scan", refuse)
        alone = DeviceSegment(**{**vars_of(segment), "flat": None})
        most = np.random.default_rng(2).random(N) < 0.8
        assert recall(alone, vectors, None) >= 0.97
        assert recall(alone, vectors, most) >= 0.95


def vars_of(segment: DeviceSegment) -> dict[str, Any]:
    return {name: getattr(segment, name) for name in segment.__dataclass_fields__}


class Faulty(HostPlacement):
    """Returns what cuVS returned at times: rows that do not qualify, or do not exist, or twice the same."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self._row = row

    def search_graph(self, graph: Any, queries: np.ndarray, count: int, *_: Any) -> np.ndarray:
        rows = np.full((len(queries), count), self._row, np.int64)
        rows[:, ::4] = np.arange(count)[::4]  # too few
        return rows


@pytest.mark.parametrize("row", [-1, 5, N, 2**40, np.iinfo(np.int64).max])
def test_wrong_rows_of_a_device_are_never_returned(vectors: np.ndarray, row: int) -> None:
    built = DeviceBuilder(lambda: Faulty(row), graph_rows=1)(np.arange(N), vectors)
    odd = np.arange(N) % 2 == 1
    for live in (None, odd):
        assert recall(built, vectors, live) == 1


def test_more_hits_than_a_device_returns_come_from_the_host(
    segment: DeviceSegment, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_segment, "_MAX_CANDIDATES", 100)
    scores, rows, _ = segment.search(vectors[:3], N + 5, None)
    assert rows.shape == (3, N)
    np.testing.assert_allclose(scores, exact(vectors, vectors[:3], None, N), atol=1e-5)
    assert not len(segment.search(vectors[:0], 5, None).rows)
    assert segment.search(vectors[:2], 5, np.zeros(N, bool)).rows.shape == (2, 0)


def test_many_queries_are_compared_in_pages(
    segment: DeviceSegment, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_segment, "_RERANKED_COMPONENTS", 7 * 114 * D)
    assert recall(segment, vectors, None) >= 0.97


def test_a_saved_segment_is_moved_back_to_the_device(
    segment: DeviceSegment, vectors: np.ndarray, tmp_path: Path
) -> None:
    save(segment, "store", 4, tmp_path)
    found = load(tmp_path, "store", D, DeviceBuilder(place).restore)
    assert found is not None
    restored, sequence = found
    assert sequence == 4
    assert isinstance(restored, DeviceSegment)
    assert (restored.kind, restored.depth, restored.probes) == (segment.kind, segment.depth, segment.probes)
    np.testing.assert_array_equal(restored.hashes, segment.hashes)
    np.testing.assert_array_equal(restored.vectors(np.arange(N)), segment.vectors(np.arange(N)))
    assert recall(restored, vectors, None) >= 0.97
    # Another backend or another placement rebuilds it.
    assert load(tmp_path, "store", D, Builder().restore) is None
    elsewhere = HostPlacement()
    elsewhere.name = "another"
    assert load(tmp_path, "store", D, DeviceBuilder(lambda: elsewhere).restore) is None
    for path in tmp_path.iterdir():
        if path.name != "segment.json":
            whole = path.read_bytes()
            path.write_bytes(whole[:500])
            assert load(tmp_path, "store", D, DeviceBuilder(place).restore) is None
            path.write_bytes(whole)


def test_the_cpu_form_of_another_setting_is_rebuilt(segment: DeviceSegment, tmp_path: Path) -> None:
    file = SegmentFile(tmp_path, "store")
    save(segment, "store", 1, tmp_path)
    for kind in ("flat", "graph", "pq"):
        index = SegmentedIndex(D, 1000, builder(kind), file)
        assert len(index.open()) == N
        assert index.needs_compaction == (segment.kind != kind)


def test_the_kind_depends_on_the_size(vectors: np.ndarray) -> None:
    assert [DeviceBuilder(place).kind(rows) for rows in (3, 1_999_999, 2_000_000)] == [
        "flat",
        "flat",
        "graph",
    ]
    assert [DeviceBuilder(place, pq=True).kind(rows) for rows in (999, 1000)] == ["flat", "pq"]
    assert DeviceBuilder(place, graph_rows=0).kind(10**9) == "flat"
    for rows in (0, 1, 3, 4):
        small = DeviceBuilder(place, graph_rows=1)(np.arange(rows), vectors[:rows])
        assert (small.kind, len(small.search(vectors[:2], 9, None).rows[0])) == ("flat", rows)


def test_codes_read_as_many_lists_as_their_recall_needs(vectors: np.ndarray) -> None:
    """Vectors without structure need most lists; near duplicates need a deeper refinement."""
    random = np.random.default_rng(4)
    drawn = random.standard_normal((N, D))
    unstructured = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    few, many = (builder("pq")(np.arange(N), values) for values in (vectors, unstructured.astype(np.float32)))
    assert isinstance(few, DeviceSegment)
    assert isinstance(many, DeviceSegment)
    assert few.probes < many.probes
    for segment in (few, many):
        measured = sample_recall(segment, D)
        assert measured is not None
        assert measured >= 0.97
    alike = vectors[:1] + 0.01 * vectors
    alike = (alike / np.linalg.norm(alike, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    deep = builder("pq")(np.arange(N), alike)
    assert isinstance(deep, DeviceSegment)
    assert deep.depth != RefineDepth()
    assert recall(deep, alike, None) >= 0.97


def test_recent_rows_are_on_the_host(segment: DeviceSegment, vectors: np.ndarray) -> None:
    sibling = segment.sibling(np.arange(3), vectors[:3])
    assert not isinstance(sibling, DeviceSegment)
    assert not sibling.large


def test_only_names_that_faiss_for_gpus_has_are_used() -> None:
    tree = ast.parse(inspect.getsource(placement))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_gpu"
    }
    assert used == _GPU_NAMES
    if _IS_GPU_BUILD:
        assert all(hasattr(faiss, name) for name in used)


def test_the_gpu_parameters_are_accepted() -> None:
    """Everything up to the first use of a GPU."""
    if not _IS_GPU_BUILD:
        skip_without("faiss-gpu", "faiss-cpu is installed, not faiss-gpu-cuvs")
    gpu: Any = faiss
    placed = placement.GpuPlacement()
    assert placed._options.use_cuvs
    selector = faiss.IDSelectorBitmap(np.packbits(np.ones(9, bool), bitorder="little"))  # type: ignore[call-arg, arg-type]
    parameters = gpu.SearchParametersCagra(itopk_size=512, num_random_samplings=8, sel=selector)
    assert (parameters.itopk_size, parameters.num_random_samplings) == (512, 8)
    config = gpu.GpuIndexCagraConfig()
    for name in ("device", "graph_degree", "intermediate_graph_degree", "build_algo"):
        assert hasattr(config, name)
    assert "numeric_type" in inspect.signature(gpu.GpuIndexCagra.search).parameters
    assert "numeric_type" in inspect.signature(gpu.GpuIndexCagra.train).parameters
    if not gpu.get_num_gpus():
        with pytest.raises(RuntimeError, match="GPU device"):
            placed.to_device(faiss.IndexFlatIP(8))
