"""The heap is walked once when all is loaded, and what it holds then is left alone until the next time."""

import gc
import threading
import weakref

import pytest

from services import heap

pytestmark = pytest.mark.usefixtures("own_heap")


class Ring:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_loaded_is_walked_no_more_and_what_is_new_is() -> None:
    loaded = Ring()
    heap.settle()
    assert not any(found is loaded for found in gc.get_objects())
    new, seen = Ring(), weakref.ref(loaded)
    gone = weakref.ref(new)
    del new
    gc.collect()
    assert gone() is None
    assert seen() is loaded


def test_nothing_is_collected_while_what_is_kept_is_loaded() -> None:
    with heap.loading():
        loaded = [Ring() for _ in range(100_000)]
        assert not gc.isenabled()
    assert gc.isenabled()
    assert not any(found is loaded for found in gc.get_objects())
    heap.settle()
    assert all(one.itself is one for one in loaded)


def test_what_fails_to_load_leaves_the_collector_on() -> None:
    with pytest.raises(RuntimeError), heap.loading():
        raise RuntimeError
    assert gc.isenabled()


def test_what_was_loaded_and_is_dropped_goes_when_the_heap_is_settled_again() -> None:
    loaded = Ring()
    heap.settle()
    gone = weakref.ref(loaded)
    del loaded
    gc.collect()
    assert gone() is not None
    heap.settle()
    assert gone() is None


def test_cycles_that_nobody_needs_are_not_kept_for_good() -> None:
    dropped = Ring()
    gone = weakref.ref(dropped)
    del dropped
    heap.settle()
    assert gone() is None


def test_where_another_thread_collects_what_it_has_not_seen_is_not_kept_for_good() -> None:
    begun, goes_on = threading.Event(), threading.Event()

    class Slow(Ring):
        def __del__(self) -> None:
            begun.set()
            goes_on.wait(30)

    Slow()
    other = threading.Thread(target=gc.collect)
    other.start()
    assert begun.wait(30)
    gone = weakref.ref(Ring())
    heap.settle()
    goes_on.set()
    other.join()
    gc.collect()
    assert gone() is None


def test_the_heap_of_another_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_owned", False)
    with heap.loading():
        assert gc.isenabled()
    heap.settle()
    assert not gc.get_freeze_count()
