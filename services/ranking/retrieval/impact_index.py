"""Retrieval by shared terms without reading the whole catalog: an inverted index, ordered by impact.

Each term keeps the rows that it can lift highest (impact-ordered postings, Anh and Moffat, 2006). A query
adds up the weights of its terms over these rows, and scores the best of them exactly. So a row that shares
only frequent terms, and is not among the first of any, is missed.
"""

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.accumulator import Accumulator
from services.core.ranges import concatenated
from services.ranking.features.tfidf_similarity import TfidfSimilarity
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.tick_cache import TickCache

_POSTINGS = 400
_MAX_TERMS = 96
_EXACT_FACTOR = 3  # so many times the requested rows are scored exactly
_SCANNED_ROWS = 3000  # a scan of so few rows is as fast


class _Postings:
    """The rows of each term by impact, at most `_POSTINGS`: `start` int64 (V + 1,), `rows` int32 (E,).

    `boost` float64 (N,) is the popularity factor of a row, `impact` float64 (N,) the boost over the length
    of its vector.
    """

    def __init__(self, similarity: TfidfSimilarity, table: ItemTable, stats: ItemStats, base: float) -> None:
        self._similarity, self._terms = similarity, similarity.terms(stats)
        terms = self._terms
        self.count = self.counted = stats.length
        self._base = base
        self.boost = base + np.log1p(stats.popular[:, 2].astype(np.float64))
        self.impact = self.boost / terms.length[: stats.length]
        useful = np.flatnonzero(self.boost > 0)
        order = useful[np.lexsort((table.item_hashes[useful], -self.impact[useful]))]
        codes = terms.codes[order]
        flat = codes.ravel()
        entries = np.flatnonzero(flat != terms.missing)
        by_code = entries[np.argsort(flat[entries], kind="stable")]
        code = flat[by_code]
        start = np.searchsorted(code, np.arange(terms.missing + 1))
        in_limit = np.arange(len(code)) - start[code] < _POSTINGS
        width = max(codes.shape[1], 1)
        self.rows = order[by_code[in_limit] // width].astype(np.int32)
        self.start = np.searchsorted(code[in_limit], np.arange(terms.missing + 1))

    def extend(self, stats: ItemStats) -> bool:
        """Note that there are new rows, which a query scans; False if the codes of terms have changed."""
        if self._similarity.terms(stats) is not self._terms:
            return False
        self.count = stats.length
        return True

    def boosts(self, rows: np.ndarray) -> np.ndarray:
        """The popularity factors of rows; nobody has interacted with new ones."""
        boosts = np.append(self.boost, self._base)
        return np.asarray(boosts[np.minimum(rows, len(self.boost))])


class ImpactIndex:
    """Rows by similarity to a user's items times `base` + log(1 + interactions of the last week)."""

    def __init__(self, similarity: TfidfSimilarity, table: ItemTable, base: float) -> None:
        self._similarity, self._table, self._accumulator = similarity, table, Accumulator()
        self._cache = TickCache(
            lambda stats: _Postings(similarity, table, stats, base),
            lambda postings, stats: postings.extend(stats),
        )

    def search(
        self, seeds: np.ndarray, weights: np.ndarray, stats: ItemStats, allowed: np.ndarray, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 (K,) of the mask `allowed`, bool (N,), and scores float64 (K,), in no order.

        They contain the best `limit` rows but for those that the postings miss.
        """
        if not len(seeds):
            return np.empty(0, np.int64), np.empty(0)
        postings = self._cache.get(stats)
        if len(allowed) < postings.counted:  # the caller has earlier statistics, of fewer rows
            allowed = np.pad(allowed, (0, postings.counted - len(allowed)))
        if np.count_nonzero(allowed) <= _SCANNED_ROWS:
            rows = np.flatnonzero(allowed)
        else:
            rows = self._best(postings, seeds, weights, stats, allowed, _EXACT_FACTOR * limit)
            new = np.arange(postings.counted, len(allowed))
            rows = np.concatenate([rows, new[allowed[postings.counted :]]])
        return rows, self.scores(seeds, weights, rows, stats)

    def scores(
        self, seeds: np.ndarray, weights: np.ndarray, rows: np.ndarray, stats: ItemStats
    ) -> np.ndarray:
        """The exact scores of rows (C,), float64 (C,), 0 for a row that shares no term with the seeds."""
        similarity = np.nan_to_num(self._similarity.to(seeds, weights, rows, stats))
        return np.asarray(similarity * self._cache.get(stats).boosts(rows))

    def _best(
        self,
        postings: _Postings,
        seeds: np.ndarray,
        weights: np.ndarray,
        stats: ItemStats,
        allowed: np.ndarray,
        limit: int,
    ) -> np.ndarray:
        codes, code_weights = self._similarity.query(seeds, weights, stats)
        known = np.flatnonzero((code_weights > 0) & (codes < len(postings.start) - 1))
        if len(known) > _MAX_TERMS:
            known = known[np.argpartition(-code_weights[known], _MAX_TERMS)[:_MAX_TERMS]]
        starts = postings.start[codes[known]]
        sizes = postings.start[codes[known] + 1] - starts
        rows = postings.rows[concatenated(starts, sizes)]
        usable = allowed[rows]
        rows, totals = self._accumulator.sums(
            rows[usable], np.repeat(code_weights[known], sizes)[usable], len(allowed)
        )
        if len(rows) <= limit:
            return rows
        return rows[np.argpartition(-totals * postings.impact[rows], limit)[:limit]]
