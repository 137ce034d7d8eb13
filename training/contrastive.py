"""Contrastive learning from pairs: the loss, and a projection of frozen vectors fitted with it."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize

from training.pairs import Pairs

_TEMPERATURE = 0.05
_PULL = 1e-3


def pair_loss(
    left: torch.Tensor,
    right: torch.Tensor,
    items: torch.Tensor,
    log_share: torch.Tensor,
    temperature: float = _TEMPERATURE,
) -> torch.Tensor:
    """In-batch softmax over partners, each corrected by how often it is drawn (Yi et al., 2019).

    `left` and `right` (B, D) of unit length; `items` int64 (B,) and `log_share` (B,) are of
    `right`. A partner that comes twice in a batch is no negative of itself.
    """
    logits = left @ right.T / temperature - log_share
    same = (items[:, None] == items[None, :]) & ~torch.eye(len(items), dtype=torch.bool, device=items.device)
    logits = logits.masked_fill(same, float("-inf"))
    return cross_entropy(logits, torch.arange(len(items), device=items.device))


def fit_head(
    vectors: np.ndarray,
    pairs: Pairs,
    *,
    steps: int = 600,
    batch: int = 1024,
    partners: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """A projection float32 (D, D) under which items of one basket are near: unit(vectors @ W.T).

    `vectors` float32 (M, D) of unit length. `partners` float32 (M, D), when given, are the
    same items seen in another modality, zeros for none: the projection keeps both together.
    """
    generator = np.random.default_rng(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(device)
    other = None if partners is None else torch.from_numpy(np.float32(partners)).to(device)
    log_share = torch.from_numpy(np.log(np.maximum(pairs.share, 1e-9))).to(device)
    eye = torch.eye(vectors.shape[1], device=device)
    weight = eye.clone().requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    for _ in range(steps if len(pairs) else 0):
        left, right = (torch.from_numpy(a).to(device) for a in pairs.draw(batch, generator))
        a, b = normalize(values[left] @ weight.T, dim=1), normalize(values[right] @ weight.T, dim=1)
        loss = pair_loss(a, b, right, log_share[right]) + _PULL * (weight - eye).square().sum()
        if other is not None:
            seen = normalize(other[left] @ weight.T, dim=1)
            loss = loss + 0.5 * pair_loss(a, seen, left, log_share[left])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return np.asarray(weight.detach().cpu().numpy(), np.float32)


def apply_head(vectors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Vectors under a projection, scaled to unit length; zeros stay zeros."""
    projected = vectors.astype(np.float32) @ weight.T
    length = np.linalg.norm(projected, axis=1, keepdims=True)
    return np.asarray(projected / np.maximum(length, 1e-12), np.float32)
