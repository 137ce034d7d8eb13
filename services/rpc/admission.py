"""Admission control: each kind of call has a limit, which connections share fairly.

Half of a limit is for the first slot of each connection. The other half is for further slots: a connection
may have as many of them as are free, so the first busy connection gets half of them, the next a quarter. This
is the dynamic threshold of Choudhury and Hahne (IEEE/ACM Transactions on Networking, 1998). So a connection
without slots gets one until half the limit of other connections is there, and no limit per connection is set.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from services.core.errors import ResourceExhausted


class AdmissionSlot:
    """The slot of one call within a limit; `further` if its connection had a slot before."""

    def __init__(self, limit: "FairLimit", peer: str, *, further: bool) -> None:
        self._limit, self._peer, self._further, self._counts = limit, peer, further, True

    def yield_to_others(self) -> None:
        """Free the slot for other connections; it still counts for its own connection."""
        if self._counts:
            self._counts = False
            self._limit.total -= 1
            self._limit.further -= self._further

    def free(self) -> None:
        """Free the slot."""
        self.yield_to_others()
        self._limit.drop(self._peer)


class FairLimit:
    """At most `max_calls` calls of a kind at once; `name` is the kind in messages."""

    def __init__(self, name: str, max_calls: int) -> None:
        self.name, self.max_calls, self.total, self.further = name, max_calls, 0, 0
        self._by_peer = Counter[str]()

    @contextmanager
    def slot(self, peer: str) -> Iterator[AdmissionSlot]:
        """A slot for a call of a connection, until the end of the block.

        Raises:
            ResourceExhausted: the server or the connection has as many calls as it may.
        """
        count = self._by_peer[peer]
        if self.total >= self.max_calls:
            raise ResourceExhausted(
                f"the server has {self.total} {self.name} open, as many as it takes at once; try again later"
            )
        if count and count >= self.max_calls // 2 - self.further:
            raise ResourceExhausted(
                f"this connection has {count} {self.name} open, its share at the moment of the "
                f"{self.max_calls} that the server takes at once; let some of them end first"
            )
        slot = AdmissionSlot(self, peer, further=count > 0)
        self._by_peer[peer] += 1
        self.total += 1
        self.further += count > 0
        try:
            yield slot
        finally:
            slot.free()

    def drop(self, peer: str) -> None:
        """Count one call of a connection less."""
        self._by_peer[peer] -= 1
        if not self._by_peer[peer]:
            del self._by_peer[peer]


@dataclass(frozen=True)
class AdmissionLimits:
    """How many calls of each kind a server runs at once, and for how long a stream may be silent.

    A connection can have a quarter of each. The sum of all limits' quarters must be below
    `CONNECTION_STREAMS`.
    """

    calls: int = 2048
    uploads: int = 1024
    feeds: int = 128
    watches: int = 512
    idle_seconds: float = 120.0


CONNECTION_STREAMS = 1024
"""The maximum of HTTP/2 streams of a connection; a client delays further ones.

Only a client that sends headers without messages reaches it, and it blocks only itself.
"""


class Admission:
    """The limits of a server, by the kind of a call.

    Calls have one request and one response, uploads a stream of requests, feeds a stream of responses.
    Watches are the streams of health and reflection. `Health.Check` has no limit, so it answers when all
    limits are reached.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self.idle_seconds = limits.idle_seconds
        self._calls = FairLimit("calls", limits.calls)
        self._uploads = FairLimit("upload streams", limits.uploads)
        self._feeds = FairLimit("feeds", limits.feeds)
        self._watches = FairLimit("health and reflection streams", limits.watches)

    def limit_of(self, method: str, *, requests: bool, responses: bool) -> FairLimit | None:
        """The limit of "package.Service/Method"; `requests` and `responses` say whether these are streams."""
        if method.startswith("grpc."):
            return self._watches if responses else None
        if requests:
            return self._uploads
        return self._feeds if responses else self._calls

    @property
    def open(self) -> Mapping[str, int]:
        """The number of open calls, by kind."""
        limits = {
            "call": self._calls,
            "upload": self._uploads,
            "feed": self._feeds,
            "watch": self._watches,
        }
        return {kind: limit.total for kind, limit in limits.items()}
