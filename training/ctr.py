"""The CTR head's fit: cross-entropy over candidates; whatever learns from its scores sees foretold ones."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch.nn.functional import binary_cross_entropy_with_logits

from services.ranking.ctr import CtrModel, CtrSettings, gather
from services.ranking.features import CANDIDATE_COLUMNS
from services.ranking.scales import Scales
from training.progress import track
from training.queries import DAY
from training.rows import Rows

_QUESTIONS_A_BATCH = 64
_CANDIDATES = 48
_PARTS = 4


def ctr_settings(
    rows: Rows, vectors: Mapping[str, np.ndarray], types: Sequence[str], *, shown: bool, plain: bool = False
) -> CtrSettings:
    """The shape of a head for these rows: standard scales from them, a space per kind of vector."""
    columns = [name for name in rows.names if name in CANDIDATE_COLUMNS]
    at = [rows.names.index(name) for name in columns]
    return CtrSettings(
        spaces={space: int(v.shape[1]) for space, v in vectors.items()},
        types=tuple(types),
        columns=tuple(columns),
        scales=Scales.of(rows.matrix[:, at]),
        plain=plain,
        shown=shown,
    )


def fit_ctr(
    settings: CtrSettings,
    rows: Rows,
    labels: np.ndarray,
    vectors: Mapping[str, np.ndarray],
    epochs: int,
    seed: int = 0,
) -> CtrModel:
    """A head fitted on rows with labels float32 (N, T), one column per event type.

    Each epoch sees every question with its answers and a draw of at most 48 candidates in all;
    rows weigh what they stand for.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model = CtrModel(settings)
    batches = -(-len(rows.size) // _QUESTIONS_A_BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(1, epochs * batches))
    start = np.cumsum(rows.size) - rows.size
    model.train()
    for step in track(range(epochs * batches), "CTR head"):
        if step % batches == 0:
            order = generator.permutation(len(rows.size))
        chosen = order[step % batches * _QUESTIONS_A_BATCH :][:_QUESTIONS_A_BATCH]
        picked, present = _pick(rows, labels, start, chosen, generator)
        logits = _forward(model, rows, chosen, picked, vectors)
        weight = np.where(present, rows.weight[picked], 0)[:, :, None]
        wanted = torch.from_numpy(labels[picked])
        loss = binary_cross_entropy_with_logits(
            logits, wanted, torch.from_numpy(np.float32(weight)), reduction="sum"
        )
        optimiser.zero_grad()
        (loss / float(weight.sum())).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def score(model: CtrModel, rows: Rows, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits float32 (N, T) of every row."""
    out = np.empty((len(rows.items), len(model.settings.types)), np.float32)
    start = np.cumsum(rows.size) - rows.size
    with torch.inference_mode():
        for begin in range(0, len(rows.size), 8):
            chosen = np.arange(begin, min(begin + 8, len(rows.size)))
            longest = int(rows.size[chosen].max())
            picked = np.minimum(start[chosen, None] + np.arange(longest), len(rows.items) - 1)
            logits = _forward(model, rows, chosen, picked, vectors).numpy()
            for at, question in enumerate(chosen):
                span = slice(start[question], start[question] + rows.size[question])
                out[span] = logits[at, : rows.size[question]]
    return out


def foretold(
    settings: CtrSettings,
    learned: Rows,
    labels: np.ndarray,
    scored: Sequence[Rows],
    vectors: Mapping[str, np.ndarray],
    epochs: int,
) -> list[np.ndarray]:
    """Logits float32 (N, T) of each of `scored`, by heads that learned from earlier days; NaN if none did.

    The days of `learned`, whose `labels` are float32 (N', T), are cut into at most four parts; rows of a
    part are scored by a head that learned from the parts before. It has seen less than the head that
    is served; but one that knows what others bought on the same day scores better than one that
    has to foretell the next, and would be believed too much. Where `learned` is of a single
    day there is no other way: there a head scores the people that it did not learn from.
    """
    edges = _edges(learned)
    split = [_part(rows, edges) for rows in scored]
    mine, first = _part(learned, edges), 1 if len(edges) else 0
    found = [np.full((len(rows.items), len(settings.types)), np.nan, np.float32) for rows in scored]
    for part in range(first, _PARTS):
        outside = np.flatnonzero(mine < part if len(edges) else mine != part)
        inside = [np.flatnonzero(parts == part) for parts in split]
        if not len(outside) or not any(map(len, inside)):
            continue
        known = labels[np.isin(learned.group(), outside)]
        model = fit_ctr(settings, learned.take(outside), known, vectors, epochs)
        for rows, chosen, out in zip(scored, inside, found, strict=True):
            out[np.isin(rows.group(), chosen)] = score(model, rows.take(chosen), vectors)
    return found


def calibrated(settings: CtrSettings, rows: Rows, logits: np.ndarray, labels: np.ndarray) -> CtrSettings:
    """The settings with a slope and an offset by type (Platt, 1999), from foretold `logits` (N, T) of `rows`.

    Of the last part of time alone, whose head had seen most, and of rows shown as they were. Without
    any, logits stay as they are.
    """
    edges = _edges(rows)
    last = _part(rows, edges)[rows.group()] == len(edges) if len(edges) else np.ones(len(logits), bool)
    known = last & np.isfinite(logits[:, 0]) & ~rows.unsold
    if not known.any():
        return replace(settings, slope=(1.0,) * labels.shape[1], offset=(0.0,) * labels.shape[1])
    found = [platt(logits[known, at].astype(np.float64), labels[known, at]) for at in range(labels.shape[1])]
    return replace(settings, slope=tuple(s for s, _ in found), offset=tuple(o for _, o in found))


def platt(logit: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Slope and offset (Platt, 1999) that make logits (N,) fit labels (N,), bool or 0 and 1."""
    done = float(label.sum())
    # Platt's own targets: labels of a single class have an answer too.
    target = np.where(label > 0, (done + 1) / (done + 2), 1 / (len(label) - done + 2))

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = at[0] * logit + at[1]
        wrong = expit(scaled) - target
        entropy = float(np.mean(np.logaddexp(0, scaled) - target * scaled))
        return entropy, np.array([np.mean(wrong * logit), np.mean(wrong)])

    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    return float(slope), float(offset)


def _edges(rows: Rows) -> np.ndarray:
    """The last days, since 1970, of all parts of time but the last: int64 (P - 1,), rising."""
    day = _days(rows)
    days = np.unique(day)
    edges = np.unique(np.quantile(day, np.arange(1, _PARTS) / _PARTS, method="lower")).astype(np.int64)
    edges = edges[edges < days[-1]]
    return np.asarray(edges if len(edges) else days[-2:-1])


def _part(rows: Rows, edges: np.ndarray) -> np.ndarray:
    """The part of each question, int64 (Q,): of time, or of the people where there are no edges."""
    if len(edges):
        return np.searchsorted(edges, _days(rows))
    return np.array([zlib.crc32(q.user_id.encode()) % _PARTS for q in rows.questions], np.int64)


def _days(rows: Rows) -> np.ndarray:
    return np.array([q.as_of // DAY for q in rows.questions], np.int64)


def _pick(
    rows: Rows, labels: np.ndarray, start: np.ndarray, chosen: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 (B, C) of the chosen questions, answers first, and which of them count, bool."""
    picked = np.zeros((len(chosen), _CANDIDATES), np.int64)
    present = np.zeros((len(chosen), _CANDIDATES), bool)
    for at, question in enumerate(chosen):
        mine = np.arange(start[question], start[question] + rows.size[question])
        answer = labels[mine].any(1)
        others = generator.permutation(mine[~answer])
        kept = np.concatenate([mine[answer], others])[:_CANDIDATES]
        picked[at, : len(kept)], present[at, : len(kept)] = kept, True
    return picked, present


def _forward(
    model: CtrModel, rows: Rows, chosen: np.ndarray, picked: np.ndarray, vectors: Mapping[str, np.ndarray]
) -> torch.Tensor:
    settings = model.settings
    persons = gather([rows.queries[q] for q in chosen], vectors, settings.spaces)
    items = {s: torch.from_numpy(np.float32(vectors[s][rows.items[picked]])) for s in settings.spaces}
    at = [rows.names.index(name) for name in settings.columns]
    dense = torch.from_numpy(settings.scales.apply(rows.matrix[picked][..., at]))
    return model(persons, items, dense)  # type: ignore[no-any-return]
