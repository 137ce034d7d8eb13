"""The CTR head: how likely a person engages with a candidate, from the encoders' vectors.

Items are their text and photograph vectors; a candidate attends to the person's history
(target attention, Deep Interest Network, Zhou et al., 2018), histograms tell how near it is to
that history in each modality (SimTier, Sheng et al., 2024), and what is known of the candidate
is joined to both. One output per event type. Knows arrays, not items.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from services.errors import FailedPrecondition
from services.ranking.query import Query
from services.ranking.scales import Scales

MAX_HISTORY = 50
SETTINGS_FILE = "ctr.json"
WEIGHTS_FILE = "ctr.safetensors"
_TIERS = 10


@dataclass(frozen=True)
class CtrSettings:
    """The shape of a head.

    `spaces` maps a space to its dimension; `types` are the event types it predicts; `columns` the
    feature columns that describe a candidate, read by their `scales`; `plain` leaves out all but the
    two representations, P = sigmoid(W (x_u, x_i) + b); `shown` says that it learned from
    impressions, so that an output is P(event | shown), with `offset` and `slope` by type on the logit to
    calibrate it.
    """

    spaces: Mapping[str, int]
    types: Sequence[str]
    columns: Sequence[str]
    scales: Scales
    width: int = 64
    plain: bool = False
    shown: bool = False
    slope: Sequence[float] = ()
    offset: Sequence[float] = ()


@dataclass(frozen=True)
class Persons:
    """Histories of B people, padded to H: `present` bool (B, H), `marks` float32 (B, H, 3).

    `vectors` float32 (B, H, D) by space, zeros for none. Marks are the event type's weight, the
    logarithm of the age in days, and whether it is of the session.
    """

    vectors: Mapping[str, torch.Tensor]
    marks: torch.Tensor
    present: torch.Tensor


class CtrModel(nn.Module):
    """The network; see the module."""

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
        self.marks = nn.Linear(3, width)
        self.nobody = nn.Parameter(torch.zeros(width))
        self.ask, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        joined = 3 * width + len(settings.columns) + len(settings.spaces) * _TIERS
        self.head = nn.Sequential(
            nn.Linear(joined, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, outputs)
        )

    def forward(
        self, persons: Persons, items: Mapping[str, torch.Tensor], dense: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, C, T) of candidates with vectors (B, C, D) by space and columns (B, C, F)."""
        past, item = self._item(persons.vectors), self._item(items)
        present = persons.present
        if self.settings.plain:
            count = present.sum(1, keepdim=True).clamp(min=1)
            person = (past * present.unsqueeze(-1)).sum(1) / count
            person = person.unsqueeze(1).expand_as(item)
            return self.head(torch.cat([person, item], -1))  # type: ignore[no-any-return]
        past = past + self.marks(persons.marks)
        # Somebody without a past, or for whom none of it matters, attends to nobody.
        past = torch.cat([past, self.nobody.expand(len(past), 1, -1)], 1)
        known = torch.cat([present, torch.ones_like(present[:, :1])], 1)
        near = self.ask(item) @ self.key(past).transpose(1, 2) / self.settings.width**0.5
        near = near.masked_fill(~known.unsqueeze(1), float("-inf"))
        person = near.softmax(-1) @ self.value(past)
        tiers = [self._tiers(persons, items, space) for space in self.settings.spaces]
        return self.head(torch.cat([person, item, person * item, dense, *tiers], -1))  # type: ignore[no-any-return]

    def _item(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        total = sum(layer(vectors[space]) for space, layer in self.project.items())
        return self.norm(total)  # type: ignore[no-any-return]

    @staticmethod
    def _tiers(persons: Persons, items: Mapping[str, torch.Tensor], space: str) -> torch.Tensor:
        """How much of the history lies at each tier of similarity, (B, C, 10), in logarithms."""
        near = items[space] @ persons.vectors[space].transpose(1, 2)
        tier = (near * _TIERS).floor().clamp(0, _TIERS - 1).long()
        known = persons.present.unsqueeze(1).expand_as(tier).to(near.dtype)
        counts = torch.zeros(*near.shape[:2], _TIERS, dtype=near.dtype, device=near.device)
        return counts.scatter_add(2, tier, known).log1p()


class CtrHead:
    """A head as training left it, over an item table's vectors.

    Raises:
        FailedPrecondition: it reads a column that `names` does not hold.
    """

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        written = json.loads((directory / SETTINGS_FILE).read_text())
        self.settings = CtrSettings(**written | {"scales": Scales(**written["scales"])})
        place = {name: at for at, name in enumerate(names)}
        if missing := [name for name in self.settings.columns if name not in place]:
            raise FailedPrecondition(f"the CTR head reads {missing[0]!r}, which is no feature here")
        self._at = np.array([place[name] for name in self.settings.columns], np.int64)
        self.model = CtrModel(self.settings)
        self.model.load_state_dict(load_file(directory / WEIGHTS_FILE))
        self.model.eval()

    @torch.inference_mode()
    def logits(
        self, query: Query, rows: np.ndarray, matrix: np.ndarray, vectors: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Logits float32 (C, T) of candidate rows (C,) with features (C, F); `vectors` (N, D) by space."""
        persons = gather([query], vectors, self.settings.spaces)
        items = {s: torch.from_numpy(np.float32(vectors[s][rows])).unsqueeze(0) for s in self.settings.spaces}
        columns = self.settings.scales.apply(matrix[:, self._at])
        dense = torch.from_numpy(columns).unsqueeze(0)
        return np.asarray(self.model(persons, items, dense)[0].numpy(), np.float32)

    def probabilities(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """P(event | shown) float64 (C,) by event type; nothing when no impressions were learned from."""
        if not self.settings.shown:
            return {}
        at = np.array(self.settings.slope) * logits + np.array(self.settings.offset)
        return dict(zip(self.settings.types, (1 / (1 + np.exp(-at))).T, strict=True))


def write_ctr(directory: Path, model: CtrModel) -> None:
    """Write a head."""
    save_file(model.state_dict(), directory / WEIGHTS_FILE)
    (directory / SETTINGS_FILE).write_text(json.dumps(asdict(model.settings), indent=1) + "\n")


def gather(queries: Sequence[Query], vectors: Mapping[str, np.ndarray], spaces: Mapping[str, int]) -> Persons:
    """People as the head reads them: session and history, newest first, at most 50 items."""
    rows = [np.concatenate([q.session, q.history])[:MAX_HISTORY] for q in queries]
    longest = max(1, *(len(r) for r in rows)) if len(rows) > 1 else max(1, len(rows[0]))
    index = np.zeros((len(rows), longest), np.int64)
    marks = np.zeros((len(rows), longest, 3), np.float32)
    present = np.zeros((len(rows), longest), bool)
    for at, (query, mine) in enumerate(zip(queries, rows, strict=True)):
        count, session = len(mine), min(len(query.session), MAX_HISTORY)
        index[at, :count], present[at, :count] = mine, True
        marks[at, :count, 0] = np.concatenate([query.session_weights, query.weights])[:count]
        marks[at, session:count, 1] = np.log1p(np.maximum(query.ages[: count - session], 0))
        marks[at, :session, 2] = 1
    mask = present[:, :, None]
    return Persons(
        {s: torch.from_numpy(np.where(mask, np.float32(vectors[s][index]), 0)) for s in spaces},
        torch.from_numpy(marks),
        torch.from_numpy(present),
    )
