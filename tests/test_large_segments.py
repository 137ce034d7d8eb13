"""Large segments, by codes and graphs, against a scan; as they are built, kept and read again."""

import threading
from pathlib import Path

import numpy as np
import pytest

from services.embedding import segments
from services.embedding.builder import Builder, BuilderStopped
from services.embedding.calibration import UNMEASURED, calibrated
from services.embedding.index import Places, Selection
from services.embedding.keeping import load, save
from services.embedding.numbered import Numbered
from services.embedding.segmented import SegmentedIndex
from services.embedding.segments import Segment, scanned


@pytest.fixture(scope="module")
def clustered() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers int64 (N,), vectors float32 (N, 32) of 200 clusters, and queries float32 (50, 32) like them."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((200, 32))
    many = centres[random.integers(0, 200, 30_050)] + 0.6 * random.standard_normal((30_050, 32))
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    return random.permutation(30_000) + 5, unit[:30_000], unit[30_000:]


@pytest.fixture(scope="module", params=["fp16", "fp16 graph", "pq", "pq graph"])
def large(request: pytest.FixtureRequest, clustered: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Segment:
    numbers, vectors, _ = clustered
    storage, _, graph = request.param.partition(" ")
    segment = Builder(storage, len(numbers) if graph else 0)(numbers, vectors)
    assert (segment.large, segment.has_graph, segment.storage) == (True, bool(graph), storage)
    np.testing.assert_array_equal(segment.vectors(np.arange(99)), vectors[:99])
    return segment


@pytest.mark.parametrize("share", [1, 0.5, 0.1, 0.01, 0.001])
def test_a_large_segment_finds_what_a_scan_finds_however_few_qualify(
    large: Segment,
    clustered: tuple[np.ndarray, np.ndarray, np.ndarray],
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "_CODES_PER_NODE", 5)  # or no graph of so few rows would be walked
    numbers, vectors, queries = clustered
    index, exact = SegmentedIndex(32), SegmentedIndex(32)
    index.replace_all(large)
    exact.replace_all(scanned(numbers, vectors))
    mask = np.random.default_rng(1).random(len(numbers)) < share
    selection = Selection(np.sort(numbers), mask, Numbered(np.sort(numbers)).rows, Places())
    permitted = set(np.sort(numbers)[mask].tolist())
    found, wanted = (i.search(queries, 20, selection) for i in (index, exact))
    recall = [np.isin(w.numbers, f.numbers).mean() for f, w in zip(found, wanted, strict=True)]
    assert np.mean(recall) >= 0.98
    for near in found:
        assert len(near.numbers) == min(20, len(permitted))
        assert permitted.issuperset(near.numbers.tolist())
        assert (np.diff(near.scores) <= 1e-6).all()


def test_tombstones_of_a_large_segment_are_not_found(large: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_CODES_PER_NODE", 5)
    index = SegmentedIndex(32)
    gone = large.numbers[: len(large) // 3]
    index.replace_all(large, gone=gone)
    _, vectors = index.vectors([*large.numbers[-5:], *gone[:5]])
    assert len(vectors) == 5
    assert not any(
        np.isin(near.numbers, gone).any() for near in index.search(large.vectors(np.arange(9)), 50)
    )


def test_a_kept_segment_comes_back_and_a_damaged_one_does_not(large: Segment, tmp_path: Path) -> None:
    assert load(tmp_path, "store", 32, large.storage) is None
    query = large.vectors(np.array([3]))
    for sequence in (7, 9):
        save(large, "store", sequence, tmp_path)
        found = load(tmp_path, "store", 32, large.storage)
        assert found is not None
        segment, until = found
        assert (until, segment.has_graph, segment.depth) == (sequence, large.has_graph, large.depth)
        np.testing.assert_array_equal(segment.numbers, large.numbers)
        np.testing.assert_array_equal(segment.search(query, 9, None)[1], large.search(query, 9, None)[1])
    assert load(tmp_path, "store", 31, large.storage) is None
    assert load(tmp_path, "another store", 32, large.storage) is None
    assert load(tmp_path, "store", 32, "sq8") is None
    for kept in (path for path in tmp_path.iterdir() if path.name != "segment.json"):
        whole = kept.read_bytes()
        for damaged in (b"", whole[:1000]):
            kept.write_bytes(damaged)
            assert load(tmp_path, "store", 32, large.storage) is None
        kept.write_bytes(whole)
    assert load(tmp_path, "store", 32, large.storage) is not None
    savers = [threading.Thread(target=save, args=(large, "store", n, tmp_path)) for n in range(4)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert load(tmp_path, "store", 32, large.storage) is not None
    assert len(list(tmp_path.iterdir())) == (5 if large.storage == "pq" and large.has_graph else 4)


@pytest.mark.parametrize(("storage", "least"), [("fp32", 0.999), ("fp16", 0.999), ("sq8", 0.95)])
def test_storages_keep_the_neighbours(
    clustered: tuple[np.ndarray, np.ndarray, np.ndarray], storage: str, least: float
) -> None:
    numbers, vectors, queries = clustered
    exact = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :50]
    rows = scanned(numbers, vectors, storage).search(queries, 50, None).rows
    assert np.mean([np.isin(e, r).mean() for e, r in zip(exact, rows, strict=True)]) >= least


@pytest.mark.parametrize("storage", ["fp16", "pq"])
def test_of_many_items_that_are_nearly_one_the_nearest_are_found(storage: str) -> None:
    random = np.random.default_rng(2)
    centres = random.standard_normal((40, 64))
    many = np.repeat(centres, 500, axis=0) + 0.1 * random.standard_normal((20_000, 64))
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    index, queries = SegmentedIndex(64), unit[::1000]
    index.replace_all(Builder(storage, 0)(np.arange(20_000), unit))
    exact = np.argsort(-(queries @ unit.T), axis=1, kind="stable")[:, :20]
    found = [near.numbers for near in index.search(queries, 20)]
    assert all(mine[0] == at for mine, at in zip(found, range(0, 20_000, 1000), strict=True))
    assert np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]) >= 0.99


def _like(random: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    many = centres[random.integers(0, len(centres), count)]
    many += 0.6 * random.standard_normal(many.shape).astype(np.float32)
    unit: np.ndarray = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16)
    return unit.astype(np.float32)


@pytest.mark.parametrize("storage", ["fp16", "fp32", "sq8", "pq"])
@pytest.mark.parametrize("share", [1, 0.2])
def test_what_is_written_beside_codes_is_found_as_by_a_scan(storage: str, share: float) -> None:
    """Of 24,000 items a fifth is replaced, some are dropped, and new ones come that are nearly one."""
    random = np.random.default_rng(5)
    centres = random.standard_normal((200, 32)).astype(np.float32)
    first = _like(random, centres, 24_000)
    index = SegmentedIndex(32, 20_000, Builder(storage, 0))
    index.replace_all(Builder(storage, 0)(np.arange(24_000), first))
    known = dict(enumerate(first))
    coming = _like(random, centres, 8000)
    alike = first[7] + 0.05 * random.standard_normal((1200, 32)).astype(np.float32)
    coming[3000:4200] = alike / np.linalg.norm(alike, axis=1, keepdims=True)
    coming = coming.astype(np.float16).astype(np.float32)
    for start in range(0, len(coming), 400):
        changed = {20_000 + n if n % 3 else 30_000 + n: coming[n] for n in range(start, start + 400)}
        gone = range(start, start + 40)
        index.change(changed, gone)
        known = {n: vector for n, vector in (known | changed).items() if n not in gone}
    parts = index._snapshot.parts
    assert len(index) == len(known)
    assert len(parts) <= 5
    assert sum(part.segment.large for part in parts) >= 2
    numbers = np.array(sorted(known))
    mask = random.random(len(numbers)) < share
    selection = None if share == 1 else Selection(numbers, mask, Numbered(numbers).rows, Places())
    permitted = numbers[mask]
    vectors = np.stack([known[number] for number in permitted.tolist()])
    queries = np.concatenate([_like(random, centres, 40), first[7:8], coming[3000:3010]])
    found = index.search(queries, 30, selection)
    exact = permitted[np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :30]]
    assert all(np.isin(near.numbers, permitted).all() for near in found)
    recall = [np.isin(e, near.numbers).mean() for e, near in zip(exact, found, strict=True)]
    assert np.mean(recall) >= (0.95 if storage == "sq8" else 0.99)
    if storage != "sq8":
        for near, query in zip(found, queries, strict=True):
            scores = [known[number] @ query for number in near.numbers.tolist()]
            np.testing.assert_allclose(near.scores, scores, atol=1e-5)


def test_rows_that_codes_were_not_learned_of_are_scanned(
    clustered: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    numbers, vectors, _ = clustered
    index, away = SegmentedIndex(32), np.random.default_rng(6).standard_normal(32) * 0.5
    index.replace_all(Segment(numbers, segments.filled(vectors, "SQfp16"), segments.coded(vectors)))
    for start, shift in ((0, 0 * away), (2000, away)):
        moved = vectors[start : start + 2000] + shift
        moved = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
        index.change({50_000 + start + n: vector for n, vector in enumerate(moved)})
        for n in range(1000):  # so that what is merged is of one kind
            index.change({40_000 + n: vectors[start]})
    assert [part.segment.large for part in index._snapshot.parts] == [True, True, False]


@pytest.mark.parametrize("storage", ["fp32", "fp16", "sq8"])
def test_vectors_are_what_is_stored(
    clustered: tuple[np.ndarray, np.ndarray, np.ndarray], storage: str
) -> None:
    numbers, vectors, _ = clustered
    segment = scanned(numbers[:500], vectors[:500], storage)
    rows = np.array([3, 499, 3, 0])
    np.testing.assert_allclose(segment.vectors(rows), segment.index.reconstruct_n(0, 500)[rows], rtol=1e-6)
    assert segment.vectors(rows[:0]).shape == (0, 32)


@pytest.mark.parametrize(("dimension", "spread", "deeper"), [(64, 0.6, False), (16, 0.05, True)])
def test_as_many_candidates_are_compared_as_the_nearest_are_among(
    dimension: int, spread: float, deeper: bool
) -> None:
    """Codes of vectors that are nearly one vector tell little, and more candidates make up for it."""
    random = np.random.default_rng(8)
    many = random.standard_normal((1, dimension)) + spread * random.standard_normal((20_300, dimension))
    if not deeper:
        many += 2 * random.standard_normal((100, dimension))[random.integers(0, 100, 20_300)]
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    segment = Builder("fp16", 0)(np.arange(20_000), unit[:20_000])
    assert (segment.depth.of(100) > UNMEASURED.of(100)) == deeper
    assert segment.beside(np.arange(30_000, 33_000), unit[:3000]).large != deeper
    index, groups = SegmentedIndex(dimension), unit[20_000:].reshape(100, 3, dimension).mean(1)
    index.replace_all(segment)
    for queries in (unit[20_000:20_100], groups):
        exact = np.argsort(-(queries @ unit[:20_000].T), axis=1, kind="stable")[:, :100]
        found = [near.numbers for near in index.search(queries, 100)]
        assert np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]) >= 0.99


def test_copies_need_no_more_candidates() -> None:
    distinct = np.random.default_rng(9).standard_normal((10, 64))
    unit = (distinct / np.linalg.norm(distinct, axis=1, keepdims=True)).astype(np.float16).repeat(2000, 0)
    assert calibrated(segments.coded(unit), unit) == UNMEASURED


def test_a_query_of_nothing_finds_as_many_as_any(large: Segment) -> None:
    queries = np.zeros((2, 32), np.float32)
    queries[1, 0] = 1
    index, even = SegmentedIndex(32), np.sort(large.numbers) % 2 == 0
    index.replace_all(large)
    chosen = Selection(np.sort(large.numbers), even, Numbered(np.sort(large.numbers)).rows, Places())
    for selection in (None, chosen):
        nothing, something = index.search(queries, 9, selection)
        assert (nothing.scores == 0).all()
        assert len(set(nothing.numbers.tolist())) == 9
        assert selection is None or not (nothing.numbers % 2).any()
        [alone] = index.search(queries[1:], 9, selection)
        assert something.numbers.tolist() == alone.numbers.tolist()
    assert not len(large.search(queries[:0], 9, None).rows)


@pytest.mark.parametrize("dimension", [1, 2, 31, 33, 97])
def test_codes_lead_in_any_dimension(dimension: int) -> None:
    random = np.random.default_rng(dimension)
    many = random.standard_normal((9000, dimension))
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    segment = Segment(np.arange(9000), segments.filled(unit, "SQfp16"), segments.coded(unit))
    index = SegmentedIndex(dimension)
    index.replace_all(segment)
    scores = [near.scores for near in index.search(unit[:20], 10)]
    exact = -np.sort(-(unit[:20] @ unit.T), axis=1)[:, :10]
    np.testing.assert_allclose(scores, exact, atol=0.02)


def test_a_kept_segment_is_made_again_where_a_graph_is_wanted_or_not(large: Segment) -> None:
    for rows, laid in ((0, False), (len(large), True), (len(large) + 1, False)):
        index = SegmentedIndex(32, 100, Builder(large.storage, rows))
        index.replace_all(large)
        assert index.worn == (laid != large.has_graph)


def test_a_builder_that_fails_says_why_and_one_that_was_stopped_ends_at_once() -> None:
    with pytest.raises(RuntimeError, match="no index was built"):
        Builder("fp7")(np.arange(3), np.zeros((3, 4), np.float32))
    builder, stopped = Builder(), list[bool]()

    def build() -> None:
        try:
            builder(np.arange(200_000), np.random.default_rng(0).random((200_000, 64), np.float32))
        except BuilderStopped:
            stopped.append(True)

    building = threading.Thread(target=build)
    building.start()
    while builder._process is None:
        pass
    builder.stop()
    building.join(10)
    assert stopped == [True]
    with pytest.raises(BuilderStopped):
        builder(np.arange(3), np.zeros((3, 4), np.float32))
