"""The CTR head of a bundle, served: `CtrModel` for the candidates of one user, in NumPy.

The vectors of items are projected when they change, not for each request, and torch spends a millisecond on
starting some twenty small operations.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from services.catalog.item_table import ItemTable
from services.catalog.row_arrays import RowArrays
from services.core.errors import FailedPrecondition
from services.core.kernels import array, kernel
from services.ranking.models.attribute_vectors import ATTRIBUTES, attribute_vectors
from services.ranking.models.ctr import MAX_HISTORY, SETTINGS_FILE, TIERS, WEIGHTS_FILE, CtrSettings
from services.ranking.models.half_precision import as_float32
from services.ranking.models.scaler import FeatureScaler
from services.ranking.state.user_query import UserQuery

_NORM_EPSILON = 1e-5  # of torch's layer norm


@dataclass(frozen=True)
class CtrInput:
    """A user's history of H items and C candidates, by their vectors.

    `past` float32 (H, W) and `items` float32 (C, W) are their projections, see `CtrHead.projections`;
    `cosines` float32 (C, H) are the cosines of their vectors by space, 0 where either has none.
    """

    past: np.ndarray
    items: np.ndarray
    cosines: Mapping[str, np.ndarray]


class CtrHead:
    """A head of a bundle.

    Raises:
        FailedPrecondition: it reads a column that `names` lacks.
    """

    def __init__(self, directory: Path, names: tuple[str, ...]) -> None:
        parameters = json.loads((directory / SETTINGS_FILE).read_text())
        self.settings = CtrSettings(**parameters | {"scales": FeatureScaler(**parameters["scales"])})
        index = {name: position for position, name in enumerate(names)}
        if missing := [name for name in self.settings.columns if name not in index]:
            raise FailedPrecondition(f"the CTR head reads {missing[0]!r}, which is not a feature here")
        self._columns = np.array([index[name] for name in self.settings.columns], np.int64)
        self._weights = {name: value.numpy() for name, value in load_file(directory / WEIGHTS_FILE).items()}

    def projections(self, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The projections of items, float32 (N, W); `vectors` float32 (N, D) by space, zeros for none."""
        total = sum(
            vectors[space] @ self._weights[f"project.{space}.weight"].T for space in self.settings.spaces
        )
        centered = total - np.mean(total, -1, keepdims=True)
        variance = np.mean(centered * centered, -1, keepdims=True)
        unit = centered / np.sqrt(variance + _NORM_EPSILON)
        return np.asarray(unit * self._weights["norm.weight"] + self._weights["norm.bias"], np.float32)

    def logits(
        self,
        query: UserQuery,
        matrix: np.ndarray,
        items: Mapping[str, np.ndarray],
        past: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """Logits float32 (C, T) of candidates with features (C, F).

        The vectors of candidates, `items` float32 (C, D), and of the items of the user's history, `past`
        (H, D), are by space, zeros for none; see `history_rows`.
        """
        cosines = {space: items[space] @ past[space].T for space in self.settings.tier_spaces}
        read = CtrInput(self.projections(past), self.projections(items), cosines)
        return self.logits_of(query, matrix, read)

    def logits_of(self, query: UserQuery, matrix: np.ndarray, of: CtrInput) -> np.ndarray:
        """The same from projections and cosines."""
        if self.settings.plain:
            user = of.past.mean(0) if len(of.past) else np.zeros(self.settings.width, np.float32)
            plain = np.concatenate([np.broadcast_to(user, of.items.shape), of.items], axis=1)
            return self._linear("head", plain)
        user = self._attention(query, of)
        tiers = [
            _tiers(np.ascontiguousarray(of.cosines[space]), TIERS) for space in self.settings.tier_spaces
        ]
        dense = self.settings.scales.apply(matrix[:, self._columns])
        inner = self._linear(
            "head.0", np.concatenate([user, of.items, user * of.items, dense, *tiers], axis=1)
        )
        with torch.inference_mode():  # NumPy has no error function
            active = nn.functional.gelu(torch.from_numpy(inner)).numpy()
        return self._linear("head.3", active)

    def probabilities(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """P(event | shown) float64 (C,) by event type; empty for a head trained without impressions."""
        if not self.settings.shown:
            return {}
        calibrated = np.array(self.settings.slope) * logits + np.array(self.settings.offset)
        return dict(zip(self.settings.types, (1 / (1 + np.exp(-calibrated))).T, strict=True))

    def _attention(self, query: UserQuery, of: CtrInput) -> np.ndarray:
        """What each candidate attends to in the history, float32 (C, W)."""
        past = of.past + self._linear("event_projection", _event_features(query, len(of.past)))
        past = np.concatenate([past, self._weights["null_token"][None]])
        keys = self._linear("k_proj", past)
        # The query of an item is linear: the keys are projected back instead, as there are fewer.
        attention = of.items @ (keys @ self._weights["q_proj.weight"]).T + keys @ self._weights["q_proj.bias"]
        attention /= np.float32(self.settings.width**0.5)
        attention = np.exp(attention - attention.max(1, keepdims=True))
        attention /= attention.sum(1, keepdims=True)
        return np.asarray(attention @ self._linear("v_proj", past))

    def _linear(self, name: str, values: np.ndarray) -> np.ndarray:
        return np.asarray(values @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"])


class CtrItems:
    """The projections of the items of a table, which may grow and change; any thread may read them."""

    def __init__(self, head: CtrHead, table: ItemTable) -> None:
        def compute(rows: np.ndarray) -> tuple[np.ndarray, ...]:
            return (head.projections(item_vectors(table, rows, head.settings)),)

        self._arrays = RowArrays(table, [head.settings.width], compute)
        self._arrays.current()  # now, not during a request

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The projections of table rows, float32 (R, W)."""
        [projections] = self._arrays.current()
        return np.asarray(projections[rows])


def item_vectors(table: ItemTable, rows: np.ndarray, settings: CtrSettings) -> dict[str, np.ndarray]:
    """The vectors of table rows, int64 (R,), in the spaces of a head: float32 (R, D), zeros for none."""
    vectors = {}
    for space, dimension in settings.spaces.items():
        if space == ATTRIBUTES:
            vectors[space] = attribute_vectors(table, rows, settings.attributes)
        elif (column := table.vectors(space)) is None:
            vectors[space] = np.zeros((len(rows), dimension), np.float32)
        else:
            vectors[space] = as_float32(column[0][rows])
    return vectors


def history_rows(query: UserQuery) -> np.ndarray:
    """The items of a user that the head reads, int64 (H,), H at most 50: the session, then the past."""
    return np.concatenate([query.session, query.history])[:MAX_HISTORY]


def _event_features(query: UserQuery, count: int) -> np.ndarray:
    """The features of the first `count` events, float32 (H, 3), as in `UserHistories`."""
    session = min(len(query.session), count)
    features = np.zeros((count, 3), np.float32)
    features[:, 0] = np.concatenate([query.session_weights, query.weights])[:count]
    features[session:, 1] = np.log1p(np.maximum(query.ages[: count - session], 0))
    features[:session, 2] = 1
    return features


@kernel(array(np.float32, 2), np.int64)
def _tiers(cosines: np.ndarray, tiers: int) -> np.ndarray:
    """The items of the history in each of T tiers of similarity, float32 (C, T): logarithms of counts."""
    counts = np.zeros((len(cosines), tiers), np.float32)
    for candidate in range(cosines.shape[0]):
        for item in range(cosines.shape[1]):
            tier = int(np.floor(cosines[candidate, item] * np.float32(tiers)))
            counts[candidate, min(max(tier, 0), tiers - 1)] += 1
    return np.log1p(counts)
