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
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

Section = Mapping[str, Any]
_BANDS = {"head": "head", "mid": "mid", "tail": "tail", "strict_cold": "strictly cold"}
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
# Okabe and Ito's palette, told apart by every kind of colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_INK, _FAINT, _IDLE = "#333333", "#DDDDDD", "#AAAAAA"
_WHISKERS: dict[str, Any] = {"fmt": "none", "ecolor": "black", "elinewidth": 1.0, "capsize": 2}
_TOP = 20
_LABEL = 36
_PANELS = 3


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`, `report.md` and its charts, PNG, into `directory`.

    Sections, each optional, one without content left out of the page; an interval is
    {"mean", "ci95": [low, high], "n"} or None, a time ISO 8601 or a datetime:

        shop        {"items", "events", "users", "photographs": int, "until": time}
        input       {file: {"read", "kept": int, "reasons": {reason: rows},
                    "examples": {reason: [row numbers]}}}
        split       {"learned_until": time, "judged": [time, time], "questions": int, "note": str}
        ranking     {method: `metrics.ranking_metrics`}, the bundle's own first
        ablation    {part: {"recall", "ndcg", "recall_difference", "ndcg_difference": interval}},
                    without the part, and the whole bundle minus that
        candidates  {"per_question": {source: count}, "targets_held": share, "held_by_band": {band: share}}
        encoders    {"text" or "image": {"frozen", "tuned": interval, "chance": share, "pairs", "k": int}}
        ctr         {event type: {"rows": int, "head", "plain": `metrics.classification_metrics`}}
        reranker    {"importance": {feature: share of the gain}, "trees": int}
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
            parts += [f"## {title}", words, *body(clean[name]), *_chart(directory, name, clean[name])]
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
        for band, words in _BANDS.items()
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
    measured = {name: known for name, p in parts.items() if (known := _known(p.get("ndcg_difference")))}
    idle = [_text(name) for name, (_, low, _) in measured.items() if low <= 0]
    if not measured:
        return [table]
    if not idle:
        return [table, "Removing any of these parts costs nDCG: all of them are working."]
    return [
        table,
        f"Removing any one of these costs no measurable nDCG, **not working yet**: {', '.join(idle)}.",
    ]


def _candidates(found: Section) -> list[str]:
    held = [("all", found.get("targets_held"))]
    held += [(_BANDS.get(band, band), share) for band, share in found.get("held_by_band", {}).items()]
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


def _reranker(reranker: Section) -> list[str]:
    best = _best(reranker.get("importance", {}))
    note = f"{_text(reranker.get('trees'))} trees; the {len(best)} features that gain most:"
    return [note, _table(("feature", "share of the gain"), best.items())]


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
    ("reranker", "Reranker", "What the trees that order the candidates look at.", _reranker),
    ("stages", "Stages", "How long each stage of the training took.", _stages),
)

# The charts. Each takes its cleaned section; None if there is nothing to draw. Methods beyond the
# palette's six colours are in the table alone.


def _known(interval: Section | None) -> tuple[float, float, float] | None:
    """Mean, low and high of an interval that has all of them."""
    match interval:
        case {"mean": float() as mean, "ci95": [float() as low, float() as high]}:
            return mean, low, high
    return None


def _best(importance: Section) -> dict[str, float]:
    known = {name: share for name, share in importance.items() if share is not None}
    return dict(sorted(known.items(), key=lambda pair: -pair[1])[:_TOP])


def _chart(directory: Path, section: str, content: Section) -> list[str]:
    """Draw a section's chart if it has one; the paragraph that shows it."""
    if section not in _CHARTS:
        return []
    name, words, draw = _CHARTS[section]
    figure = draw(content)
    if figure is None:
        return []
    figure.savefig(directory / name, dpi=144, metadata={"Software": None})
    return [f"![{words}]({name})"]


def _figure(height: float, width: float = 7, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure, in inches, and its panels, in rows of three."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    columns = min(panels, _PANELS)
    grid = figure.subplots(-(-panels // columns), columns, squeeze=False).ravel().tolist()
    for axes in grid[panels:]:
        axes.set_visible(False)
    for axes in grid[:panels]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_IDLE)
        axes.tick_params(colors=_INK, labelsize=8.5, length=0)
        axes.set_axisbelow(True)
    return figure, grid[:panels]


def _title(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold", parse_math=False)
    axes.set_xlabel(x, fontsize=8.5, color=_INK)
    axes.set_ylabel(y, fontsize=8.5, color=_INK)


def _names(names: Iterable[str]) -> list[str]:
    """Names as labels: one line each, a long one without its middle."""
    flat = (" ".join(name.split()) for name in names)
    half = _LABEL // 2
    return [name if len(name) <= _LABEL else f"{name[:half]}…{name[-half:]}" for name in flat]


def _reach(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths of whiskers (2, N); rounding may leave a mean just outside its interval, which has none."""
    return np.maximum([mean - low, high - mean], 0)


def _draw_ranking(methods: Section) -> Figure | None:
    k, shown = next(iter(methods.values())).get("k", 20), list(methods.items())[: len(_COLOURS)]
    figure, (axes,) = _figure(3.5)
    width, count = 0.8 / len(shown), dict.fromkeys(_BANDS, 0)
    for place, (_, found) in enumerate(shown):
        bands = {band: found.get("target_recall", {}).get(band) for band in _BANDS}
        at, known = [], []
        for column, (band, interval) in enumerate(bands.items()):
            if values := _known(interval):
                at.append(column + (place - (len(shown) - 1) / 2) * width)
                known.append(values)
                count[band] = bands[band]["n"]
        mean, low, high = np.array(known).reshape(-1, 3).T
        axes.bar(at, mean, width * 0.92, color=_COLOURS[place])
        axes.errorbar(at, mean, _reach(mean, low, high), **_WHISKERS)
    if not any(count.values()):
        return None
    labels = [f"{words}\n{count[band]:,} targets" for band, words in _BANDS.items()]
    axes.set_xticks(range(len(_BANDS)), labels)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    _title(axes, "What is found, by how often it had been chosen", y=f"recall@{k} (share of targets)")
    patches = [Patch(color=_COLOURS[place]) for place in range(len(shown))]
    _legend(figure, patches, [name for name, _ in shown])
    return figure


def _legend(figure: Figure, handles: Sequence[Artist], names: Iterable[str]) -> None:
    """A legend under the panels, where it hides nothing."""
    columns = len(handles) if len(handles) <= _PANELS + 1 else _PANELS
    legend = figure.legend(
        handles, _names(names), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_ablation(parts: Section) -> Figure | None:
    known = {name: v for name, part in parts.items() if (v := _known(part.get("ndcg_difference")))}
    if not known:
        return None
    order = sorted(known, key=lambda name: known[name][0])
    figure, (axes,) = _figure(1.2 + 0.28 * len(order))
    mean, low, high = np.array([known[name] for name in order]).T
    colours = [_COLOURS[0] if bound > 0 else _IDLE for bound in low]
    axes.barh(range(len(order)), mean, 0.65, color=colours)
    axes.errorbar(mean, range(len(order)), xerr=_reach(mean, low, high), **_WHISKERS)
    axes.axvline(0, color=_INK, linewidth=0.9)
    axes.set_yticks(range(len(order)), _names(order), parse_math=False)
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    _title(
        axes, "What each part contributes (grey: nothing measurable)", "nDCG lost without it, 95 % interval"
    )
    return figure


def _draw_ctr(types: Section) -> Figure | None:
    drawn = {name: of for name, of in types.items() if (of.get("head") or {}).get("reliability")}
    if not drawn:
        return None
    columns, rows = min(len(drawn), _PANELS), -(-len(drawn) // _PANELS)
    figure, panels = _figure(0.4 + 2.6 * rows, max(3.2, 2.35 * columns), len(drawn))
    for axes, name, of in zip(panels, _names(drawn), drawn.values(), strict=True):
        most = 1e-3
        for model, colour, mark in (("plain", _COLOURS[1], "s"), ("head", _COLOURS[0], "o")):
            curve = np.array((of.get(model) or {}).get("reliability") or np.zeros((0, 3)))[:, :2]
            axes.plot(*curve.T, color=colour, marker=mark, ms=3.5, lw=1.4)
            most = max(most, *curve.ravel().tolist())
        axes.plot([0, most], [0, most], color=_IDLE, lw=0.9, ls="--", zorder=0)
        axes.set(xlim=(-0.04 * most, 1.06 * most), ylim=(-0.04 * most, 1.06 * most), box_aspect=1)
        axes.locator_params(nbins=4)
        axes.grid(color=_FAINT, linewidth=0.7)
        _title(axes, name, "predicted probability", "observed share")
    _legend(figure, panels[0].lines, ("plain", "head", "perfect"))
    return figure


def _draw_reranker(reranker: Section) -> Figure | None:
    best = _best(reranker.get("importance", {}))
    if not best:
        return None
    figure, (axes,) = _figure(1.0 + 0.2 * len(best))
    axes.barh(range(len(best)), [100 * share for share in best.values()], 0.7, color=_COLOURS[0])
    axes.set_yticks(range(len(best)), _names(best), parse_math=False)
    axes.set_ylim(len(best) - 0.4, -0.6)  # the best on top
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    _title(axes, f"The {len(best)} most important features", "share of the total gain (%)")
    return figure


_CHARTS: dict[str, tuple[str, str, Callable[[Section], Figure | None]]] = {
    "ranking": ("recall_by_band.png", "Recall by popularity band and method", _draw_ranking),
    "ablation": ("ablation.png", "nDCG lost without each part", _draw_ablation),
    "ctr": ("reliability.png", "Predicted against observed, by event type", _draw_ctr),
    "reranker": ("importance.png", "The most important features", _draw_reranker),
}
