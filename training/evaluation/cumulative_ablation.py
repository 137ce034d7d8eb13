"""Cumulative ablation: adds the parts of the bundle one by one and measures the gain and cost of each."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from training.core import metrics
from training.examples.feature_rows import FeatureRows
from training.examples.point_in_time import PointInTime
from training.ranking import ctr
from training.ranking.fit_models import FittedModels

STEPS = ("recent", "impressions", "graph", "words", "text", "image", "sequence", "taste", "ctr", "trees")
"""The parts in the order in which they are added to the features from counts and attributes."""

COUNTS = "counts"


def cumulative_ablation(
    pages: Mapping[str, Sequence[np.ndarray] | None],
    targets: Sequence[np.ndarray],
    cost: Mapping[str, float],
    k: int,
) -> dict[str, dict[str, Any]]:
    """The quality of each step's pages, the gain of the step, and the cumulative milliseconds.

    A step without pages has its milliseconds only.
    """
    results: dict[str, dict[str, Any]] = {}
    previous: Mapping[str, np.ndarray] | None = None
    total = 0.0
    for step, step_pages in pages.items():
        total += cost.get(step, 0.0)
        results[step] = {"milliseconds": round(total, 2)}
        if step_pages is None:
            continue
        figures = metrics.per_query(step_pages, targets, k)
        for name in ("recall", "ndcg"):
            results[step][name] = metrics.interval(figures[name]).to_dict()
            if previous is not None:
                gain = metrics.paired_interval(figures[name], previous[name])
                results[step][f"{name}_gained"] = gain.to_dict()
        previous = figures
    return results


def step_milliseconds(
    past: PointInTime,
    rows: FeatureRows,
    models: FittedModels,
    vectors: Mapping[str, np.ndarray],
    allowed: np.ndarray,
) -> dict[str, float]:
    """The cost of each step for a query of `rows` on this machine: its source, features and model.

    Sources and feature blocks that belong to no step count for the first step. Vector spaces are searched
    exhaustively here; the services search an index.
    """
    cost: dict[str, float] = defaultdict(float)
    count, previous = len(rows.size), None
    for index in range(count):
        eval_query, user_query = rows.eval_queries[index], rows.user_queries[index]
        stats = past.stats_at(eval_query.as_of)
        query_rows = rows.take(np.array([index]))
        features = past.features(eval_query.as_of)
        if stats is not previous:  # exclude the work that queries of one time share
            list(past.proposals(user_query, eval_query.as_of, allowed))
            list(features.blocks(user_query, query_rows.items, stats))
            previous = stats
        user_query = replace(user_query, derived={})  # what models derive from a user counts
        _measure(past.proposals(user_query, eval_query.as_of, allowed), cost)
        _measure(features.blocks(user_query, query_rows.items, stats), cost)
        _measure(_score_steps(query_rows, models, vectors), cost)
    total = dict.fromkeys((COUNTS, *STEPS), 0.0)
    for name, seconds in cost.items():
        total[name if name in total else COUNTS] += 1000 * seconds / max(count, 1)
    return total


def _measure(parts: Iterable[tuple[str, object]], cost: dict[str, float]) -> None:
    start = time.perf_counter()
    for name, _ in parts:
        cost[name] += time.perf_counter() - start
        start = time.perf_counter()


def _score_steps(
    rows: FeatureRows, models: FittedModels, vectors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, object]]:
    matrix = rows.matrix
    if models.head is not None:
        logits = ctr.score(models.head, rows, vectors)
        yield "ctr", logits
        matrix = np.concatenate([matrix, logits], axis=1)
    matrix = matrix[:, models.columns]
    yield COUNTS, models.model.linear_score(matrix)
    if models.model.trees is not None:
        yield "trees", models.model.trees.predict(matrix, raw_score=True, num_threads=1)
