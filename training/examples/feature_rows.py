"""Feature rows with labels: the candidates of past queries, with the features that ranking would compute."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.ranking.models.baseline_scorer import baseline_scores
from services.ranking.models.first_phase import COLUMNS, first_phase_rows, without_interactions
from services.ranking.state.user_query import UserQuery
from training.core.progress import track
from training.examples.point_in_time import PointInTime
from training.examples.queries import EvalQuery


@dataclass(frozen=True)
class FeatureRows:
    """The rows of Q queries, one query after the other.

    `matrix` float32 (N, F); `items` int64 (N,) table rows; `label` float32 (N,) the grade of a target, 0 for
    other candidates; `weight` float32 (N,); `size` int64 (Q,) rows of each query. `eval_queries` are the
    queries and `user_queries` the same in table rows. `first_phase` float32 (N, F) are the rows of the first
    phase, NaN for those of pages. `no_interactions` bool (N,) marks rows whose features
    hide their item's interactions (cold-start dropout). `targets` int64 (Q,) is the number of targets of each
    query; `sources` int64 (N,) has one bit for each source that proposed the row.
    """

    names: Sequence[str]
    matrix: np.ndarray
    first_phase: np.ndarray
    items: np.ndarray
    sources: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    no_interactions: np.ndarray
    size: np.ndarray
    eval_queries: Sequence[EvalQuery]
    user_queries: Sequence[UserQuery]
    targets: np.ndarray

    def take(self, selected: np.ndarray) -> "FeatureRows":
        """The rows of some queries, `selected` int64 (K,)."""
        start = np.cumsum(self.size) - self.size
        spans = [np.arange(start[q], start[q] + self.size[q]) for q in selected]
        rows = np.concatenate([np.empty(0, np.int64), *spans])
        return FeatureRows(
            self.names,
            self.matrix[rows],
            self.first_phase[rows],
            self.items[rows],
            self.sources[rows],
            self.label[rows],
            self.weight[rows],
            self.no_interactions[rows],
            self.size[selected],
            [self.eval_queries[q] for q in selected],
            [self.user_queries[q] for q in selected],
            self.targets[selected],
        )

    def group(self) -> np.ndarray:
        """The query of each row, int64 (N,)."""
        return np.repeat(np.arange(len(self.size)), self.size)


def training_rows(
    past: PointInTime,
    eval_queries: Sequence[EvalQuery],
    negatives: int,
    cold_start_share: float,
    seed: int = 0,
) -> FeatureRows | None:
    """Training rows: the targets of each query and `negatives` other candidates.

    Half of the negatives are the best by hand-set weights. The others are a random sample, weighted by the
    candidates that it represents. Items without interactions are excluded, because their presence among the
    candidates could reveal that they are targets. Instead, a share `cold_start_share` of the rows hides its
    item's interactions. Queries without a target among the candidates are dropped; None if none remains.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for eval_query in track(eval_queries, "rows"):
        stats, user_query = past.stats_at(eval_query.as_of), past.query(eval_query)
        allowed = past.live(eval_query.as_of) & ~np.isnan(stats.age)
        items, scores = past.candidates(user_query, eval_query.as_of, allowed)
        targets = past.table.rows(eval_query.targets.tolist())
        label = _grades(items, targets, eval_query.grades)
        if not label.any():
            continue
        features = past.features(eval_query.as_of)
        matrix = features.matrix(user_query, items, stats)
        selected, weight = _sample_rows(label, baseline_scores(past.names, matrix), negatives, generator)
        matrix, no_interactions = matrix[selected], generator.random(len(selected)) < cold_start_share
        matrix[no_interactions] = features.without_interactions(
            matrix[no_interactions], items[selected][no_interactions], stats
        )
        first = first_phase_rows(scores[selected], items[selected], stats)
        first[no_interactions] = without_interactions(first[no_interactions])
        parts.append(
            (
                eval_query,
                user_query,
                matrix,
                first,
                items[selected],
                past.source_bits(scores[selected]),
                label[selected],
                weight,
                no_interactions,
                len(targets),
            )
        )
    return _concatenate(past, parts) if parts else None


def evaluation_rows(past: PointInTime, eval_queries: Sequence[EvalQuery], allowed: np.ndarray) -> FeatureRows:
    """Evaluation rows: all candidates of each query among `allowed`, bool (M,)."""
    parts = []
    for eval_query in track(eval_queries, "queries"):
        stats, user_query = past.stats_at(eval_query.as_of), past.query(eval_query)
        items, scores = past.candidates(user_query, eval_query.as_of, allowed & past.live(eval_query.as_of))
        label = _grades(items, past.table.rows(eval_query.targets.tolist()), eval_query.grades)
        matrix = past.features(eval_query.as_of).matrix(user_query, items, stats)
        ones, no_interactions = np.ones(len(items), np.float32), np.zeros(len(items), bool)
        parts.append(
            (
                eval_query,
                user_query,
                matrix,
                first_phase_rows(scores, items, stats),
                items,
                past.source_bits(scores),
                label,
                ones,
                no_interactions,
                len(eval_query.targets),
            )
        )
    return _concatenate(past, parts)


def page_rows(
    past: PointInTime,
    pages: Sequence[EvalQuery],
    labels: Sequence[np.ndarray],
    weights: np.ndarray,
    cold_start_share: float,
) -> tuple[FeatureRows, np.ndarray, np.ndarray] | None:
    """Rows of logged pages; their labels, float32 (N, T), one column per event type; their positions.

    The targets of a page are the items on it, and its labels are float32 (S, T). Positions are int64 (N,), 0
    for unknown. Items of the session are
    excluded, as from candidates. The grade of a row is the largest weight of its labels, by `weights`
    float32 (T,). A share `cold_start_share` of the rows hides its item's interactions. None if no page has an
    item of the catalog.
    """
    generator = np.random.default_rng(0)
    parts, page_labels, positions = [], [], []
    for page, label in zip(track(pages, "pages"), labels, strict=True):
        stats, user_query = past.stats_at(page.as_of), past.query(page)
        items = past.table.rows(page.targets.tolist())
        in_catalog = (items >= 0) & ~np.isin(items, user_query.session)
        items = items[in_catalog]
        if not len(items):
            continue
        features = past.features(page.as_of)
        matrix, no_interactions = (
            features.matrix(user_query, items, stats),
            generator.random(len(items)) < cold_start_share,
        )
        matrix[no_interactions] = features.without_interactions(
            matrix[no_interactions], items[no_interactions], stats
        )
        zeros, ones = np.zeros(len(items), np.int64), np.ones(len(items), np.float32)
        grade = (label[in_catalog] * weights).max(1)
        first = np.full((len(items), len(COLUMNS)), np.nan, np.float32)
        parts.append(
            (page, user_query, matrix, first, items, zeros, grade, ones, no_interactions, len(items))
        )
        page_labels.append(label[in_catalog])
        positions.append((page.positions if len(page.positions) else np.zeros(len(in_catalog)))[in_catalog])
    if not parts:
        return None
    every_label = np.concatenate(page_labels).astype(np.float32)
    return _concatenate(past, parts), every_label, np.concatenate(positions).astype(np.int64)


def _grades(items: np.ndarray, targets: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """The grade of each of `items`, rising int64 (C,), 0 if it is no target: float32 (C,)."""
    label = np.zeros(len(items), np.float32)
    if not len(items):
        return label
    position = np.minimum(np.searchsorted(items, targets), len(items) - 1)
    present = items[position] == targets
    label[position[present]] = grades[present] if len(grades) else 1
    return label


def _sample_rows(
    label: np.ndarray, score: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    others = np.flatnonzero(label == 0)
    order = others[np.argsort(-score[others], kind="stable")]
    best, rest = order[: count // 2], order[count // 2 :]
    sample = generator.permutation(rest)[: count - len(best)]
    selected = np.concatenate([np.flatnonzero(label), best, sample])
    weight = np.ones(len(selected), np.float32)
    if len(sample):
        weight[len(selected) - len(sample) :] = len(rest) / len(sample)
    return selected, weight


def _concatenate(past: PointInTime, parts: Sequence[tuple[object, ...]]) -> FeatureRows:
    eval_queries, user_queries, matrix, first, items, sources, label, weight, no_interactions, targets = zip(
        *parts, strict=True
    )
    return FeatureRows(
        past.names,
        np.concatenate(matrix),
        np.concatenate(first),
        np.concatenate(items),
        np.concatenate(sources),
        np.concatenate(label).astype(np.float32),
        np.concatenate(weight),
        np.concatenate(no_interactions),
        np.array([len(i) for i in items], np.int64),
        eval_queries,
        user_queries,
        np.array(targets, np.int64),
    )
