"""Runs work that would block the event loop in a thread pool."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services.core.errors import Unavailable

T = TypeVar("T")


async def run_in(pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
    """The result of `function`, run by a thread of the pool; Unavailable once the pool is shut down."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, function)
    except RuntimeError as error:
        if "shutdown" in str(error):
            raise Unavailable("the service is shutting down") from None
        raise
