"""How the stages of a request share its time, and how a failed stage degrades the response."""

import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from services.core import deadline
from services.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
    VitrineError,
)
from services.gateway.clients.circuit_breaker import CircuitBreaker
from services.gateway.query import Degradation, DegradationCode, StageReport

T = TypeVar("T")
_CODES: dict[type[VitrineError], DegradationCode] = {
    DeadlineExceeded: DegradationCode.TIMEOUT,
    FailedPrecondition: DegradationCode.NOT_READY,
    Unavailable: DegradationCode.UNAVAILABLE,
}


@dataclass(frozen=True)
class StageBudgets:
    """The time of one request: its start by `time.monotonic`, and its seconds in all."""

    start: float
    seconds: float

    def remaining(self, share: float) -> float:
        """Seconds until this share of the time has passed, not below 0."""
        return max(0.0, self.start + share * self.seconds - time.monotonic())


class StageCalls:
    """Calls of backends, with a circuit breaker for each kind of call."""

    def __init__(self) -> None:
        self.breakers = defaultdict[str, CircuitBreaker](CircuitBreaker)

    async def attempt(
        self,
        stage: str,
        call: Awaitable[T],
        seconds: float,
        degraded: list[Degradation],
        *,
        breaker_name: str = "",
    ) -> T | None:
        """The answer to a call, or None and a line in `degraded`.

        Calls of one `breaker_name`, the stage's name by default, share a circuit breaker.

        Raises:
            InvalidArgument: the request is wrong.
        """
        breaker, remaining = self.breakers[breaker_name or stage], deadline.remaining()
        seconds = seconds if remaining is None else min(seconds, remaining)
        if pause := breaker.wait():
            _discard(call)
            message = f"it failed so often that it is not asked for another {pause:.1f} s"
            degraded.append(Degradation(stage, DegradationCode.UNAVAILABLE, message))
            return None
        try:
            with deadline.within(seconds):
                answer = await deadline.wait(call)
        except InvalidArgument as error:
            breaker.succeeded()
            raise error.without("user") from None
        except VitrineError as error:
            if isinstance(error, DeadlineExceeded):
                breaker.failed(seconds)
            elif isinstance(error, Unavailable):
                breaker.failed(math.inf)
            else:
                breaker.succeeded()
            code = _CODES.get(type(error), DegradationCode.FAILED)
            degraded.append(Degradation(stage, code, str(error)))
            return None
        breaker.succeeded()
        return answer


@contextmanager
def timed(name: str, stages: list[StageReport]) -> Iterator[Callable[[int], None]]:
    """Append the report of a stage. The caller passes the number of items to the function that it gets."""
    start, counts = time.perf_counter(), [0]
    yield counts.append
    stages.append(StageReport(name, counts[-1], time.perf_counter() - start))


def _discard(call: Awaitable[T]) -> None:
    """Close a coroutine that was never awaited."""
    if isinstance(call, Coroutine):
        call.close()
