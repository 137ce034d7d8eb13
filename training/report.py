"""What a training run found, as `report.json` and as a page with charts for people.

Knows what the sections of a report are called and how they look, not where they come from.
"""

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from training.charts import BANDS, Section, draw_chart, in_full, top_features

_FIGURES = ("recall", "ndcg", "hit", "mrr", "precision", "f1")
_SHORT = {"ndcg": "nDCG", "mrr": "MRR", "f1": "F1"}
_CLASSIFIED = {
    "auc": "AUC",
    "log_loss": "log loss",
    "normalised_cross_entropy": "normalised cross-entropy",
    "brier": "Brier score",
    "ece": "calibration error",
    "base_rate": "base rate",
}


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`, `report.md` and its charts, PNG, into `directory`.

    Sections, each optional, one without content left out of the page; an interval is
    {"mean", "ci95": [low, high], "n"} or None, a time ISO 8601 or a datetime:

        shop        {"items", "events", "users", "photographs": int, "until": time}
        input       {file: {"read", "kept": int, "reasons": {reason: rows},
                    "examples": {reason: [row numbers]}}}
        made        {"device": str, "libraries": {name: version}, "settings": {key: value not the default}}
        split       {"learned_until": time, "judged": [time, time], "questions": int, "note": str}
        ranking     {method: `metrics.ranking_metrics`}, the bundle's own first
        ablation    {part: {"recall", "ndcg", "recall_difference", "ndcg_difference": interval}},
                    without the part, and the whole bundle minus that
        ladder      {part: {"recall", "ndcg", "recall_gained", "ndcg_gained": interval,
                    "milliseconds": float}}, with the parts before it, gained over them, cost of all
        candidates  {"per_question": {source: count}, "targets_held": share, "held_by_band": {band: share}}
        encoders    {"text" or "image": {"frozen", "tuned": interval, "chance": share, "pairs", "k": int}}
        ctr         {event type: {"rows": int, "head", "plain": `metrics.classification_metrics`}}
        propensity  {"7 days": {"kept": bool, "why": str where not, "model", "base rate":
                    `metrics.classification_metrics`, "gained": interval of log loss}}
        reranker    {"importance": {feature: share of the absolute SHAP values}, "trees": int}
        cold_start  {method: `metrics.recall_by_count`}, the whole bundle first
        graph       {relation: {"ndcg", "ndcg_as_cosine": float, weighting's fields: float}}
        stages      {stage: seconds}

    The JSON has sorted keys and two more: "methods", the order of ranking's, and
    "not_finite", the paths of numbers that were NaN or infinite. Such a number is null: a report
    about hours of training should not fail for one, nor hide it, so the page names it too.

    Raises:
        ValueError: there is a section of another name.
        TypeError: a value is none that JSON has, nor of NumPy, nor a date.
    """
    if unknown := sorted(report.keys() - {name for name, *_ in _SECTIONS}):
        raise ValueError(f"a report has no sections {unknown}")
    lost: list[str] = []
    clean: dict[str, Any] = _plain(report, "", lost)
    directory.mkdir(parents=True, exist_ok=True)
    parts = ["# Training report"]
    for name, title, words, body in _SECTIONS:
        if clean.get(name):
            parts += [f"## {title}", words, *body(clean[name]), *draw_chart(directory, name, clean[name])]
    if lost:
        parts += ["## Not finite", "These figures were NaN or infinite and are left open.", _text(lost)]
    (directory / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    document = {**clean, "methods": list(clean.get("ranking") or ()), "not_finite": lost}
    text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")


def _plain(value: Any, path: str, lost: list[str]) -> Any:
    """`value` in what JSON has; the paths of numbers that are not finite are added to `lost`."""
    match value:
        case None | bool() | str() | int():
            return value
        case float() if math.isfinite(value):
            return float(value)
        case float():
            lost.append(path)
            return None
        case date():
            return value.isoformat()
        case np.generic() | np.ndarray():
            return _plain(value.tolist(), path, lost)
        case Mapping():
            return {str(key): _plain(v, f"{path}/{key}".lstrip("/"), lost) for key, v in value.items()}
        case list() | tuple():
            return [_plain(v, f"{path}/{place}", lost) for place, v in enumerate(value)]
    raise TypeError(f"{path} is {type(value).__name__}, which a report cannot hold")


# The page. Every body takes its cleaned section and gives paragraphs.


def _text(value: Any) -> str:
    """A value as a table's cell, whatever a shop calls its things."""
    match value:
        case None:
            return "–"
        case bool() | int():
            return f"{value:,}"
        case float():
            return f"{value:.3f}"
        case list():
            return ", ".join(str(v) if isinstance(v, int) else _text(v) for v in value)
        case {"mean": float() as mean, "ci95": [float() as low, float() as high]}:
            return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        case str():
            flat = html.escape(" ".join(value.split()), quote=False)
            return re.sub(r"([\\`*\[\]|~#$])", r"\\\1", flat)
    return "–"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)]]
    cells = [lines[0], *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], lines[1], *cells[1:]])


def _shop(shop: Section) -> list[str]:
    return [_table(("of the shop", "count"), shop.items())]


def _input(files: Section) -> list[str]:
    kept = [(name, f["read"], f["kept"]) for name, f in files.items()]
    reasons = [
        (f"{name}: {reason}", rows, f.get("examples", {}).get(reason))
        for name, f in files.items()
        for reason, rows in f.get("reasons", {}).items()
    ]
    found = [_table(("file", "rows read", "rows kept"), kept)]
    return found + ([_table(("what was found", "rows", "for example rows"), reasons)] if reasons else [])


def _made(made: Section) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in made["libraries"].items())
    rows = [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in made["settings"].items()
    ]
    found = [f"On {_text(made['device'])}, by {_text(versions)}."]
    return found + ([_table(("setting", "value"), rows)] if rows else [])


def _split(split: Section) -> list[str]:
    begin, end = split["judged"]
    return [
        f"Learned from what happened before {_text(split['learned_until'])}; judged by "
        f"{_text(split['questions'])} questions from {_text(begin)} to {_text(end)}. {_text(split['note'])}"
    ]


def _ranking(methods: Section) -> list[str]:
    k = next(iter(methods.values())).get("k", 20)
    of = list(methods.values())
    rows = [[f"{_SHORT.get(name, name)}@{k}", *(m.get(name) for m in of)] for name in _FIGURES]
    rows += [
        [f"recall@{k}, {who} people", *(m.get(f"recall_{key}_users") for m in of)]
        for key, who in (("warm", "known"), ("new", "new"))
    ]
    rows += [
        [f"recall@{k} of {words} targets", *(m.get("target_recall", {}).get(band) for m in of)]
        for band, words in BANDS.items()
    ]
    rows += [[name, *(m.get(key) for m in of)] for key, name in (("coverage", "coverage"), ("gini", "Gini"))]
    return [_table(("measure", *(_text(name) for name in methods)), rows)]


def _ablation(parts: Section) -> list[str]:
    columns = {
        "ndcg": "nDCG without it",
        "ndcg_difference": "nDCG lost",
        "recall": "recall without it",
        "recall_difference": "recall lost",
    }
    table = _table(("part", *columns.values()), ([n, *(p.get(c) for c in columns)] for n, p in parts.items()))
    measured = {name: known for name, p in parts.items() if (known := in_full(p.get("ndcg_difference")))}
    idle = [_text(name) for name, (_, low, _) in measured.items() if low <= 0]
    if not measured:
        return [table]
    if not idle:
        return [table, "Removing any of these parts costs nDCG: all of them are working."]
    return [
        table,
        f"Removing any one of these costs no measurable nDCG, **not working yet**: {', '.join(idle)}.",
    ]


def _ladder(rungs: Section) -> list[str]:
    columns = {
        "recall": "recall",
        "recall_gained": "recall gained",
        "ndcg": "nDCG",
        "ndcg_gained": "nDCG gained",
        "milliseconds": "ms a question",
    }
    rows = (
        [n if not at else f"+ {n}", *(r.get(c) for c in columns)] for at, (n, r) in enumerate(rungs.items())
    )
    return [_table(("part", *columns.values()), rows)]


def _candidates(found: Section) -> list[str]:
    held = [("all", found.get("targets_held"))]
    held += [(BANDS.get(band, band), share) for band, share in found.get("held_by_band", {}).items()]
    return [
        _table(("source", "candidates per question"), found.get("per_question", {}).items()),
        _table(("targets", "share among the candidates"), held),
    ]


def _encoders(encoders: Section) -> list[str]:
    columns = ("frozen", "tuned", "chance", "pairs", "k")
    rows = ([name, *(e.get(column) for column in columns)] for name, e in encoders.items())
    return [_table(("encoder", "recall@k frozen", "recall@k tuned", "by chance", "pairs", "k"), rows)]


def _ctr(types: Section) -> list[str]:
    rows = [
        [name, model, of.get("rows"), *(of[model].get(key) for key in _CLASSIFIED)]
        for name, of in types.items()
        for model in ("head", "plain")
        if of.get(model)
    ]
    return [_table(("event type", "model", "rows", *_CLASSIFIED.values()), rows)]


def _propensity(horizons: Section) -> list[str]:
    rows = [
        [within, said, of.get("rows"), *(of[said].get(key) for key in _CLASSIFIED)]
        for within, of in horizons.items()
        for said in ("model", "base rate")
        if of.get(said)
    ]
    table = [_table(("within", "said by", "people", *_CLASSIFIED.values()), rows)] if rows else []
    gained = [
        f"Within {_text(within)} the log loss is lower by {_text(of['gained'])} than that of the rate which "
        "turned out to be right."
        for within, of in horizons.items()
        if of.get("gained")
    ]
    out = [
        f"**Left out**, within {_text(within)}: {_text(of['why'])}."
        for within, of in horizons.items()
        if not of.get("kept")
    ]
    return [*table, *gained, *out]


def _reranker(reranker: Section) -> list[str]:
    best = top_features(reranker.get("importance", {}))
    grown = f"{_text(reranker.get('trees'))} trees in the one judged"
    note = f"{grown}; the {len(best)} features that move its scores most:"
    return [note, _table(("feature", "share of absolute SHAP values"), best.items())]


def _cold_start(methods: Section) -> list[str]:
    counts = list(next(iter(methods.values())))
    rows = [[name, *(of.get(count) for count in counts)] for name, of in methods.items()]
    return [_table(("recall@20 of targets chosen before", *counts), rows)]


def _graph(relations: Section) -> list[str]:
    names = list(next(iter(relations.values())))
    head = ("relation", *names)
    return [_table(head, [(relation, *(of[n] for n in names)) for relation, of in relations.items()])]


def _stages(stages: Section) -> list[str]:
    return [
        _table(("stage", "seconds"), [(n, None if s is None else f"{s:,.1f}") for n, s in stages.items()])
    ]


_SECTIONS: tuple[tuple[str, str, str, Callable[[Section], list[str]]], ...] = (
    ("shop", "Shop", "What there was to learn from.", _shop),
    (
        "input",
        "Input",
        "Rows that could not be used were dropped, each with a reason; a note or a dropped value keeps its "
        "row.",
        _input,
    ),
    (
        "made",
        "How it was made",
        "The run that published this, and what was set otherwise than `training/shop_settings.py` has it. "
        "Seeds are fixed. A stage kept from an earlier run may have been made elsewhere.",
        _made,
    ),
    ("split", "Split", "Nothing that is judged was seen while learning.", _split),
    (
        "ranking",
        "Ranking",
        "How much of what people went on to choose is among the first recommendations (recall) and how near "
        "the top (nDCG); in brackets the 95 % interval. Head, mid and tail are the most, less and least "
        "chosen items, strictly cold ones nobody had chosen; coverage is the share of items shown to "
        "anybody; Gini is 0 if all are shown equally often, 1 if only one is.",
        _ranking,
    ),
    (
        "ablation",
        "Ablation",
        "What the bundle loses when one part is taken away: the more, the more that part contributes.",
        _ablation,
    ),
    (
        "ladder",
        "Part by part",
        "What each part adds to those above it: candidates, features and a model fitted for just these. "
        "The cost is that of candidates, features and scores where this was trained, without an index. "
        "What is not listed is not in the bundle: there was nothing for it to read, or, as of a CTR head, "
        "it did not help.",
        _ladder,
    ),
    (
        "cold_start",
        "Cold start",
        "How much of what people went on to choose is found, by how often it had been chosen before: of "
        "items that nobody knows yet, only text, photograph and attributes can tell.",
        _cold_start,
    ),
    (
        "candidates",
        "Candidates",
        "Ranking can only order what was proposed: how much each source proposes, and how many of the "
        "targets were among it.",
        _candidates,
    ),
    (
        "encoders",
        "Encoders",
        "How often an item's nearest k others include one chosen together with it, before and after tuning, "
        "over pairs that tuning never saw.",
        _encoders,
    ),
    (
        "ctr",
        "Probabilities",
        "How well the CTR head's chance of an event fits what happened, beside a plain model's: AUC 0.5 is "
        "guessing and 1 perfect; of log loss, Brier score and calibration error less is better; normalised "
        "cross-entropy below 1 beats always saying the base rate.",
        _ctr,
    ),
    (
        "propensity",
        "Who buys soon",
        "How well the chance that a person buys within so many days fits what happened in the last of them, "
        "which the model did not see, beside saying for everybody the rate of the days before.",
        _propensity,
    ),
    (
        "graph",
        "Item graph",
        "How each relation turns counts into the weight of an edge, found on days before those that rankers "
        "learn from, and how well its edges alone foretell what came next there (nDCG@20).",
        _graph,
    ),
    ("reranker", "Reranker", "What the model that orders the candidates looks at.", _reranker),
    ("stages", "Stages", "How long each stage of the training took.", _stages),
)
