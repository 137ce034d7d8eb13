"""Contrastive learning from pairs: the loss, and a projection of frozen vectors fitted with it."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy, dropout, normalize

from training.examples.positive_pairs import PositivePairs

_TEMPERATURE = 0.05
_IDENTITY_PENALTY = 1e-3
# Of the projection: a third of the time of batches of 1,024 at a rate of .001, and better in as many steps.
_HEAD_RATE, _HEAD_BATCH = 3e-3, 512


def pair_loss(
    left: torch.Tensor,
    right: torch.Tensor,
    items: torch.Tensor,
    log_share: torch.Tensor,
    temperature: float = _TEMPERATURE,
) -> torch.Tensor:
    """In-batch softmax over partners, corrected for their sampling probability (Yi et al., 2019).

    `left` and `right` (B, D) have unit length; `items` int64 (B,) and `log_share` (B,) belong to `right`. A
    partner that occurs twice in a batch is no negative of itself.
    """
    logits = left @ right.T / temperature - log_share
    same = (items[:, None] == items[None, :]) & ~torch.eye(len(items), dtype=torch.bool, device=items.device)
    logits = logits.masked_fill(same, float("-inf"))
    return cross_entropy(logits, torch.arange(len(items), device=items.device))


def fit_head(
    vectors: np.ndarray,
    pairs: PositivePairs,
    *,
    steps: int = 600,
    batch: int = _HEAD_BATCH,
    partners: np.ndarray | None = None,
    temperature: float = _TEMPERATURE,
    dropout_share: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """A projection float32 (D, D) that brings items of one basket together: unit(vectors @ W.T).

    `vectors` float32 (M, D) have unit length. `partners` float32 (M, D), optional, are vectors of the same
    items in another modality, zeros if missing: the projection keeps both close. In each step `dropout_share`
    of the numbers of a vector are left out.
    """
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(device)
    partner_values = None if partners is None else torch.from_numpy(np.float32(partners)).to(device)
    log_share = torch.from_numpy(np.log(np.maximum(pairs.share, 1e-9))).to(device)
    eye = torch.eye(vectors.shape[1], device=device)
    weight = eye.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=_HEAD_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps if len(pairs) else 0):
        left, right = (torch.from_numpy(a).to(device) for a in pairs.draw(batch, generator))
        a, b = (normalize(dropout(values[side], dropout_share) @ weight.T, dim=1) for side in (left, right))
        loss = pair_loss(a, b, right, log_share[right], temperature)
        loss = loss + _IDENTITY_PENALTY * (weight - eye).square().sum()
        if partner_values is not None:
            partner = normalize(partner_values[left] @ weight.T, dim=1)
            loss = loss + 0.5 * pair_loss(a, partner, left, log_share[left], temperature)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return np.asarray(weight.detach().cpu().numpy(), np.float32)


def apply_head(vectors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Projected vectors, scaled to unit length; zeros stay zeros."""
    projected = vectors.astype(np.float32) @ weight.T
    length = np.linalg.norm(projected, axis=1, keepdims=True)
    return np.asarray(projected / np.maximum(length, 1e-12), np.float32)
