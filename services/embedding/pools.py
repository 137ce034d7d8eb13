"""Work that would hold up the event loop, in a pool of threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services.errors import Unavailable

T = TypeVar("T")


async def run_in(pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
    """What `function` gives, run by a thread of the pool; Unavailable once that is shut down."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, function)
    except RuntimeError as error:
        if "shutdown" in str(error):
            raise Unavailable("the service is shutting down") from None
        raise
