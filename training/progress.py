"""Progress of long loops, in the log: at most a line every few seconds, whoever reads it."""

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
_SECONDS = 10.0
_log = logging.getLogger(__name__)


def track(loop: Iterable[T], name: str) -> Iterator[T]:
    """The same items, with a line on how far it is and how long the rest will take."""
    total = len(loop) if isinstance(loop, Sized) else 0
    began = said = time.monotonic()
    for done, item in enumerate(loop):
        yield item
        now = time.monotonic()
        if now - said > _SECONDS and done + 1 < total:
            said = now
            left = (now - began) / (done + 1) * (total - done - 1)
            _log.info("%s: %d of %d, about %.0f s left", name, done + 1, total, left)
