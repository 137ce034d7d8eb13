"""What is derived from the items and their statistics: computed once per tick, extended for new items."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from services.ranking.state.item_stats import ItemStats


class Rows(Protocol):
    """A value over the first `count` rows of the statistics."""

    count: int


R = TypeVar("R", bound=Rows)


class TickCache(Generic[R]):
    """Adds a value to statistics, where it stays; any thread may use it.

    `compute` gives the value for statistics. `extend` adds rows up to the length of the statistics, in place,
    and returns False if the value must be computed anew.
    """

    def __init__(self, compute: Callable[[ItemStats], R], extend: Callable[[R, ItemStats], bool]) -> None:
        self._compute, self._extend = compute, extend

    def get(self, stats: ItemStats) -> R:
        """The value for statistics; it may have more rows than these."""
        value: R | None = stats.derived.by_cache.get(self)
        if value is not None and value.count >= stats.length:
            return value
        with stats.derived.lock:
            value = stats.derived.by_cache.get(self)
            if value is None or (value.count < stats.length and not self._extend(value, stats)):
                stats.derived.by_cache[self] = value = self._compute(stats)
            return value


def prepare(stats: ItemStats, like: ItemStats) -> None:
    """Derive from statistics all that was derived from others."""
    for cache in list(like.derived.by_cache):
        cache.get(stats)
