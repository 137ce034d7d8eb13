"""Where an item stands among all others by a number of the catalogue: a year, a size, a running number."""

from collections.abc import Sequence

import numpy as np

from services.item_table import ItemTable
from services.ranking.moment import Moment
from services.ranking.query import SEEDS, Query

ORDER_PARTS = ("above", "session", "history")


class Order:
    """Ranks over the rows of one item table by its number attributes; of several numbers the first counts."""

    def __init__(self, table: ItemTable, names: Sequence[str]) -> None:
        self._table, self._names = table, tuple(names)
        self._kept: tuple[Moment, dict[str, np.ndarray]] | None = None

    def columns(self, name: str, query: Query, rows: np.ndarray, moment: Moment) -> list[np.ndarray]:
        """Of rows (C,), one column of each of ORDER_PARTS, float32 (C,); NaN for unknown.

        log(1 + n): n how many different numbers are above the row's, and how many steps away the nearest
        item of the session and of the history is.
        """
        rank = self._ranks(moment)[name]
        mine = rank[rows]
        found = [np.log1p(np.nanmax(rank, initial=0) - mine)]
        for known in (query.session[:SEEDS], query.history[:SEEDS]):
            theirs = rank[known]
            theirs = theirs[~np.isnan(theirs)]
            if len(theirs):
                found.append(np.log1p(np.abs(mine[:, None] - theirs).min(1)))
            else:
                found.append(np.full(len(rows), np.nan))
        return [np.asarray(column, np.float32) for column in found]

    def _ranks(self, moment: Moment) -> dict[str, np.ndarray]:
        """Of each attribute the rank of each row's number among the different ones, float32 (N,)."""
        kept = self._kept
        if kept is None or kept[0] is not moment:
            self._kept = kept = moment, {name: self._rank(name, moment) for name in self._names}
        return kept[1]

    def _rank(self, name: str, moment: Moment) -> np.ndarray:
        """A number's place among those of items that were there at the moment."""
        count = len(moment.age)
        rank = np.full(count, np.nan, np.float32)
        numbers = self._table.numbers(name)
        if numbers is not None:
            value = numbers[:count, 0].copy()
            known = ~np.isnan(value)
            there = np.unique(value[known & (self._table.created[:count] <= moment.tick)])
            rank[known] = np.searchsorted(there, value[known])
        return rank
