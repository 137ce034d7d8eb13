"""Decodes image files in processes that can be killed, so that a hanging decoder costs one image."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

from PIL import Image

from services.core.errors import InvalidArgument, Unavailable
from services.embedding.images import decoder_worker
from services.embedding.images.decoder_worker import MAX_SECONDS, MEMORY_LIMIT, REPLY, REQUEST

MAX_WALL_SECONDS = 6 * MAX_SECONDS
"""Allows for a machine with several times more load than cores."""
DECODED, TIMEOUT, OUT_OF_MEMORY, CRASH = "process", "timeout", "out_of_memory", "crash"


class DecoderProcesses:
    """Up to `count` processes, each started when the others are busy; any thread may call it."""

    def __init__(self, count: int) -> None:
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker() for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)
        self.outcomes: Counter[str] = Counter()
        """How many files were decoded, and how many made a process end, by outcome."""

    @property
    def pids(self) -> list[int]:
        """The ids of the running processes."""
        return [worker.pid for worker in self._workers if worker.pid]

    def load(self, data: bytes, target: int, field: str) -> Image.Image:
        """Decode a file; see `decoder.load`.

        Raises:
            InvalidArgument: as `decoder.load`, or decoding takes too much time or memory.
            Unavailable: after `close`.
        """
        with self._worker() as worker:
            outcome, image = worker.load(data, target)
        self.outcomes[outcome] += 1
        if isinstance(image, str):
            raise InvalidArgument.of(field, image)
        return image

    def close(self) -> None:
        """End all processes; their files in progress fail."""
        for worker in self._workers:
            worker.stop()  # the waiting thread returns it to the queue
        for worker in [self._idle.get() for _ in self._workers]:
            worker.close()
            self._idle.put(worker)

    @contextlib.contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)


class _Worker:
    """One decoder process, restarted after it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._closed = False

    @property
    def pid(self) -> int:
        """The process id; 0 if no process runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def load(self, data: bytes, target: int) -> tuple[str, Image.Image | str]:
        """Decode a file; returns the outcome with the image or the error text."""
        process, connection = self._running()
        try:
            connection.settimeout(MAX_WALL_SECONDS)
            connection.sendall(REQUEST.pack(target, len(data)))
            connection.sendall(data)
            if header := decoder_worker.receive(connection, REPLY.size):
                kind, width, height, size = REPLY.unpack(header)
                body = decoder_worker.receive(connection, size)
                if len(body) == size:  # otherwise the process ended during its reply
                    return _reply(kind, (width, height), body)
        except TimeoutError:
            process.kill()
            return self._end_of(process, f"takes more than {MAX_WALL_SECONDS} seconds to decode")
        except OSError:  # the process has ended
            pass
        return self._end_of(process)

    def stop(self) -> None:
        """End the process, while a thread may wait for it, and start no other."""
        with self._lock:
            self._closed, process = True, self._process
        if process is not None:  # the waiting thread may clear it meanwhile
            process.kill()

    def close(self) -> None:
        """Release the process; no thread may wait for it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _running(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        with self._lock:
            if self._closed:
                raise Unavailable("the service is shutting down")
            if self._process is None or self._connection is None or self._process.poll() is not None:
                self.close()
                self._process, self._connection = _start()
            return self._process, self._connection

    def _end_of(self, process: subprocess.Popen[bytes], timeout: str = "") -> tuple[str, str]:
        """The outcome and error of a process that ended before its reply; the next one starts on demand."""
        code = process.wait()
        self.close()
        if self._closed:
            raise Unavailable("the service is shutting down")
        if -code == signal.SIGXCPU:
            timeout = f"takes more than {MAX_SECONDS} seconds of processor time to decode"
        if timeout:
            return TIMEOUT, timeout
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return CRASH, f"cannot be decoded: the process that decodes it ended with {name}"


def _reply(kind: int, size: tuple[int, int], body: bytearray) -> tuple[str, Image.Image | str]:
    if kind == decoder_worker.IMAGE:
        return DECODED, Image.frombytes("RGB", size, body)
    if kind == decoder_worker.OUT_OF_MEMORY:
        return OUT_OF_MEMORY, f"needs more than {MEMORY_LIMIT >> 20} MiB of memory to decode"
    return DECODED, body.decode()


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a fresh interpreter; a forked process would inherit the locks and memory of this process."""
    parent_end, child_end = socket.socketpair()
    with child_end:
        process = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
            [sys.executable, "-W", "ignore", "-m", decoder_worker.__name__, str(child_end.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[child_end.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    return process, parent_end
