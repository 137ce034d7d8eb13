"""The events of a shop in columns."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Events:
    """Events in columns of one length N, ordered by time.

    `user` int32 codes into `user_ids`; `item` int32 codes into `item_ids`, `number` int64 item
    hashes; `kind` int16, the index in the shop's event types; `time` int64, microseconds
    since 1970; `price` float64, NaN unknown; `position` int32, 0 unknown; `session` int32 codes
    into `session_ids`, `channel` int32 codes into `channel_names`, -1 for none.
    """

    event_ids: np.ndarray
    user: np.ndarray
    user_ids: list[str]
    item: np.ndarray
    item_ids: list[str]
    number: np.ndarray
    kind: np.ndarray
    time: np.ndarray
    price: np.ndarray
    position: np.ndarray
    session: np.ndarray
    session_ids: list[str]
    channel: np.ndarray
    channel_names: list[str]

    def __len__(self) -> int:
        return len(self.time)

    def take(self, rows: np.ndarray) -> "Events":
        """The events at `rows`, int64, with the same user, item and session ids."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Events(**{n: v[rows] if isinstance(v, np.ndarray) else v for n, v in columns.items()})

    @classmethod
    def none(cls) -> "Events":
        """No events, as in a new shop."""
        code, number = np.empty(0, np.int32), np.empty(0, np.int64)
        kind, price = np.empty(0, np.int16), np.empty(0, np.float64)
        ids = np.empty(0, object)
        return cls(ids, code, [], code, [], number, kind, number, price, code, code, [], code, [])
