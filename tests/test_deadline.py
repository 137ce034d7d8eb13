"""Deadlines of calls inside the process."""

import asyncio
from collections.abc import AsyncGenerator

from services import deadline


async def stream() -> AsyncGenerator[float | None]:
    with deadline.within(60):
        yield deadline.remaining()
        yield deadline.remaining()


def test_a_stream_is_closed_by_another_task_than_began_it() -> None:
    async def run() -> None:
        rows = stream()
        first = await asyncio.create_task(rows.asend(None))
        assert first is not None
        assert 0 < first <= 60
        await asyncio.create_task(rows.aclose())
        assert deadline.remaining() is None

    asyncio.run(run())


def test_a_call_inside_a_call_ends_no_later_than_that() -> None:
    with deadline.within(1):
        with deadline.within(60):
            left = deadline.remaining()
        assert left is not None
        assert left <= 1
    assert deadline.remaining() is None
