"""The training set of CTR head and reranker: rows of past queries and of logged pages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.data.config import ShopConfig
from training.data.shop import ShopData
from training.examples import queries
from training.examples.feature_rows import FeatureRows, evaluation_rows, page_rows, training_rows
from training.examples.point_in_time import PointInTime
from training.examples.queries import EvalQuery

_ROWS = 150_000
"""Few baskets keep more candidates each, up to about so many rows: then lists are nearly complete."""
_CANDIDATES = 200, 1000
FEW = 500
"""Fewer baskets are cross-validated; of more, a late fifth is at least a hundred."""
_MAX_VALIDATION = 400


@dataclass(frozen=True)
class TrainingSet:
    """Training data of the rankers.

    `rows` are candidates of past queries. The CTR head is trained on `ctr_rows` with `labels`,
    float32 (N, T): the rows of logged pages if the shop logs impressions (`has_impressions`), else `rows`.
    The reranker is trained on logged pages as well; `positions` int64 (N,) are those of the rows on their
    pages, 0 without pages. `validation` are all candidates of queries of the same time, if baskets are few:
    models are chosen by cross-validation then. A part of a training set has none.
    """

    rows: FeatureRows
    ctr_rows: FeatureRows
    labels: np.ndarray
    positions: np.ndarray
    types: list[str]
    has_impressions: bool
    validation: FeatureRows | None = None

    def before(self, until: int) -> "TrainingSet":
        """The part before `until`, microseconds since 1970."""
        return self.where(lambda query: query.as_of < until)

    def since(self, time: int) -> "TrainingSet":
        """The part from a time on, microseconds since 1970."""
        return self.where(lambda query: query.as_of >= time)

    def where(self, condition: Callable[[EvalQuery], bool]) -> "TrainingSet":
        """The queries and pages that fulfil a condition."""
        return self._take(
            np.flatnonzero([condition(q) for q in self.rows.eval_queries]),
            np.flatnonzero([condition(q) for q in self.ctr_rows.eval_queries]),
        )

    def sample(self, limit: int) -> "TrainingSet":
        """A random sample of at most `limit` queries and `limit` pages, in their order."""
        # The same sample if both are the same rows.
        return self._take(_sample(len(self.rows.size), limit), _sample(len(self.ctr_rows.size), limit))

    def _take(self, queries: np.ndarray, ctr_queries: np.ndarray) -> "TrainingSet":
        """Some of the queries of `rows` and of `ctr_rows`, rising int64."""
        label_rows = np.isin(self.ctr_rows.group(), ctr_queries)
        return TrainingSet(
            self.rows.take(queries),
            self.ctr_rows.take(ctr_queries),
            self.labels[label_rows],
            self.positions[label_rows],
            self.types,
            self.has_impressions,
        )


def make_training_set(
    past: PointInTime,
    shop: ShopData,
    settings: ShopConfig,
    training_queries: list[EvalQuery],
    since: int,
    eval_queries: Sequence[EvalQuery] = (),
    allowed: np.ndarray | None = None,
) -> TrainingSet | None:
    """The training set of queries and pages from `since` on; None if no target is among the candidates.

    If the queries are few, `eval_queries` of the same time make the validation, over the table rows that are
    `allowed`, bool (M,).
    """
    selected = _sample_queries(training_queries, settings.ranking.max_queries)
    candidates = settings.ranking.candidates_per_query
    if candidates is None:
        candidates = int(np.clip(_ROWS // max(len(selected), 1), *_CANDIDATES))
    rows = training_rows(past, selected, candidates, settings.ranking.cold_start_dropout)
    if rows is None:
        return None
    pages, page_labels, types = queries.make_pages(
        shop.events, dict(settings.event_types), since, settings.ranking.max_pages
    )
    weights = np.array([settings.event_types[name] for name in types], np.float32)
    page_data = page_rows(past, pages, page_labels, weights, settings.ranking.cold_start_dropout)
    if page_data is not None:
        return TrainingSet(rows, *page_data, types, has_impressions=True)
    target = "_or_".join(settings.targets)
    labels, nowhere = (rows.label[:, None] > 0).astype(np.float32), np.zeros(len(rows.label), np.int64)
    validation = None
    if allowed is not None and eval_queries and len(rows.size) < FEW:
        validation = evaluation_rows(past, _sample_queries(list(eval_queries), _MAX_VALIDATION), allowed)
    return TrainingSet(rows, rows, labels, nowhere, [target], has_impressions=False, validation=validation)


def _sample_queries(eval_queries: list[EvalQuery], limit: int) -> list[EvalQuery]:
    return [eval_queries[index] for index in _sample(len(eval_queries), limit)]


def _sample(count: int, limit: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])
