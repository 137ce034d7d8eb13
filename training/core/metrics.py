"""Metrics of rankings and probabilities, with bootstrap confidence intervals.

Takes arrays and returns numbers; depends on no model, shop or file. Metrics are computed over all items,
never over sampled negatives. Recall, nDCG, bands, coverage and Gini index are defined as in `bench`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

BANDS = ("head", "mid", "tail", "strict_cold")
_SAMPLES_PER_STEP = 1 << 21
_DECIMALS = 5
_MIN_PROBABILITY = 1e-7  # keeps the log loss of a wrong probability of 0 or 1 finite
_Key = TypeVar("_Key", int, str)
_COUNTS = {0: "0", 1: "1-2", 3: "3-9", 10: "10-29", 30: "30+"}


@dataclass(frozen=True)
class Interval:
    """A mean over `count` values and its 95 % bootstrap interval [`low`, `high`]."""

    mean: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """The form used in reports, rounded to 5 decimals."""
        low, high = round(self.low, _DECIMALS), round(self.high, _DECIMALS)
        return {"mean": round(self.mean, _DECIMALS), "ci95": [low, high], "n": self.count}


def interval(values: np.ndarray, seed: int = 0, rounds: int = 1000) -> Interval:
    """The mean of `values` (N,) and the 2.5 % and 97.5 % quantiles of the means of `rounds` resamples.

    All arrays of one length use the same resamples, whatever the size of a step.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values in one dimension, not {values.shape}")
    generator = np.random.default_rng(seed)
    step = max(1, _SAMPLES_PER_STEP // len(values))
    means = [
        values[generator.integers(0, len(values), (min(step, rounds - start), len(values)))].mean(1)
        for start in range(0, rounds, step)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired_interval(a: np.ndarray, b: np.ndarray, seed: int = 0, rounds: int = 1000) -> Interval:
    """The mean of a - b over the same queries in the same order, both (Q,), and its interval.

    Raises:
        ValueError: the lengths differ, there are no values, or one is not finite.
    """
    if np.shape(a) != np.shape(b):
        raise ValueError(f"{np.shape(a)} and {np.shape(b)} are not the same queries")
    return interval(np.asarray(a, np.float64) - np.asarray(b, np.float64), seed, rounds)


def interval_or_none(values: np.ndarray) -> dict[str, Any] | None:
    """The interval of `values` (N,) as a dictionary, or None if there are no values."""
    return interval(values).to_dict() if len(values) else None


def popularity_bands(counts: Mapping[_Key, int]) -> dict[_Key, str]:
    """The popularity band of each item, by its number of engagements.

    Items are sorted by engagements, ties by key. An item is 'head' while the items before it hold less than
    50 % of all engagements, 'mid' while less than 80 %, else 'tail'. An item without engagements is
    'strict_cold'. Keys are numbers or ids.
    """
    total, cumulative = sum(counts.values()), 0
    bands = {}
    for item, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        band = "head" if cumulative < 0.5 * total else "mid" if cumulative < 0.8 * total else "tail"
        bands[item] = band if count else "strict_cold"
        cumulative += count
    return bands


def per_query(
    pages: Sequence[np.ndarray], targets: Sequence[np.ndarray], k: int = 20
) -> dict[str, np.ndarray]:
    """Metrics of each query, float64 (Q,) by name, for paired comparisons.

    `pages` are int64 items, best first; the first `k` count. `targets` are int64 items; their order and
    repetitions do not matter. With h targets among the first k, of t targets: recall is h / t; precision is
    h / k, also for a shorter page; f1 is 2h / (k + t), their harmonic mean; hit is 1 if h > 0; mrr is
    1 / rank of the first hit, or 0; ndcg has binary gains, a log2 discount, and min(t, k) hits at the top as
    its ideal; map is the sum of the precision at the rank of each hit, over min(t, k).

    Raises:
        ValueError: lengths differ, a query has no target, or the first k of a page repeat an item.
    """
    gains = np.zeros((len(pages), k))
    size = np.zeros(len(pages))
    for row, (page, target) in enumerate(zip(pages, targets, strict=True)):
        top = np.asarray(page)[:k]
        if len(np.unique(top)) != len(top) or not len(target):
            raise ValueError(f"query {row}: its page repeats an item or it has no target")
        gains[row, : len(top)] = np.isin(top, target)
        size[row] = len(np.unique(target))
    hits = gains.sum(1)
    discount = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discount)[np.minimum(size, k).astype(np.int64) - 1]
    return {
        "recall": hits / size,
        "ndcg": gains @ discount / ideal,
        "hit": (hits > 0).astype(np.float64),
        "mrr": (gains / np.arange(1, k + 1)).max(1),
        "precision": hits / k,
        "f1": 2 * hits / (k + size),
        "map": (gains * np.cumsum(gains, axis=1) / np.arange(1, k + 1)).sum(1) / np.minimum(size, k),
    }


def ranking_metrics(
    pages: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    *,
    bands: Mapping[int, str],
    warm: np.ndarray,
    universe: int,
    k: int = 20,
) -> dict[str, Any]:
    """The metrics of `per_query` as intervals, and metrics by user group, by band and over the catalog.

    `bands` maps an item to its band; a missing item is 'strict_cold'. `warm` bool (Q,) marks queries of users
    with a history. `universe` is the number of items that could be recommended. `target_recall` pools the
    targets of all queries by band. `coverage` is the share of the universe that appears on any page. `gini`
    is 0 if all items appear equally often and 1 if only one appears. A metric without data is None.

    Raises:
        ValueError: as in `per_query`, or the pages contain more items than the universe.
    """
    figures = per_query(pages, targets, k)
    warm = np.asarray(warm, bool)
    of_band: dict[str, list[bool]] = {band: [] for band in BANDS}
    for page, target in zip(pages, targets, strict=True):
        target_items = np.unique(target)
        for item, hits in zip(target_items.tolist(), np.isin(target_items, page[:k]).tolist(), strict=True):
            of_band[bands.get(item, "strict_cold")].append(hits)
    tops = [page[:k] for page in pages]
    counts = np.unique(np.concatenate(tops), return_counts=True)[1] if tops else np.zeros(0, np.int64)
    if len(counts) > universe:
        raise ValueError(f"{len(counts)} items were shown of a universe of {universe}")
    return {
        "k": k,
        "queries": len(pages),
        **{name: interval_or_none(values) for name, values in figures.items()},
        "recall_warm_users": interval_or_none(figures["recall"][warm]),
        "recall_new_users": interval_or_none(figures["recall"][~warm]),
        "target_recall": {
            band: interval_or_none(np.array(hits, np.float64)) for band, hits in of_band.items()
        },
        "coverage": round(len(counts) / universe, _DECIMALS),
        "gini": _gini(counts, universe),
    }


def recall_by_count(
    pages: Sequence[np.ndarray], targets: Sequence[np.ndarray], counts: Mapping[int, int], k: int = 20
) -> dict[str, Any]:
    """The share of targets among the first `k` of their pages, by the targets' number of engagements.

    Pooled over all queries. `counts` maps an item to its engagements; a missing item has none. The groups are
    "0", "1-2", "3-9", "10-29" and "30+"; a group without targets is None.
    """
    hits: dict[str, list[float]] = {name: [] for name in _COUNTS.values()}
    steps = np.array(list(_COUNTS))
    for page, target in zip(pages, targets, strict=True):
        target_items = np.unique(target)
        for item, hit in zip(target_items.tolist(), np.isin(target_items, page[:k]).tolist(), strict=True):
            lower = int(steps[np.searchsorted(steps, counts.get(item, 0), side="right") - 1])
            hits[_COUNTS[lower]].append(float(hit))
    return {name: interval_or_none(np.array(values)) for name, values in hits.items()}


def _gini(counts: np.ndarray, universe: int) -> float | None:
    """The Gini index over `universe` items; `counts` (S,) are the counts that are not zero."""
    if not len(counts):
        return None
    rank = np.arange(universe - len(counts) + 1, universe + 1)
    index = (2 * rank - universe - 1) @ np.sort(counts) / (universe * counts.sum())
    return round(float(index), _DECIMALS)


def classification_metrics(
    probability: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None, bins: int = 15
) -> dict[str, Any]:
    """How well `probability` (N,), float in [0, 1], predicts `label` (N,), bool or 0 and 1.

    `weight` (N,) is the weight of a row, not negative. `log_loss` is in nats. `ece` is the mean distance of
    prediction and observation over `bins` bins of equal mass (Nguyen and O'Connor, 2015).
    `normalised_cross_entropy` is the log loss divided by the log loss of the base rate; below 1 is better
    (He et al., 2014). `reliability` has one [mean prediction, observed rate, rows] per bin, by rising
    prediction. Equal predictions share a bin. `auc` and normalized cross-entropy are None if there is one
    class only; all metrics are None if no row has weight.

    Raises:
        ValueError: a probability is outside [0, 1] or NaN, or the shapes differ.
    """
    p, y = np.asarray(probability, np.float64), np.asarray(label, np.float64)
    w = np.ones(len(p)) if weight is None else np.asarray(weight, np.float64)
    if not (p.shape == y.shape == w.shape) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"{p.shape} probabilities in [0, 1], {y.shape} labels, {w.shape} weights needed")
    p, y, w = p[w > 0], y[w > 0], w[w > 0]
    names = ("auc", "log_loss", "brier", "ece", "base_rate", "normalised_cross_entropy")
    if not len(p):
        return {"rows": 0, **dict.fromkeys(names), "reliability": []}
    base = float(np.average(y, weights=w))
    loss = _log_loss(p, y, w)
    both_classes = 0 < y.sum() < len(y)
    constant = _log_loss(np.full(len(y), base), y, w)
    mass, curve = _reliability(p, y, w, bins)
    ece = float(np.average(np.abs(curve[:, 0] - curve[:, 1]), weights=mass))
    brier = float(np.average((p - y) ** 2, weights=w))
    values = (
        _auc(p, y, w) if both_classes else None,
        loss,
        brier,
        ece,
        base,
        loss / constant if both_classes else None,
    )
    reliability = [[predicted, observed, int(rows)] for predicted, observed, rows in curve.tolist()]
    return {"rows": len(p), **dict(zip(names, values, strict=True)), "reliability": reliability}


def _log_loss(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    p = np.clip(p, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    return float(np.average(-(y * np.log(p) + (1 - y) * np.log1p(-p)), weights=w))


def _auc(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """The weighted share of pairs of a positive and a negative in the right order; a tie counts half."""
    _, group = np.unique(p, return_inverse=True)
    positive, negative = np.bincount(group, w * y), np.bincount(group, w * (1 - y))
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))


def _reliability(p: np.ndarray, y: np.ndarray, w: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The mass of each nonempty bin (B,), and its mean prediction, observed rate and rows (B, 3).

    A group of equal predictions belongs to the bin of the middle of its mass.
    """
    _, group = np.unique(p, return_inverse=True)
    grouped = np.bincount(group, w)
    middle = (np.cumsum(grouped) - grouped / 2) / grouped.sum()
    _, place = np.unique(np.minimum(middle * bins, bins - 1).astype(np.int64), return_inverse=True)
    row = place[group]
    mass = np.bincount(row, w)
    return mass, np.stack(
        [np.bincount(row, w * p) / mass, np.bincount(row, w * y) / mass, np.bincount(row)], 1
    )
