"""How long the caller still waits, wherever in the process that is asked.

A server sets it when a call arrives; a call inside the process sees its caller's.
"""

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

from services.errors import DeadlineExceeded

T = TypeVar("T")
_ends: ContextVar[float | None] = ContextVar("deadline", default=None)


def remaining() -> float | None:
    """Seconds left, not below 0; None when the caller set no deadline."""
    end = _ends.get()
    return None if end is None else max(0.0, end - time.monotonic())


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Let what runs inside end in at most `seconds`, or sooner where a deadline is set already."""
    left = remaining()
    bounds = [bound for bound in (seconds, left) if bound is not None]
    token = _ends.set(time.monotonic() + min(bounds) if bounds else None)
    try:
        yield
    finally:
        with suppress(
            ValueError
        ):  # a stream that its caller left is closed by another task, in its own context
            _ends.reset(token)


async def wait(awaitable: Awaitable[T], at_most: float | None = None) -> T:
    """Wait no longer than the deadline, nor than `at_most` seconds; DeadlineExceeded after that."""
    bounds = [bound for bound in (remaining(), at_most) if bound is not None]
    try:
        return await asyncio.wait_for(awaitable, min(bounds) if bounds else None)
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed") from None
