"""A bounded queue in which a caller with much work does not delay a caller with little work.

Self-clocked fair queueing (Golestani, 1994): an entry's tag is the work of its caller that would be done at
its end if all callers with entries shared the queue evenly. Entries leave in the order of their tags. Entries
of one caller stay in their order.
"""

import heapq
import threading
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Tagged(NamedTuple, Generic[T]):
    tag: int
    order: int
    caller: Hashable
    weight: int
    entry: T


class FairQueue(Generic[T]):
    """Entries of several callers: at most `capacity`, with a total weight of at most `max_weight`."""

    def __init__(self, capacity: int, max_weight: int) -> None:
        self._capacity, self._max_weight = capacity, max_weight
        self._heap: list[_Tagged[T]] = []
        self._last_tags: dict[Hashable, int] = {}
        self._tag = self._order = self._weight = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, entry: T, caller: Hashable, weight: int) -> bool:
        """Add an entry of weight 1 or more; False if the queue is full.

        An empty queue accepts an entry of any weight.
        """
        with self._changed:
            full = len(self._heap) >= self._capacity or self._weight + weight > self._max_weight
            if full and self._heap:
                return False
            tag = max(self._tag, self._last_tags.get(caller, 0)) + weight
            self._last_tags[caller] = tag
            self._order += 1
            self._weight += weight
            heapq.heappush(self._heap, _Tagged(tag, self._order, caller, weight, entry))
            self._changed.notify()
        return True

    @property
    def finished(self) -> bool:
        """Whether the queue is closed and empty."""
        with self._changed:
            return self._closed and not self._heap

    def take(self, limit: int, max_weight: int, timeout: float | None = None) -> list[T]:
        """Wait for an entry, then take the next ones: at most `limit`, with a total weight of `max_weight`.

        The first one may weigh more. The list is empty if the queue is finished, or if no entry came within
        `timeout` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._heap or self._closed, timeout)
            entries: list[T] = []
            weight = 0
            while self._heap and len(entries) < limit:
                weight += self._heap[0].weight
                if entries and weight > max_weight:
                    break
                entries.append(self._pop())
            return entries

    def close(self) -> None:
        """Wake the threads that wait in `take`; entries in the queue can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _pop(self) -> T:
        first = heapq.heappop(self._heap)
        self._tag = first.tag
        self._weight -= first.weight
        if self._last_tags[first.caller] == first.tag:  # its last entry
            del self._last_tags[first.caller]
        return first.entry
