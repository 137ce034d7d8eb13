"""The fair queue shares by weight, keeps the order of each caller and is bounded."""

import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.core.fair_queue import FairQueue

_puts = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=60)


def queue(capacity: int = 1000, max_weight: int = 1_000_000) -> FairQueue[tuple[str, int, int]]:
    return FairQueue(capacity, max_weight)


@given(puts=_puts, limit=st.integers(1, 5), max_weight=st.integers(1, 100))
def test_every_entry_leaves_once_and_in_order_for_each_caller(
    puts: list[tuple[str, int]], limit: int, max_weight: int
) -> None:
    fair = queue()
    for order, (caller, weight) in enumerate(puts):
        assert fair.put((caller, order, weight), caller, weight)
    fair.close()
    output: list[tuple[str, int, int]] = []
    while entries := fair.take(limit, max_weight):
        assert len(entries) <= limit
        assert len(entries) == 1 or sum(weight for _, _, weight in entries) <= max_weight
        output += entries
    assert sorted(order for _, order, _ in output) == list(range(len(puts)))
    for caller in "abc":
        orders = [order for who, order, _ in output if who == caller]
        assert orders == sorted(orders)


@given(puts=_puts)
def test_waiting_callers_share_the_queue_by_weight(puts: list[tuple[str, int]]) -> None:
    fair = queue()
    remaining = Counter[str]()
    for caller, weight in puts:
        fair.put((caller, 0, weight), caller, weight)
        remaining[caller] += weight
    fair.close()
    callers, served_counts = set(remaining), Counter[str]()
    heaviest = max(weight for _, weight in puts)
    while entries := fair.take(1, 1):
        [(caller, _, weight)] = entries
        served_counts[caller] += weight
        remaining[caller] -= weight
        waiting = [served_counts[other] for other in callers if remaining[other]]
        assert max(waiting, default=0) - min(waiting, default=0) <= 2 * heaviest


def test_a_new_caller_is_next_after_a_large_backlog_of_another() -> None:
    fair = queue()
    for order in range(100):
        fair.put(("large", order, 1000), "large", 1000)
    fair.take(1, 1)
    fair.put(("small", 0, 2), "small", 2)
    assert fair.take(1, 1) == [("small", 0, 2)]


def test_a_queue_is_bounded_by_count_and_weight() -> None:
    by_number, by_weight = queue(capacity=2), queue(max_weight=10)
    assert [by_number.put(("a", n, 1), "a", 1) for n in range(3)] == [True, True, False]
    assert [by_weight.put(("a", n, 6), "a", 6) for n in range(2)] == [True, False]
    assert queue(max_weight=10).put(("a", 0, 11), "a", 11)  # or it could never be written
    by_number.take(1, 1)
    assert by_number.put(("a", 3, 1), "a", 1)


def test_closing_wakes_waiting_callers() -> None:
    fair = queue()
    results: list[list[tuple[str, int, int]]] = []
    thread = threading.Thread(target=lambda: results.append(fair.take(1, 1)))
    thread.start()
    fair.close()
    thread.join(30)
    assert results == [[]]
