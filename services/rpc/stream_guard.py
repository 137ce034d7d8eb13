"""Ends streams whose client sends nothing or reads nothing.

HTTP/2 lets a client leave a stream open and silent, or leave messages unread. Either would keep its admission
slot forever.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from services.core.errors import DeadlineExceeded

_END = object()


class ClientNotReading(Exception):
    """The client reads nothing; `write`, of the pending message, ends when the client reads or leaves."""

    def __init__(self, seconds: float, write: "asyncio.Future[None]") -> None:
        self.write = write
        super().__init__(f"nothing was read for {seconds:g} seconds, so the stream was closed; open it again")


class GuardedStream:
    """Both directions of a stream; a client may be silent while it waits for a response."""

    def __init__(self, context: Any, seconds: float) -> None:
        self._context, self._seconds = context, seconds
        self._received = self._answered = 0

    async def requests(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The client's messages.

        Raises:
            DeadlineExceeded: every message has a response, and no message came for `seconds`.
        """
        while True:
            read = asyncio.ensure_future(anext(messages, _END))
            try:
                while not (await asyncio.wait({read}, timeout=self._seconds))[0]:
                    if self._answered >= self._received:
                        raise DeadlineExceeded(
                            f"no message came for {self._seconds:g} seconds, so the stream was closed; open "
                            "another when there is something to send"
                        )
            finally:
                read.cancel()
            message = read.result()
            if message is _END:
                return
            self._received += 1
            yield message

    async def write(self, response: Any) -> None:
        """Send a message; waits while HTTP/2's flow control blocks because the client does not read.

        Raises:
            ClientNotReading: the client read nothing for `seconds`.
        """
        write = asyncio.ensure_future(self._context.write(response))
        write.add_done_callback(_retrieve)
        if not (await asyncio.wait({write}, timeout=self._seconds))[0]:
            raise ClientNotReading(self._seconds, write)
        write.result()
        self._answered += 1


def _retrieve(write: "asyncio.Future[None]") -> None:
    """Retrieve the exception of a write that nobody waits for: a client that left is not an error."""
    if not write.cancelled():
        write.exception()
