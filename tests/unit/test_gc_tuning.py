"""The garbage collector skips loaded objects until the next freeze."""

import gc
import threading
import weakref

import pytest

from services.core import gc_tuning

pytestmark = pytest.mark.usefixtures("tuned_gc")


class Ring:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_loaded_objects_are_frozen_and_new_ones_are_collected() -> None:
    ring = Ring()
    gc_tuning.collect_and_freeze()
    assert not any(instance is ring for instance in gc.get_objects())
    new, loaded_ref = Ring(), weakref.ref(ring)
    new_ref = weakref.ref(new)
    del new
    gc.collect()
    assert new_ref() is None
    assert loaded_ref() is ring


def test_the_collector_is_off_during_loading() -> None:
    with gc_tuning.freeze_loaded():
        rings = [Ring() for _ in range(100_000)]
        assert not gc.isenabled()
    assert gc.isenabled()
    assert not any(instance is rings for instance in gc.get_objects())
    gc_tuning.collect_and_freeze()
    assert all(one.itself is one for one in rings)


def test_a_failed_load_leaves_the_collector_enabled() -> None:
    with pytest.raises(RuntimeError), gc_tuning.freeze_loaded():
        raise RuntimeError
    assert gc.isenabled()


def test_dropped_objects_are_freed_at_the_next_freeze() -> None:
    ring = Ring()
    gc_tuning.collect_and_freeze()
    reference = weakref.ref(ring)
    del ring
    gc.collect()
    assert reference() is not None
    gc_tuning.collect_and_freeze()
    assert reference() is None


def test_garbage_cycles_are_not_frozen_forever() -> None:
    ring = Ring()
    reference = weakref.ref(ring)
    del ring
    gc_tuning.collect_and_freeze()
    assert reference() is None


def test_a_collection_in_another_thread_freezes_no_garbage_forever() -> None:
    start, goes_on = threading.Event(), threading.Event()

    class Slow(Ring):
        def __del__(self) -> None:
            start.set()
            goes_on.wait(30)

    Slow()
    other = threading.Thread(target=gc.collect)
    other.start()
    assert start.wait(30)
    reference = weakref.ref(Ring())
    gc_tuning.collect_and_freeze()
    goes_on.set()
    other.join()
    gc.collect()
    assert reference() is None


def test_gc_tuning_does_nothing_unless_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_tuning, "_enabled", False)
    with gc_tuning.freeze_loaded():
        assert gc.isenabled()
    gc_tuning.collect_and_freeze()
    assert not gc.get_freeze_count()
