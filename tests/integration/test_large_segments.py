"""Large segments with PQ codes and graphs find what a scan finds, also after a restart."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from services.embedding.index import segment as segments
from services.embedding.index import segmented_index
from services.embedding.index.builder import Builder, BuilderStopped
from services.embedding.index.id_map import IdMap
from services.embedding.index.persistence import load, save
from services.embedding.index.refine_depth import UNMEASURED, calibrate
from services.embedding.index.segment import Segment, flat_segment
from services.embedding.index.segmented_index import SegmentedIndex, SegmentFile
from services.embedding.index.vector_index import PositionCache, Selection
from tests.support.disks import small_disk


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers int64 (N,), vectors float32 (N, 32) of 200 clusters, and queries float32 (50, 32) like them."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((200, 32))
    many = centers[random.integers(0, 200, 30_050)] + 0.6 * random.standard_normal((30_050, 32))
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    return random.permutation(30_000) + 5, unit[:30_000], unit[30_000:]


@pytest.fixture(scope="module", params=["fp16", "fp16 graph", "pq", "pq graph"])
def large(request: pytest.FixtureRequest, clusters: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Segment:
    numbers, vectors, _ = clusters
    storage, _, graph = request.param.partition(" ")
    segment = Builder(storage, len(numbers) if graph else 0)(numbers, vectors)
    assert (segment.large, segment.has_graph, segment.storage) == (True, bool(graph), storage)
    np.testing.assert_array_equal(segment.vectors(np.arange(99)), vectors[:99])
    return segment


@pytest.mark.parametrize("share", [1, 0.5, 0.1, 0.01, 0.001])
def test_a_large_segment_finds_what_a_scan_finds_under_any_filter(
    large: Segment,
    clusters: tuple[np.ndarray, np.ndarray, np.ndarray],
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "_CODES_PER_NODE", 5)  # or no graph of so few rows would be walked
    numbers, vectors, queries = clusters
    index, exact = SegmentedIndex(32), SegmentedIndex(32)
    index.replace_all(large)
    exact.replace_all(flat_segment(numbers, vectors))
    mask = np.random.default_rng(1).random(len(numbers)) < share
    selection = Selection(np.sort(numbers), mask, IdMap(np.sort(numbers)).rows, PositionCache())
    eligible = set(np.sort(numbers)[mask].tolist())
    hits, exact_hits = (i.search(queries, 20, selection) for i in (index, exact))
    recall = [np.isin(w.hashes, f.hashes).mean() for f, w in zip(hits, exact_hits, strict=True)]
    assert np.mean(recall) >= 0.98
    for near in hits:
        assert len(near.hashes) == min(20, len(eligible))
        assert eligible.issuperset(near.hashes.tolist())
        assert (np.diff(near.scores) <= 1e-6).all()


def test_a_full_disk_keeps_the_previous_segment_file(large: Segment, tmp_path: Path) -> None:
    save(large, "store", 1, tmp_path / "measured")
    sizes = [path.stat().st_size for path in (tmp_path / "measured").iterdir()]
    with small_disk(tmp_path / "disk", 64) as disk:
        folder = disk.path / "index"
        save(large, "store", 1, folder)
        before = sorted(path.name for path in folder.iterdir())
        free = shutil.disk_usage(disk.path).free
        # Room for all but a byte of it, so that the very end does not fit, and for less and less.
        for missing in (1, 5_000, sum(sizes) // 3, sum(sizes) - 10_000):
            ballast = disk.path / "ballast"
            ballast.write_bytes(bytes(free - sum(sizes) + missing))
            with pytest.raises(OSError, match=r"No space|written"):  # as Python or NumPy says it
                save(large, "store", 2, folder)
            assert sorted(path.name for path in folder.iterdir()) == before
            ballast.unlink()
        segment, sequence = load(folder, "store", 32, Builder(large.storage).restore) or (None, 0)
        assert (sequence, segment is not None and len(segment)) == (1, len(large))
        save(large, "store", 2, folder)
        assert (load(folder, "store", 32, Builder(large.storage).restore) or (None, 0))[1] == 2


def test_an_unsaved_index_is_saved_once_there_is_space(
    clusters: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmented_index, "_RETRY_SECONDS", 0.0)
    numbers, vectors, queries = clusters
    with small_disk(tmp_path / "disk", 1) as disk:
        index = SegmentedIndex(32, 20_000, Builder(), SegmentFile(disk.path / "index", "store"))
        index.open()
        index.reconcile(np.empty(0, np.int64), numbers, vectors.astype(np.float16), 7)
        index.maintain(7)
        assert not index.needs_compaction  # it was compacted, and is searched
        assert len(index.search(queries[:1], 5)[0].hashes) == 5
        assert load(disk.path / "index", "store", 32, Builder().restore) is None
        disk.resize(64)
        index.maintain(8)
        segment, sequence = load(disk.path / "index", "store", 32, Builder().restore) or (None, 0)
        assert (sequence, segment is not None and len(segment)) == (7, len(numbers))
        index.close()


def test_tombstones_of_a_large_segment_are_not_found(large: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_CODES_PER_NODE", 5)
    index = SegmentedIndex(32)
    tombstones = large.hashes[: len(large) // 3]
    index.replace_all(large, deleted=tombstones)
    _, vectors = index.vectors([*large.hashes[-5:], *tombstones[:5]])
    assert len(vectors) == 5
    assert not any(
        np.isin(near.hashes, tombstones).any() for near in index.search(large.vectors(np.arange(9)), 50)
    )


def test_a_saved_segment_loads_and_a_damaged_one_does_not(large: Segment, tmp_path: Path) -> None:
    assert load(tmp_path, "store", 32, Builder(large.storage).restore) is None
    query = large.vectors(np.array([3]))
    for sequence in (7, 9):
        save(large, "store", sequence, tmp_path)
        reloaded = load(tmp_path, "store", 32, Builder(large.storage).restore)
        assert reloaded is not None
        segment, until = reloaded
        assert (until, segment.has_graph, segment.depth) == (sequence, large.has_graph, large.depth)
        np.testing.assert_array_equal(segment.hashes, large.hashes)
        np.testing.assert_array_equal(segment.search(query, 9, None)[1], large.search(query, 9, None)[1])
    assert load(tmp_path, "store", 31, Builder(large.storage).restore) is None
    assert load(tmp_path, "another store", 32, Builder(large.storage).restore) is None
    assert load(tmp_path, "store", 32, Builder("sq8").restore) is None
    for file in (path for path in tmp_path.iterdir() if path.name != "segment.json"):
        whole = file.read_bytes()
        for content in (b"", whole[:1000]):
            file.write_bytes(content)
            assert load(tmp_path, "store", 32, Builder(large.storage).restore) is None
        file.write_bytes(whole)
    assert load(tmp_path, "store", 32, Builder(large.storage).restore) is not None
    savers = [threading.Thread(target=save, args=(large, "store", n, tmp_path)) for n in range(4)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert load(tmp_path, "store", 32, Builder(large.storage).restore) is not None
    assert len(list(tmp_path.iterdir())) == (5 if large.storage == "pq" and large.has_graph else 4)


@pytest.mark.parametrize(("storage", "least"), [("fp32", 0.999), ("fp16", 0.999), ("sq8", 0.95)])
def test_every_storage_keeps_the_nearest_neighbors(
    clusters: tuple[np.ndarray, np.ndarray, np.ndarray], storage: str, least: float
) -> None:
    numbers, vectors, queries = clusters
    exact = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :50]
    rows = flat_segment(numbers, vectors, storage).search(queries, 50, None).rows
    assert np.mean([np.isin(e, r).mean() for e, r in zip(exact, rows, strict=True)]) >= least


@pytest.mark.parametrize("storage", ["fp16", "pq"])
def test_the_nearest_of_many_near_duplicates_are_found(storage: str) -> None:
    random = np.random.default_rng(2)
    centers = random.standard_normal((40, 64))
    many = np.repeat(centers, 500, axis=0) + 0.1 * random.standard_normal((20_000, 64))
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    index, queries = SegmentedIndex(64), unit[::1000]
    index.replace_all(Builder(storage, 0)(np.arange(20_000), unit))
    exact = np.argsort(-(queries @ unit.T), axis=1, kind="stable")[:, :20]
    hits = [near.hashes for near in index.search(queries, 20)]
    assert all(hashes[0] == at for hashes, at in zip(hits, range(0, 20_000, 1000), strict=True))
    assert np.mean([np.isin(e, f).mean() for e, f in zip(exact, hits, strict=True)]) >= 0.99


def _like(random: np.random.Generator, centers: np.ndarray, count: int) -> np.ndarray:
    many = centers[random.integers(0, len(centers), count)]
    many += 0.6 * random.standard_normal(many.shape).astype(np.float32)
    unit: np.ndarray = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16)
    return unit.astype(np.float32)


@pytest.mark.parametrize("storage", ["fp16", "fp32", "sq8", "pq"])
@pytest.mark.parametrize("share", [1, 0.2])
def test_new_writes_next_to_pq_codes_are_found_exactly(storage: str, share: float) -> None:
    """Of 24,000 items a fifth is replaced, some are dropped, and new ones come that are nearly one."""
    random = np.random.default_rng(5)
    centers = random.standard_normal((200, 32)).astype(np.float32)
    first = _like(random, centers, 24_000)
    index = SegmentedIndex(32, 20_000, Builder(storage, 0))
    index.replace_all(Builder(storage, 0)(np.arange(24_000), first))
    vectors_by_hash = dict(enumerate(first))
    coming = _like(random, centers, 8000)
    alike = first[7] + 0.05 * random.standard_normal((1200, 32)).astype(np.float32)
    coming[3000:4200] = alike / np.linalg.norm(alike, axis=1, keepdims=True)
    coming = coming.astype(np.float16).astype(np.float32)
    for start in range(0, len(coming), 400):
        upserts = {20_000 + n if n % 3 else 30_000 + n: coming[n] for n in range(start, start + 400)}
        deletions = range(start, start + 40)
        index.change(upserts, deletions)
        vectors_by_hash = {
            n: vector for n, vector in (vectors_by_hash | upserts).items() if n not in deletions
        }
    parts = index._snapshot.parts
    assert len(index) == len(vectors_by_hash)
    assert len(parts) <= 5
    assert sum(part.segment.large for part in parts) >= 2
    numbers = np.array(sorted(vectors_by_hash))
    mask = random.random(len(numbers)) < share
    selection = None if share == 1 else Selection(numbers, mask, IdMap(numbers).rows, PositionCache())
    eligible = numbers[mask]
    vectors = np.stack([vectors_by_hash[number] for number in eligible.tolist()])
    queries = np.concatenate([_like(random, centers, 40), first[7:8], coming[3000:3010]])
    hits = index.search(queries, 30, selection)
    exact = eligible[np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :30]]
    assert all(np.isin(near.hashes, eligible).all() for near in hits)
    recall = [np.isin(e, near.hashes).mean() for e, near in zip(exact, hits, strict=True)]
    assert np.mean(recall) >= (0.95 if storage == "sq8" else 0.99)
    if storage != "sq8":
        for near, query in zip(hits, queries, strict=True):
            scores = [vectors_by_hash[number] @ query for number in near.hashes.tolist()]
            np.testing.assert_allclose(near.scores, scores, atol=1e-5)


def test_rows_that_pq_was_not_trained_on_are_scanned(
    clusters: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    numbers, vectors, _ = clusters
    index, away = SegmentedIndex(32), np.random.default_rng(6).standard_normal(32) * 0.5
    index.replace_all(
        Segment(numbers, segments.build_faiss_index(vectors, "SQfp16"), segments.build_pq_codes(vectors))
    )
    for start, shift in ((0, 0 * away), (2000, away)):
        outliers = vectors[start : start + 2000] + shift
        outliers = (
            (outliers / np.linalg.norm(outliers, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
        )
        index.change({50_000 + start + n: vector for n, vector in enumerate(outliers)})
        for n in range(1000):  # so that what is merged is of one kind
            index.change({40_000 + n: vectors[start]})
    assert [part.segment.large for part in index._snapshot.parts] == [True, True, False]


@pytest.mark.parametrize("storage", ["fp32", "fp16", "sq8"])
def test_vectors_equal_the_stored_ones(
    clusters: tuple[np.ndarray, np.ndarray, np.ndarray], storage: str
) -> None:
    numbers, vectors, _ = clusters
    segment = flat_segment(numbers[:500], vectors[:500], storage)
    rows = np.array([3, 499, 3, 0])
    np.testing.assert_allclose(segment.vectors(rows), segment.index.reconstruct_n(0, 500)[rows], rtol=1e-6)
    assert segment.vectors(rows[:0]).shape == (0, 32)


@pytest.mark.parametrize(("dimension", "spread", "deeper"), [(64, 0.6, False), (16, 0.05, True)])
def test_the_refine_depth_covers_the_nearest(dimension: int, spread: float, deeper: bool) -> None:
    """Codes of vectors that are nearly one vector tell little, and more candidates make up for it."""
    random = np.random.default_rng(8)
    many = random.standard_normal((1, dimension)) + spread * random.standard_normal((20_300, dimension))
    if not deeper:
        many += 2 * random.standard_normal((100, dimension))[random.integers(0, 100, 20_300)]
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    segment = Builder("fp16", 0)(np.arange(20_000), unit[:20_000])
    assert (segment.depth.of(100) > UNMEASURED.of(100)) == deeper
    assert segment.sibling(np.arange(30_000, 33_000), unit[:3000]).large != deeper
    index, groups = SegmentedIndex(dimension), unit[20_000:].reshape(100, 3, dimension).mean(1)
    index.replace_all(segment)
    for queries in (unit[20_000:20_100], groups):
        exact = np.argsort(-(queries @ unit[:20_000].T), axis=1, kind="stable")[:, :100]
        hits = [near.hashes for near in index.search(queries, 100)]
        assert np.mean([np.isin(e, f).mean() for e, f in zip(exact, hits, strict=True)]) >= 0.99


def test_duplicates_need_no_deeper_refinement() -> None:
    distinct = np.random.default_rng(9).standard_normal((10, 64))
    unit = (distinct / np.linalg.norm(distinct, axis=1, keepdims=True)).astype(np.float16).repeat(2000, 0)
    assert calibrate(segments.build_pq_codes(unit), unit) == UNMEASURED


def test_a_zero_query_returns_as_many_hits_as_any(large: Segment) -> None:
    queries = np.zeros((2, 32), np.float32)
    queries[1, 0] = 1
    index, even = SegmentedIndex(32), np.sort(large.hashes) % 2 == 0
    index.replace_all(large)
    half = Selection(np.sort(large.hashes), even, IdMap(np.sort(large.hashes)).rows, PositionCache())
    for selection in (None, half):
        nothing, something = index.search(queries, 9, selection)
        assert (nothing.scores == 0).all()
        assert len(set(nothing.hashes.tolist())) == 9
        assert selection is None or not (nothing.hashes % 2).any()
        [alone] = index.search(queries[1:], 9, selection)
        assert something.hashes.tolist() == alone.hashes.tolist()
    assert not len(large.search(queries[:0], 9, None).rows)


@pytest.mark.parametrize("dimension", [1, 2, 31, 33, 97])
def test_pq_codes_work_in_any_dimension(dimension: int) -> None:
    random = np.random.default_rng(dimension)
    many = random.standard_normal((9000, dimension))
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    segment = Segment(
        np.arange(9000), segments.build_faiss_index(unit, "SQfp16"), segments.build_pq_codes(unit)
    )
    index = SegmentedIndex(dimension)
    index.replace_all(segment)
    scores = [near.scores for near in index.search(unit[:20], 10)]
    exact = -np.sort(-(unit[:20] @ unit.T), axis=1)[:, :10]
    np.testing.assert_allclose(scores, exact, atol=0.02)


def test_a_saved_segment_is_rebuilt_if_the_graph_setting_changes(large: Segment) -> None:
    for rows, laid in ((0, False), (len(large), True), (len(large) + 1, False)):
        index = SegmentedIndex(32, 100, Builder(large.storage, rows))
        index.replace_all(large)
        assert index.needs_compaction == (laid != large.has_graph)


def test_a_failed_builder_gives_the_reason_and_a_stopped_one_ends() -> None:
    with pytest.raises(RuntimeError, match="no index was built"):
        Builder("fp7")(np.arange(3), np.zeros((3, 4), np.float32))
    builder, outcomes = Builder(), list[bool]()

    def build() -> None:
        try:
            builder(np.arange(200_000), np.random.default_rng(0).random((200_000, 64), np.float32))
        except BuilderStopped:
            outcomes.append(True)

    building = threading.Thread(target=build)
    building.start()
    while builder._process is None:
        pass
    builder.stop()
    building.join(10)
    assert outcomes == [True]
    with pytest.raises(BuilderStopped):
        builder(np.arange(3), np.zeros((3, 4), np.float32))
