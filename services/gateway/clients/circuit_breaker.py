"""Circuit breaker (Nygard, "Release It!", 2007): a backend that keeps failing is not called for a while.

After some failures in a row no call goes through. After a pause one call at a time tries the backend again.
"""

import time
from collections.abc import Callable

_FAILURES = 5
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_MIN_SECONDS = 0.2


class CircuitBreaker:
    """Decides whether a backend is called; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures, self._pause, self._until, self._is_trying = 0, _FIRST_PAUSE, 0.0, False

    def wait(self) -> float:
        """Seconds until the next call; 0 lets the caller through, who then reports the outcome."""
        if self._failures < _FAILURES:
            return 0.0
        if (pause := self._until - self._clock()) > 0:
            return pause
        self._until, self._is_trying = self._clock() + self._pause, True  # others wait for this trial
        return 0.0

    @property
    def open(self) -> bool:
        """Whether the backend failed so often that it is not called."""
        return self._failures >= _FAILURES

    def retry(self) -> None:
        """Let the next caller through as a trial, unless a trial is running."""
        if not self._is_trying:
            self._until = 0.0

    def succeeded(self) -> None:
        """Report that the backend answered, even with an error that is the caller's."""
        self._failures, self._pause, self._until, self._is_trying = 0, _FIRST_PAUSE, 0.0, False

    def failed(self, seconds: float) -> None:
        """Report that the backend failed, or did not answer in `seconds`; too short a time does not count."""
        if seconds < _MIN_SECONDS:
            return
        if self._failures < _FAILURES:
            self._failures += 1
            if self._failures < _FAILURES:
                return
        elif self._is_trying:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            return  # this call went out before the breaker opened
        self._until, self._is_trying = self._clock() + self._pause, False
