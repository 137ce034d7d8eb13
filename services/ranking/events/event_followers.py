"""The ranking services that follow the writes of one event store."""

from typing import Protocol


class EventFollower(Protocol):
    """A service whose state in memory follows the events of a store."""

    @property
    def event_sequence(self) -> int:
        """The sequence number of the last event in its state."""

    async def follow(self) -> None:
        """Read the events that were committed since; a closed service does nothing."""


class EventFollowers:
    """The services that answer calls: a write returns once each of them reflects it."""

    def __init__(self) -> None:
        self._followers: list[EventFollower] = []

    @property
    def followers(self) -> tuple[EventFollower, ...]:
        """The registered services, in the order of their registration."""
        return tuple(self._followers)

    def register(self, follower: EventFollower) -> None:
        """Let every later write update a service."""
        if follower not in self._followers:
            self._followers.append(follower)

    def unregister(self, follower: EventFollower) -> None:
        """The opposite of `register`; does nothing for a service that is not registered."""
        if follower in self._followers:
            self._followers.remove(follower)
