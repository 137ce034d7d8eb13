"""A process that decodes image files for its parent, one at a time, within limits of time and memory.

It imports little besides Pillow, starts in a fraction of a second and ends with its parent. A request is a
`REQUEST` and the file; a reply is a `REPLY` and RGB pixels or an error text.
"""

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import sys

from services.core.errors import InvalidArgument
from services.embedding.images import decoder
from services.embedding.images.headers import MAX_MEMORY

REQUEST = struct.Struct("<II")
"""The target side and the size of the file in bytes."""
REPLY = struct.Struct("<BIII")
"""The kind of reply, the width and height of the image, and the number of bytes that follow."""
IMAGE, INVALID, OUT_OF_MEMORY = range(3)
MAX_SECONDS = 10
"""CPU time limit for one file."""
MEMORY_LIMIT = MAX_MEMORY * 3 // 2
"""Data memory of the process: the limit by the header, plus a margin for its error."""


def main() -> None:
    """Serve the socket whose file descriptor is the first argument, until the parent closes it."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)  # sent to the whole group; the parent drains first
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        while request := receive(parent, REQUEST.size):
            target, size = REQUEST.unpack(request)
            data = receive(parent, size)
            _limit_time()
            _end_with(parent, ends=True)
            header, body = _decode(bytes(data), target)
            _end_with(parent, ends=False)
            parent.sendall(header)
            parent.sendall(body)


def receive(connection: socket.socket, size: int) -> bytearray:
    """Receive `size` bytes; empty if the other side has closed."""
    buffer = bytearray(size)
    view, position = memoryview(buffer), 0
    while position < size:
        count = connection.recv_into(view[position:])
        if not count:
            return bytearray()
        position += count
    return buffer


def _limit_time() -> None:
    """Let the kernel end this process after MAX_SECONDS more CPU time; no decoder can prevent that."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = int(used.ru_utime + used.ru_stime) + MAX_SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))


def _end_with(parent: socket.socket, *, ends: bool) -> None:
    """Let the kernel end this process when the parent ends, even while a decoder runs.

    The parent sends nothing while it waits, so the only event of the socket is that it closes. The signal of
    that event, SIGIO, ends a process that does not handle it (on Linux).
    """
    flags = fcntl.fcntl(parent, fcntl.F_GETFL) & ~os.O_ASYNC
    if ends:
        fcntl.fcntl(parent, fcntl.F_SETOWN, os.getpid())
        flags |= os.O_ASYNC
    fcntl.fcntl(parent, fcntl.F_SETFL, flags)
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    if ends and poll.poll(0):
        sys.exit()  # the parent ended before the signal was enabled


def _decode(data: bytes, target: int) -> tuple[bytes, bytes]:
    """The header and the body of the reply."""
    try:
        image = decoder.load(data, target, "")
        pixels = image.tobytes()
        return REPLY.pack(IMAGE, *image.size, len(pixels)), pixels
    except InvalidArgument as error:
        kind, text = INVALID, error.violations[0].description.encode()
    except MemoryError:
        kind, text = OUT_OF_MEMORY, b""
    return REPLY.pack(kind, 0, 0, len(text)), text


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):  # the parent has ended
        main()
