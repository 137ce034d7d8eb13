"""The rank of an item among all items by a numeric attribute, such as a year, a size or a serial number."""

from collections.abc import Sequence

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.growing_array import appended
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.tick_cache import TickCache
from services.ranking.state.user_query import SEEDS, UserQuery

RANK_PARTS = ("above", "session", "history")


class _Ranks:
    """The rank of each row's value among `distinct`, the values of items created before a tick.

    `ranks` float32 (N,), NaN for no value; `highest` is the highest rank.
    """

    def __init__(self, distinct: np.ndarray, values: np.ndarray) -> None:
        self._distinct, self.count = distinct, 0
        self._ranks, self.highest = np.empty(0, np.float32), 0.0
        self.append(values)

    @property
    def ranks(self) -> np.ndarray:
        """See the class."""
        return self._ranks[: self.count]

    def append(self, values: np.ndarray) -> None:
        """Add rows, float64 (M,)."""
        ranks = np.where(np.isnan(values), np.nan, np.searchsorted(self._distinct, values))
        self._ranks = appended(self._ranks, self.count, ranks.astype(np.float32))
        self.highest = float(np.nanmax(ranks, initial=self.highest))
        self.count += len(values)  # last: a reader sees complete rows


class NumericRank:
    """Ranks over the rows of one item table by its numeric attributes; of several values the first counts."""

    def __init__(self, table: ItemTable, names: Sequence[str]) -> None:
        self._table, self._names = table, tuple(names)
        self._caches = {name: self._cache(name) for name in self._names}

    def columns(self, name: str, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> list[np.ndarray]:
        """The columns `RANK_PARTS` of rows (C,), each float32 (C,); NaN for unknown.

        Each is log(1 + n). "above": n is the count of distinct values above the row's. "session" and
        "history": n is the distance in ranks to the nearest item of the session and of the history.
        """
        ranks = self._caches[name].get(stats)
        rank, row_ranks = ranks.ranks, ranks.ranks[rows]
        columns = [np.log1p(ranks.highest - row_ranks)]
        for seeds in (query.session[:SEEDS], query.history[:SEEDS]):
            seed_ranks = rank[seeds]
            seed_ranks = seed_ranks[~np.isnan(seed_ranks)]
            if len(seed_ranks):
                columns.append(np.log1p(np.abs(row_ranks[:, None] - seed_ranks).min(1)))
            else:
                columns.append(np.full(len(rows), np.nan))
        return [np.asarray(column, np.float32) for column in columns]

    def _cache(self, name: str) -> TickCache[_Ranks]:
        def extend(ranks: _Ranks, stats: ItemStats) -> bool:
            ranks.append(self._values(name, ranks.count, stats.length))
            return True

        return TickCache(lambda stats: self._compute(name, stats), extend)

    def _compute(self, name: str, stats: ItemStats) -> _Ranks:
        values = self._values(name, 0, stats.length)
        earlier = ~np.isnan(values) & (self._table.created[: stats.length] <= stats.tick)
        return _Ranks(np.unique(values[earlier]), values)

    def _values(self, name: str, start: int, end: int) -> np.ndarray:
        """The first number of some rows, float64, NaN for none."""
        column = self._table.numbers(name)
        return np.full(end - start, np.nan) if column is None else column[start:end, 0].copy()
