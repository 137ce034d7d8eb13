"""How good rankings and probabilities are, each figure with the interval that chance leaves it.

Knows nothing of models, shops or files: arrays in, numbers out. Ranking everything, no sampled
metrics; recall, nDCG, bands, coverage and Gini index mean what `bench` measures by the same names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

BANDS = ("head", "mid", "tail", "strict_cold")
_DRAWN_AT_ONCE = 1 << 21
_DECIMALS = 5
_LEAST = 1e-7  # log loss of a certain and wrong float32 probability stays finite
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
        """As reports hold it, rounded to 5 decimals."""
        low, high = round(self.low, _DECIMALS), round(self.high, _DECIMALS)
        return {"mean": round(self.mean, _DECIMALS), "ci95": [low, high], "n": self.count}


def interval(values: np.ndarray, seed: int = 0, rounds: int = 1000) -> Interval:
    """The mean of `values` (N,) and the 2.5 and 97.5 % quantiles of the means of `rounds` resamples.

    The resamples are the same however many are drawn at once, and for all arrays of one length.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values in one dimension, not {values.shape}")
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // len(values))
    means = [
        values[generator.integers(0, len(values), (min(step, rounds - done), len(values)))].mean(1)
        for done in range(0, rounds, step)
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


def described(values: np.ndarray) -> dict[str, Any] | None:
    """The interval of `values` (N,) as a dictionary; of no values, None."""
    return interval(values).to_dict() if len(values) else None


def popularity_bands(counts: Mapping[_Key, int]) -> dict[_Key, str]:
    """The band of each item by its engagements, most engaged first and ties by rising item.

    Items are 'head' while those before them hold less than 50 % of all engagements, 'mid' while
    less than 80 %, then 'tail'; 'strict_cold' without any. The keys may be numbers or ids:
    equal counts across a border fall as the keys sort.
    """
    total, seen = sum(counts.values()), 0
    bands = {}
    for item, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        band = "head" if seen < 0.5 * total else "mid" if seen < 0.8 * total else "tail"
        bands[item] = band if count else "strict_cold"
        seen += count
    return bands


def per_query(
    pages: Sequence[np.ndarray], targets: Sequence[np.ndarray], k: int = 20
) -> dict[str, np.ndarray]:
    """Figures of each query, float64 (Q,) by name, for paired comparisons.

    `pages` are int64 item numbers, best first, of which the first `k` count; `targets` int64
    numbers, their order and repetitions of no meaning. With h targets among the first k of t:
    recall h / t; precision h / k, also for a shorter page; f1 2h / (k + t), the harmonic mean of
    these; hit 1 if h > 0; mrr 1 / the place of the first hit, 0 without; ndcg with binary gains, log2
    discount, and as ideal min(t, k) hits in the first places.

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
    """What `per_query` gives, as intervals, and whom and what it serves.

    `bands` names the band of an item, 'strict_cold' for one that it lacks; `warm` bool (Q,) says
    whose past is known; `universe` is the number of items that could have been recommended.
    `target_recall` pools the targets of all queries by band; `coverage` is the share of the
    universe that was shown at all; `gini` of how often, 0 all equally, 1 one item alone. What
    there is nothing to measure of is None.

    Raises:
        ValueError: as of `per_query`, or more items were shown than there are.
    """
    figures = per_query(pages, targets, k)
    warm = np.asarray(warm, bool)
    of_band: dict[str, list[bool]] = {band: [] for band in BANDS}
    for page, target in zip(pages, targets, strict=True):
        wanted = np.unique(target)
        for item, found in zip(wanted.tolist(), np.isin(wanted, page[:k]).tolist(), strict=True):
            of_band[bands.get(item, "strict_cold")].append(found)
    tops = [page[:k] for page in pages]
    shown = np.unique(np.concatenate(tops), return_counts=True)[1] if tops else np.zeros(0, np.int64)
    if len(shown) > universe:
        raise ValueError(f"{len(shown)} items were shown of a universe of {universe}")
    return {
        "k": k,
        "queries": len(pages),
        **{name: described(values) for name, values in figures.items()},
        "recall_warm_users": described(figures["recall"][warm]),
        "recall_new_users": described(figures["recall"][~warm]),
        "target_recall": {band: described(np.array(found, np.float64)) for band, found in of_band.items()},
        "coverage": round(len(shown) / universe, _DECIMALS),
        "gini": _gini(shown, universe),
    }


def recall_by_count(
    pages: Sequence[np.ndarray], targets: Sequence[np.ndarray], counts: Mapping[int, int], k: int = 20
) -> dict[str, Any]:
    """The share of targets among the first `k` of their pages, by how often each had been chosen.

    Pooled over all queries; `counts` holds an item's engagements, none for one that it lacks. From
    "0" over "1-2", "3-9" and "10-29" to "30+"; None where there is no such target.
    """
    found: dict[str, list[float]] = {name: [] for name in _COUNTS.values()}
    steps = np.array(list(_COUNTS))
    for page, target in zip(pages, targets, strict=True):
        wanted = np.unique(target)
        for item, held in zip(wanted.tolist(), np.isin(wanted, page[:k]).tolist(), strict=True):
            least = int(steps[np.searchsorted(steps, counts.get(item, 0), side="right") - 1])
            found[_COUNTS[least]].append(float(held))
    return {name: described(np.array(values)) for name, values in found.items()}


def _gini(shown: np.ndarray, universe: int) -> float | None:
    """Gini index over `universe` items of which `shown` (S,) holds the counts that are not zero."""
    if not len(shown):
        return None
    place = np.arange(universe - len(shown) + 1, universe + 1)
    index = (2 * place - universe - 1) @ np.sort(shown) / (universe * shown.sum())
    return round(float(index), _DECIMALS)


def classification_metrics(
    probability: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None, bins: int = 15
) -> dict[str, Any]:
    """How well float `probability` (N,) in [0, 1] foretells `label` (N,), bool or 0 and 1.

    `weight` (N,), not negative, counts a row that often. `log_loss` in nats; `ece` the mean
    distance between predicted and observed over `bins` bins of equal mass (Nguyen and O'Connor
    2015); `normalised_cross_entropy` the log loss over that of always saying the base rate, below 1
    is better (He et al. 2014); `reliability` one [mean predicted, observed, rows] per
    bin, predictions rising. Equal predictions share a bin. `auc` and normalised cross-entropy
    are None of a single class, everything is without a row that weighs something.

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
    both = 0 < y.sum() < len(y)
    constant = _log_loss(np.full(len(y), base), y, w)
    mass, curve = _reliability(p, y, w, bins)
    ece = float(np.average(np.abs(curve[:, 0] - curve[:, 1]), weights=mass))
    brier = float(np.average((p - y) ** 2, weights=w))
    found = (_auc(p, y, w) if both else None, loss, brier, ece, base, loss / constant if both else None)
    reliability = [[predicted, observed, int(rows)] for predicted, observed, rows in curve.tolist()]
    return {"rows": len(p), **dict(zip(names, found, strict=True)), "reliability": reliability}


def _log_loss(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    p = np.clip(p, _LEAST, 1 - _LEAST)
    return float(np.average(-(y * np.log(p) + (1 - y) * np.log1p(-p)), weights=w))


def _auc(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """The share of pairs of both classes in the right order, ties half, each by both weights."""
    _, group = np.unique(p, return_inverse=True)
    positive, negative = np.bincount(group, w * y), np.bincount(group, w * (1 - y))
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))


def _reliability(p: np.ndarray, y: np.ndarray, w: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The mass of each bin that holds a row (B,), and mean predicted, observed and rows (B, 3).

    A group of equal predictions goes where the middle of its mass lies.
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
