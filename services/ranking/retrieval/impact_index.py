"""Retrieval by shared terms without reading the whole catalog: an inverted index, ordered by impact.

Each term keeps the rows that it can lift highest (impact-ordered postings, Anh and Moffat, 2006). A query
adds up the weights of its terms over these rows, and scores the best of them exactly. So a row that shares
only frequent terms, and is not among the first of any, is missed.
"""

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.accumulator import Scratch
from services.core.kernels import array, kernel
from services.ranking.features.tfidf_similarity import TermQuery, TfidfSimilarity
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.tick_cache import TickCache

_POSTINGS = 400
_MAX_TERMS = 96
_EXACT_FACTOR = 3  # so many times the requested rows are scored exactly
_SCANNED_ROWS = 3000  # a scan of so few rows is as fast
_ROWS, _NUMBERS = array(np.int64), array(np.float64)


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
        boosts, counted = np.full(len(rows), self._base), rows < len(self.boost)
        boosts[counted] = self.boost[rows[counted]]
        return boosts


class ImpactIndex:
    """Rows by similarity to a user's items times `base` + log(1 + interactions of the last week)."""

    def __init__(self, similarity: TfidfSimilarity, table: ItemTable, base: float) -> None:
        self._similarity, self._scratch = similarity, Scratch()
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
        postings, query = self._cache.get(stats), self._similarity.query(seeds, weights, stats)
        if len(allowed) < postings.counted:  # the caller has earlier statistics, of fewer rows
            allowed = np.pad(allowed, (0, postings.counted - len(allowed)))
        if np.count_nonzero(allowed) <= _SCANNED_ROWS:
            rows = np.flatnonzero(allowed)
        else:
            rows = self._best(postings, query, allowed, _EXACT_FACTOR * limit)
            new = np.arange(postings.counted, len(allowed))
            rows = np.concatenate([rows, new[allowed[postings.counted :]]])
        return rows, self._scores(postings, query, rows, stats)

    def scores(
        self, seeds: np.ndarray, weights: np.ndarray, rows: np.ndarray, stats: ItemStats
    ) -> np.ndarray:
        """The exact scores of rows (C,), float64 (C,), 0 for a row that shares no term with the seeds."""
        query = self._similarity.query(seeds, weights, stats)
        return self._scores(self._cache.get(stats), query, rows, stats)

    def _scores(
        self, postings: _Postings, query: TermQuery, rows: np.ndarray, stats: ItemStats
    ) -> np.ndarray:
        similarity = self._similarity.to_query(query, rows, stats)
        return np.asarray(np.where(np.isnan(similarity), 0, similarity) * postings.boosts(rows))

    def _best(self, postings: _Postings, query: TermQuery, allowed: np.ndarray, limit: int) -> np.ndarray:
        known = np.flatnonzero((query.weights > 0) & (query.codes < len(postings.start) - 1))
        if len(known) > _MAX_TERMS:
            known = known[np.argpartition(-query.weights[known], _MAX_TERMS)[:_MAX_TERMS]]
        rows, impacts = _impacts(
            postings.start,
            postings.rows,
            postings.impact,
            query.codes[known],
            query.weights[known],
            np.ascontiguousarray(allowed),
            self._scratch.of(len(allowed)),
        )
        return rows if len(rows) <= limit else rows[np.argpartition(-impacts, limit)[:limit]]


@kernel(_ROWS, array(np.int32), _NUMBERS, _ROWS, _NUMBERS, array(np.bool_), array(np.int32, writable=True))
def _impacts(
    starts: np.ndarray,
    posted: np.ndarray,
    impact: np.ndarray,
    codes: np.ndarray,
    weights: np.ndarray,
    allowed: np.ndarray,
    scratch: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The allowed rows in the postings of codes, int64 (K,), and their impacts, float64 (K,)."""
    size = 0
    for code in codes:
        size += starts[code + 1] - starts[code]
    rows, totals, count = np.empty(size, np.int64), np.zeros(size), 0
    for index in range(len(codes)):
        for posting in range(starts[codes[index]], starts[codes[index] + 1]):
            row = posted[posting]
            if not allowed[row]:
                continue
            place = scratch[row]
            if place < 0 or place >= count or rows[place] != row:
                place = count
                scratch[row], rows[place] = place, row
                count += 1
            totals[place] += weights[index]
    for place in range(count):
        totals[place] *= impact[rows[place]]
    return rows[:count].copy(), totals[:count].copy()
