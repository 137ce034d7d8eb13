"""A column of few rows reads back what was written."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.columns import Column

MANY = 300  # more than a column holds as recent before it merges them


def values_of(column: Column, row: int) -> list[float]:
    [values] = column.of_rows(np.array([row])).tolist()
    return [value for value in values if not np.isnan(value)]


@pytest.mark.parametrize("row", [0, 5])
def test_one_row_can_be_written_many_times(row: int) -> None:
    column = Column(np.float64, np.nan)
    for value in range(MANY):
        column.put(row, [float(value)])
        assert values_of(column, row) == [float(value)]
        assert column.matches(row + 1, lambda values: values >= 0).tolist() == [False] * row + [True]


def test_the_first_write_can_have_many_values() -> None:
    column, values = Column(np.float64, np.nan), [float(value) for value in range(MANY)]
    column.put(3, values)
    assert values_of(column, 3) == values
    assert column.entries(4)[0].tolist() == [3] * MANY


@given(
    writes=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 130, MANY])), max_size=12),
    times=st.sampled_from([1, 40]),
)
@settings(deadline=None)
def test_a_column_of_few_rows_holds_the_last_write_of_each(writes: list[tuple[int, int]], times: int) -> None:
    column, history = Column(np.float64, np.nan), dict[int, list[float]]()
    for at, (row, count) in enumerate(writes * times):
        history[row] = [float(at)] * count
        column.put(row, history[row])
    assert {row: values_of(column, row) for row in history} == history
