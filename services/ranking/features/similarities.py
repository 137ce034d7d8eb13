"""The cosines of candidates and a user's items by space, computed once for features and models."""

import numpy as np

from services.catalog.item_table import ItemTable
from services.ranking.models.half_precision import as_float32
from services.ranking.state.user_query import MAX_SEQUENCE, SEEDS, UserQuery


class Similarities:
    """Cosines of candidates with table rows `rows`, int64 (C,), for a user.

    `items` int64 (U,) are the user's items: at most 50 of the session, then so many of the history that there
    are 50 in all, and at least 30 of the history if the user has them. `session` is the number of the former.
    """

    def __init__(self, table: ItemTable, query: UserQuery, rows: np.ndarray) -> None:
        self._table, self._rows = table, rows
        session = query.session[:MAX_SEQUENCE]
        self.session = len(session)
        history = query.history[: max(SEEDS, MAX_SEQUENCE - self.session)]
        self.items = np.concatenate([session, history])
        self._cosines: dict[str, np.ndarray] = {}

    @property
    def count(self) -> int:
        """The number of candidates."""
        return len(self._rows)

    def cosines(self, space: str) -> np.ndarray | None:
        """Cosines float32 (C, U), 0 where either has no vector; None if no item has one."""
        if space not in self._cosines:
            column = self._table.vectors(space)
            if column is None:
                return None
            values, _ = column
            self._cosines[space] = as_float32(values[self._rows]) @ as_float32(values[self.items]).T
        return self._cosines[space]

    def present(self, space: str) -> tuple[np.ndarray, np.ndarray]:
        """Which candidates, bool (C,), and which of the user's items, bool (U,), have a vector in a space."""
        column = self._table.vectors(space)
        if column is None:
            return np.zeros(len(self._rows), bool), np.zeros(len(self.items), bool)
        return np.ascontiguousarray(column[1][self._rows]), np.ascontiguousarray(column[1][self.items])
