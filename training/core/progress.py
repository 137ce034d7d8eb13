"""Progress of long loops, logged at most every few seconds."""

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
_SECONDS = 10.0
_log = logging.getLogger(__name__)


def track(loop: Iterable[T], name: str) -> Iterator[T]:
    """Yield the items of `loop` and log the progress and the remaining time."""
    total = len(loop) if isinstance(loop, Sized) else 0
    start = last_report = time.monotonic()
    for done, item in enumerate(loop):
        yield item
        now = time.monotonic()
        if now - last_report > _SECONDS and done + 1 < total:
            last_report = now
            remaining = (now - start) / (done + 1) * (total - done - 1)
            _log.info("%s: %d of %d, about %.0f s left", name, done + 1, total, remaining)
