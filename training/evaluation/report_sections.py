"""The sections of the page of a training report: their titles, words and tables.

Each function takes a section in the form that `report.write_report` states, cleaned, and returns paragraphs.
"""

import html
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from training.evaluation.charts import BANDS, Section, complete_interval, top_features

_MAX_UNREADABLE = 20  # unreadable images
_FIGURES = ("recall", "ndcg", "hit", "mrr", "precision", "f1")
_SHORT = {"ndcg": "nDCG", "mrr": "MRR", "f1": "F1"}
_CLASSIFICATION_NAMES = {
    "auc": "AUC",
    "log_loss": "log loss",
    "normalised_cross_entropy": "normalized cross-entropy",
    "brier": "Brier score",
    "ece": "calibration error",
    "base_rate": "base rate",
}
_SLICE_WORDS = {"position": "position {}", "user": "{} users", "item": "{} items"}


def cell(value: Any) -> str:
    """A value as a table cell, with Markdown and HTML of the shop's names escaped."""
    match value:
        case None:
            return "–"
        case bool() | int():
            return f"{value:,}"
        case float():
            return f"{value:.3f}"
        case list():
            return ", ".join(str(v) if isinstance(v, int) else cell(v) for v in value)
        case {"mean": float() as mean, "ci95": [float() as low, float() as high]}:
            return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        case str():
            flat = html.escape(" ".join(value.split()), quote=False)
            return re.sub(r"([\\`*\[\]|~#$])", r"\\\1", flat)
    return "–"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)]]
    cells = [lines[0], *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], lines[1], *cells[1:]])


def _summary(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"{index}. {cell(line)}" for index, line in enumerate(lines, 1))]


def _windows(windows: Section) -> list[str]:
    counts = [(name.replace("_", " "), value) for name, value in windows.items()]
    return [_table(("window", "value"), counts)]


def _decisions(decisions: Sequence[Section]) -> list[str]:
    return ["\n".join(f"* {cell(decision['text'])}." for decision in decisions)]


def _shop(shop: Section) -> list[str]:
    return [_table(("shop", "count"), shop.items())]


def _input(files: Section) -> list[str]:
    counts = [(name, f["read"], f["kept"]) for name, f in files.items()]
    reasons = [
        (f"{name}: {reason}", rows, f.get("examples", {}).get(reason))
        for name, f in files.items()
        for reason, rows in f.get("reasons", {}).items()
    ]
    tables = [_table(("file", "rows read", "rows used"), counts)]
    return tables + ([_table(("finding", "rows", "example rows"), reasons)] if reasons else [])


def _verdict(verdict: Section) -> list[str]:
    lines = [f"* Refused, but allowed by --allow-losses: {cell(reason)}" for reason in verdict["allowed"]]
    lines += [f"* {cell(warning)}" for warning in verdict["warnings"]]
    return ["\n".join(lines) or "No warnings."]


def _images(images: Section) -> list[str]:
    counts = [(name, len(v) if isinstance(v, list) else v) for name, v in images.items()]
    sentences = [*images["problems"], *images["unreadable"][:_MAX_UNREADABLE]]
    return [_table(("images", "count"), counts), *(f"* {cell(sentence)}" for sentence in sentences)]


def _provenance(run: Section) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in run["libraries"].items())
    rows = [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in run["settings"].items()
    ]
    paragraphs = [f"Device: {cell(run['device'])}. Libraries: {cell(versions)}."]
    return paragraphs + ([_table(("setting", "value"), rows)] if rows else [])


def _split(split: Section) -> list[str]:
    start, end = split["evaluated"]
    words = "The features know events before" if split.get("crossed") else "Trained on events before"
    return [
        f"{words} {cell(split['learned_until'])}; evaluated on "
        f"{cell(split['queries'])} queries from {cell(start)} to {cell(end)}. {cell(split['note'])}"
    ]


def _ranking(methods: Section) -> list[str]:
    k = next(iter(methods.values())).get("k", 20)
    figures = list(methods.values())
    rows = [[f"{_SHORT.get(name, name)}@{k}", *(m.get(name) for m in figures)] for name in _FIGURES]
    rows += [
        [f"recall@{k}, {group} users", *(m.get(f"recall_{key}_users") for m in figures)]
        for key, group in (("warm", "returning"), ("new", "new"))
    ]
    rows += [
        [f"recall@{k} of {words} targets", *(m.get("target_recall", {}).get(band) for m in figures)]
        for band, words in BANDS.items()
    ]
    rows += [
        [name, *(m.get(key) for m in figures)] for key, name in (("coverage", "coverage"), ("gini", "Gini"))
    ]
    return [_table(("measure", *(cell(name) for name in methods)), rows)]


def _logged_pages(methods: Section) -> list[str]:
    columns = {
        "log_likelihood": "log-likelihood",
        "gained": "gain over positions alone",
        "lost": "loss against the whole bundle",
    }
    rows = ([name, *(_fine(method.get(c)) for c in columns)] for name, method in methods.items())
    return [_table(("scores", *columns.values()), rows)]


def _page_slices(kinds: Section) -> list[str]:
    rows = (
        (words.format(BANDS.get(name, name)), of.get("rows"), _fine(of.get("gained")))
        for kind, words in _SLICE_WORDS.items()
        for name, of in kinds.get(kind, {}).items()
    )
    return [_table(("slice", "items shown", "gain over positions alone"), rows)]


def _fine(interval: Any) -> str:
    """An interval of small numbers."""
    measured = complete_interval(interval)
    if not measured:
        return "–"
    mean, low, high = measured
    return f"{mean:.4f} ({low:.4f}, {high:.4f})"


def _ablation(parts: Section) -> list[str]:
    columns = {
        "ndcg": "nDCG without it",
        "ndcg_difference": "nDCG loss",
        "recall": "recall without it",
        "recall_difference": "recall loss",
    }
    table = _table(("part", *columns.values()), ([n, *(p.get(c) for c in columns)] for n, p in parts.items()))
    measured = {
        name: interval
        for name, p in parts.items()
        if (interval := complete_interval(p.get("ndcg_difference")))
    }
    unmeasured = [cell(name) for name, (_, low, _) in measured.items() if low <= 0]
    if not measured:
        return [table]
    if not unmeasured:
        return [table, "Removing any of these parts reduces nDCG, so all of them contribute."]
    return [
        table,
        "Removing one of these does not measurably reduce nDCG, **no measurable contribution**: "
        f"{', '.join(unmeasured)}.",
    ]


def _cumulative_ablation(steps: Section) -> list[str]:
    columns = {
        "recall": "recall",
        "recall_gained": "recall gain",
        "ndcg": "nDCG",
        "ndcg_gained": "nDCG gain",
        "milliseconds": "ms per query",
    }
    columns = {key: name for key, name in columns.items() if any(key in step for step in steps.values())}
    rows = (
        [n if not index else f"+ {n}", *(r.get(c) for c in columns)]
        for index, (n, r) in enumerate(steps.items())
    )
    return [_table(("part", *columns.values()), rows)]


def _candidates(candidates: Section) -> list[str]:
    recalls = [("all", candidates.get("target_recall"))]
    recalls += [
        (BANDS.get(band, band), share) for band, share in candidates.get("target_recall_by_band", {}).items()
    ]
    return [
        _table(("source", "candidates per query"), candidates.get("per_query", {}).items()),
        _table(("targets", "share among the candidates"), recalls),
        *_index_recall(candidates.get("index_recall", {})),
    ]


def _index_recall(indexes: Section) -> list[str]:
    if not indexes:
        return []
    note = "Some sources read an index, which may miss items. The recall is the share of the best items, by "
    note += "the scores of the whole catalog, that the index finds."
    rows = [(name, index.get("recall"), index.get("queries")) for name, index in indexes.items()]
    return [note, _table(("source", "recall of the index", "queries"), rows)]


def _encoders(encoders: Section) -> list[str]:
    columns = ("frozen", "body", "tuned", "projection", "chance", "pairs", "k")
    rows = ([name, *(e.get(column) for column in columns)] for name, e in encoders.items())
    names = (
        "recall@k of the base",
        "without a projection",
        "with a projection",
        "the projection",
        "by chance",
        "pairs",
        "k",
    )
    products = [
        f"Of the images of products in several variants, {cell(same['recall'])} have another variant among "
        f"the {cell(same['k'])} nearest."
        for same in (e.get("same_product") for e in encoders.values())
        if same
    ]
    return [_table(("encoder", *names), rows), *products]


def _ctr(types: Section) -> list[str]:
    rows = [
        [name, model, models.get("rows"), *(models[model].get(key) for key in _CLASSIFICATION_NAMES)]
        for name, models in types.items()
        for model in ("head", "plain")
        if models.get(model)
    ]
    return [_table(("event type", "model", "rows", *_CLASSIFICATION_NAMES.values()), rows)]


def _propensity(horizons: Section) -> list[str]:
    rows = [
        [horizon, model, figures.get("rows"), *(figures[model].get(key) for key in _CLASSIFICATION_NAMES)]
        for horizon, figures in horizons.items()
        for model in ("model", "base rate")
        if figures.get(model)
    ]
    table = [_table(("within", "model", "users", *_CLASSIFICATION_NAMES.values()), rows)] if rows else []
    gains = [
        f"Within {cell(horizon)} the log loss is {cell(figures['gained'])} lower than that of the true "
        "rate of the evaluated window."
        for horizon, figures in horizons.items()
        if figures.get("gained")
    ]
    excluded = [
        f"**Not published**, within {cell(horizon)}: {cell(figures['reason'])}."
        for horizon, figures in horizons.items()
        if not figures.get("published")
    ]
    return [*table, *gains, *excluded]


def _reranker(reranker: Section) -> list[str]:
    best = top_features(reranker.get("importance", {}))
    count = f"{cell(reranker.get('trees'))} trees in the evaluated model"
    note = f"{count}; the {len(best)} most important features:"
    return [note, _table(("feature", "share of absolute SHAP values"), best.items())]


def _first_phase(first_phase: Section) -> list[str]:
    depth = first_phase.get("depth")
    note = "The bundle has no first phase: it would lose too much."
    if depth is not None:
        note = f"The bundle passes on {cell(depth)} candidates."
    return [note, _table(("candidates", "recall@20 lost"), first_phase.get("recall_loss", {}).items())]


def _cold_start(methods: Section) -> list[str]:
    counts = list(next(iter(methods.values())))
    rows = [[name, *(recalls.get(count) for count in counts)] for name, recalls in methods.items()]
    return [_table(("recall@20 by earlier engagements", *counts), rows)]


def _graph(relations: Section) -> list[str]:
    names = list(next(iter(relations.values())))
    head = ("relation", *names)
    return [_table(head, [(relation, *(values[n] for n in names)) for relation, values in relations.items()])]


def _stages(stages: Section) -> list[str]:
    return [
        _table(("stage", "seconds"), [(n, None if s is None else f"{s:,.1f}") for n, s in stages.items()])
    ]


SECTIONS: tuple[tuple[str, str, str, Callable[[Any], list[str]]], ...] = (
    ("summary", "Summary", "What this run learned.", _summary),
    ("shop", "Shop", "The training data.", _shop),
    (
        "windows",
        "Windows",
        "How far back this run looks: rankers are fitted on the baskets from the first time on, and those "
        "from the second time on evaluate them. The number of baskets chooses both, unless settings fix the "
        "days.",
        _windows,
    ),
    (
        "decisions",
        "Decisions",
        "A learned part replaces a simpler one where held-out data show a gain by a 95 % interval. Fewer "
        "than 100 queries show nothing: then a ranker that stays close to the simple one may be used.",
        _decisions,
    ),
    (
        "input",
        "Input",
        "Unusable rows are dropped, each with a reason. A row with a note or a dropped value is used.",
        _input,
    ),
    ("verdict", "Data losses", "The data losses of the files, checked before training.", _verdict),
    (
        "images",
        "Images",
        "The image files in images/, the items with an image, unused files and the first undecodable files.",
        _images,
    ),
    (
        "provenance",
        "Provenance",
        "The run that published this bundle and its non-default settings. Seeds are fixed. A stage reused "
        "from an earlier run may come from another machine.",
        _provenance,
    ),
    ("split", "Split", "No evaluated model is fitted on the queries that it ranks.", _split),
    (
        "ranking",
        "Ranking",
        "Recall is the share of the users' next items among the first recommendations; nDCG also values "
        "their rank. Brackets contain the 95 % interval. Head, mid and tail are items by falling popularity; "
        "strictly cold items have no earlier engagements. Coverage is the share of items that "
        "any query recommends. Gini is 0 if all items are recommended equally often and 1 if only one is.",
        _ranking,
    ),
    (
        "pages",
        "Logged pages",
        "How well scores predict what users engage with among what they were shown, next to its position: "
        "the log-likelihood of an item on later pages. In a shop that logs pages, the same measure on "
        "earlier pages decides about trees and the scores of the CTR head. Recall of next items does not: "
        "users can only take what the shop has shown, so it favors scores like those that filled the "
        "shop's pages.",
        _logged_pages,
    ),
    (
        "page_slices",
        "Gain on logged pages",
        "Where the whole bundle gains over positions alone: by the place of an item on its page, by whether "
        "the user has a history, and by the popularity of the item before the evaluated days. If an interval "
        "contains 0, no gain is measured there; below 0 it is a loss.",
        _page_slices,
    ),
    (
        "ablation",
        "Ablation",
        "The loss of quality without each part. A larger loss means a larger contribution. Models without a "
        "part have as many trees as the whole bundle, and scores of the CTR head if it has them. In a shop "
        "that logs pages, what counts is the loss on logged pages, above.",
        _ablation,
    ),
    (
        "cumulative_ablation",
        "Cumulative ablation",
        "The gain of each part over the parts above it, with its candidates and features and a model fitted "
        "on them; in a shop that logs pages, its cost only. The cost covers candidates, features and scores "
        "on the training machine, without an index. "
        "A part that is not listed is not in the bundle, because it has no data or, as for a CTR head, does "
        "not improve the ranking.",
        _cumulative_ablation,
    ),
    (
        "cold_start",
        "Cold start",
        "Recall of the users' next items, by their number of earlier engagements. For new items, only text, "
        "image and attributes are available.",
        _cold_start,
    ),
    (
        "candidates",
        "Candidates",
        "Ranking can only order candidates. The tables show the number of candidates of each source and the "
        "share of targets among the candidates.",
        _candidates,
    ),
    (
        "encoders",
        "Encoders",
        "How often an item's k nearest neighbors include an item of the same basket, on held-out pairs: by "
        "the pretrained base, by the encoder alone, and with its projection, used if that finds more.",
        _encoders,
    ),
    (
        "ctr",
        "Probabilities",
        "The quality of the CTR head's event probabilities, compared with a plain model. AUC is 0.5 for "
        "random and 1 for perfect predictions. Lower log loss, Brier score and calibration error are better. "
        "Normalized cross-entropy below 1 is better than a constant prediction of the base rate.",
        _ctr,
    ),
    (
        "propensity",
        "Purchase propensity",
        "The quality of the predicted probability that a user buys within some days, on the last window, "
        "which is not part of the training data, compared with the base rate of the window before.",
        _propensity,
    ),
    (
        "graph",
        "Item graph",
        "The weighting of the edges of each relation, tuned on days before the ranking days, and the nDCG@20 "
        "of ranking by these edges alone.",
        _graph,
    ),
    (
        "first_phase",
        "First phase",
        "The recall that is lost, against scoring every candidate, by how many candidates the first phase "
        "passes on to the models.",
        _first_phase,
    ),
    ("reranker", "Reranker", "The features of the model that ranks the candidates.", _reranker),
    ("stages", "Stages", "The duration of each training stage.", _stages),
)
