"""The segmented index equals brute force under changes and compactions."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.embedding.index import segmented_index
from services.embedding.index.id_map import IdMap
from services.embedding.index.segment import Segment, flat_segment
from services.embedding.index.segmented_index import SegmentedIndex
from services.embedding.index.vector_index import PositionCache, Selection

D = 8


def _vector(seed: int) -> np.ndarray:
    """Of unit length, in steps that float16 holds."""
    vector = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    unit: np.ndarray = (vector / np.float32(np.linalg.norm(vector))).astype(np.float16).astype(np.float32)
    return unit


def _segment(vectors: dict[int, np.ndarray]) -> Segment:
    return flat_segment(np.array(list(vectors), np.int64), np.array(list(vectors.values())).reshape(-1, D))


def _select(eligible: set[int], hashes: Sequence[int], places: PositionCache) -> Selection:
    """Of a table whose rows are all numbers that were ever known, in the order they came."""
    numbers = np.array(hashes, np.int64)
    return Selection(numbers, np.isin(numbers, list(eligible)), IdMap(numbers).rows, places)


def _brute(vectors: dict[int, np.ndarray], query: np.ndarray, limit: int) -> list[int]:
    return sorted(vectors, key=lambda n: (-round(float(vectors[n] @ query), 6), n))[:limit]


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
    eligible=st.none() | st.sets(st.integers(1, 40)),
)
@settings(max_examples=100, deadline=None)
def test_search_equals_brute_force_after_any_changes(
    steps: Sequence[tuple[list[tuple[int, int]], list[int], bool]],
    start: int,
    query: int,
    eligible: set[int] | None,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmented_index, "_FRESH_ROWS", 5)
        rows = {n: _vector(n) for n in range(1, start + 1)}
        index, places, hashes = SegmentedIndex(D), PositionCache(), list(rows)
        index.replace_all(_segment(rows))
        for upserts, deletions, compacts in steps:
            changes = {n: _vector(seed) for n, seed in upserts}
            removals = [n for n in deletions if n not in changes]
            index.change(changes, removals)
            hashes += [n for n in changes if n not in hashes]
            rows = {n: v for n, v in (rows | changes).items() if n not in removals}
            if compacts:
                index.compact()
            selection = None if eligible is None else _select(eligible, hashes, places)
            [hits] = index.search(_vector(query)[None], 7, selection)
            candidates = {n: v for n, v in rows.items() if eligible is None or n in eligible}
            assert hits.hashes.tolist() == _brute(candidates, _vector(query), 7)
            assert len(index) == len(rows)
            at, vectors = index.vectors([999, *rows])
            assert at.tolist() == list(range(1, len(rows) + 1))
            np.testing.assert_array_equal(vectors, np.array(list(rows.values())).reshape(-1, D))


def test_changes_during_a_compaction_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmented_index, "_FRESH_ROWS", 5)
    building, goes_on = threading.Event(), threading.Event()

    def build(numbers: np.ndarray, vectors: np.ndarray) -> Segment:
        building.set()
        goes_on.wait(10)
        return flat_segment(numbers, vectors)

    rows = {n: _vector(n) for n in range(50)}
    index = SegmentedIndex(D, 10, build)
    index.replace_all(_segment(rows))
    writes = {n: _vector(n) for n in range(50, 62)}
    index.change(writes)
    rows |= writes
    compacting = ThreadPoolExecutor(1).submit(index.compact)
    building.wait(10)
    changes = {n: _vector(n + 1000) for n in range(10, 70, 3)}
    index.change(changes, [0, 1, 2])
    rows = {n: v for n, v in (rows | changes).items() if n > 2}
    for is_finished in (False, True):
        if is_finished:
            goes_on.set()
            compacting.result(10)
        for query in range(20):
            [hits] = index.search(_vector(query)[None], 12)
            assert hits.hashes.tolist() == _brute(rows, _vector(query), 12)
    assert len(index) == len(rows)
    for n in range(100, 180):
        index.change({n: _vector(n)})
    assert len(index._snapshot.parts) <= 6


def test_concurrent_searches_never_miss_unchanged_items(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fifth of the catalog is replaced over and over; the rest is found all the while."""
    monkeypatch.setattr(segmented_index, "_FRESH_ROWS", 16)
    stays = {n: _vector(n) for n in range(80)}
    index, stop, wrong = SegmentedIndex(D), threading.Event(), list[int]()
    index.replace_all(_segment(stays))

    def search() -> None:
        while not stop.is_set():
            for n, vector in stays.items():
                [hits] = index.search(vector[None], 100)
                if n not in hits.hashes or len(np.unique(hits.hashes)) != len(hits.hashes):
                    wrong.append(n)

    searching = [threading.Thread(target=search) for _ in range(2)]
    for thread in searching:
        thread.start()
    for step in range(60):
        deleted_hash = 1000 + step % 20
        index.change(
            {1000 + k: _vector(step * 20 + k) for k in range(20) if 1000 + k != deleted_hash}, [deleted_hash]
        )
        if index.needs_compaction:
            index.compact()
    stop.set()
    for thread in searching:
        thread.join()
    assert wrong == []
    assert len(index) == 80 + 19
    assert sum(len(part.segment) for part in index._snapshot.parts) < 80 * 4


def test_a_rewritten_item_is_found_at_all_times() -> None:
    vectors = {n: _vector(n) for n in range(300)}
    index, stop, misses = SegmentedIndex(D), threading.Event(), list[int]()
    index.change(vectors)

    def search() -> None:
        while not stop.is_set():
            for n in range(0, 300, 7):
                if n not in index.search(vectors[n][None], 5)[0].hashes:
                    misses.append(n)

    searching = threading.Thread(target=search)
    searching.start()
    for _ in range(200):
        index.change(vectors)
    stop.set()
    searching.join()
    assert misses == []


def test_empty_segments_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmented_index, "_MERGED_ROWS", 2048)
    index = SegmentedIndex(D)
    index.replace_all(_segment({n: _vector(n) for n in range(3000)}))
    for start in range(0, 20_480, 256):
        index.change({10_000 + n: _vector(n) for n in range(start, start + 256)})
    many = len(index._snapshot.parts)
    index.change({}, range(10_000, 29_000))
    index.change({50_000 + n: _vector(n) for n in range(1100)})
    assert len(index._snapshot.parts) <= 4 < many
    index.change({}, range(3000))
    [hits] = index.search(_vector(20_000)[None], 3)
    assert hits.hashes[0] == 30_000
    assert len(index) == 480 + 1100 + 1000


def test_many_changes_between_opening_and_loading_are_applied() -> None:
    index = SegmentedIndex(D)
    index.open()
    vectors = {n: _vector(n) for n in range(3000)}
    index.change(vectors)
    index.reconcile(np.empty(0, np.int64), np.array(list(vectors)), np.stack(list(vectors.values())), 1)
    assert len(index) == 3000


def test_a_second_catalog_waits_for_the_compaction_of_the_first() -> None:
    building, goes_on = threading.Event(), threading.Event()

    def build(numbers: np.ndarray, vectors: np.ndarray) -> Segment:
        building.set()
        goes_on.wait(10)
        return flat_segment(numbers, vectors)

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


def test_an_item_is_found_once_the_table_contains_it() -> None:
    table, places, requests = np.arange(100), PositionCache(), list[int]()

    def rows_of(numbers: np.ndarray) -> np.ndarray:
        requests.append(len(numbers))
        return np.where(numbers < length, numbers, -1)

    rows, length = IdMap(np.arange(90, 110)), 100
    for _ in range(2):
        mask = Selection(table, np.ones(100, bool), rows_of, places).of(rows)
        assert mask.tolist() == [True] * 10 + [False] * 10
    assert requests == [20]
    length = 104  # the last row is counted, and not yet looked up
    mask = Selection(np.arange(105), np.ones(105, bool), rows_of, places).of(rows)
    assert mask.tolist() == [True] * 15 + [False] * 5
    assert requests == [20, 10]
    shorter = Selection(table[:95], np.ones(95, bool), rows_of, places).of(rows, 12)
    assert shorter.tolist() == [True] * 5 + [False] * 7
    assert requests == [20, 10]


def test_lossy_segments_are_rebuilt_from_the_originals() -> None:
    generator = np.random.default_rng(3)
    many = generator.standard_normal((60, D)).astype(np.float32)
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    original = dict(enumerate(unit))

    def lossy(numbers: np.ndarray, vectors: np.ndarray) -> Segment:
        return flat_segment(numbers, vectors, "sq8")

    def search_hashes(index: SegmentedIndex) -> np.ndarray:
        return index.vectors(list(original))[1]

    index = SegmentedIndex(D, 1, lossy, originals=lambda page: {n: original[n] for n in page})
    index.change(original)
    index.compact()
    once = search_hashes(index)
    assert 0 < np.abs(once - unit).max() < 0.02
    for _ in range(5):
        index.compact()
    np.testing.assert_array_equal(search_hashes(index), once)
    original[7] = -unit[7]
    index.change({7: original[7]})
    for _ in range(2):
        index.compact()
        np.testing.assert_allclose(search_hashes(index)[7], -unit[7], atol=0.02)


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
def test_ties_are_broken_alike_wherever_items_are_stored(seed: int) -> None:
    generator = np.random.default_rng(seed)
    distinct = np.stack([_vector(n) for n in range(60)])
    vectors, numbers = distinct[generator.integers(0, 60, 300)], np.arange(1, 301)
    query = np.stack([_vector(n) for n in range(4)])
    hits = []
    for order in (np.arange(300), generator.permutation(300)):
        index = SegmentedIndex(D)
        index.replace_all(flat_segment(numbers[order], vectors[order]))
        hits.append([near.hashes.tolist() for near in index.search(query, 50)])
    assert hits[0] == hits[1]
