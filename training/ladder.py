"""The bundle's parts one after the other: what each adds to those before it, and what it costs a request."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from training import ctr, metrics
from training.rankers import Fitted
from training.replay import Replay
from training.rows import Rows

RUNGS = ("graph", "words", "text", "image", "sequence", "ctr", "trees")
"""The parts in the order in which they are added to what counts and labels of items tell."""

COUNTS = "counts"


def ladder(
    pages: Mapping[str, Sequence[np.ndarray]],
    targets: Sequence[np.ndarray],
    spent: Mapping[str, float],
    k: int,
) -> dict[str, dict[str, Any]]:
    """Of each rung's pages how good they are, what the rung gained, and the milliseconds up to it."""
    found: dict[str, dict[str, Any]] = {}
    below: Mapping[str, np.ndarray] | None = None
    total = 0.0
    for rung, mine in pages.items():
        figures = metrics.per_query(mine, targets, k)
        total += spent.get(rung, 0.0)
        found[rung] = {"milliseconds": round(total, 2)}
        for name in ("recall", "ndcg"):
            found[rung][name] = metrics.interval(figures[name]).to_dict()
            if below is not None:
                gained = metrics.paired_interval(figures[name], below[name])
                found[rung][f"{name}_gained"] = gained.to_dict()
        below = figures
    return found


def milliseconds(
    past: Replay, rows: Rows, whole: Fitted, vectors: Mapping[str, np.ndarray], allowed: np.ndarray
) -> dict[str, float]:
    """What each rung costs a question of `rows`, here: its source, its features and its model.

    Sources and blocks of features that belong to no rung count for the first. Spaces are searched
    exhaustively; serving searches an index.
    """
    spent: dict[str, float] = defaultdict(float)
    count, before = len(rows.size), None
    for at in range(count):
        question, query = rows.questions[at], rows.queries[at]
        now = past.at(question.as_of)
        mine = rows.take(np.array([at]))
        features = past.features(now)
        if now is not before:  # what is made once for a moment is no question's
            list(past.proposals(query, now, allowed))
            list(features.blocks(query, mine.items, now))
            before = now
        _clocked(past.proposals(query, now, allowed), spent)
        _clocked(features.blocks(query, mine.items, now), spent)
        _clocked(_scored(mine, whole, vectors), spent)
    total = dict.fromkeys((COUNTS, *RUNGS), 0.0)
    for name, seconds in spent.items():
        total[name if name in total else COUNTS] += 1000 * seconds / max(count, 1)
    return total


def _clocked(steps: Iterable[tuple[str, object]], spent: dict[str, float]) -> None:
    start = time.perf_counter()
    for name, _ in steps:
        spent[name] += time.perf_counter() - start
        start = time.perf_counter()


def _scored(rows: Rows, whole: Fitted, vectors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, object]]:
    matrix = rows.matrix
    if whole.head is not None:
        logits = ctr.score(whole.head, rows, vectors)
        yield "ctr", logits
        matrix = np.concatenate([matrix, logits], axis=1)
    matrix = matrix[:, whole.columns]
    yield COUNTS, whole.model.choice.terms(matrix).sum(1)
    if whole.model.trees is not None:
        yield "trees", whole.model.trees.predict(matrix, num_threads=1)
