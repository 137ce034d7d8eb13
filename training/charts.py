"""The report's charts: one for a section that has one. Knows sections as the report cleaned them.

Methods beyond the palette's six colours are in the report's table alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

Section = Mapping[str, Any]
BANDS = {"head": "head", "mid": "mid", "tail": "tail", "strict_cold": "strictly cold"}
# Okabe and Ito's palette, told apart by every kind of colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_INK, _FAINT, _IDLE = "#333333", "#DDDDDD", "#AAAAAA"
_WHISKERS: dict[str, Any] = {"fmt": "none", "ecolor": "black", "elinewidth": 1.0, "capsize": 2}
_TOP = 20
_LABEL = 36
_PANELS = 3


def in_full(interval: Section | None) -> tuple[float, float, float] | None:
    """Mean, low and high of an interval that has all of them."""
    match interval:
        case {"mean": float() as mean, "ci95": [float() as low, float() as high]}:
            return mean, low, high
    return None


def top_features(importance: Section) -> dict[str, float]:
    """The features that move scores most, at most 20, with their share; those without one are left out."""
    known = {name: share for name, share in importance.items() if share is not None}
    return dict(sorted(known.items(), key=lambda pair: -pair[1])[:_TOP])


def draw_chart(directory: Path, section: str, content: Section) -> list[str]:
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
    width, count = 0.8 / len(shown), dict.fromkeys(BANDS, 0)
    for place, (_, found) in enumerate(shown):
        bands = {band: found.get("target_recall", {}).get(band) for band in BANDS}
        at, known = [], []
        for column, (band, interval) in enumerate(bands.items()):
            if values := in_full(interval):
                at.append(column + (place - (len(shown) - 1) / 2) * width)
                known.append(values)
                count[band] = bands[band]["n"]
        mean, low, high = np.array(known).reshape(-1, 3).T
        axes.bar(at, mean, width * 0.92, color=_COLOURS[place])
        axes.errorbar(at, mean, _reach(mean, low, high), **_WHISKERS)
    if not any(count.values()):
        return None
    labels = [f"{words}\n{count[band]:,} targets" for band, words in BANDS.items()]
    axes.set_xticks(range(len(BANDS)), labels)
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
    known = {name: v for name, part in parts.items() if (v := in_full(part.get("ndcg_difference")))}
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


def _draw_cold_start(methods: Section) -> Figure | None:
    counts = list(next(iter(methods.values())))
    figure, (axes,) = _figure(3.2)
    shown = list(methods.items())[: len(_COLOURS)]
    drawn = 0
    for colour, (_, of) in zip(_COLOURS, shown, strict=False):
        known = [(at, v) for at, count in enumerate(counts) if (v := in_full(of.get(count)))]
        drawn += len(known)
        places, means = [at for at, _ in known], [mean for _, (mean, *_) in known]
        axes.plot(places, means, color=colour, marker="o", ms=3.5, lw=1.4)
    if not drawn:
        return None
    axes.set_xticks(range(len(counts)), counts)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    _title(axes, "What is found of items that are new", "times chosen before", "recall@20")
    _legend(figure, axes.lines, [name for name, _ in shown])
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
    best = top_features(reranker.get("importance", {}))
    if not best:
        return None
    figure, (axes,) = _figure(1.0 + 0.2 * len(best))
    axes.barh(range(len(best)), [100 * share for share in best.values()], 0.7, color=_COLOURS[0])
    axes.set_yticks(range(len(best)), _names(best), parse_math=False)
    axes.set_ylim(len(best) - 0.4, -0.6)  # the best on top
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    _title(axes, f"The {len(best)} most important features", "share of absolute SHAP values (%)")
    return figure


_CHARTS: dict[str, tuple[str, str, Callable[[Section], Figure | None]]] = {
    "ranking": ("recall_by_band.png", "Recall by popularity band and method", _draw_ranking),
    "ablation": ("ablation.png", "nDCG lost without each part", _draw_ablation),
    "cold_start": ("cold_start.png", "Recall by how often an item had been chosen", _draw_cold_start),
    "ctr": ("reliability.png", "Predicted against observed, by event type", _draw_ctr),
    "reranker": ("importance.png", "The most important features", _draw_reranker),
}
