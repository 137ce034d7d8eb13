"""The index against brute force, through any series of changes."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.embedding import index as index_module
from services.embedding.index import SpaceIndex

D = 8


def _vector(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def _brute(known: dict[int, np.ndarray], query: np.ndarray, limit: int) -> list[int]:
    return sorted(known, key=lambda n: (-float(known[n] @ query), n))[:limit]


_steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10_000)), max_size=6),
        st.lists(st.integers(1, 30)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("exact_rows", [0, 20_000])
@given(
    steps=_steps,
    start=st.integers(0, 20),
    query=st.integers(0, 99),
    allowed=st.none() | st.sets(st.integers(1, 40)),
)
@settings(max_examples=60, deadline=None)
def test_search_equals_brute_force_after_any_changes(
    exact_rows: int,
    steps: Sequence[tuple[list[tuple[int, int]], list[int]]],
    start: int,
    query: int,
    allowed: set[int] | None,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_EXACT_ROWS", exact_rows)
        patch.setattr(index_module, "_FRESH_ROWS", 5)
        known = {n: _vector(n) for n in range(1, start + 1)}
        index = SpaceIndex(D)
        stacked = np.array(list(known.values()), np.float32).reshape(-1, D)
        index.replace_all(np.array(list(known), np.int64), stacked)
        for upserts, deletions in steps:
            changed = {n: _vector(seed) for n, seed in upserts}
            gone = [n for n in deletions if n not in changed]
            index.change(changed, gone)
            known = {n: v for n, v in (known | changed).items() if n not in gone}
        qualified = known if allowed is None else {n: v for n, v in known.items() if n in allowed}
        permitted = None if allowed is None else np.array(sorted(allowed), np.int64)
        [found] = index.search(_vector(query)[None], 7, permitted)
    assert len(index) == len(known)
    assert found.numbers.tolist() == _brute(qualified, _vector(query), 7)
    at, vectors = index.vectors([*known, 999])
    assert at.tolist() == list(range(len(known)))
    np.testing.assert_array_equal(
        vectors, stacked if not steps else np.array(list(known.values())).reshape(-1, D)
    )


def test_a_snapshot_taken_before_a_change_does_not_change() -> None:
    index = SpaceIndex(D)
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
        index = SpaceIndex(D)
        index.replace_all(numbers[order], vectors[order])
        found.append([near.numbers.tolist() for near in index.search(query, 50)])
    assert found[0] == found[1]
