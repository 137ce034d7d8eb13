"""Evaluates the ranking of a bundle on the last days, in full and with each part ablated.

The evaluated models are fitted on the earlier ranking days, on at most 6,000 baskets, or by cross-fitting
(`held_out_models`). The published models are fitted on all days and baskets.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from services.catalog import filters
from services.ranking.models.baseline_scorer import baseline_scores
from training.core import metrics
from training.data.config import ShopConfig
from training.data.events import Events
from training.data.shop import ShopData
from training.evaluation.cumulative_ablation import COUNTS, STEPS, cumulative_ablation, step_milliseconds
from training.evaluation.held_out_models import TRAINING_QUERIES, HeldOutModels, Split, split_of
from training.evaluation.page_likelihood import BUNDLE, page_likelihood, page_slices
from training.examples.feature_rows import FeatureRows, evaluation_rows
from training.examples.point_in_time import PointInTime
from training.examples.queries import EvalQuery
from training.examples.training_set import TrainingSet
from training.examples.windows import Windows
from training.ranking import ctr
from training.ranking.first_phase import depth_losses, fit_first_phase
from training.ranking.fit_models import FittedModels, groups_of
from training.ranking.page_reranker import LoggedPages

FILE = "evaluation.json"
PAGE = 20
_TIMED_QUERIES = 50
_RECALL_QUERIES = 100
# The parts that describe new items come first, because a chart shows at most six curves.
_COLD_START_PARTS = ("text", "image", "words", "reranker")
# Feature parts whose candidate source has another name.
_SOURCE_OF_PART = {"graph": "co_occurrence", "words": "title_keywords"}
_SHAP_QUERIES = 100
_SHAP_ROWS = 20_000
_EXCLUDED = -np.inf
_log = logging.getLogger(__name__)


def write_empty(directory: Path) -> None:
    """Write an evaluation without sections, for a shop without evaluation data."""
    (directory / FILE).write_text("{}\n")


def evaluate(
    past: PointInTime,
    shop: ShopData,
    settings: ShopConfig,
    data: TrainingSet,
    eval_queries: Sequence[EvalQuery],
    vectors: Mapping[str, np.ndarray],
    windows: Windows,
    directory: Path,
    bundle_models: FittedModels,
    depth: int | None,
) -> None:
    """Write the report's sections, evaluated on the queries of the evaluation window.

    If these are too few, all queries of the ranking window are evaluated, by cross-fitting. The evaluated
    models have the recipe of the published `bundle_models`: how far they are shrunk, as many trees, and the
    CTR head if those read it. `depth` is how many candidates the first phase of the published bundle passes
    on, None without a first phase.
    """
    split = split_of(data, eval_queries, windows, settings.ranking.eval_queries)
    if not split.folds:
        write_empty(directory)
        return
    queries, since, training = split.queries, split.since, split.folds[0].training
    allowed = filters.evaluate(task_filter(settings), past.table)
    rows = evaluation_rows(past, queries, allowed)
    held_out = HeldOutModels(split, settings, vectors, bundle_models)
    models, score = held_out.first, held_out.scores(rows)
    # What is measured on one set of models leaves out the queries that they are fitted on.
    first_queries = split.folds[0].queries
    first_rows = rows.take(first_queries)
    pages = _by_method(held_out, rows, score)
    counts = _counts(past, shop.events, since)
    inputs = _metric_inputs(past, counts, queries, int(allowed.sum()))
    results = {
        "split": _split(split),
        "ranking": {name: metrics.ranking_metrics(p, **inputs) for name, p in pages.items()},
        "ablation": {},
        "cold_start": {},
        "candidates": _candidates(past, rows, inputs)
        | {"index_recall": _index_recall(past, queries, allowed)},
        "ctr": _ctr(data, training, models, settings, vectors, since, first_rows),
        "reranker": _importance(models, first_rows, models.matrix(first_rows, vectors)),
    }
    missing = {part for part in ("text", "image") if part not in vectors}
    missing |= {"sequence"} if "sequence model" not in pages else set()
    missing |= {"taste"} if np.isnan(rows.matrix[:, rows.names.index("taste_appeal")]).all() else set()
    missing |= {"ctr"} if models.head is None else set()
    missing |= set() if data.has_impressions else {"recent", "impressions"}
    parts = [part for part in STEPS if part not in missing]
    late = data.since(since).sample(TRAINING_QUERIES)
    on_pages = _page_scores(models, late, vectors) if data.has_impressions else {}

    def fitted_without(*removed_parts: str) -> list[np.ndarray]:
        if removed_parts == ("ctr",) and not models.reads_head:
            on_pages["without ctr"] = on_pages[BUNDLE]
            return pages[BUNDLE]
        _log.info("evaluating without %s", ", ".join(removed_parts))
        # A head that is no column is not fitted anew for other vectors.
        excluded = removed_parts if models.reads_head else (*removed_parts, "ctr")
        models_without = held_out.without(excluded)
        if data.has_impressions and len(removed_parts) == 1:
            on_pages[f"without {removed_parts[0]}"] = models_without.first.score(late.ctr_rows, vectors)
        left = proposed_by_others(past, rows, removed_parts)
        return _pages(rows, np.where(left, models_without.scores(rows), _EXCLUDED))

    targets = inputs["targets"]
    without = {part: fitted_without(part) for part in parts if part != "trees"}
    without |= {"trees": pages["choice model alone"], "reranker": pages["hand-set weights"]}
    steps: dict[str, Sequence[np.ndarray] | None] = dict.fromkeys((COUNTS, *parts))
    if not data.has_impressions:  # there the next purchase decides about no model, so only the cost is of use
        steps = {step: fitted_without(*parts[index:]) for index, step in enumerate((COUNTS, *parts[:-2]))}
        steps |= {parts[-2]: pages["choice model alone"], parts[-1]: pages["whole bundle"]}
    timed_rows = rows.take(np.sort(np.random.default_rng(3).permutation(len(rows.size))[:_TIMED_QUERIES]))
    cost = step_milliseconds(past, timed_rows, models, vectors, allowed)
    results["cumulative_ablation"] = cumulative_ablation(steps, targets, cost, PAGE)
    for part, other_pages in without.items():
        results["ablation"][part] = _difference(pages["whole bundle"], other_pages, targets)
    results["cold_start"] = _cold_start(pages["whole bundle"], without, targets, counts)
    losses = _first_phase_losses(training, rows, score, targets, first_queries)
    results["first_phase"] = {"recall_loss": losses, "depth": depth}
    if data.has_impressions:
        results |= _logged_pages(on_pages, late, inputs["bands"])
    (directory / FILE).write_text(json.dumps(results, indent=1) + "\n")


def _by_method(held_out: HeldOutModels, rows: FeatureRows, score: np.ndarray) -> dict[str, list[np.ndarray]]:
    """The pages of the whole bundle, by its `score`, and of simpler methods over the same candidates."""
    pages = {BUNDLE: _pages(rows, score)}
    pages["hand-set weights"] = _pages(rows, baseline_scores(rows.names, rows.matrix))
    pages["item graph"] = _pages(rows, rows.matrix[:, _columns(rows, "baskets_", "people_")].sum(1))
    lately, ever = (rows.matrix[:, rows.names.index(name)] for name in ("popular_7d", "popular_ever"))
    next_item = rows.matrix[:, rows.names.index("sequence_next")]
    if not np.isnan(next_item).all():
        pages["sequence model"] = _pages(rows, next_item)
    pages["popular"] = _pages(rows, lately + np.float32(1e-3) * ever)
    pages["choice model alone"] = _pages(rows, held_out.linear_scores(rows))
    if (of_head := held_out.head_scores(rows)) is not None:
        pages["CTR head alone"] = _pages(rows, of_head)
    return pages


def _page_scores(
    models: FittedModels, late: TrainingSet, vectors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The scores of the rows of logged pages, float64 (N,), by method."""
    rows = late.ctr_rows
    matrix = models.matrix(rows, vectors)
    scores = {BUNDLE: models.model.score(matrix)}
    scores["without trees"] = models.model.linear_score(matrix)
    scores["hand-set weights"] = baseline_scores(rows.names, rows.matrix)
    for name, column in (("sequence model", "sequence_next"), ("popular", "popular_7d")):
        score = rows.matrix[:, rows.names.index(column)].astype(np.float64)
        if not np.isnan(score).all():
            scores[name] = np.where(np.isnan(score), np.nanmean(score), score)
    return scores


def _logged_pages(
    scores: Mapping[str, np.ndarray], late: TrainingSet, bands: Mapping[int, str]
) -> dict[str, Any]:
    """The sections on logged pages, from the scores of their rows, float64 (N,), by method."""
    rows = late.ctr_rows
    pages = LoggedPages(groups_of(rows, rows.matrix), late.positions)
    is_returning = np.array([len(user.history) > 0 for user in rows.user_queries], bool)
    band_of_row = np.array([bands.get(item, "strict_cold") for item in rows.items.tolist()], str)
    return {
        "pages": page_likelihood(scores, pages),
        "page_slices": page_slices(scores[BUNDLE], pages, is_returning, band_of_row),
    }


def _cold_start(
    bundle_pages: Sequence[np.ndarray],
    without: Mapping[str, Sequence[np.ndarray]],
    targets: Sequence[np.ndarray],
    counts: Mapping[int, int],
) -> dict[str, Any]:
    """Recall by the number of earlier interactions: of the bundle, then without each part."""
    curves = {"whole bundle": bundle_pages}
    for part in sorted(without, key=lambda part: part not in _COLD_START_PARTS):
        curves[f"without {part}"] = without[part]
    return {name: metrics.recall_by_count(curve, targets, counts, PAGE) for name, curve in curves.items()}


def _first_phase_losses(
    training: TrainingSet,
    rows: FeatureRows,
    second: np.ndarray,
    targets: Sequence[np.ndarray],
    queries: np.ndarray,
) -> dict[str, Any]:
    """The losses on those of the queries, int64 (K,), that are not in the training data."""
    part, of_part = rows.take(queries), np.isin(rows.group(), queries)
    first = fit_first_phase(training.rows).terms(part.first_phase).sum(1)
    return depth_losses(first, second[of_part], part, [targets[index] for index in queries.tolist()])


def task_filter(settings: ShopConfig) -> filters.Filter:
    """The filter of the evaluated queries."""
    return filters.AllOf(tuple(filters.Equals(name, text) for name, text in settings.task.filter.items()))


def _pages(rows: FeatureRows, score: np.ndarray) -> list[np.ndarray]:
    """The best 20 items of every query, ties by row."""
    pages, start = [], 0
    for size in rows.size.tolist():
        query_score = score[start : start + size]
        best = np.argsort(-query_score, kind="stable")[:PAGE]
        pages.append(rows.items[start : start + size][best[np.isfinite(query_score[best])]])
        start += size
    return pages


def _columns(rows: FeatureRows, *prefixes: str) -> list[int]:
    return [index for index, name in enumerate(rows.names) if name.startswith(prefixes)]


def proposed_by_others(past: PointInTime, rows: FeatureRows, parts: Collection[str]) -> np.ndarray:
    """The rows that a source or graph relation outside of `parts` proposed: bool (N,).

    Items that would move up within the graph's limit without the part are not counted.
    """
    names = past.source_names
    own = [_SOURCE_OF_PART.get(part, part) for part in parts]
    others = rows.sources & ~sum(1 << names.index(source) for source in own if source in names)
    proposed = np.asarray(others != 0)
    if "graph" in parts or not any(source in names for source in own):
        return proposed
    graph_only = np.flatnonzero(others == 1 << names.index(_SOURCE_OF_PART["graph"]))
    query_of = rows.group()[graph_only]
    for query in np.unique(query_of):
        query_rows = graph_only[query_of == query]
        as_of = rows.eval_queries[query].as_of
        by_relation = past.related(rows.user_queries[query], as_of, rows.items[query_rows])
        proposed[query_rows] = np.any(
            [tied for relation, tied in by_relation.items() if relation not in parts], axis=0
        )
    return proposed


def _counts(past: PointInTime, events: Events, since: int) -> dict[int, int]:
    """Table row to number of engagements before `since`, for items that have any."""
    engaged = past.state.weights[events.kind] > 0
    hashes, counts = np.unique(events.number[engaged & (events.time < since)], return_counts=True)
    rows = past.table.rows(hashes)
    in_catalog = rows >= 0
    return dict(zip(rows[in_catalog].tolist(), counts[in_catalog].tolist(), strict=True))


def _metric_inputs(
    past: PointInTime, counts: Mapping[int, int], queries: Sequence[EvalQuery], universe: int
) -> dict[str, Any]:
    bands = metrics.popularity_bands(counts)
    targets = [past.table.rows(q.targets.tolist()) for q in queries]
    warm = np.array([len(past.query(q).history) > 0 for q in queries])
    return {"targets": targets, "bands": bands, "warm": warm, "universe": universe, "k": PAGE}


def _split(split: Split) -> dict[str, Any]:
    sizes = [len(fold.training.rows.size) for fold in split.folds]
    recipe = "the published ones' recipe: as far shrunk, as many trees, and the CTR head if they read it"
    note = f"The evaluated rankers are fitted on {sizes[0]} earlier baskets; they have"
    if split.is_crossed:
        note = (
            "The baskets are too few for days of their own: each query is ranked by models that are fitted "
            f"on the {sizes[0]} or so baskets of other users, of all these days; the models have"
        )
    return {
        "learned_until": _iso(split.since),
        "evaluated": [_iso(split.since), _iso(split.queries[-1].as_of)],
        "queries": len(split.queries),
        "crossed": split.is_crossed,
        "note": f"{note} {recipe}, which all baskets chose. The published ones are fitted on all baskets.",
    }


def _iso(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).isoformat()


def _candidates(past: PointInTime, rows: FeatureRows, inputs: Mapping[str, Any]) -> dict[str, Any]:
    count = len(rows.size)
    hits_by_band: dict[str, list[bool]] = {}
    start = 0
    for size, targets in zip(rows.size.tolist(), inputs["targets"], strict=True):
        is_candidate = np.isin(targets, rows.items[start : start + size])
        for item, is_hit in zip(targets.tolist(), is_candidate.tolist(), strict=True):
            hits_by_band.setdefault(inputs["bands"].get(item, "strict_cold"), []).append(is_hit)
        start += size
    all_hits = [is_hit for band in hits_by_band.values() for is_hit in band]
    return {
        "per_query": {
            name: float(((rows.sources >> bit) & 1).sum() / count)
            for bit, name in enumerate(past.source_names)
        },
        "target_recall": float(np.mean(all_hits)),
        "target_recall_by_band": {band: float(np.mean(hits)) for band, hits in hits_by_band.items()},
    }


def _index_recall(
    past: PointInTime, queries: Sequence[EvalQuery], allowed: np.ndarray
) -> dict[str, dict[str, float]]:
    """The recall of the candidate indexes on a sample of queries, and how many of these have any result."""
    recalls: dict[str, list[float]] = {}
    for index in np.sort(np.random.default_rng(5).permutation(len(queries))[:_RECALL_QUERIES]):
        query = queries[index]
        live = allowed & past.live(query.as_of)
        for source, recall in past.index_recalls(past.query(query), query.as_of, live).items():
            recalls.setdefault(source, []).append(recall)
    return {name: {"recall": float(np.mean(r)), "queries": len(r)} for name, r in recalls.items()}


def _ctr(
    data: TrainingSet,
    training: TrainingSet,
    models: FittedModels,
    settings: ShopConfig,
    vectors: Mapping[str, np.ndarray],
    since: int,
    rows: FeatureRows,
) -> dict[str, Any]:
    """The metrics of the CTR head and of the plain head, on pages or candidates of the evaluation days."""
    if models.head is None:
        return {}
    late = np.flatnonzero([q.as_of >= since for q in data.ctr_rows.eval_queries])
    rows_seen, labels = rows, (rows.label[:, None] > 0).astype(np.float32)
    if data.has_impressions:
        if not len(late):
            return {}
        rows_seen, labels = data.ctr_rows.take(late), data.labels[np.isin(data.ctr_rows.group(), late)]
    usable = ~rows_seen.no_interactions
    shape = ctr.ctr_settings(
        training.ctr_rows, vectors, training.types, shown=training.has_impressions, plain=True
    )
    plain = ctr.fit_ctr(shape, training.ctr_rows, training.labels, vectors, settings.ranking.ctr_epochs)
    head = models.head.settings
    results = {}
    logits, plain_logits = (
        ctr.score(model, rows_seen, vectors).astype(np.float64) for model in (models.head, plain)
    )
    for column, name in enumerate(training.types):
        logit, plain_logit = logits[:, column], plain_logits[:, column]
        if head.shown:
            logit = head.slope[column] * logit + head.offset[column]
        results[name] = {
            "rows": int(usable.sum()),
            "head": metrics.classification_metrics(1 / (1 + np.exp(-logit[usable])), labels[usable, column]),
            "plain": metrics.classification_metrics(
                1 / (1 + np.exp(-plain_logit[usable])), labels[usable, column]
            ),
        }
    return results


def _importance(models: FittedModels, rows: FeatureRows, matrix: np.ndarray) -> dict[str, Any]:
    """How much each feature separates the candidates of a query, as a share of all features.

    The mean absolute SHAP value relative to the query's mean, over a random sample of a hundred queries and
    at most 20,000 of their candidates.
    """
    generator = np.random.default_rng(2)
    queries = generator.permutation(len(rows.size))[:_SHAP_QUERIES]
    sample = np.flatnonzero(np.isin(rows.group(), queries))
    sample = np.sort(generator.permutation(sample)[:_SHAP_ROWS])
    share: dict[str, float] = {}
    if len(sample):
        contributions = models.model.contributions(matrix[sample])
        _, query_of, count = np.unique(rows.group()[sample], return_inverse=True, return_counts=True)
        mean = np.stack([np.bincount(query_of, part) for part in contributions.T], axis=1) / count[:, None]
        effect = np.abs(contributions - mean[query_of]).mean(0)
        effect /= max(float(effect.sum()), 1e-12)
        share = dict(zip(models.model.choice.columns, effect.tolist(), strict=True))
    return {"importance": share, "trees": models.model.tree_count}


def _difference(
    bundle_pages: Sequence[np.ndarray], other_pages: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> dict[str, Any]:
    figures, other_figures = (
        metrics.per_query(bundle_pages, targets, PAGE),
        metrics.per_query(other_pages, targets, PAGE),
    )
    results: dict[str, Any] = {}
    for name in ("recall", "ndcg"):
        results[name] = metrics.interval(other_figures[name]).to_dict()
        results[f"{name}_difference"] = metrics.paired_interval(figures[name], other_figures[name]).to_dict()
    return results
