"""Looks up host names with separate threads and a timeout.

`getaddrinfo` cannot be interrupted: if a DNS server does not answer, the call blocks its thread for up to
half a minute, depending on `resolv.conf`. No other work uses these threads.
"""

import asyncio
import socket
from collections.abc import Sequence

from services.core.executors import BoundedPool

_THREADS, _MAX_WAITING = 8, 64


class NameLookup:
    """Resolves host names; a look-up takes at most `seconds`."""

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._pool = BoundedPool("name look-up", _THREADS, _MAX_WAITING)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a host, as text, in the resolver's order.

        Raises:
            socket.gaierror: the name is unknown.
            UnicodeError: the name is invalid.
            TimeoutError: no DNS server answers in time.
            ResourceExhausted: too many look-ups are waiting.
        """

        def look_up() -> Sequence[str]:
            results = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(address[0]) for *_, address in results))

        async with asyncio.timeout(self._seconds):
            return await self._pool.run(look_up)

    def close(self) -> None:
        """Stop the look-ups."""
        self._pool.close()
