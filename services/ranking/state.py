"""Behaviour in memory, as of any moment: columns over every event, an index by person.

One thread extends, any thread reads. Derived from the event store and rebuilt from it;
training fills it from a shop's events, so that both see the past through the same code.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from services.ranking.behaviour import Rows


@dataclass(frozen=True)
class Columns:
    """Items of events, one row each, in the order they were recorded.

    `user`, `number`, `sequence` int64; `kind` int16, the event type's place in the shop's list;
    `channel` int16, a place in the state's `channels`, -1 unknown; `occurred`, `recorded` int64,
    microseconds since 1970; `price` of one, float64, NaN unknown; `quantity` int64.
    """

    user: np.ndarray
    number: np.ndarray
    kind: np.ndarray
    channel: np.ndarray
    occurred: np.ndarray
    recorded: np.ndarray
    price: np.ndarray
    quantity: np.ndarray
    sequence: np.ndarray

    def take(self, rows: np.ndarray) -> "Columns":
        """The same columns at `rows`."""
        return Columns(*(getattr(self, f.name)[rows] for f in fields(self)))


MAX_CHANNELS = 16
_WEEK = 7 * 86_400 * 1e6
_DTYPES = (np.int64, np.int64, np.int16, np.int16, np.int64, np.int64, np.float64, np.int64, np.int64)


class BehaviourState:
    """Every event so far; `event_types` maps a type to its weight as an interest."""

    def __init__(self, event_types: Mapping[str, float]) -> None:
        self.event_types = dict(event_types)
        self.kinds = {name: kind for kind, name in enumerate(event_types)}
        self.channels: dict[str, int] = {}
        self.weights = np.array(list(event_types.values()), np.float32)
        self._columns = Columns(*(np.empty(0, dtype) for dtype in _DTYPES))
        self._length = 0
        self._rows_of: dict[int, list[int]] = {}
        self._keys: dict[tuple[str, str], int] = {}
        self._users: set[int] = set()
        self.sequence = 0

    def extend(self, rows: Rows, identities: Mapping[tuple[str, str], int]) -> None:
        """Add what was committed, and who the people are."""
        kinds = np.array([self.kinds.get(name, -1) for name in rows.type], np.int16)
        self.append(
            Columns(
                user=rows.user,
                number=rows.number,
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

    def append(self, new: Columns, identities: Mapping[tuple[str, str], int]) -> None:
        """Add rows in the order of their sequence."""
        start, end = self._length, self._length + len(new.user)
        self._columns = Columns(
            *(_appended(getattr(self._columns, f.name), start, getattr(new, f.name)) for f in fields(new))
        )
        for row, user in enumerate(new.user.tolist(), start):
            self._rows_of.setdefault(user, []).append(row)
        joined = {
            old: key for identity, key in identities.items() if (old := self._keys.get(identity, key)) != key
        }
        for old, key in joined.items():
            # A visitor turned out to be a user. Who reads meanwhile finds what both did under either key.
            moved = self._rows_of.get(old, [])
            self._columns.user[moved] = key
            self._rows_of[key] = sorted([*moved, *self._rows_of.get(key, [])])
        self._keys.update(identities)
        self._users |= {key for (kind, _), key in identities.items() if kind == "user"}
        for old in joined:
            self._rows_of.pop(old, None)
        self._length = end
        if end > start:
            self.sequence = int(new.sequence[-1])

    def forget(self, user_keys: Collection[int], user_id: str = "", visitor_id: str = "") -> None:
        """Leave nothing of people: their rows are of no kind, and so nobody's.

        Ids count too, for a store that has forgotten them already.
        """
        gone = set(user_keys) | self.keys_of(user_id, visitor_id)
        for key in gone:
            self._clear(np.array(self._rows_of.pop(key, []), np.int64))
        self._keys = {identity: key for identity, key in self._keys.items() if key not in gone}
        self._users -= gone

    def drop(self, sequences: Collection[int], user_keys: Collection[int] = ()) -> None:
        """Leave nothing of events, by their sequence, and of people of whom nothing is left."""
        wanted = np.sort(np.fromiter(sequences, np.int64))
        known = self._columns.sequence[: self._length]  # rising
        first, last = (np.searchsorted(known, wanted, side) for side in ("left", "right"))
        rows = np.concatenate([np.empty(0, np.int64), *map(np.arange, first, last)])
        gone = set(rows.tolist())
        for key in set(self._columns.user[rows].tolist()):
            self._rows_of[key] = [row for row in self._rows_of.get(key, ()) if row not in gone]
        self._clear(rows)
        self.forget(user_keys)

    def _clear(self, rows: np.ndarray) -> None:
        self._columns.kind[rows] = -1
        self._columns.user[rows] = self._columns.number[rows] = self._columns.quantity[rows] = 0
        self._columns.price[rows] = np.nan

    def all(self) -> Columns:
        """Every row."""
        return Columns(*(getattr(self._columns, f.name)[: self._length] for f in fields(Columns)))

    def history(
        self, user_id: str, visitor_id: str, before: int, limit: int, upto: int | None = None
    ) -> Columns:
        """What a person did, newest first, at most `limit` rows recorded before a moment.

        `upto` leaves out what was committed after that sequence number. Types that weigh
        nothing as an interest, such as impressions, are left out.
        """
        rows, columns = self._rows(user_id, visitor_id), self._columns
        kinds = columns.kind[rows]
        keep = (columns.recorded[rows] < before) & (kinds >= 0)
        keep &= self.weights[np.maximum(kinds, 0)] > 0
        if upto is not None:
            keep &= columns.sequence[rows] <= upto
        rows = rows[keep]
        order = np.lexsort((-rows, -columns.occurred[rows]))[:limit]
        return columns.take(rows[order])

    def everything(self, user_id: str, visitor_id: str, before: int, limit: int) -> Columns:
        """All that a person did or was shown, newest first, as in `history`."""
        rows, columns = self._rows(user_id, visitor_id), self._columns
        rows = rows[(columns.recorded[rows] < before) & (columns.kind[rows] >= 0)]
        return columns.take(rows[np.lexsort((-rows, -columns.occurred[rows]))[:limit]])

    def ignored(
        self, user_id: str, visitor_id: str, since: int, before: int, upto: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a person was shown from `since` on and did not engage with after: numbers int64 (N,), rising.

        And how often, float32 (N,), each showing halved by a week's age at `before`; both as in `history`.
        """
        rows, columns = self._rows(user_id, visitor_id), self._columns
        keep = (columns.recorded[rows] < before) & (columns.kind[rows] >= 0)
        if upto is not None:
            keep &= columns.sequence[rows] <= upto
        mine = columns.take(rows[keep])
        engaged = self.weights[mine.kind] > 0
        numbers, item = np.unique(mine.number, return_inverse=True)
        last = np.full(len(numbers), np.iinfo(np.int64).min)
        np.maximum.at(last, item[engaged], mine.occurred[engaged])
        shown = ~engaged & (mine.occurred >= since) & (mine.occurred > last[item])
        counts = np.zeros(len(numbers))
        np.add.at(counts, item[shown], np.exp2(-np.maximum(before - mine.occurred[shown], 0) / _WEEK))
        return numbers[counts > 0], counts[counts > 0].astype(np.float32)

    def keys_of(self, user_id: str, visitor_id: str) -> set[int]:
        """The keys of a person; a visitor's who is another user's is not among them."""
        user, visitor = self._keys.get(("user", user_id)), self._keys.get(("visitor", visitor_id))
        if user_id and visitor != user and visitor in self._users:
            visitor = None
        return {key for key in (user, visitor) if key is not None}

    def _rows(self, user_id: str, visitor_id: str) -> np.ndarray:
        """The rows of a person, int64, under either id."""
        mine = [self._rows_of.get(key, []) for key in self.keys_of(user_id, visitor_id)]
        return np.unique(np.array([row for rows in mine for row in rows], np.int64))


def _appended(values: np.ndarray, length: int, new: np.ndarray) -> np.ndarray:
    end = length + len(new)
    if end > len(values):
        grown = np.empty(max(end, 2 * len(values)), values.dtype)
        grown[:length] = values[:length]
        values = grown
    # Rows past a reader's length are not its own, so writing them needs no copy.
    values[length:end] = new
    return values
