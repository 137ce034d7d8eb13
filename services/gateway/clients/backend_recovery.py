"""Retries a backend at once when it recovers, although its circuit breakers would wait longer.

While a breaker of a backend is open, the backend's health is checked. Once it changes to serving, the next
call goes through as a trial. If a backend reports healthy all the time while its calls fail, its health
never changes, and the breakers keep their pauses.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from services.gateway.clients.circuit_breaker import CircuitBreaker

Serves = Callable[[], Awaitable[bool]]
_EVERY = 0.5


class BackendRecovery:
    """Watches `backends`, a health check for each by name; `breakers` gives the breakers of a backend."""

    def __init__(
        self,
        backends: Mapping[str, Serves],
        breakers: Callable[[str], list[CircuitBreaker]],
        every: float = _EVERY,
    ) -> None:
        self._backends, self._breakers, self._every = backends, breakers, every
        self._unhealthy: set[str] = set()

    async def run(self) -> None:
        """Check again and again, until canceled."""
        while True:
            await asyncio.sleep(self._every)
            await self.check()

    async def check(self) -> None:
        """Check each backend that has an open breaker, and let calls to a recovered one through."""
        for name, serves in self._backends.items():
            open_breakers = [breaker for breaker in self._breakers(name) if breaker.open]
            if not open_breakers:
                self._unhealthy.discard(name)
            elif not await serves():
                self._unhealthy.add(name)
            elif name in self._unhealthy:
                self._unhealthy.discard(name)
                for breaker in open_breakers:
                    breaker.retry()
