"""Items in the order of their scores equal a sorted list."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.core.ordering import best_first

SCORES = st.one_of(st.integers(-2, 2), st.floats(allow_nan=False, width=32))


@given(st.lists(SCORES, max_size=60), st.randoms(use_true_random=False), st.sampled_from([np.float32, float]))
def test_the_best_come_first_and_ties_go_by_hash(scores: list[float], random: object, dtype: type) -> None:
    hashes = list(range(-3, len(scores) - 3))
    random.shuffle(hashes)  # type: ignore[attr-defined] # of random.Random
    values: np.ndarray = np.array(scores, dtype)
    expected = sorted(range(len(scores)), key=lambda index: (-values[index], hashes[index]))
    assert best_first(values, np.array(hashes, np.int64)).tolist() == expected
