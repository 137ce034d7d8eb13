"""Fits the first phase of ranking, and chooses how many candidates it passes on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from services.ranking.models.first_phase import COLUMNS
from services.ranking.models.linear import ConditionalLogit
from training.core import metrics
from training.examples.feature_rows import FeatureRows, evaluation_rows
from training.examples.point_in_time import PointInTime
from training.examples.queries import EvalQuery
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import fit_choice
from training.ranking.fit_models import FittedModels

DEPTHS = (150, 200, 300, 400, 600)
"""Not less: page rules reorder what the models score."""
MAX_LOSS = 0.002
"""How much recall@20 a depth may cost."""
_PAGE, _QUERIES = 20, 200


def fit_first_phase(rows: FeatureRows) -> ConditionalLogit:
    """Fit the linear model on the candidates of past queries."""
    time = np.array([q.as_of for q in rows.eval_queries], np.int64)
    groups = RankingGroups(rows.first_phase, rows.label, rows.weight, rows.size, time)
    return fit_choice(groups, COLUMNS)


def choose_depth(
    past: PointInTime,
    eval_queries: Sequence[EvalQuery],
    allowed: np.ndarray,
    first: ConditionalLogit,
    models: FittedModels,
    vectors: Mapping[str, np.ndarray],
) -> int | None:
    """The smallest depth that loses at most `MAX_LOSS` on a sample of queries; None if every one loses more.

    `allowed`, bool (M,), are the rows that may be candidates.

    The models may have been fitted on the same queries: that favors the second phase alone, so the depth
    errs on the safe side. It does not depend on the evaluation, which a run may skip.
    """
    sample = np.sort(np.random.default_rng(4).permutation(len(eval_queries))[:_QUERIES])
    if not len(sample):
        return DEPTHS[-1]
    rows = evaluation_rows(past, [eval_queries[index] for index in sample], allowed)
    targets = [past.table.rows(eval_queries[index].targets) for index in sample]
    pages = depth_pages(first.terms(rows.first_phase).sum(1), models.score(rows, vectors), rows)
    recall = {depth: metrics.per_query(p, targets, _PAGE)["recall"].mean() for depth, p in pages.items()}
    return next((d for d in DEPTHS if recall[None] - recall[d] <= MAX_LOSS), None)


def depth_losses(
    first: np.ndarray, second: np.ndarray, rows: FeatureRows, targets: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The loss of recall@20 by depth, with its interval.

    `first` and `second` float (N,) are the scores of the two phases for all candidates of the queries.
    """
    pages = depth_pages(first, second, rows)
    recall = {depth: metrics.per_query(p, targets, _PAGE)["recall"] for depth, p in pages.items()}
    return {str(d): metrics.paired_interval(recall[None], recall[d]).to_dict() for d in DEPTHS}


def depth_pages(
    first: np.ndarray, second: np.ndarray, rows: FeatureRows
) -> dict[int | None, list[np.ndarray]]:
    """The pages of each of `DEPTHS`, and of None for all candidates."""
    every: tuple[int | None, ...] = (None, *DEPTHS)
    return {depth: _pages(rows, first, second, depth, _PAGE) for depth in every}


def _pages(
    rows: FeatureRows, first: np.ndarray, second: np.ndarray, depth: int | None, page: int
) -> list[np.ndarray]:
    """The best items of each query by `second` among its best `depth` by `first`."""
    pages, start = list[np.ndarray](), 0
    for size in rows.size.tolist():
        part = slice(start, start + size)
        selected = np.argsort(-first[part], kind="stable")[:depth]
        best = np.argsort(-second[part][selected], kind="stable")[:page]
        pages.append(rows.items[part][selected[best]])
        start += size
    return pages
