"""Decodes image files within limits of memory and time.

The calling thread decodes an ordinary file. A separate process, which can be killed, decodes a costly one:
many scans, a large image, and every AVIF and HEIC file.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from PIL import Image

from services.embedding.images import decoder
from services.embedding.images.decoder_processes import DecoderProcesses
from services.embedding.images.headers import MAX_MEMORY, ImageHeader, read_header

INTERACTIVE_PROCESSES = 2
MAX_PROCESSES = 8
_THREAD = "thread"


class ByteBudget:
    """Limits the bytes in use over all threads.

    First come, first served; a request larger than the budget waits until nothing else is in use.
    """

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes for the block; waits until they are free."""
        share, ticket = min(size, self._size), object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket and self._free >= share)
            self._waiting.popleft()
            self._free -= share
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += share
                self._changed.notify_all()


class _Resources:
    """The processes and memory of one priority: interactive and bulk calls do not wait for each other."""

    def __init__(self, processes: int, memory: int) -> None:
        self.processes = DecoderProcesses(processes)
        self.in_threads, self.in_processes = ByteBudget(memory), ByteBudget(MAX_MEMORY)


class ImageLoader:
    """Decodes for the whole process; any thread may call it. `close` ends the decoder processes."""

    def __init__(self) -> None:
        count = min(os.cpu_count() or 1, MAX_PROCESSES)
        self._interactive = _Resources(INTERACTIVE_PROCESSES, MAX_MEMORY // 2)
        self._bulk = _Resources(count, MAX_MEMORY)
        self._lock = threading.Lock()
        self._in_threads = 0

    def load(
        self,
        data: bytes,
        target: int,
        field: str = "image.data",
        *,
        header: ImageHeader | None = None,
        interactive: bool = False,
    ) -> Image.Image:
        """Decode a file to the same pixels as `decoder.load`; `interactive` means that a user waits.

        `header` is the result of `read_header` for the same arguments, if the caller has it.

        Raises:
            InvalidArgument: as `decoder.load`, or decoding takes too much time or memory.
            Unavailable: after `close`, for a costly file.
        """
        header = header or read_header(data, target, field)
        resources = self._interactive if interactive else self._bulk
        if header.is_costly:
            with resources.in_processes.taking(header.memory):
                return resources.processes.load(data, target, field)
        with resources.in_threads.taking(header.memory):
            image = decoder.decode(data, header, target, field)
        with self._lock:
            self._in_threads += 1
        return image

    @property
    def outcomes(self) -> Mapping[str, int]:
        """How many files were decoded in threads and in processes, and how many made a process end."""
        both = self._interactive.processes.outcomes + self._bulk.processes.outcomes
        return {_THREAD: self._in_threads, **both}

    @property
    def pids(self) -> list[int]:
        """The ids of the running processes."""
        return [*self._interactive.processes.pids, *self._bulk.processes.pids]

    def close(self) -> None:
        """End the processes; their files in progress fail."""
        self._interactive.processes.close()
        self._bulk.processes.close()
