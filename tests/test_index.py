"""The index against brute force through any changes and compactions, its graphs against a scan."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.embedding import segmented, segments
from services.embedding.builder import Builder, BuilderStopped
from services.embedding.calibration import UNMEASURED, calibrated
from services.embedding.index import Places, Selection
from services.embedding.keeping import load, save
from services.embedding.numbered import Numbered
from services.embedding.segmented import SegmentedIndex
from services.embedding.segments import Segment, scanned

D = 8


def _vector(seed: int) -> np.ndarray:
    """Of unit length, in steps that float16 holds."""
    vector = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    unit: np.ndarray = (vector / np.float32(np.linalg.norm(vector))).astype(np.float16).astype(np.float32)
    return unit


def _segment(known: dict[int, np.ndarray]) -> Segment:
    return scanned(np.array(list(known), np.int64), np.array(list(known.values())).reshape(-1, D))


def _select(allowed: set[int], known: Sequence[int], places: Places) -> Selection:
    """Of a table whose rows are all numbers that were ever known, in the order they came."""
    numbers = np.array(known, np.int64)
    return Selection(numbers, np.isin(numbers, list(allowed)), Numbered(numbers).rows, places)


def _brute(known: dict[int, np.ndarray], query: np.ndarray, limit: int) -> list[int]:
    return sorted(known, key=lambda n: (-round(float(known[n] @ query), 6), n))[:limit]


_steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10_000)), max_size=8),
        st.lists(st.integers(1, 30)),
        st.booleans(),
    ),
    max_size=12,
)


@given(
    steps=_steps,
    start=st.integers(0, 20),
    query=st.integers(0, 99),
    allowed=st.none() | st.sets(st.integers(1, 40)),
)
@settings(max_examples=100, deadline=None)
def test_search_equals_brute_force_after_any_changes(
    steps: Sequence[tuple[list[tuple[int, int]], list[int], bool]],
    start: int,
    query: int,
    allowed: set[int] | None,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmented, "_FRESH_ROWS", 5)
        known = {n: _vector(n) for n in range(1, start + 1)}
        index, places, seen = SegmentedIndex(D), Places(), list(known)
        index.replace_all(_segment(known))
        for upserts, deletions, compacts in steps:
            changed = {n: _vector(seed) for n, seed in upserts}
            gone = [n for n in deletions if n not in changed]
            index.change(changed, gone)
            seen += [n for n in changed if n not in seen]
            known = {n: v for n, v in (known | changed).items() if n not in gone}
            if compacts:
                index.compact()
            selection = None if allowed is None else _select(allowed, seen, places)
            [found] = index.search(_vector(query)[None], 7, selection)
            qualified = {n: v for n, v in known.items() if allowed is None or n in allowed}
            assert found.numbers.tolist() == _brute(qualified, _vector(query), 7)
            assert len(index) == len(known)
            at, vectors = index.vectors([999, *known])
            assert at.tolist() == list(range(1, len(known) + 1))
            np.testing.assert_array_equal(vectors, np.array(list(known.values())).reshape(-1, D))


def test_what_changes_while_it_is_compacted_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmented, "_FRESH_ROWS", 5)
    building, goes_on = threading.Event(), threading.Event()

    def build(numbers: np.ndarray, vectors: np.ndarray) -> Segment:
        building.set()
        goes_on.wait(10)
        return scanned(numbers, vectors)

    known = {n: _vector(n) for n in range(50)}
    index = SegmentedIndex(D, 10, build)
    index.replace_all(_segment(known))
    written = {n: _vector(n) for n in range(50, 62)}
    index.change(written)
    known |= written
    compacting = ThreadPoolExecutor(1).submit(index.compact)
    building.wait(10)
    changed = {n: _vector(n + 1000) for n in range(10, 70, 3)}
    index.change(changed, [0, 1, 2])
    known = {n: v for n, v in (known | changed).items() if n > 2}
    for finished in (False, True):
        if finished:
            goes_on.set()
            compacting.result(10)
        for query in range(20):
            [found] = index.search(_vector(query)[None], 12)
            assert found.numbers.tolist() == _brute(known, _vector(query), 12)
    assert len(index) == len(known)
    for n in range(100, 180):
        index.change({n: _vector(n)})
    assert len(index._snapshot.parts) <= 6


def test_searches_beside_changes_and_compactions_never_miss_what_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fifth of the catalogue is replaced over and over; the rest is found all the while."""
    monkeypatch.setattr(segmented, "_FRESH_ROWS", 16)
    stays = {n: _vector(n) for n in range(80)}
    index, done, wrong = SegmentedIndex(D), threading.Event(), list[int]()
    index.replace_all(_segment(stays))

    def search() -> None:
        while not done.is_set():
            for n, vector in stays.items():
                [found] = index.search(vector[None], 100)
                if n not in found.numbers or len(np.unique(found.numbers)) != len(found.numbers):
                    wrong.append(n)

    searching = [threading.Thread(target=search) for _ in range(2)]
    for thread in searching:
        thread.start()
    for step in range(60):
        gone = 1000 + step % 20
        index.change({1000 + k: _vector(step * 20 + k) for k in range(20) if 1000 + k != gone}, [gone])
        if index.worn:
            index.compact()
    done.set()
    for thread in searching:
        thread.join()
    assert wrong == []
    assert len(index) == 80 + 19
    assert sum(len(part.segment) for part in index._snapshot.parts) < 80 * 4


def test_what_is_written_again_is_found_all_the_while() -> None:
    known = {n: _vector(n) for n in range(300)}
    index, done, missed = SegmentedIndex(D), threading.Event(), list[int]()
    index.change(known)

    def search() -> None:
        while not done.is_set():
            for n in range(0, 300, 7):
                if n not in index.search(known[n][None], 5)[0].numbers:
                    missed.append(n)

    searching = threading.Thread(target=search)
    searching.start()
    for _ in range(200):
        index.change(known)
    done.set()
    searching.join()
    assert missed == []


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


def test_segments_that_died_are_not_searched_nor_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmented, "_MERGED_ROWS", 2048)
    index = SegmentedIndex(D)
    index.replace_all(_segment({n: _vector(n) for n in range(3000)}))
    for start in range(0, 20_480, 256):
        index.change({10_000 + n: _vector(n) for n in range(start, start + 256)})
    many = len(index._snapshot.parts)
    index.change({}, range(10_000, 29_000))
    index.change({50_000 + n: _vector(n) for n in range(1100)})
    assert len(index._snapshot.parts) <= 4 < many
    index.change({}, range(3000))
    [found] = index.search(_vector(20_000)[None], 3)
    assert found.numbers[0] == 30_000
    assert len(index) == 480 + 1100 + 1000


def test_what_changes_between_opening_and_holding_may_be_much() -> None:
    index = SegmentedIndex(D)
    index.open()
    known = {n: _vector(n) for n in range(3000)}
    index.change(known)
    index.hold(np.empty(0, np.int64), np.array(list(known)), np.stack(list(known.values())), 1)
    assert len(index) == 3000


def test_another_catalogue_waits_for_the_compaction_of_the_first() -> None:
    building, goes_on = threading.Event(), threading.Event()

    def build(numbers: np.ndarray, vectors: np.ndarray) -> Segment:
        building.set()
        goes_on.wait(10)
        return scanned(numbers, vectors)

    index = SegmentedIndex(D, 10, build)
    index.replace_all(_segment({n: _vector(n) for n in range(50)}))
    with ThreadPoolExecutor(2) as pool:
        compacting = pool.submit(index.compact)
        building.wait(10)
        replacing = pool.submit(index.replace_all, _segment({n: _vector(n) for n in range(60, 90)}))
        goes_on.set()
        compacting.result(10)
        replacing.result(10)
    assert len(index) == 30


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


def test_an_item_that_no_table_knows_yet_is_found_once_one_does() -> None:
    table, kept, asked = np.arange(100), Places(), list[int]()

    def rows_of(numbers: np.ndarray) -> np.ndarray:
        asked.append(len(numbers))
        return np.where(numbers < known, numbers, -1)

    rows, known = Numbered(np.arange(90, 110)), 100
    for _ in range(2):
        chosen = Selection(table, np.ones(100, bool), rows_of, kept).of(rows)
        assert chosen.tolist() == [True] * 10 + [False] * 10
    assert asked == [20]
    known = 104  # the last row is counted, and not yet looked up
    chosen = Selection(np.arange(105), np.ones(105, bool), rows_of, kept).of(rows)
    assert chosen.tolist() == [True] * 15 + [False] * 5
    assert asked == [20, 10]
    shorter = Selection(table[:95], np.ones(95, bool), rows_of, kept).of(rows, 12)
    assert shorter.tolist() == [True] * 5 + [False] * 7
    assert asked == [20, 10]


def test_what_lost_components_is_made_again_of_the_originals() -> None:
    generator = np.random.default_rng(3)
    many = generator.standard_normal((60, D)).astype(np.float32)
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    original = dict(enumerate(unit))

    def lossy(numbers: np.ndarray, vectors: np.ndarray) -> Segment:
        return scanned(numbers, vectors, "sq8")

    def found(index: SegmentedIndex) -> np.ndarray:
        return index.vectors(list(original))[1]

    index = SegmentedIndex(D, 1, lossy, originals=lambda page: {n: original[n] for n in page})
    index.change(original)
    index.compact()
    once = found(index)
    assert 0 < np.abs(once - unit).max() < 0.02
    for _ in range(5):
        index.compact()
    np.testing.assert_array_equal(found(index), once)
    original[7] = -unit[7]
    index.change({7: original[7]})
    for _ in range(2):
        index.compact()
        np.testing.assert_allclose(found(index)[7], -unit[7], atol=0.02)


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


def test_a_snapshot_taken_before_a_change_does_not_change() -> None:
    index = SegmentedIndex(D)
    index.change({1: _vector(1), 2: _vector(2)})
    before = index._snapshot
    rows, length = before.fresh[: before.length].copy(), before.length
    index.change({1: _vector(3)}, [2])
    assert before.length == length
    assert not before.dead[:length].any()
    np.testing.assert_array_equal(before.fresh[:length], rows)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_of_equal_items_the_same_ones_are_found_wherever_they_stand(seed: int) -> None:
    generator = np.random.default_rng(seed)
    distinct = np.stack([_vector(n) for n in range(60)])
    vectors, numbers = distinct[generator.integers(0, 60, 300)], np.arange(1, 301)
    query = np.stack([_vector(n) for n in range(4)])
    found = []
    for order in (np.arange(300), generator.permutation(300)):
        index = SegmentedIndex(D)
        index.replace_all(scanned(numbers[order], vectors[order]))
        found.append([near.numbers.tolist() for near in index.search(query, 50)])
    assert found[0] == found[1]
