"""Eligibility: which items of the catalog a request may show. The hard rules hold on every path."""

from collections.abc import Sequence

import numpy as np

from services.catalog import filters
from services.catalog.item_table import ItemTable
from services.gateway.query import RecommendQuery, RequestContext, UserState
from services.gateway.rules.page_builder import FILTER

_MAX_BACKFILL = 20_000


class EligibilityFilter:
    """Eligible items of a table; `popular` int64 (P,) are item hashes, best first."""

    def __init__(self, table: ItemTable, popular: np.ndarray) -> None:
        self._table, self._popular = table, popular
        self._popularity = 0, np.empty(0, np.int64)

    def mask(self, query: RecommendQuery, excluded: frozenset[int]) -> np.ndarray:
        """Which rows are live, available, meet the filter and are not excluded: bool (N,), read-only."""
        mask = self._mask(query, query.condition, excluded)
        mask.flags.writeable = False
        return mask

    def any_eligible(self, query: RecommendQuery) -> bool:
        """Whether any item is eligible, before the user's purchases are known."""
        return bool(self.mask(query, excluded_items(query, None)).any())

    def eligible(self, mask: np.ndarray, item_hashes: np.ndarray) -> np.ndarray:
        """The indices, int64 (K,), of the items, int64 (C,), that a mask of this class allows."""
        rows = self._table.rows(item_hashes)
        known = np.flatnonzero((rows >= 0) & (rows < len(mask)))
        return np.asarray(known[mask[rows[known]]])

    def popular(self, mask: np.ndarray) -> np.ndarray:
        """The bundle's popular items that a mask allows, int64 (K,) hashes, best first."""
        return np.asarray(self._popular[self.eligible(mask, self._popular)])

    def most_popular(self, mask: np.ndarray, condition: filters.Filter, limit: int) -> list[int]:
        """The most popular items that a mask allows and that meet a condition."""
        mask = filters.both(mask, filters.evaluate(condition, self._table))
        return self._by_popularity(np.flatnonzero(mask), limit)

    def backfill(self, context: RequestContext, item_hashes: Sequence[int]) -> list[int]:
        """Eligible items besides `item_hashes`, popular ones first, at most 20,000.

        If the rules may relax the filter, at most as many follow that meet the query's loose condition alone.
        """
        query, mask = context.query, context.eligible.copy()
        rows = self._table.rows(item_hashes)
        rows = rows[(rows >= 0) & (rows < len(mask))]
        loose = np.zeros(len(mask), bool)
        if FILTER in query.rules.relax:
            other = self._mask(query, query.loose_condition, context.excluded)[: len(mask)]
            loose[: len(other)] = other & ~mask[: len(other)]
        mask[rows] = loose[rows] = False
        return [
            *self._by_popularity(np.flatnonzero(mask), _MAX_BACKFILL),
            *self._by_popularity(np.flatnonzero(loose), _MAX_BACKFILL),
        ]

    def _mask(
        self, query: RecommendQuery, condition: filters.Filter | None, excluded: frozenset[int]
    ) -> np.ndarray:
        available = self._table.available(query.as_of)
        if condition is None:
            mask = available.copy()
        else:
            mask = filters.both(available, filters.evaluate(condition, self._table))
        rows = self._table.rows(excluded)
        mask[rows[(rows >= 0) & (rows < len(mask))]] = False
        return mask

    def _by_popularity(self, rows: np.ndarray, limit: int) -> list[int]:
        """The hashes of at most `limit` rows, int64, the bundle's popular items first."""
        best = rows[np.argsort(self._popularity_ranks(rows), kind="stable")[:limit]]
        item_hashes: list[int] = self._table.item_hashes[best].tolist()
        return item_hashes

    def _popularity_ranks(self, rows: np.ndarray) -> np.ndarray:
        """The rank of rows among the bundle's P popular items, from 0; P for all others."""
        length, ranks = self._popularity
        if length < self._table.length:  # rows never move
            length = self._table.length
            ranks = np.full(length, len(self._popular))
            popular_rows = self._table.rows(self._popular)
            present = np.flatnonzero((popular_rows >= 0) & (popular_rows < length))
            ranks[popular_rows[present]] = present
            self._popularity = length, ranks
        of_rows: np.ndarray = ranks[rows]
        return of_rows


def excluded_items(query: RecommendQuery, user_state: UserState | None) -> frozenset[int]:
    """The hashes of items not to show: by the request, the session, and the policies for past items."""
    excluded = set(query.excluded)
    if query.items is None:
        excluded.update(query.user.session_hashes())
    if user_state is not None and query.exclude_purchased:
        excluded.update(user_state.purchased)
    if user_state is not None and query.exclude_viewed:
        excluded.update(user_state.history)
    return frozenset(excluded)
