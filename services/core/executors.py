"""Thread pools, so that the work of one kind does not wait for another's.

Admission limits bound the queue of a plain pool, which `run_in` uses. `BoundedPool` has a bound of its own.

asyncio has one default pool per process, which `asyncio.to_thread` and `loop.getaddrinfo` share: if a DNS
server does not answer, all other work in that pool waits. So the work that calls wait for runs in pools of
its own, and the default pool is for background work such as loading a bundle.
"""

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from services.core.errors import ResourceExhausted, Unavailable

T = TypeVar("T")
_REQUEST_QUEUE = 1024


async def run_in(pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
    """The result of `function`, run by a thread of the pool; Unavailable once the pool is shut down."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, function)
    except RuntimeError as error:
        if "shutdown" in str(error):
            raise Unavailable("the service is shutting down") from None
        raise


def finish_queued(pool: ThreadPoolExecutor) -> None:
    """Wait until a pool of one thread has run what was queued so far; does nothing once it is shut down.

    A call that timed out leaves its function running, which refers to what is about to be closed.
    """
    with contextlib.suppress(RuntimeError):
        pool.submit(int).result()


class BoundedPool:
    """`threads` threads, and a queue of at most `max_queued` functions.

    The threads are daemons: a function that hangs does not keep the process running.
    """

    def __init__(self, name: str, threads: int, max_queued: int) -> None:
        self._name, self._max_queued = name, max_queued
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed, self._lock = False, threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, function: Callable[[], T]) -> T:
        """Run `function` in a thread; it does not start if its caller leaves before a thread is free.

        Raises:
            ResourceExhausted: the queue is full.
            Unavailable: the pool is closed.
        """
        future: Future[T] = Future()
        with self._lock:  # an entry in a closed queue would wait forever
            if self._closed:
                raise Unavailable("the service is shutting down")
            if self._queue.qsize() >= self._max_queued:
                raise ResourceExhausted(
                    f"{self._max_queued} calls wait for the {self._name} threads; try again later"
                )
            self._queue.put((future, function))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Start no more functions; running ones end by themselves, queued ones raise Unavailable."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            future, function = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if self._closed:
                    raise Unavailable("the service is shutting down")
                future.set_result(function())
            except BaseException as error:  # the caller gets it
                future.set_exception(error)
            del entry, future, function  # otherwise an idle thread keeps them in memory


def request_pool(name: str) -> BoundedPool:
    """A pool for the work of requests, with as many threads as asyncio's default pool."""
    return BoundedPool(name, min(32, (os.cpu_count() or 1) + 4), _REQUEST_QUEUE)
