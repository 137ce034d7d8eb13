"""Indexed reads of the rows of a user equal a full scan."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.ranking.state import user_rows
from services.ranking.state.event_columns import EventColumns, EventState

TYPES = {"impression": 0.0, "click": 0.25, "purchase": 1.0}
WEEK = 7 * 86_400 * 1_000_000
_row = st.tuples(
    st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.integers(0, 40), st.integers(0, 3)
)
_joins = st.tuples(st.sampled_from([1, 3]), st.just(2))
_gone = st.lists(st.integers(1, 60), max_size=6)
_steps = st.lists(st.lists(_row, max_size=25) | _joins | _gone.map(frozenset) | st.integers(1, 3), max_size=8)


def identities(keys: dict[str, int]) -> dict[tuple[str, str], int]:
    return {("visitor" if name == "v" else "user", name): key for name, key in keys.items()}


def state_after(steps: list[Any]) -> EventState:
    """A state after rows, joins of a user's key into which a visitor's goes, deletions and forgetting."""
    state, keys = EventState(TYPES), {"u": 1, "v": 2, "w": 3}
    sequence = 0
    for step in steps:
        if isinstance(step, list):
            users, numbers, kinds, times, delays = (
                np.array([row[at] for row in step], np.int64) for at in range(5)
            )
            users = np.where(users == 2, keys["v"], users)
            sequences = np.arange(sequence + 1, sequence + 1 + len(step))
            sequence += len(step)
            state.append(
                EventColumns(
                    user=users,
                    item_hash=numbers,
                    kind=kinds.astype(np.int16),
                    channel=np.full(len(step), -1, np.int16),
                    occurred=times,
                    recorded=times + delays,
                    price=np.full(len(step), np.nan),
                    quantity=np.ones(len(step), np.int64),
                    sequence=sequences,
                ),
                identities(keys),
            )
        elif isinstance(step, tuple):
            keys["v"] = step[0] if keys["v"] == step[1] else keys["v"]
            state.append(state.all().take(np.empty(0, np.int64)), identities(keys))
        elif isinstance(step, frozenset):
            state.drop(step)
        else:
            state.forget({step})
    return state


def rows_of(state: EventState, user: tuple[str, str], before: int, upto: int | None) -> list[int]:
    """Every row of a person that is of some kind, by looking at each."""
    columns, keys = state.all(), state.keys_of(*user)
    return [
        row
        for row in range(len(columns.user))
        if columns.kind[row] >= 0
        and columns.user[row] in keys
        and columns.recorded[row] < before
        and (upto is None or columns.sequence[row] <= upto)
    ]


@given(
    steps=_steps,
    before=st.integers(0, 45),
    limit=st.integers(1, 12),
    upto=st.none() | st.integers(0, 40),
    since=st.integers(0, 40),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_newest_and_the_ignored_rows_equal_a_full_scan(
    monkeypatch: pytest.MonkeyPatch, steps: list[Any], before: int, limit: int, upto: int | None, since: int
) -> None:
    monkeypatch.setattr(user_rows, "_FIRST_BLOCK", 2)
    state = state_after(steps)
    columns = state.all()

    def newest(rows: list[int]) -> list[int]:
        order = sorted(rows, key=lambda row: (columns.occurred[row], row), reverse=True)
        return [int(columns.sequence[row]) for row in order[:limit]]

    for user in [("u", ""), ("", "v"), ("u", "v"), ("w", ""), ("w", "v"), ("nobody", "")]:
        every = rows_of(state, user, before, None)
        assert state.everything(*user, before, limit).sequence.tolist() == newest(every)
        scan = rows_of(state, user, before, upto)
        engagements = [row for row in scan if columns.kind[row] > 0]
        assert state.history(*user, before, limit, upto).sequence.tolist() == newest(engagements)
        expected: dict[int, float] = {}
        for row in scan:
            number, time = int(columns.item_hash[row]), columns.occurred[row]
            later = [r for r in engagements if columns.item_hash[r] == number and columns.occurred[r] >= time]
            if columns.kind[row] == 0 and time >= since and not later:
                age = max(before - time, 0)
                expected[number] = expected.get(number, 0) + 2 ** (-age / WEEK)
        numbers, counts = state.ignored(*user, since, before, upto)
        assert numbers.tolist() == sorted(expected)
        np.testing.assert_allclose(counts, [expected[n] for n in sorted(expected)], rtol=1e-6)


def test_a_short_history_reads_few_rows() -> None:
    state, count = EventState(TYPES), 50_000
    every = np.arange(count)
    state.append(
        EventColumns(
            user=np.ones(count, np.int64),
            item_hash=every,
            kind=np.full(count, 2, np.int16),
            channel=np.full(count, -1, np.int16),
            occurred=every,
            recorded=every,
            price=np.full(count, np.nan),
            quantity=np.ones(count, np.int64),
            sequence=every + 1,
        ),
        {("user", "u"): 1},
    )
    row_reads: list[int] = []

    def keep(rows: np.ndarray) -> np.ndarray:
        row_reads.append(len(rows))
        return np.ones(len(rows), bool)

    rows = state._rows.of(1).newest(keep, 200)
    assert rows[-1] == count - 1
    assert sum(row_reads) < 1000
    assert state.history("u", "", count, 200).item_hash.tolist() == list(range(count - 1, count - 201, -1))
