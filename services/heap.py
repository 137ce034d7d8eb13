"""What a serving process keeps is not walked again and again by Python's collector of cycles.

A full collection stops every thread, at any time: for a third of a second with a hundred thousand items.
Nothing happens in a process that does not `own` its heap, as one that runs tests or trains.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 20_000
"""So many new objects cost a collection of the youngest, some milliseconds."""
_owned = False


def own() -> None:
    """Collect as this process, which does nothing but serve, does best."""
    global _owned  # noqa: PLW0603 - the collector is the process's
    _owned = True
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])


@contextmanager
def loading() -> Iterator[None]:
    """Collect nothing meanwhile, and leave what is there at the end out of collections, until `settle`."""
    if not _owned:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def settle() -> None:
    """Collect all, then leave what is there out of collections, until this is called again.

    To be called when what is kept was loaded, and when something that was kept is gone: else its cycles stay.
    """
    if not _owned:
        return
    gc.unfreeze()
    before = gc.get_stats()[-1]["collections"]
    gc.collect()
    if gc.get_stats()[-1]["collections"] > before:  # else another thread is collecting: nothing was done
        gc.freeze()
