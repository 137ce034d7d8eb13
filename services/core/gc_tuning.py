"""Freezes long-lived objects, so that Python's garbage collector skips them.

A full collection stops all threads: for a third of a second with a hundred thousand items. The functions do
nothing in a process that has not called `enable`, such as one that trains or runs tests.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 20_000
"""The number of new objects after which the youngest generation is collected; takes some milliseconds."""
_enabled = False


def enable() -> None:
    """Tune the collector for a process that only serves, and enable this module."""
    global _enabled  # noqa: PLW0603 - the collector is the process's
    _enabled = True
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])


@contextmanager
def freeze_loaded() -> Iterator[None]:
    """Pause collection during the block, and freeze all objects at its end, until `collect_and_freeze`."""
    if not _enabled:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def collect_and_freeze() -> None:
    """Collect all garbage, then freeze all objects until the next call.

    Call it after loading, and after long-lived objects were dropped: otherwise their cycles stay in memory.
    """
    if not _enabled:
        return
    gc.unfreeze()
    collections = gc.get_stats()[-1]["collections"]
    gc.collect()
    if gc.get_stats()[-1]["collections"] > collections:  # otherwise another thread was collecting
        gc.freeze()


def unfreeze() -> None:
    """Unfreeze all objects: at its exit Python does not free frozen cycles."""
    gc.unfreeze()
