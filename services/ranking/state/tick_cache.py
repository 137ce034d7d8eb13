"""What is derived from the items and their statistics: computed once per tick, extended for new items."""

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from services.ranking.state.item_stats import ItemStats


class Derived(Protocol):
    """A value over the first `count` rows of the statistics."""

    count: int


D = TypeVar("D", bound=Derived)


class TickCache(Generic[D]):
    """Keeps the value of the latest statistics; any thread may use it.

    `compute` gives the value for statistics. `extend` adds rows up to the length of the statistics, in place,
    and returns False if the value must be computed anew.
    """

    def __init__(self, compute: Callable[[ItemStats], D], extend: Callable[[D, ItemStats], bool]) -> None:
        self._compute, self._extend = compute, extend
        self._cached: tuple[object, D] | None = None
        self._lock = threading.Lock()

    def get(self, stats: ItemStats) -> D:
        """The value for statistics; it may have more rows than these."""
        cached = self._cached
        if cached is not None and cached[0] is stats.origin and cached[1].count >= stats.length:
            return cached[1]
        with self._lock:
            cached = self._cached
            if (
                cached is None
                or cached[0] is not stats.origin
                or (cached[1].count < stats.length and not self._extend(cached[1], stats))
            ):
                self._cached = cached = stats.origin, self._compute(stats)
            return cached[1]
