"""The charts of the report, at most one per section. Input is the cleaned sections of the report.

A chart shows at most six methods, the number of colors; the report's tables show all.
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
# Okabe and Ito's palette, which is safe for color-blind readers.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_INK, _FAINT, _IDLE = "#333333", "#DDDDDD", "#AAAAAA"
_WHISKERS: dict[str, Any] = {"fmt": "none", "ecolor": "black", "elinewidth": 1.0, "capsize": 2}
_TOP = 20
_LABEL = 36
_PANELS = 3


def complete_interval(interval: Section | None) -> tuple[float, float, float] | None:
    """Mean, low and high of an interval, or None if one of them is missing."""
    match interval:
        case {"mean": float() as mean, "ci95": [float() as low, float() as high]}:
            return mean, low, high
    return None


def top_features(importance: Section) -> dict[str, float]:
    """The most important features, at most 20, with their shares; features without a share are dropped."""
    shares = {name: share for name, share in importance.items() if share is not None}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1])[:_TOP])


def draw_chart(directory: Path, section: str, content: Section) -> list[str]:
    """Draw the chart of a section, if it has one, and return the paragraph that shows it."""
    if section not in _CHARTS:
        return []
    name, words, draw = _CHARTS[section]
    figure = draw(content)
    if figure is None:
        return []
    figure.savefig(directory / name, dpi=144, metadata={"Software": None})
    return [f"![{words}]({name})"]


def _figure(
    height: float, width: float = 7, panels: int = 1, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure, in inches, and its panels, in rows of three; `ratios` are the relative widths of columns."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    columns = min(panels, _PANELS)
    rows = -(-panels // columns)
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios).ravel().tolist()
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
    """Names as labels: on one line, long ones shortened in the middle."""
    flat = (" ".join(name.split()) for name in names)
    half = _LABEL // 2
    return [name if len(name) <= _LABEL else f"{name[:half]}…{name[-half:]}" for name in flat]


def _whiskers(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths of error bars (2, N), not negative; rounding may put a mean just outside its interval."""
    return np.maximum([mean - low, high - mean], 0)


def _draw_ranking(methods: Section) -> Figure | None:
    k, chart_methods = next(iter(methods.values())).get("k", 20), list(methods.items())[: len(_COLORS)]
    figure, (axes,) = _figure(3.5)
    width, count = 0.8 / len(chart_methods), dict.fromkeys(BANDS, 0)
    for place, (_, figures) in enumerate(chart_methods):
        bands = {band: figures.get("target_recall", {}).get(band) for band in BANDS}
        positions, intervals = [], []
        for column, (band, interval) in enumerate(bands.items()):
            if values := complete_interval(interval):
                positions.append(column + (place - (len(chart_methods) - 1) / 2) * width)
                intervals.append(values)
                count[band] = bands[band]["n"]
        mean, low, high = np.array(intervals).reshape(-1, 3).T
        axes.bar(positions, mean, width * 0.92, color=_COLORS[place])
        axes.errorbar(positions, mean, _whiskers(mean, low, high), **_WHISKERS)
    if not any(count.values()):
        return None
    labels = [f"{words}\n{count[band]:,} targets" for band, words in BANDS.items()]
    axes.set_xticks(range(len(BANDS)), labels)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    _title(axes, "Recall by popularity", y=f"recall@{k} (share of targets)")
    patches = [Patch(color=_COLORS[place]) for place in range(len(chart_methods))]
    _legend(figure, patches, [name for name, _ in chart_methods])
    return figure


def _legend(figure: Figure, handles: Sequence[Artist], names: Iterable[str]) -> None:
    """A legend below the panels."""
    columns = len(handles) if len(handles) <= _PANELS + 1 else _PANELS
    legend = figure.legend(
        handles, _names(names), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_page_slices(kinds: Section) -> Figure | None:
    intervals = {
        kind: {n: v for n, of in slices.items() if (v := complete_interval(of.get("gained")))}
        for kind, slices in kinds.items()
    }
    intervals = {kind: slices for kind, slices in intervals.items() if slices}
    if not intervals:
        return None
    ratios = [1 + len(slices) for slices in intervals.values()]
    figure, panels = _figure(3, 7.5, len(intervals), ratios)
    for axes, (kind, slices) in zip(panels, intervals.items(), strict=True):
        if axes is not panels[0]:
            axes.sharey(panels[0])
            axes.tick_params(labelleft=False)
        places, (mean, low, high) = range(len(slices)), np.array(list(slices.values())).T
        axes.axhline(0, color=_INK, linewidth=0.9)
        axes.errorbar(places, mean, _whiskers(mean, low, high), **_WHISKERS)
        colors = np.where((low > 0) | (high < 0), _COLORS[0], _IDLE).tolist()
        axes.scatter(places, mean, 30, colors, zorder=3)
        axes.set_xticks(places, [BANDS.get(name, name).replace(" ", "\n") for name in slices])
        axes.set_xlim(-0.6, len(slices) - 0.4)
        axes.grid(axis="y", color=_FAINT, linewidth=0.7)
        _title(axes, f"By {kind}")
    panels[0].set_ylabel("log-likelihood gained (gray: not measurable)", fontsize=8.5, color=_INK)
    return figure


def _draw_ablation(parts: Section) -> Figure | None:
    intervals = {
        name: v for name, part in parts.items() if (v := complete_interval(part.get("ndcg_difference")))
    }
    if not intervals:
        return None
    order = sorted(intervals, key=lambda name: intervals[name][0])
    figure, (axes,) = _figure(1.2 + 0.28 * len(order))
    mean, low, high = np.array([intervals[name] for name in order]).T
    colors = [_COLORS[0] if bound > 0 else _IDLE for bound in low]
    axes.barh(range(len(order)), mean, 0.65, color=colors)
    axes.errorbar(mean, range(len(order)), xerr=_whiskers(mean, low, high), **_WHISKERS)
    axes.axvline(0, color=_INK, linewidth=0.9)
    axes.set_yticks(range(len(order)), _names(order), parse_math=False)
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    _title(axes, "Contribution of each part (gray: not measurable)", "nDCG loss without it, 95 % interval")
    return figure


def _draw_cold_start(methods: Section) -> Figure | None:
    counts = list(next(iter(methods.values())))
    figure, (axes,) = _figure(3.2)
    chart_methods = list(methods.items())[: len(_COLORS)]
    points = 0
    for color, (_, recalls) in zip(_COLORS, chart_methods, strict=False):
        intervals = [
            (index, v) for index, count in enumerate(counts) if (v := complete_interval(recalls.get(count)))
        ]
        points += len(intervals)
        places, means = [index for index, _ in intervals], [mean for _, (mean, *_) in intervals]
        axes.plot(places, means, color=color, marker="o", ms=3.5, lw=1.4)
    if not points:
        return None
    axes.set_xticks(range(len(counts)), counts)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    _title(axes, "Recall of new items", "earlier engagements", "recall@20")
    _legend(figure, axes.lines, [name for name, _ in chart_methods])
    return figure


def _draw_ctr(types: Section) -> Figure | None:
    charts = {
        name: figures for name, figures in types.items() if (figures.get("head") or {}).get("reliability")
    }
    if not charts:
        return None
    columns, rows = min(len(charts), _PANELS), -(-len(charts) // _PANELS)
    figure, panels = _figure(0.4 + 2.6 * rows, max(3.2, 2.35 * columns), len(charts))
    for axes, name, figures in zip(panels, _names(charts), charts.values(), strict=True):
        limit = 1e-3
        for model, color, marker in (("plain", _COLORS[1], "s"), ("head", _COLORS[0], "o")):
            curve = np.array((figures.get(model) or {}).get("reliability") or np.zeros((0, 3)))[:, :2]
            axes.plot(*curve.T, color=color, marker=marker, ms=3.5, lw=1.4)
            limit = max(limit, *curve.ravel().tolist())
        axes.plot([0, limit], [0, limit], color=_IDLE, lw=0.9, ls="--", zorder=0)
        axes.set(xlim=(-0.04 * limit, 1.06 * limit), ylim=(-0.04 * limit, 1.06 * limit), box_aspect=1)
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
    axes.barh(range(len(best)), [100 * share for share in best.values()], 0.7, color=_COLORS[0])
    axes.set_yticks(range(len(best)), _names(best), parse_math=False)
    axes.set_ylim(len(best) - 0.4, -0.6)  # the most important on top
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    _title(axes, f"The {len(best)} most important features", "share of absolute SHAP values (%)")
    return figure


_CHARTS: dict[str, tuple[str, str, Callable[[Section], Figure | None]]] = {
    "ranking": ("recall_by_band.png", "Recall by popularity band and method", _draw_ranking),
    "page_slices": ("page_gain.png", "Gain on logged pages by position, user and item", _draw_page_slices),
    "ablation": ("ablation.png", "nDCG loss without each part", _draw_ablation),
    "cold_start": ("cold_start.png", "Recall by number of earlier engagements", _draw_cold_start),
    "ctr": ("reliability.png", "Predicted and observed rates, by event type", _draw_ctr),
    "reranker": ("importance.png", "The most important features", _draw_reranker),
}
