"""The cosines of candidates and a user's items by space, computed once for features and models."""

from dataclasses import dataclass

import numpy as np

from services.catalog.item_table import ItemTable
from services.ranking.models.ctr import MAX_HISTORY
from services.ranking.models.half_precision import as_float32
from services.ranking.state.user_query import SEEDS, UserQuery


@dataclass(frozen=True)
class SpaceSimilarities:
    """Cosines float32 (C, U) in one space, 0 where either has no vector.

    `present` bool (C,) says which candidates have a vector, `item_present` bool (U,) which user's items.
    """

    cosines: np.ndarray
    present: np.ndarray
    item_present: np.ndarray


class Similarities:
    """Cosines of candidates with table rows `rows`, int64 (C,), for a user.

    `items` int64 (U,) are the user's items: at most 50 of the session, then so many of the history that there
    are 50 in all, and at least 30 of the history if the user has them. `session` is the number of the former.
    """

    def __init__(self, table: ItemTable, query: UserQuery, rows: np.ndarray) -> None:
        self._table, self._rows = table, rows
        session = query.session[:MAX_HISTORY]
        self.session = len(session)
        history = query.history[: max(SEEDS, MAX_HISTORY - self.session)]
        self.items = np.concatenate([session, history])
        self._spaces: dict[str, SpaceSimilarities | None] = {}

    @property
    def count(self) -> int:
        """The number of candidates."""
        return len(self._rows)

    def space(self, name: str) -> SpaceSimilarities | None:
        """The cosines in a space; None if no item has a vector in it."""
        if name not in self._spaces:
            column = self._table.vectors(name)
            self._spaces[name] = None if column is None else self._similarities(*column)
        return self._spaces[name]

    def _similarities(self, values: np.ndarray, present: np.ndarray) -> SpaceSimilarities:
        return SpaceSimilarities(
            as_float32(values[self._rows]) @ as_float32(values[self.items]).T,
            np.ascontiguousarray(present[self._rows]),
            np.ascontiguousarray(present[self.items]),
        )
