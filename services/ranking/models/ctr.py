"""The CTR head: the probability that a user interacts with a candidate, from the vectors of the encoders.

An item is its text and image vectors and the embeddings of its attributes. A candidate attends to the
history of the user (target attention, Deep Interest Network, Zhou et al., 2018), histograms hold its
similarity to that history in each modality (SimTier, Sheng et al., 2024), and feature columns of the
candidate are appended. One output per event type.
`ctr_head` serves it. Knows arrays, not items.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from services.ranking.models.attribute_vectors import ATTRIBUTES
from services.ranking.models.scaler import FeatureScaler
from services.ranking.state.user_query import UserQuery

MAX_HISTORY = 50
SETTINGS_FILE = "ctr.json"
WEIGHTS_FILE = "ctr.safetensors"
TIERS = 10


@dataclass(frozen=True)
class CtrSettings:
    """The shape of a head.

    `spaces` maps a space to its dimension, one of them may be `ATTRIBUTES`, that of the text attributes
    `attributes`; `types` are the event types that it predicts; `columns` the
    feature columns of a candidate, scaled by `scales`; `plain` uses only the two representations,
    P = sigmoid(W (x_u, x_i) + b); `shown` is true for a head that was trained with impressions: its output
    is P(event | shown), calibrated by `offset` and `slope` by type on the logit.
    """

    spaces: Mapping[str, int]
    types: Sequence[str]
    columns: Sequence[str]
    scales: FeatureScaler
    width: int = 64
    plain: bool = False
    shown: bool = False
    slope: Sequence[float] = ()
    offset: Sequence[float] = ()
    attributes: Sequence[str] = ()

    @property
    def tier_spaces(self) -> list[str]:
        """The spaces in which similarities are counted: shares of attribute values are columns."""
        return [space for space in self.spaces if space != ATTRIBUTES]


@dataclass(frozen=True)
class UserHistories:
    """Histories of B users, padded to H: `present` bool (B, H), `event_features` float32 (B, H, 3).

    `vectors` float32 (B, H, D) by space, zeros for none. The features of an event are the weight of its
    type, the logarithm of its age in days, and whether it is of the session.
    """

    vectors: Mapping[str, torch.Tensor]
    event_features: torch.Tensor
    present: torch.Tensor


class CtrModel(nn.Module):
    """The network; see the docstring of the module."""

    def __init__(self, settings: CtrSettings) -> None:
        super().__init__()
        width = settings.width
        self.settings = settings
        self.project = nn.ModuleDict({s: nn.Linear(d, width, bias=False) for s, d in settings.spaces.items()})
        self.norm = nn.LayerNorm(width)
        outputs = len(settings.types)
        if settings.plain:
            self.head: nn.Module = nn.Linear(2 * width, outputs)
            return
        self.event_projection = nn.Linear(3, width)
        self.null_token = nn.Parameter(torch.zeros(width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        input_size = 3 * width + len(settings.columns) + len(settings.tier_spaces) * TIERS
        self.head = nn.Sequential(
            nn.Linear(input_size, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, outputs)
        )

    def forward(
        self, users: UserHistories, items: Mapping[str, torch.Tensor], dense: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, C, T) of candidates with vectors (B, C, D) by space and columns (B, C, F)."""
        past, item = self._item(users.vectors), self._item(items)
        present = users.present
        if self.settings.plain:
            count = present.sum(1, keepdim=True).clamp(min=1)
            user = (past * present.unsqueeze(-1)).sum(1) / count
            user = user.unsqueeze(1).expand_as(item)
            return self.head(torch.cat([user, item], -1))  # type: ignore[no-any-return]
        past = past + self.event_projection(users.event_features)
        # A user without a history, or without a relevant item in it, attends to the null token.
        past = torch.cat([past, self.null_token.expand(len(past), 1, -1)], 1)
        mask = torch.cat([present, torch.ones_like(present[:, :1])], 1)
        attention = self.q_proj(item) @ self.k_proj(past).transpose(1, 2) / self.settings.width**0.5
        attention = attention.masked_fill(~mask.unsqueeze(1), float("-inf"))
        user = attention.softmax(-1) @ self.v_proj(past)
        tiers = [self._tiers(users, items, space) for space in self.settings.tier_spaces]
        return self.head(torch.cat([user, item, user * item, dense, *tiers], -1))  # type: ignore[no-any-return]

    def _item(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        total = sum(layer(vectors[space]) for space, layer in self.project.items())
        return self.norm(total)  # type: ignore[no-any-return]

    @staticmethod
    def _tiers(users: UserHistories, items: Mapping[str, torch.Tensor], space: str) -> torch.Tensor:
        """The items of the history in each tier of similarity, (B, C, 10): logarithms of counts."""
        cosine = items[space] @ users.vectors[space].transpose(1, 2)
        tier = (cosine * TIERS).floor().clamp(0, TIERS - 1).long()
        present = users.present.unsqueeze(1).expand_as(tier).to(cosine.dtype)
        counts = torch.zeros(*cosine.shape[:2], TIERS, dtype=cosine.dtype, device=cosine.device)
        return counts.scatter_add(2, tier, present).log1p()


def write_ctr(directory: Path, model: CtrModel) -> None:
    """Write a head."""
    save_file(model.state_dict(), directory / WEIGHTS_FILE)
    (directory / SETTINGS_FILE).write_text(json.dumps(asdict(model.settings), indent=1) + "\n")


def user_histories(
    queries: Sequence[UserQuery], vectors: Mapping[str, np.ndarray], spaces: Mapping[str, int]
) -> UserHistories:
    """The histories of users as the head reads them: the session, then the past, newest first, at most 50."""
    rows = [np.concatenate([q.session, q.history])[:MAX_HISTORY] for q in queries]
    longest = max(1, *(len(r) for r in rows)) if len(rows) > 1 else max(1, len(rows[0]))
    index = np.zeros((len(rows), longest), np.int64)
    event_features = np.zeros((len(rows), longest, 3), np.float32)
    present = np.zeros((len(rows), longest), bool)
    for user, (query, items) in enumerate(zip(queries, rows, strict=True)):
        count, session = len(items), min(len(query.session), MAX_HISTORY)
        index[user, :count], present[user, :count] = items, True
        event_features[user, :count, 0] = np.concatenate([query.session_weights, query.weights])[:count]
        event_features[user, session:count, 1] = np.log1p(np.maximum(query.ages[: count - session], 0))
        event_features[user, :session, 2] = 1
    mask = present[:, :, None]
    return UserHistories(
        {s: torch.from_numpy(np.where(mask, vectors[s][index], 0)).float() for s in spaces},
        torch.from_numpy(event_features),
        torch.from_numpy(present),
    )
