"""The index against brute force through any changes and compactions."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.embedding import segmented
from services.embedding.index import Places, Selection
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
