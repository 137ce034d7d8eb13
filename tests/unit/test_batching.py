"""Dynamic batching fills batches, is fair and isolates failures."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from random import Random
from types import TracebackType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from services.embedding.runtime.batching import Batcher, Lane, Model, Rows

BUDGET = 100
POISON = -13


class Desk:
    """A batcher of one model whose rows are (name, length), its threads held; `open` lets them answer.

    A vector is twice its row's name, and its length.
    """

    def __init__(self, *, capacity: int = 10_000, overlaps: bool = False, threads: int = 1) -> None:
        self.batches: list[list[tuple[int, int]]] = []
        self.prepared: list[int] = []
        self._gate = threading.Event()
        self._busy = threading.Semaphore(0)
        model = Model("text", self._begin, BUDGET, capacity, overlaps=overlaps)
        self.batcher = Batcher([model], threads, lambda: self.prepared.append(threading.get_ident()))
        for _ in range(threads):
            self.plug = self.submit([(-1, 1)], Lane.INTERACTIVE)
            assert self._busy.acquire(timeout=10)
        self.batches.clear()

    def _begin(self, rows: Rows) -> Callable[[], np.ndarray]:
        vectors = self._run(rows)
        return lambda: vectors

    def _run(self, rows: Rows) -> np.ndarray:
        self.batches.append(list(rows))
        self._busy.release()
        self._gate.wait(10)
        if any(name == POISON for name, _ in rows):
            raise ArithmeticError("poison")
        return np.array([(2 * name, length) for name, length in rows], np.float32)

    def submit(
        self, rows: list[tuple[int, int]], lane: Lane = Lane.BULK, seconds: float | None = None
    ) -> Future[np.ndarray]:
        return self.batcher.submit("text", rows, np.array([length for _, length in rows]), lane, seconds)

    def open(self) -> None:
        self._gate.set()

    def __enter__(self) -> "Desk":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()
        self.batcher.close()


calls = st.lists(st.lists(st.integers(1, 130), min_size=1, max_size=30), min_size=1, max_size=12)


@given(
    calls=calls, lanes=st.randoms(use_true_random=False), overlaps=st.booleans(), threads=st.integers(1, 4)
)
@settings(deadline=None, max_examples=60)
def test_every_row_runs_once_within_the_budget_and_with_little_padding(
    calls: list[list[int]], lanes: Random, overlaps: bool, threads: int
) -> None:
    with Desk(overlaps=overlaps, threads=threads) as desk:
        futures = [
            desk.submit(
                [(1000 * n + row, length) for row, length in enumerate(lengths)], lanes.choice(list(Lane))
            )
            for n, lengths in enumerate(calls)
        ]
        desk.open()
        for n, (lengths, future) in enumerate(zip(calls, futures, strict=True)):
            expected = [(2 * (1000 * n + row), length) for row, length in enumerate(lengths)]
            np.testing.assert_array_equal(future.result(10), expected)
    for batch in desk.batches:
        padded = max(length for _, length in batch) * len(batch)
        assert len(batch) == 1 or padded <= BUDGET
        assert padded - sum(length for _, length in batch) <= BUDGET // 8


@pytest.mark.parametrize(
    ("rows", "threads", "sizes"),
    [(8, 1, [8]), (8, 2, [4, 4]), (12, 3, [4, 4, 4]), (20, 2, [10, 10]), (4, 4, [2, 2])],
)
def test_waiting_rows_are_split_among_idle_threads_down_to_a_quarter_batch(
    rows: int, threads: int, sizes: list[int]
) -> None:
    together = threading.Barrier(len(sizes))
    batches = []

    def begin(rows: Rows) -> Callable[[], np.ndarray]:
        together.wait(10)  # nobody runs two of them
        batches.append(len(rows))
        return lambda: np.array(rows, np.float32)[:, None]

    batcher = Batcher([Model("text", begin, BUDGET, BUDGET)], threads)
    while batcher._idle < threads:
        time.sleep(0.001)
    future = batcher.submit("text", range(rows), np.full(rows, BUDGET // 10), Lane.BULK)
    np.testing.assert_array_equal(future.result(10)[:, 0], range(rows))
    batcher.close()
    assert sorted(batches) == sizes


def test_threads_initialize_separately_and_one_failure_spares_the_others() -> None:
    with Desk(threads=3) as desk:
        assert len(set(desk.prepared)) == 3
        bad, good = desk.submit([(POISON, 100)]), desk.submit([(n, 100) for n in range(9)])
        desk.open()
        with pytest.raises(ArithmeticError):
            bad.result(10)
        assert len(good.result(10)) == 9


def test_a_flood_of_small_calls_fills_batches() -> None:
    with Desk() as desk:
        futures = [desk.submit([(n, 10)]) for n in range(40)]
        desk.open()
        assert [future.result(10)[0, 0] for future in futures] == [2 * n for n in range(40)]
    assert [len(batch) for batch in desk.batches] == [10] * 4


def test_small_calls_have_priority_and_large_ones_do_not_starve() -> None:
    with Desk() as desk:
        bulk = [desk.submit([(n, 100)], Lane.BULK) for n in (1, 2)]
        idle = desk.submit([(3, 100)], Lane.BACKGROUND)
        small = [desk.submit([(n, 100)], Lane.INTERACTIVE) for n in range(20, 40)]
        desk.open()
        for future in (*bulk, idle, *small):
            future.result(10)
    order = [name for ((name, _),) in desk.batches]
    assert order[0] == 20
    assert order.index(1) < order.index(39)
    assert order.index(3) < order.index(39)
    assert sorted(order) == sorted([1, 2, 3, *range(20, 40)])


def test_a_cancelled_call_is_not_run() -> None:
    with Desk() as desk:
        given_up, late, active = (
            desk.submit([(1, 100)]),
            desk.submit([(2, 100)], seconds=0),
            desk.submit([(3, 100)], seconds=60),
        )
        given_up.cancel()
        desk.open()
        assert active.result(10)[0, 0] == 6
        with pytest.raises(DeadlineExceeded):
            late.result(10)
    assert desk.batches == [[(3, 100)]]


def test_a_full_lane_refuses_calls_but_runs_one_larger_than_its_limit() -> None:
    with Desk(capacity=300) as desk:
        large = desk.submit([(n, 100) for n in range(5)], Lane.INTERACTIVE)
        with pytest.raises(ResourceExhausted, match="text encoder"):
            desk.submit([(9, 100)], Lane.INTERACTIVE)
        bulk = [desk.submit([(n, 100)]) for n in range(9)]
        desk.open()
        assert len(large.result(10)) == 5
        assert [future.result(10)[0, 0] for future in bulk] == [2 * n for n in range(9)]
        assert desk.submit([(9, 100)], Lane.INTERACTIVE).result(10)[0, 0] == 18


def test_a_cancelled_flood_frees_its_room() -> None:
    with Desk(capacity=300) as desk:
        desk.submit([(n, 100) for n in range(3)], Lane.INTERACTIVE).cancel()
        desk.open()
        assert desk.plug.result(10)[0, 0] == -2
        # The thread drops it when it next looks, which a call of another lane makes sure of.
        desk.submit([(1, 1)], Lane.BACKGROUND).result(10)
        assert desk.submit([(9, 100)], Lane.INTERACTIVE).result(10)[0, 0] == 18
    assert [(9, 100)] in desk.batches
    assert desk.batcher.waiting() == {"text": 0}


def test_models_can_be_added_and_removed() -> None:
    with Desk() as desk:
        desk.open()
        ones = Model("other", lambda rows: lambda: np.ones((len(rows), 1), np.float32), BUDGET, BUDGET)
        desk.batcher.add([ones])
        assert desk.batcher.submit("other", [0, 0], np.ones(2), Lane.BULK).result(10).shape == (2, 1)
        assert desk.batcher.finished["other"] == 2
        desk.batcher.remove(["other"])
        assert "other" not in desk.batcher.finished
        assert desk.submit([(4, 1)]).result(10)[0, 0] == 8


def test_a_failing_batch_fails_its_callers_alone() -> None:
    with Desk() as desk:
        bad, good = desk.submit([(POISON, 100), (1, 100)]), desk.submit([(2, 100)])
        desk.open()
        with pytest.raises(ArithmeticError):
            bad.result(10)
        assert good.result(10)[0, 0] == 4


def test_a_batch_starts_while_another_runs_and_a_single_one_does_not_wait() -> None:
    starts = [threading.Event() for _ in range(3)]
    ends = [threading.Event() for _ in range(3)]

    def begin(rows: Rows) -> Callable[[], np.ndarray]:
        (name,) = rows
        starts[name].set()

        def wait() -> np.ndarray:
            assert ends[name].wait(10)
            if name == 1:
                raise ArithmeticError("poison")
            return np.array([[name]], np.float32)

        return wait

    batcher = Batcher([Model("gpu", begin, 1, 10, overlaps=True)])
    first, second, third = (batcher.submit("gpu", [n], np.ones(1), Lane.BULK) for n in range(3))
    assert starts[1].wait(10)  # nothing is done yet
    assert not starts[2].wait(0.05)  # no more than one ahead
    ends[0].set()
    assert first.result(10)[0, 0] == 0
    assert starts[2].wait(10)
    ends[1].set()
    with pytest.raises(ArithmeticError):
        second.result(10)
    ends[2].set()
    assert third.result(10)[0, 0] == 2
    last = batcher.submit("gpu", [2], np.ones(1), Lane.BULK)
    batcher.close()
    assert last.result(0)[0, 0] == 2


def test_a_batch_that_cannot_start_spares_the_running_one() -> None:
    queue_event, end = threading.Event(), threading.Event()

    def begin(rows: Rows) -> Callable[[], np.ndarray]:
        if rows[0] == POISON:
            raise ArithmeticError("poison")
        assert queue_event.wait(10)

        def wait() -> np.ndarray:
            assert end.wait(10)
            return np.array([[rows[0]]], np.float32)

        return wait

    batcher = Batcher([Model("gpu", begin, 1, 10, overlaps=True)])
    first, bad = (batcher.submit("gpu", [name], np.ones(1), Lane.BULK) for name in (1, POISON))
    queue_event.set()
    with pytest.raises(ArithmeticError):
        bad.result(10)
    assert not first.done()
    batcher.remove(["gpu"])
    end.set()
    assert first.result(10)[0, 0] == 1
    assert batcher.totals["gpu"] == 1
    batcher.close()


def test_a_wrong_number_of_vectors_fails_the_callers_but_not_the_thread() -> None:
    row_counts = iter([1, 3, 2])
    model = Model("odd", lambda rows: lambda: np.ones((next(row_counts), 1), np.float32), BUDGET, BUDGET)
    batcher = Batcher([model])
    for _ in range(2):
        with pytest.raises(ValueError, match="odd encoder returned"):
            batcher.submit("odd", [0, 0], np.ones(2), Lane.BULK).result(10)
    assert len(batcher.submit("odd", [0, 0], np.ones(2), Lane.BULK).result(10)) == 2
    batcher.close()


def test_closing_finishes_accepted_calls_and_refuses_new_ones() -> None:
    desk = Desk()
    future = desk.submit([(1, 100), (2, 100)])
    desk.open()
    desk.batcher.close()
    assert len(future.result(0)) == 2
    with pytest.raises(Unavailable):
        desk.submit([(1, 1)])
