"""Neighbours that keep failing are left alone for a while, so that no call waits for them in vain.

A circuit breaker (Nygard, "Release It!", 2007): after some failures in a row nobody is let through, then one
call at a time finds out whether that has changed.
"""

import time
from collections.abc import Callable

_FAILURES = 5
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_PATIENCE = 0.2


class Breaker:
    """Whether a neighbour is asked; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures, self._pause, self._until, self._trying = 0, _FIRST_PAUSE, 0.0, False

    def wait(self) -> float:
        """Seconds for which it is left alone; 0 lets the caller through, who then tells what came of it."""
        if self._failures < _FAILURES:
            return 0.0
        if (left := self._until - self._clock()) > 0:
            return left
        self._until, self._trying = self._clock() + self._pause, True  # others wait for what this one finds
        return 0.0

    def succeeded(self) -> None:
        """It answered, be it with an error of the caller's."""
        self._failures, self._pause, self._until, self._trying = 0, _FIRST_PAUSE, 0.0, False

    def failed(self, seconds: float) -> None:
        """It was away, or did not answer in `seconds`: too few of them prove nothing."""
        if seconds < _PATIENCE:
            return
        if self._failures < _FAILURES:
            self._failures += 1
            if self._failures < _FAILURES:
                return
        elif self._trying:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            return  # it was on its way before
        self._until, self._trying = self._clock() + self._pause, False
