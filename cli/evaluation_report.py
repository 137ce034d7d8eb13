"""What `vitrine evaluate` prints: metrics of the pages and of simple methods on the same queries."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from scipy import sparse

from cli.evaluation_queries import EvalQuery, micros
from services.catalog import filters
from services.catalog.item_table import ItemTable
from training.core import metrics
from training.core.plural import plural
from training.data.config import Evaluation
from training.data.dataset import ShopData
from training.evaluation.simple_methods import MAX_EASE_ITEMS, SimpleMethods, pages

VITRINE = "Vitrine"
Page = list[tuple[str, float]]
"""Item ids, best first, with their scores."""
_FIGURES = ("recall", "ndcg", "hit")


@dataclass(frozen=True)
class Answer:
    """The page of a query, the number of its candidates by source, and of the targets among them."""

    page: Page
    milliseconds: float
    candidates: Mapping[str, int]
    targets_among_candidates: int
    degraded: bool


def simple_pages(
    shop: ShopData, queries: Sequence[EvalQuery], task: Evaluation, first_day: datetime
) -> dict[str, list[list[str]]]:
    """The pages of simple methods, fitted on the events before the first day.

    A user's history is as of the day of the query.
    """
    events, items = shop.events, {item.id: column for column, item in enumerate(shop.items)}
    cut = micros(first_day)
    past = events.take(np.flatnonzero(events.time < cut))
    methods = SimpleMethods.of(past, shop.settings, items)
    weights = np.array(list(shop.settings.event_types.values()))
    code = {user: index for index, user in enumerate(events.user_ids)}
    engaged = np.flatnonzero(weights[events.kind] > 0)
    engaged = engaged[np.argsort(events.user[engaged], kind="stable")]
    column = np.array([items.get(item, -1) for item in events.item_ids], np.int64)[events.item]
    known = column >= 0
    is_target = np.array([name in shop.settings.targets for name in shop.settings.event_types])
    start = np.searchsorted(events.user[engaged], np.arange(len(code) + 1))
    profiles, excluded = list[np.ndarray](), list[np.ndarray]()
    for query in queries:
        user = code.get(query.user_id)
        rows = engaged[start[user] : start[user + 1]] if user is not None else engaged[:0]
        rows = rows[events.time[rows] < micros(query.day)]
        rows = rows[known[rows]]
        history, bought = column[rows], column[rows[is_target[events.kind[rows]]]]
        session = [items[item] for item in query.session if item in items]
        profiles.append(np.unique(np.array([*session, *history], np.int64)))
        hidden = [items[item] for item in query.excluded if item in items]
        excluded.append(np.array([*session, *hidden, *(bought if task.exclude_purchased else [])], np.int64))
    sizes = [len(profile) for profile in profiles]
    columns = np.concatenate([np.empty(0, np.int64), *profiles])
    matrix = sparse.csr_matrix(
        (np.ones(len(columns), np.float32), columns, np.cumsum([0, *sizes])), (len(queries), len(items))
    )
    table = ItemTable.of(shop.items, {}, {}, [first_day] * len(shop.items))
    condition = filters.AllOf(tuple(filters.Equals(name, text) for name, text in task.filter.items()))
    allowed = np.zeros(len(items), bool)
    allowed[[items[item] for item in table.ids(np.flatnonzero(filters.evaluate(condition, table)))]] = True
    ids = [item.id for item in shop.items]
    return {
        name: [[ids[column] for column in page] for page in pages(scores, allowed, excluded)]
        for name, scores in methods.scores(matrix).items()
    }


def notes_of(shop: ShopData, queries: Sequence[EvalQuery]) -> list[str]:
    """What an evaluation of these queries cannot count, in sentences."""
    notes, ids = [], {item.id for item in shop.items}
    if unknown := sum(item not in ids for query in queries for item in query.targets):
        notes.append(f"{plural(unknown, 'target')} not in the catalog: no method can find them")
    if (sold := len(np.unique(shop.events.item))) > MAX_EASE_ITEMS:
        notes.append(
            f"no EASE: {sold:,} items have events, and above {MAX_EASE_ITEMS:,} it takes too much memory"
        )
    return notes


def evaluation_of(
    queries: Sequence[EvalQuery],
    answers: Sequence[Answer],
    simple: Mapping[str, Sequence[Sequence[str]]],
    k: int,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The metrics@k of all methods with intervals, statistics of Vitrine's answers, and `notes` on both."""
    by_method = {VITRINE: [[item for item, _ in answer.page] for answer in answers], **simple}
    code: dict[str, int] = {}
    targets = [_codes(code, query.targets) for query in queries]
    values = {
        name: metrics.per_query([_codes(code, page) for page in of], targets, k)
        for name, of in by_method.items()
    }
    results = {
        name: {figure: metrics.interval(of[figure]).to_dict() for figure in _FIGURES}
        for name, of in values.items()
    }
    for name in simple:
        gain = metrics.paired_interval(values[VITRINE]["ndcg"], values[name]["ndcg"])
        results[name]["vitrine_gains_ndcg"] = gain.to_dict()
    counts: Counter[str] = Counter()
    for answer in answers:
        counts.update(answer.candidates)
    milliseconds = np.array([answer.milliseconds for answer in answers])
    return {
        "queries": len(queries),
        "days": len({query.day for query in queries}),
        "k": k,
        "methods": results,
        "candidates_per_query": {s: round(n / len(answers), 1) for s, n in sorted(counts.items())},
        "targets_among_candidates": round(
            sum(answer.targets_among_candidates for answer in answers) / sum(map(len, targets)), 4
        ),
        "ms_per_query": {
            "mean": round(float(milliseconds.mean()), 2),
            "p99": round(float(np.quantile(milliseconds, 0.99)), 2),
        },
        "degraded": sum(answer.degraded for answer in answers),
        "notes": list(notes),
    }


def print_evaluation(evaluation: Mapping[str, Any], *, as_json: bool) -> None:
    """Print an evaluation as a table, or as JSON."""
    if as_json:
        print(json.dumps(evaluation, indent=1))  # noqa: T201 - a command's answer
        return
    k, methods = evaluation["k"], evaluation["methods"]
    width = max(map(len, methods))
    heads = (f"recall@{k}", f"nDCG@{k}", f"hit@{k}", "Vitrine gains, nDCG")
    count, days = evaluation["queries"], plural(evaluation["days"], "day")
    lines = [
        f"{count:,} queries of {days}, 95 % intervals; the simple methods know events before the first day",
        f"{'':{width}}  " + "  ".join(f"{head:20}" for head in heads),
    ]
    for name, figures in methods.items():
        cells = [_cell(figures[figure]) for figure in (*_FIGURES, "vitrine_gains_ndcg") if figure in figures]
        lines.append(f"{name:{width}}  " + "  ".join(f"{cell:20}" for cell in cells))
    share, ms = evaluation["targets_among_candidates"], evaluation["ms_per_query"]
    lines.append(f"{share:.1%} of the targets are candidates; {ms['mean']} ms a query, p99 {ms['p99']} ms")
    lines += [f"note: {note}" for note in evaluation["notes"]]
    print("\n".join(line.rstrip() for line in lines))  # noqa: T201 - a command's answer


def _codes(code: dict[str, int], ids: Sequence[str]) -> np.ndarray:
    return np.array([code.setdefault(item, len(code)) for item in ids], np.int64)


def _cell(interval: Mapping[str, Any]) -> str:
    low, high = interval["ci95"]
    return f"{interval['mean']:.3f} [{low:.3f}, {high:.3f}]"
