"""The rows of item hashes equal a dictionary while they grow."""

import sys
import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.hash_rows import HashRows

LARGEST = np.iinfo(np.int64).max
HASHES = st.one_of(st.integers(-LARGEST - 1, LARGEST), st.integers(0, 60), st.just(LARGEST))
MANY = 33


@given(
    st.lists(st.tuples(st.lists(HASHES, max_size=120), st.booleans()), max_size=6),
    st.lists(HASHES, max_size=2 * MANY),
)
@settings(deadline=None)
def test_look_ups_equal_a_dictionary(steps: list[tuple[list[int], bool]], others: list[int]) -> None:
    rows, expected = HashRows(), dict[int, int]()
    for hashes, indexes in steps:
        for item_hash in hashes:
            if item_hash not in expected:
                expected[item_hash] = len(expected)
                rows.add(item_hash, expected[item_hash])
        if indexes:
            rows.index()
        queries = [*others, *expected, *others][: 3 * MANY]
        for query in (queries, queries[: MANY - 2], [*expected], []):
            answer = [expected.get(item_hash, -1) for item_hash in query]
            for asked in (query, iter(query), np.array(query, np.int64)):
                found = rows.rows(asked)
                assert found.dtype == np.int64
                assert found.tolist() == answer
        for item_hash in [*others, *expected]:
            assert rows.get(item_hash) == expected.get(item_hash)
        assert rows.items() == list(expected.items())


def test_a_reader_finds_every_hash_that_was_added_before() -> None:
    rows, count, errors = HashRows(), [0], list[str]()
    hashes = np.random.default_rng(0).permutation(np.arange(-3000, 3000) * 1_000_003)

    def read() -> None:
        generator = np.random.default_rng(1)
        while count[0] < len(hashes):
            known = count[0]
            queried = generator.integers(0, len(hashes), 200)
            found = rows.rows(hashes[queried])
            is_known = queried < known
            if not (found[is_known] == queried[is_known]).all():
                errors.append(f"a hash of the first {known} is missing")
            if not np.isin(found[~is_known], [-1, *queried[~is_known]]).all():
                errors.append("a hash has the row of another one")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for row, item_hash in enumerate(hashes.tolist()):
            rows.add(item_hash, row)
            count[0] = row + 1
            rows.index()
    finally:
        count[0] = len(hashes)
        for reader in readers:
            reader.join()
        sys.setswitchinterval(interval)
    assert errors == []
