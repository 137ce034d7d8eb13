"""What a bundle's ranking is worth: the last days, unseen, in full and with each part taken away.

Judged are models fitted on the ranking days before, on at most 6,000 of their baskets; what is published
learns from all days and baskets.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from services import filters
from services.ranking.blend import blend
from training import ctr, metrics
from training.dataset import Events, Shop
from training.ladder import COUNTS, RUNGS, ladder, milliseconds
from training.lesson import Lesson
from training.queries import Question
from training.rankers import Fitted, Heads, belongs, fit_models
from training.replay import Replay
from training.rows import Rows, judging_rows
from training.shop_settings import ShopSettings

FILE = "judged.json"
PAGE = 20
_CLOCKED = 50
# A dozen models are fitted. Of 3,000 of H&M's baskets no tree is sure to help, of 12,000 ninety-six are.
_LEARNED = 6000
# What items without a past are told by comes first among the curves: a chart has place for six.
_OF_NEW_ITEMS = ("text", "image", "words", "reranker")
_EXPLAINED = 100
_EXPLAINED_ROWS = 20_000
_NONE = -np.inf
_log = logging.getLogger(__name__)


def write_nothing(directory: Path) -> None:
    """Say that there was nothing to judge by."""
    (directory / FILE).write_text("{}\n")


def judge(
    past: Replay,
    shop: Shop,
    settings: ShopSettings,
    lesson: Lesson,
    questions: Sequence[Question],
    vectors: Mapping[str, np.ndarray],
    since: int,
    directory: Path,
) -> None:
    """Write the report's sections on questions from `since` on, microseconds since 1970."""
    asked = [q for q in questions if q.as_of >= since]
    chosen = np.sort(np.random.default_rng(1).permutation(len(asked))[: settings.ranking.judged])
    asked = [asked[at] for at in chosen]
    early = lesson.before(since).some(_LEARNED if asked else 0)
    if not len(early.rows.size) or not len(early.seen.size):
        write_nothing(directory)
        return
    allowed = filters.evaluate(_condition(settings), past.table)
    rows = judging_rows(past, asked, allowed)
    heads = Heads(early, settings.ranking.ctr_epochs)
    whole = fit_models(early, settings, vectors, heads=heads)
    matrix = whole.matrix(rows, vectors)
    pages = {"whole bundle": _pages(rows, whole.model.score(matrix))}
    pages["hand-set weights"] = _pages(rows, blend(rows.names, rows.matrix))
    pages["item graph"] = _pages(rows, rows.matrix[:, _at(rows, "baskets_", "people_")].sum(1))
    foretold = rows.matrix[:, rows.names.index("sequence_next")]
    if not np.isnan(foretold).all():
        pages["sequence model"] = _pages(rows, foretold)
    pages["popular"] = _pages(rows, rows.matrix[:, rows.names.index("popular_7d")])
    pages["choice model alone"] = _pages(rows, whole.model.choice.terms(matrix).sum(1))
    if whole.head is not None:
        pages["CTR head alone"] = _pages(rows, ctr.score(whole.head, rows, vectors)[:, -1])
    counts = _counts(past, shop.events, since)
    about = _about(past, counts, asked, int(allowed.sum()))
    found = {
        "split": _split(early, asked, since),
        "ranking": {name: metrics.ranking_metrics(p, **about) for name, p in pages.items()},
        "ablation": {},
        "cold_start": {},
        "candidates": _candidates(past, rows, about),
        "ctr": _ctr(lesson, early, whole, settings, vectors, since, rows),
        "reranker": _importance(whole, rows, matrix),
    }
    missing = {part for part in ("text", "image") if part not in vectors}
    missing |= {"sequence"} if "sequence model" not in pages else set()
    missing |= {"ctr"} if whole.head is None else set()
    parts = [part for part in RUNGS if part not in missing]
    unread = not any(belongs(name, "ctr") for name in whole.model.choice.columns)

    def fitted_without(*lacking: str) -> list[np.ndarray]:
        _log.info("judging without %s", ", ".join(lacking))
        # What the whole has or has not of a head, its parts have or have not either.
        gone = {*lacking, *({"ctr"} if unread else ())}
        fitted = fit_models(early, settings, vectors, gone, heads, doubt=False)
        score = fitted.score(rows, vectors)
        return _pages(rows, np.where(proposed_without(past, rows, lacking), score, _NONE))

    targets = about["targets"]
    without = {part: fitted_without(part) for part in parts if part != "trees"}
    without["trees"] = pages["choice model alone"]
    without["reranker"] = pages["hand-set weights"]
    rungs = {COUNTS: fitted_without(*parts)}
    for at, part in enumerate(parts[:-2], 1):
        rungs[part] = fitted_without(*parts[at:])
    rungs |= {parts[-2]: pages["choice model alone"], parts[-1]: pages["whole bundle"]}
    few = rows.take(np.sort(np.random.default_rng(3).permutation(len(rows.size))[:_CLOCKED]))
    spent = milliseconds(past, few, whole, vectors, allowed)
    found["ladder"] = ladder(rungs, targets, spent, PAGE)
    for part, lacking in without.items():
        found["ablation"][part] = _difference(pages["whole bundle"], lacking, targets)
    curves = {"whole bundle": pages["whole bundle"]}
    for part in sorted(without, key=lambda part: part not in _OF_NEW_ITEMS):
        curves[f"without {part}"] = without[part]
    for name, curve in curves.items():
        found["cold_start"][name] = metrics.recall_by_count(curve, targets, counts, PAGE)
    (directory / FILE).write_text(json.dumps(found, indent=1) + "\n")


def _condition(settings: ShopSettings) -> filters.Filter:
    return filters.AllOf(tuple(filters.Equals(name, text) for name, text in settings.task.filter.items()))


def _pages(rows: Rows, score: np.ndarray) -> list[np.ndarray]:
    """The best 20 items of every question, ties by row."""
    found, start = [], 0
    for size in rows.size.tolist():
        mine = score[start : start + size]
        best = np.argsort(-mine, kind="stable")[:PAGE]
        found.append(rows.items[start : start + size][best[np.isfinite(mine[best])]])
        start += size
    return found


def _at(rows: Rows, *prefixes: str) -> list[int]:
    return [at for at, name in enumerate(rows.names) if name.startswith(prefixes)]


def proposed_without(past: Replay, rows: Rows, parts: Collection[str]) -> np.ndarray:
    """The rows that a source, or a relation of the graph, other than the parts' own proposed: bool (N,).

    What would move up within the graph's limit is not found this way.
    """
    names = past.source_names
    others = rows.sources & ~sum(1 << names.index(part) for part in parts if part in names)
    proposed = np.asarray(others != 0)
    if "graph" in parts or not any(part in names for part in parts):
        return proposed
    alone = np.flatnonzero(others == 1 << names.index("graph"))
    question = rows.group()[alone]
    for at in np.unique(question):
        mine = alone[question == at]
        now = past.at(rows.questions[at].as_of)
        near = past.related(rows.queries[at], now, rows.items[mine])
        proposed[mine] = np.any([tied for relation, tied in near.items() if relation not in parts], axis=0)
    return proposed


def _counts(past: Replay, events: Events, since: int) -> dict[int, int]:
    """Table row to how often it was engaged with before a moment, where it was."""
    engaged = past.state.weights[events.kind] > 0
    numbers, counts = np.unique(events.number[engaged & (events.time < since)], return_counts=True)
    rows = past.table.rows(numbers)
    known = rows >= 0
    return dict(zip(rows[known].tolist(), counts[known].tolist(), strict=True))


def _about(
    past: Replay, counts: Mapping[int, int], asked: Sequence[Question], universe: int
) -> dict[str, Any]:
    bands = metrics.popularity_bands(counts)
    answers = [past.table.rows(q.targets.tolist()) for q in asked]
    warm = np.array([len(past.query(q).history) > 0 for q in asked])
    return {"targets": answers, "bands": bands, "warm": warm, "universe": universe, "k": PAGE}


def _split(early: Lesson, asked: Sequence[Question], since: int) -> dict[str, Any]:
    return {
        "learned_until": _iso(since),
        "judged": [_iso(since), _iso(asked[-1].as_of)],
        "questions": len(asked),
        "note": f"The rankers judged learned from {len(early.rows.size)} earlier baskets, what is published "
        "from all.",
    }


def _iso(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).isoformat()


def _candidates(past: Replay, rows: Rows, about: Mapping[str, Any]) -> dict[str, Any]:
    count = len(rows.size)
    held: dict[str, list[bool]] = {}
    start = 0
    for size, answer in zip(rows.size.tolist(), about["targets"], strict=True):
        mine = np.isin(answer, rows.items[start : start + size])
        for item, found in zip(answer.tolist(), mine.tolist(), strict=True):
            held.setdefault(about["bands"].get(item, "strict_cold"), []).append(found)
        start += size
    every = [found for band in held.values() for found in band]
    return {
        "per_question": {
            name: float(((rows.sources >> bit) & 1).sum() / count)
            for bit, name in enumerate(past.source_names)
        },
        "targets_held": float(np.mean(every)),
        "held_by_band": {band: float(np.mean(found)) for band, found in held.items()},
    }


def _ctr(
    lesson: Lesson,
    early: Lesson,
    whole: Fitted,
    settings: ShopSettings,
    vectors: Mapping[str, np.ndarray],
    since: int,
    rows: Rows,
) -> dict[str, Any]:
    """The head beside the plain form, on what was shown, or proposed, in the judged days."""
    if whole.head is None:
        return {}
    late = np.flatnonzero([q.as_of >= since for q in lesson.seen.questions])
    seen, labels = rows, (rows.label[:, None] > 0).astype(np.float32)
    if lesson.shown:
        if not len(late):
            return {}
        seen, labels = lesson.seen.take(late), lesson.labels[np.isin(lesson.seen.group(), late)]
    known = ~seen.unsold
    shape = ctr.ctr_settings(early.seen, vectors, early.types, shown=early.shown, plain=True)
    plain = ctr.fit_ctr(shape, early.seen, early.labels, vectors, settings.ranking.ctr_epochs)
    head = whole.head.settings
    found = {}
    logits, simple_ones = (
        ctr.score(model, seen, vectors).astype(np.float64) for model in (whole.head, plain)
    )
    for at, name in enumerate(early.types):
        logit, simple = logits[:, at], simple_ones[:, at]
        if head.shown:
            logit = head.slope[at] * logit + head.offset[at]
        found[name] = {
            "rows": int(known.sum()),
            "head": metrics.classification_metrics(1 / (1 + np.exp(-logit[known])), labels[known, at]),
            "plain": metrics.classification_metrics(1 / (1 + np.exp(-simple[known])), labels[known, at]),
        }
    return found


def _importance(whole: Fitted, rows: Rows, matrix: np.ndarray) -> dict[str, Any]:
    """How far each feature moves the candidates of a question apart, as a share of all features'.

    By the mean absolute SHAP value about a question's mean, of a hundred questions and at most 20,000 of
    their candidates, drawn at random.
    """
    generator = np.random.default_rng(2)
    asked = generator.permutation(len(rows.size))[:_EXPLAINED]
    drawn = np.flatnonzero(np.isin(rows.group(), asked))
    drawn = np.sort(generator.permutation(drawn)[:_EXPLAINED_ROWS])
    share: dict[str, float] = {}
    if len(drawn):
        parts = whole.model.contributions(matrix[drawn])
        _, question, count = np.unique(rows.group()[drawn], return_inverse=True, return_counts=True)
        mean = np.stack([np.bincount(question, part) for part in parts.T], axis=1) / count[:, None]
        moved = np.abs(parts - mean[question]).mean(0)
        moved /= max(float(moved.sum()), 1e-12)
        share = dict(zip(whole.model.choice.columns, moved.tolist(), strict=True))
    trees = whole.model.trees
    return {"importance": share, "trees": trees.num_trees() if trees is not None else 0}


def _difference(
    whole: Sequence[np.ndarray], lacking: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> dict[str, Any]:
    one, other = metrics.per_query(whole, targets, PAGE), metrics.per_query(lacking, targets, PAGE)
    found: dict[str, Any] = {}
    for name in ("recall", "ndcg"):
        found[name] = metrics.interval(other[name]).to_dict()
        found[f"{name}_difference"] = metrics.paired_interval(one[name], other[name]).to_dict()
    return found
