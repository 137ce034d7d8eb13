"""A unit of CPU time: what a fixed loop costs on this machine at this moment."""

import time

_NUMBERS = 4_000_000


def reference_seconds() -> float:
    """The CPU time of the loop in this thread. Tests compare with it: a second means little by itself."""
    start = time.thread_time()
    sum(range(_NUMBERS))
    return time.thread_time() - start
