"""The deadline of the current call, available anywhere in the process.

A server sets it when a call arrives; a call inside the process inherits it.
"""

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

from services.core.errors import DeadlineExceeded

T = TypeVar("T")
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def remaining() -> float | None:
    """Seconds left, at least 0; None if the caller set no deadline."""
    end = _deadline.get()
    return None if end is None else max(0.0, end - time.monotonic())


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Set a deadline in `seconds` for the block, or keep the present one if it is earlier."""
    bounds = [bound for bound in (seconds, remaining()) if bound is not None]
    token = _deadline.set(time.monotonic() + min(bounds) if bounds else None)
    try:
        yield
    finally:
        # When the caller leaves a stream, another task closes it, in another context.
        with suppress(ValueError):
            _deadline.reset(token)


async def wait(awaitable: Awaitable[T], max_seconds: float | None = None) -> T:
    """Wait until the deadline, but at most `max_seconds`; DeadlineExceeded after that."""
    bounds = [bound for bound in (remaining(), max_seconds) if bound is not None]
    try:
        async with asyncio.timeout(min(bounds) if bounds else None):  # unlike `wait_for`, without a task
            return await awaitable
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed") from None
