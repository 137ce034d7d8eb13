"""Writes the report of a training run: `report.json`, and a page with charts for readers.

Depends on the names and forms of the sections, not on the code that makes them.
"""

import json
import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation.charts import draw_chart
from training.evaluation.report_sections import SECTIONS, cell


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`, `report.md` and its charts, PNG, into `directory`.

    All sections are optional; the page omits empty ones. An interval is {"mean", "ci95": [low, high], "n"} or
    None; a time is ISO 8601 or a datetime:

        shop        {"items", "events", "users", "images": int, "until": time,
                    "logs_pages": bool}
        summary     [sentence]
        windows     {"since", "evaluated_from": time, counts of days and baskets}
        decisions   [{"part", "baseline", "measure", "text": str, "accepted": bool, "queries": int,
                    "gain": interval}], one per learned part
        input       {file: {"read", "kept": int, "reasons": {reason: rows}, "examples": {reason: [places]},
                    "samples": {reason: [values]}, "warnings", "notes": [sentence]}}, all but the first three
                    optional
        verdict     {"allowed", "warnings": [sentence]}, the overridden refusals and the warnings
        images      {"files", "items": int, "problems": [sentence], "unreadable": ["file: reason"]}
        provenance  {"device": str, "libraries": {name: version}, "settings": {key: non-default value}}
        split       {"learned_until": time, "evaluated": [time, time], "queries": int, "note": str}
        ranking     {method: `metrics.ranking_metrics`}, the bundle first
        pages       {method: {"log_likelihood", "gained", "lost": interval}}, of a shop that logs pages
        page_slices {"position", "user" or "item": {slice: {"gained": interval, "rows": int}}}, of the bundle
        ablation    {part: {"recall", "ndcg", "recall_difference", "ndcg_difference": interval}},
                    without the part, and the bundle minus that
        cumulative_ablation
                    {part: {"recall", "ndcg", "recall_gained", "ndcg_gained": interval,
                    "milliseconds": float}}, with all parts up to this one, the gain, and the total cost;
                    the cost only of a shop that logs pages
        candidates  {"per_query": {source: count}, "target_recall": share,
                    "target_recall_by_band": {band: share},
                    "index_recall": {source: {"recall": share, "queries": int}}}
        encoders    {"text" or "image": {"frozen", "body", "tuned": interval, "chance": share, "pairs",
                    "k": int, "projection": "used" or "left out", "same_product": {"recall": interval,
                    "k": int}}}, the body with its projection is "tuned"
        ctr         {event type: {"rows": int, "head", "plain": `metrics.classification_metrics`}}
        propensity  {"7 days": {"published": bool, "reason": str if not, "model", "base rate":
                    `metrics.classification_metrics`, "gained": interval of log loss}}
        first_phase {"recall_loss": {depth: interval}, "depth": int or None}, what it costs to score fewer
        reranker    {"importance": {feature: share of the absolute SHAP values}, "trees": int}
        cold_start  {method: `metrics.recall_by_count`}, the bundle first
        graph       {relation: {"ndcg", "ndcg_as_cosine": float, fields of the weighting: float}}
        stages      {stage: seconds}

    The JSON has sorted keys and two more keys: "methods", the order of the ranking methods, and "not_finite",
    the paths of NaN and infinite numbers. Such a number becomes null and the page lists it, so that one
    number does not fail hours of training.

    Raises:
        ValueError: a section has an unknown name.
        TypeError: a value is neither JSON, NumPy nor a date.
    """
    if unknown := sorted(report.keys() - {name for name, *_ in SECTIONS}):
        raise ValueError(f"a report has no sections {unknown}")
    not_finite: list[str] = []
    clean: dict[str, Any] = _plain(report, "", not_finite)
    directory.mkdir(parents=True, exist_ok=True)
    parts = ["# Training report"]
    for name, title, words, body in SECTIONS:
        if clean.get(name):
            parts += [f"## {title}", words, *body(clean[name]), *draw_chart(directory, name, clean[name])]
    if not_finite:
        parts += ["## Not finite", "These values are NaN or infinite and are omitted.", cell(not_finite)]
    (directory / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    document = {**clean, "methods": list(clean.get("ranking") or ()), "not_finite": not_finite}
    text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")


def _plain(value: Any, path: str, not_finite: list[str]) -> Any:
    """`value` as JSON data; the paths of numbers that are not finite are appended to `not_finite`."""
    match value:
        case None | bool() | str() | int():
            return value
        case float() if math.isfinite(value):
            return float(value)
        case float():
            not_finite.append(path)
            return None
        case date():
            return value.isoformat()
        case np.generic() | np.ndarray():
            return _plain(value.tolist(), path, not_finite)
        case Mapping():
            return {str(key): _plain(v, f"{path}/{key}".lstrip("/"), not_finite) for key, v in value.items()}
        case list() | tuple():
            return [_plain(v, f"{path}/{index}", not_finite) for index, v in enumerate(value)]
    raise TypeError(f"{path} is {type(value).__name__}, which a report cannot contain")
