"""The users of the latest requests in memory: Rank needs the user that Retrieve before it has made."""

import numpy as np

from services.catalog.item_table import ItemTable
from services.ranking.state.event_columns import EventColumns, EventState
from services.ranking.state.query_builder import MAX_IMPRESSIONS, User, make_query
from services.ranking.state.user_query import MAX_HISTORY, UserQuery

_MAX_ENTRIES = 64
_Key = tuple[User, int, int | None, int, int]


class QueryCache:
    """Users in rows of `table`, from the events of `state`; `targets` are the kinds of purchases.

    One thread reads users, any thread may clear.
    """

    def __init__(self, state: EventState, table: ItemTable, targets: np.ndarray) -> None:
        self._state, self._table, self._targets = state, table, targets
        self._entries: dict[_Key, tuple[UserQuery, EventColumns]] = {}

    def query(self, user: User, cutoff: int, until_sequence: int | None) -> tuple[UserQuery, EventColumns]:
        """A user before `cutoff`, microseconds since 1970, and the stored events that this is made from."""
        entries = self._entries
        # A new row raises the version before its hash is found, and the sequence after that.
        key = user, cutoff, until_sequence, self._table.version, self._table.sequence
        is_complete = until_sequence is not None and until_sequence <= self._state.sequence
        if is_complete and (entry := entries.get(key)):
            return entry
        ids = user.user_id, user.visitor_id
        past = self._state.history(*ids, cutoff, MAX_HISTORY, until_sequence)
        shown = None
        if self._state.has_impressions:
            shown = self._state.impressions(*ids, cutoff, MAX_IMPRESSIONS, until_sequence)
        entry = make_query(self._state, self._table, user, past, cutoff, self._targets, shown), past
        if is_complete:
            if len(entries) >= _MAX_ENTRIES:
                entries.pop(next(iter(entries)), None)
            entries[key] = entry
        return entry

    def clear(self) -> None:
        """Forget all users, after events were deleted."""
        self._entries = {}  # a new one: a request in progress may add to the other
