"""Fits the CTR head by cross-entropy over candidates, and predicts out-of-fold scores for the reranker."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from services.ranking.features.feature_matrix import CANDIDATE_COLUMNS
from services.ranking.features.user_impressions import IMPRESSION_COLUMNS
from services.ranking.models.attribute_vectors import ATTRIBUTES
from services.ranking.models.ctr import CtrModel, CtrSettings, user_histories
from services.ranking.models.scaler import FeatureScaler
from services.ranking.state.item_stats import RECENT_COLUMNS
from training.core.progress import track
from training.examples.feature_rows import FeatureRows
from training.examples.queries import DAY, user_part
from training.ranking.platt import platt

_QUERIES_PER_BATCH = 64
_CANDIDATES = 48
_PARTS = 4
POSITIONS = 20  # later places on a page count as this
_RATE_PRIOR, _MIN_RATE = 20.0, 1e-6
PAGE_COLUMNS = (*RECENT_COLUMNS, *IMPRESSION_COLUMNS)


def ctr_settings(
    rows: FeatureRows,
    vectors: Mapping[str, np.ndarray],
    types: Sequence[str],
    *,
    shown: bool,
    plain: bool = False,
    attributes: Sequence[str] = (),
) -> CtrSettings:
    """The settings of a head for these rows: their feature scales, and a vector space per kind of vector.

    One of the spaces may be that of `attributes`. A head of logged pages (`shown`) reads what happened in the
    last hours as well.
    """
    read = (*CANDIDATE_COLUMNS, *(PAGE_COLUMNS if shown else ()))
    columns = [name for name in rows.names if name in read]
    indices = [rows.names.index(name) for name in columns]
    return CtrSettings(
        spaces={space: int(v.shape[1]) for space, v in vectors.items()},
        types=tuple(types),
        columns=tuple(columns),
        scales=FeatureScaler.of(rows.matrix[:, indices]),
        plain=plain,
        shown=shown,
        attributes=tuple(attributes) if ATTRIBUTES in vectors else (),
    )


def fit_ctr(
    settings: CtrSettings,
    rows: FeatureRows,
    labels: np.ndarray,
    vectors: Mapping[str, np.ndarray],
    epochs: int,
    seed: int = 0,
    positions: np.ndarray | None = None,
) -> CtrModel:
    """A head fitted on rows with labels float32 (N, T), one column per event type.

    An epoch goes over every query, with its targets and a random sample of the others, at most 48 rows a
    query. Rows are weighted. With the `positions` of rows on their pages, int64 (N,), 0 for unknown, the
    logit of an event is that of the head plus an effect of the position (Zhao et al., 2019), which starts
    from the rate of events there. The effects are left out when ranking, and `calibrate` then fits the head
    to the average over positions.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model = CtrModel(settings)
    places = np.zeros(len(rows.items), np.int64) if positions is None else np.clip(positions, 0, POSITIONS)
    effects = torch.from_numpy(_position_logits(places, labels)).requires_grad_(positions is not None)
    batches = -(-len(rows.size) // _QUERIES_PER_BATCH)
    parameters = [*model.parameters(), *([effects] if effects.requires_grad else [])]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(1, epochs * batches))
    start = np.cumsum(rows.size) - rows.size
    model.train()
    for step in track(range(epochs * batches), "CTR head"):
        if step % batches == 0:
            order = generator.permutation(len(rows.size))
        batch = order[step % batches * _QUERIES_PER_BATCH :][:_QUERIES_PER_BATCH]
        candidates, present = _sample_candidates(rows, labels, start, batch, generator)
        logits = _forward(model, rows, batch, candidates, vectors) + effects[places[candidates]]
        weight = np.where(present, rows.weight[candidates], 0)[:, :, None]
        target = torch.from_numpy(labels[candidates])
        loss = binary_cross_entropy_with_logits(
            logits, target, torch.from_numpy(np.float32(weight)), reduction="sum"
        )
        optimizer.zero_grad()
        (loss / float(weight.sum())).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _position_logits(places: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The logit of the rate of each event type at each position, relative to all rows: float32 (21, T)."""
    mean = np.clip(labels.mean(0, keepdims=True), _MIN_RATE, 1 - _MIN_RATE)
    shown = np.bincount(places, minlength=POSITIONS + 1)[:, None]
    engaged = np.stack([np.bincount(places, label, POSITIONS + 1) for label in labels.T], axis=1)
    rate = (engaged + _RATE_PRIOR * mean) / (shown + _RATE_PRIOR)
    return np.asarray(np.log(rate / (1 - rate)) - np.log(mean / (1 - mean)), np.float32)


def score(model: CtrModel, rows: FeatureRows, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits float32 (N, T) of every row."""
    out = np.empty((len(rows.items), len(model.settings.types)), np.float32)
    start = np.cumsum(rows.size) - rows.size
    with torch.inference_mode():
        for first in range(0, len(rows.size), 8):
            batch = np.arange(first, min(first + 8, len(rows.size)))
            longest = int(rows.size[batch].max())
            candidates = np.minimum(start[batch, None] + np.arange(longest), len(rows.items) - 1)
            logits = _forward(model, rows, batch, candidates, vectors).numpy()
            for index, query in enumerate(batch):
                span = slice(start[query], start[query] + rows.size[query])
                out[span] = logits[index, : rows.size[query]]
    return out


def out_of_fold_logits(
    settings: CtrSettings,
    training: FeatureRows,
    labels: np.ndarray,
    targets: Sequence[FeatureRows],
    vectors: Mapping[str, np.ndarray],
    epochs: int,
    positions: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Logits float32 (N, T) of each of `targets`, by heads fitted on earlier days; NaN without such a head.

    The days of `training`, with `labels` float32 (N', T), are cut into at most four parts. The rows of a part
    are scored by a head fitted on the parts before it. Such a head has less data than the served head. But a
    head that knows the purchases of the same day would score better than a head that predicts the next day,
    and the reranker would trust it too much. If `training` has a single day, the parts are groups of users:
    each part is scored by a head fitted on the other users.
    """
    edges = _edges(training)
    split = [_part(rows, edges) for rows in targets]
    training_part, first = _part(training, edges), 1 if len(edges) else 0
    logits = [np.full((len(rows.items), len(settings.types)), np.nan, np.float32) for rows in targets]
    for part in range(first, _PARTS):
        outside = np.flatnonzero(training_part < part if len(edges) else training_part != part)
        inside = [np.flatnonzero(parts == part) for parts in split]
        if not len(outside) or not any(map(len, inside)):
            continue
        used = np.isin(training.group(), outside)
        places = None if positions is None else positions[used]
        model = fit_ctr(settings, training.take(outside), labels[used], vectors, epochs, positions=places)
        for rows, queries, out in zip(targets, inside, logits, strict=True):
            out[np.isin(rows.group(), queries)] = score(model, rows.take(queries), vectors)
    return logits


def calibrate(
    settings: CtrSettings, rows: FeatureRows, logits: np.ndarray, labels: np.ndarray
) -> CtrSettings:
    """The settings with a slope and an offset per type (Platt, 1999), fitted on out-of-fold `logits` (N, T).

    Uses only the last part of time, whose head had the most data, and only rows with their interactions.
    Without such rows the logits stay unchanged.
    """
    edges = _edges(rows)
    last = _part(rows, edges)[rows.group()] == len(edges) if len(edges) else np.ones(len(logits), bool)
    usable = last & np.isfinite(logits[:, 0]) & ~rows.no_interactions
    if not usable.any():
        return replace(settings, slope=(1.0,) * labels.shape[1], offset=(0.0,) * labels.shape[1])
    lines = [
        platt(logits[usable, column].astype(np.float64), labels[usable, column])
        for column in range(labels.shape[1])
    ]
    return replace(settings, slope=tuple(s for s, _ in lines), offset=tuple(o for _, o in lines))


def _edges(rows: FeatureRows) -> np.ndarray:
    """The last days, since 1970, of all parts of time but the last: int64 (P - 1,), rising."""
    day = _days(rows)
    days = np.unique(day)
    edges = np.unique(np.quantile(day, np.arange(1, _PARTS) / _PARTS, method="lower")).astype(np.int64)
    edges = edges[edges < days[-1]]
    return np.asarray(edges if len(edges) else days[-2:-1])


def _part(rows: FeatureRows, edges: np.ndarray) -> np.ndarray:
    """The part of each query, int64 (Q,): of time, or of the users if there are no edges."""
    if len(edges):
        return np.searchsorted(edges, _days(rows))
    return np.array([user_part(q.user_id, _PARTS) for q in rows.eval_queries], np.int64)


def _days(rows: FeatureRows) -> np.ndarray:
    return np.array([q.as_of // DAY for q in rows.eval_queries], np.int64)


def _sample_candidates(
    rows: FeatureRows,
    labels: np.ndarray,
    start: np.ndarray,
    batch: np.ndarray,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 (B, C) of the queries `batch`, targets first, and which of them count, bool.

    C is at most 48, and no more than the longest query has: pages are short.
    """
    longest = min(int(rows.size[batch].max()), _CANDIDATES)
    candidates = np.zeros((len(batch), longest), np.int64)
    present = np.zeros((len(batch), longest), bool)
    for index, query in enumerate(batch):
        query_rows = np.arange(start[query], start[query] + rows.size[query])
        is_target = labels[query_rows].any(1)
        others = generator.permutation(query_rows[~is_target])
        sample = np.concatenate([query_rows[is_target], others])[:_CANDIDATES]
        candidates[index, : len(sample)], present[index, : len(sample)] = sample, True
    return candidates, present


def _forward(
    model: CtrModel,
    rows: FeatureRows,
    batch: np.ndarray,
    candidates: np.ndarray,
    vectors: Mapping[str, np.ndarray],
) -> torch.Tensor:
    settings = model.settings
    users = user_histories([rows.user_queries[q] for q in batch], vectors, settings.spaces)
    items = {s: torch.from_numpy(np.float32(vectors[s][rows.items[candidates]])) for s in settings.spaces}
    indices = [rows.names.index(name) for name in settings.columns]
    dense = torch.from_numpy(settings.scales.apply(rows.matrix[candidates][..., indices]))
    return model(users, items, dense)  # type: ignore[no-any-return]
