"""Sums by key equal those of plain Python, whatever the scratch memory holds from earlier calls."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.accumulator import Accumulator, first_occurrences
from services.core.growing_array import appended
from services.core.ranges import concatenated

# Sizes around the least size of the scratch memory, which grows with the largest of them.
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1279, 1280, 1281, 1600, 5000]))
DTYPES = st.sampled_from([np.int32, np.int64])


@st.composite
def keyed_values(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Keys, their values and the size of the range; the first and the last key are frequent."""
    size = draw(SIZES)
    key = st.one_of(st.integers(0, size - 1), st.sampled_from([0, size - 1]))
    pairs = draw(st.lists(st.tuples(key, st.integers(-8, 8)), max_size=60))
    keys = np.array([key for key, _ in pairs], draw(DTYPES))
    return keys, np.array([value / 4 for _, value in pairs]), size


def check_sums(accumulator: Accumulator, keys: np.ndarray, values: np.ndarray, size: int) -> None:
    expected: Counter[int] = Counter()
    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        expected[key] += value
    distinct, sums = accumulator.sums(keys, values, size)
    assert distinct.dtype == np.int64
    assert len(distinct) == len(expected)
    assert dict(zip(distinct.tolist(), sums.tolist(), strict=True)) == dict(expected)


def check_distinct(accumulator: Accumulator, keys: np.ndarray, size: int) -> None:
    distinct, index = accumulator.distinct(keys, size)
    assert distinct.dtype == index.dtype == np.int64
    assert sorted(distinct.tolist()) == sorted(set(keys.tolist()))
    np.testing.assert_array_equal(distinct[index], keys)


@given(st.lists(keyed_values(), min_size=1, max_size=8))
@settings(deadline=None)
def test_sums_and_distinct_keys_equal_a_counter(calls: list[tuple[np.ndarray, np.ndarray, int]]) -> None:
    accumulator = Accumulator()
    for keys, values, size in calls:
        check_sums(accumulator, keys, values, size)
        check_distinct(accumulator, keys, size)


@given(st.lists(st.one_of(st.integers(0, 20), st.integers(-(1 << 63), (1 << 63) - 1)), max_size=80))
def test_first_occurrences_equal_a_dictionary(keys: list[int]) -> None:
    place: dict[int, int] = {}
    for key in keys:
        place.setdefault(key, len(place))
    distinct, index = first_occurrences(np.array(keys, np.int64))
    assert distinct.tolist() == list(place)
    assert index.tolist() == [place[key] for key in keys]


def test_threads_share_an_accumulator() -> None:
    accumulator = Accumulator()

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(150):
            size = int(generator.choice([3, 50, 2000, 9000]))
            keys = generator.integers(0, size, int(generator.integers(0, 400)))
            check_sums(accumulator, keys, generator.integers(-8, 9, len(keys)) / 4, size)
            check_distinct(accumulator, keys, size)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(work, seed) for seed in range(6)]:
                future.result()
    finally:
        sys.setswitchinterval(interval)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=10), DTYPES)
def test_concatenated_ranges_equal_python_ranges(ranges: list[tuple[int, int]], dtype: type) -> None:
    starts: np.ndarray = np.array([start for start, _ in ranges], dtype)
    sizes: np.ndarray = np.array([size for _, size in ranges], dtype)
    indices = concatenated(starts, sizes)
    assert np.issubdtype(indices.dtype, np.integer)
    assert indices.tolist() == [n for start, size in ranges for n in range(start, start + size)]


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 3), st.sampled_from([(), (2,)]))
def test_an_appended_array_equals_a_list_and_leaves_its_readers_alone(
    sizes: list[int], start: int, shape: tuple[int, ...]
) -> None:
    values, length = np.zeros((start, *shape), np.float32), 0
    expected: list[float] = []
    readers: list[tuple[np.ndarray, list[float]]] = []
    for step, size in enumerate(sizes):
        new = np.full((size, *shape), step, np.float32)
        values = appended(values, length, new)
        expected += [float(step)] * size
        length += size
        readers.append((values[:length], list(expected)))
    for view, seen in readers:
        assert view.dtype == np.float32
        np.testing.assert_array_equal(
            view, np.broadcast_to(np.array(seen).reshape(-1, *[1] * len(shape)), view.shape)
        )


@pytest.mark.parametrize("count", [1, 2, 9])
def test_appending_within_the_room_copies_nothing(count: int) -> None:
    values = appended(np.empty(0), 0, np.arange(count, dtype=float))
    roomy = appended(values, count, np.ones(1))
    assert len(roomy) == 2 * count
    assert appended(roomy, count + 1, np.ones(count - 1)) is roomy
