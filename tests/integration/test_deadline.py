"""Deadlines apply to calls inside the process."""

import asyncio
from collections.abc import AsyncGenerator

from services.core import deadline


async def stream() -> AsyncGenerator[float | None]:
    with deadline.within(60):
        yield deadline.remaining()
        yield deadline.remaining()


async def test_a_stream_can_be_closed_by_another_task() -> None:
    rows = stream()
    first = await asyncio.create_task(rows.asend(None))
    assert first is not None
    assert 0 < first <= 60
    await asyncio.create_task(rows.aclose())
    assert deadline.remaining() is None


def test_a_nested_call_has_the_deadline_of_its_caller() -> None:
    with deadline.within(1):
        with deadline.within(60):
            seconds = deadline.remaining()
        assert seconds is not None
        assert seconds <= 1
    assert deadline.remaining() is None
