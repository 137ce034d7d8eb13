"""Events in memory, readable as of any time: columns over every event, and the rows of each user.

One thread writes, any thread reads. The event store is the truth, and a start rebuilds this from it;
training fills it from the events of a shop: both read the past by the same code.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from services.core.growing_array import appended
from services.ranking.state.user_rows import RowRange, UserRows

if TYPE_CHECKING:
    from services.ranking.events.event_store import EventItemRows


@dataclass(frozen=True)
class EventColumns:
    """Items of events, one row each, in the order they were recorded.

    `user`, `item_hash`, `sequence` int64; `kind` int16, the index of the event type in the shop's list;
    `channel` int16, an index in the state's `channels`, -1 unknown; `occurred`, `recorded` int64,
    microseconds since 1970; `price` of one, float64, NaN unknown; `quantity` int64.
    """

    user: np.ndarray
    item_hash: np.ndarray
    kind: np.ndarray
    channel: np.ndarray
    occurred: np.ndarray
    recorded: np.ndarray
    price: np.ndarray
    quantity: np.ndarray
    sequence: np.ndarray

    def take(self, rows: np.ndarray) -> "EventColumns":
        """The same columns at `rows`."""
        return EventColumns(*(getattr(self, f.name)[rows] for f in fields(self)))


MAX_CHANNELS = 16
_WEEK = 7 * 86_400 * 1e6
_DTYPES = (np.int64, np.int64, np.int16, np.int16, np.int64, np.int64, np.float64, np.int64, np.int64)


class EventState:
    """Every event so far; `event_types` maps a type to its weight as an interest."""

    def __init__(self, event_types: Mapping[str, float]) -> None:
        self.event_types = dict(event_types)
        self.kinds = {name: kind for kind, name in enumerate(event_types)}
        self.channels: dict[str, int] = {}
        self.weights = np.array(list(event_types.values()), np.float32)
        self.has_impressions = bool((self.weights == 0).any())
        """Whether the shop has event types of weight 0."""
        self._columns = EventColumns(*(np.empty(0, dtype) for dtype in _DTYPES))
        self._length = 0
        self._rows = UserRows()
        self._keys: dict[tuple[str, str], int] = {}
        self._users: set[int] = set()
        self.sequence = 0

    def extend(self, rows: "EventItemRows", identities: Mapping[tuple[str, str], int]) -> None:
        """Add committed rows; `identities` maps ("user" or "visitor", id) to the key of a user."""
        kinds = np.array([self.kinds.get(name, -1) for name in rows.type], np.int16)
        self.append(
            EventColumns(
                user=rows.user,
                item_hash=rows.item_hash,
                kind=kinds,
                channel=self.channel_codes(rows.channel),
                occurred=rows.occurred,
                recorded=rows.recorded,
                price=rows.price,
                quantity=rows.quantity,
                sequence=rows.sequence,
            ),
            identities,
        )

    def channel_codes(self, names: Sequence[str]) -> np.ndarray:
        """The code of each channel, int16, new ones added as long as there are fewer than 16."""
        for name in names:
            if name and name not in self.channels and len(self.channels) < MAX_CHANNELS:
                self.channels[name] = len(self.channels)
        return np.array([self.channels.get(name, -1) for name in names], np.int16)

    def append(self, new: EventColumns, identities: Mapping[tuple[str, str], int]) -> None:
        """Add rows in the order of their sequence."""
        start, end = self._length, self._length + len(new.user)
        self._columns = EventColumns(
            *(appended(getattr(self._columns, f.name), start, getattr(new, f.name)) for f in fields(new))
        )
        self._rows.add(new.user, start, self._columns.occurred)
        self.identify(identities)
        self._length = end
        if end > start:
            self.sequence = int(new.sequence[-1])

    def identify(self, identities: Mapping[tuple[str, str], int]) -> None:
        """Take over the keys of users, by ("user" or "visitor", id)."""
        joined = {
            old: key for identity, key in identities.items() if (old := self._keys.get(identity, key)) != key
        }
        for old, key in joined.items():
            # A visitor is a user from now on. Meanwhile a reader finds the events of both under either key.
            self._columns.user[self._rows.of(old).all()] = key
            self._rows.copy(old, key, self._columns.occurred)
        self._keys.update(identities)
        self._users |= {key for (kind, _), key in identities.items() if kind == "user"}
        for old in joined:
            self._rows.pop(old)

    def forget(self, user_keys: Collection[int], user_id: str = "", visitor_id: str = "") -> None:
        """Erase users, by their keys and by ids, which the store may have deleted already."""
        erased = set(user_keys) | self.keys_of(user_id, visitor_id)
        for key in erased:
            self._clear(self._rows.pop(key))
        self._keys = {identity: key for identity, key in self._keys.items() if key not in erased}
        self._users -= erased

    def drop(self, sequences: Collection[int], user_keys: Collection[int] = ()) -> None:
        """Erase events, by their sequence, and users who have no events any more."""
        dropped = np.sort(np.fromiter(sequences, np.int64))
        ordered = self._columns.sequence[: self._length]  # in ascending order
        first, last = (np.searchsorted(ordered, dropped, side) for side in ("left", "right"))
        rows = np.concatenate([np.empty(0, np.int64), *map(np.arange, first, last)])
        for key in set(self._columns.user[rows].tolist()):
            self._rows.drop(key, rows)
        self._clear(rows)
        self.forget(user_keys)

    def _clear(self, rows: np.ndarray) -> None:
        self._columns.kind[rows] = -1
        self._columns.user[rows] = self._columns.item_hash[rows] = self._columns.quantity[rows] = 0
        self._columns.price[rows] = np.nan

    def all(self) -> EventColumns:
        """Every row."""
        return EventColumns(*(getattr(self._columns, f.name)[: self._length] for f in fields(EventColumns)))

    def history(
        self, user_id: str, visitor_id: str, before: int, limit: int, until_sequence: int | None = None
    ) -> EventColumns:
        """The interactions of a user, newest first: at most `limit` rows recorded before a time.

        `until_sequence` leaves out events committed after that sequence number. Event types of weight 0,
        such as impressions, are left out.
        """
        return self._latest(self.weights > 0, user_id, visitor_id, before, limit, until_sequence)

    def everything(self, user_id: str, visitor_id: str, before: int, limit: int) -> EventColumns:
        """The interactions and impressions of a user, newest first, as in `history`."""
        return self._latest(self.weights >= 0, user_id, visitor_id, before, limit)

    def impressions(
        self, user_id: str, visitor_id: str, before: int, limit: int, until_sequence: int | None = None
    ) -> EventColumns:
        """The impressions of a user, newest first, as in `history`: the events of types of weight 0."""
        return self._latest(self.weights == 0, user_id, visitor_id, before, limit, until_sequence)

    def ignored(
        self, user_id: str, visitor_id: str, since: int, before: int, until_sequence: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A user's impressions since a time without a later interaction: item hashes int64 (N,), ascending.

        And their counts, float32 (N,): the weight of an impression halves with every week of its age at
        `before`. `before` and `until_sequence` are as in `history`.
        """
        ranges, columns = self._ranges(user_id, visitor_id), self._columns
        # An interaction before `since` is not later than an impression of this range.
        rows = _union([part.since(since, columns.occurred) for part in ranges])
        keep = (columns.recorded[rows] < before) & (columns.kind[rows] >= 0)
        if until_sequence is not None:
            keep &= columns.sequence[rows] <= until_sequence
        rows = rows[keep]
        occurred, interaction = columns.occurred[rows], self.weights[columns.kind[rows]] > 0
        hashes, item = np.unique(columns.item_hash[rows], return_inverse=True)
        last = np.full(len(hashes), np.iinfo(np.int64).min)
        np.maximum.at(last, item[interaction], occurred[interaction])
        ignored = ~interaction & (occurred > last[item])
        counts = np.zeros(len(hashes))
        np.add.at(counts, item[ignored], np.exp2(-np.maximum(before - occurred[ignored], 0) / _WEEK))
        return hashes[counts > 0], counts[counts > 0].astype(np.float32)

    def _latest(
        self,
        of_kinds: np.ndarray,
        user_id: str,
        visitor_id: str,
        before: int,
        limit: int,
        until_sequence: int | None = None,
    ) -> EventColumns:
        """The events of a user whose kind is in a mask, bool (K,), newest first, as in `history`."""
        ranges, columns = self._ranges(user_id, visitor_id), self._columns

        def keep(rows: np.ndarray) -> np.ndarray:
            kinds = columns.kind[rows]
            mask = (columns.recorded[rows] < before) & (kinds >= 0)
            mask &= of_kinds[np.maximum(kinds, 0)]
            if until_sequence is not None:
                mask &= columns.sequence[rows] <= until_sequence
            return np.asarray(mask)

        return columns.take(_newest(ranges, columns.occurred, keep, limit))

    def keys_of(self, user_id: str, visitor_id: str) -> set[int]:
        """The keys of a user; the key of a visitor who belongs to another user is left out."""
        user, visitor = self._keys.get(("user", user_id)), self._keys.get(("visitor", visitor_id))
        if user_id and visitor != user and visitor in self._users:
            visitor = None
        return {key for key in (user, visitor) if key is not None}

    def _ranges(self, user_id: str, visitor_id: str) -> list[RowRange]:
        """The rows of a user under either id; some may be in both while a visitor becomes a user."""
        return [self._rows.of(key) for key in self.keys_of(user_id, visitor_id)]


def _union(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows that are in any part, int64 (N,), in ascending order."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))


def _newest(
    ranges: Sequence[RowRange],
    occurred: np.ndarray,
    keep: Callable[[np.ndarray], np.ndarray],
    limit: int,
) -> np.ndarray:
    """The newest rows for which `keep` is true, int64 (N,), the newest first."""
    rows = _union([part.newest(keep, limit) for part in ranges])
    return rows[np.lexsort((-rows, -occurred[rows]))[:limit]]
