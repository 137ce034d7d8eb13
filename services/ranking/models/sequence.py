"""The sequence model: predicts the next item from a user's items in their order.

A causal transformer over the latest items of a user (SASRec, Kang and McAuley, 2018) gives a vector; its
dot product with the vector of an item is the item's score. The vector of an item is a projection of its
text, image and attribute values, plus a delta of its own. Training drops the delta at random (DropoutNet,
Volkovs et al., 2017): the model scores an item without interactions by its content. Knows rows of an item
table, not how it is trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.special import erf
from torch import nn

from services.catalog.item_table import ItemTable
from services.catalog.row_arrays import RowArrays
from services.core.kernels import array, kernel
from services.core.sorted_arrays import find
from services.ranking.state.user_query import UserQuery

SETTINGS_FILE = "sequence.json"
WEIGHTS_FILE = "sequence.safetensors"
_HOURS_A_DAY = 24.0
_NORM_EPSILON = 1e-5  # of torch's layer norm
_LAYERS = frozenset(
    (
        "event_projection",
        "attention_norm",
        "mlp_norm",
        "output_norm",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "mlp.0",
        "mlp.3",
    )
)


@dataclass(frozen=True)
class SequenceSettings:
    """The shape of a model.

    `spaces` maps a space to its dimension; `values` are the (attribute, text) pairs with an embedding;
    `width` is the dimension of the model's vectors.
    """

    spaces: Mapping[str, int]
    values: Sequence[tuple[str, str]]
    width: int = 64
    dropout: float = 0.2


@dataclass(frozen=True)
class SequenceItems:
    """B items as the model reads them.

    `vectors` float32 (B, D) by space, zeros for none; `values` int64 (B, W), 1 + the index in the values of
    the settings, and `delta_rows` int64 (B,), 1 + the index in the item hashes of the model; 0 for none.
    """

    vectors: Mapping[str, torch.Tensor]
    values: torch.Tensor
    delta_rows: torch.Tensor


class SequenceNet(nn.Module):
    """The network; `item_hashes`, int64 (K,), ascending, are the items with a delta.

    An item is a vector float32 (width + 1,), whose last element is its bias.
    """

    item_hashes: torch.Tensor

    def __init__(self, settings: SequenceSettings, item_hashes: np.ndarray) -> None:
        super().__init__()
        self.settings, width = settings, settings.width
        self.register_buffer("item_hashes", torch.from_numpy(item_hashes.astype(np.int64)))
        self.project = nn.ModuleDict(
            {space: nn.Linear(size, width + 1, bias=False) for space, size in settings.spaces.items()}
        )
        self.values = nn.EmbeddingBag(len(settings.values) + 1, width + 1, mode="sum", padding_idx=0)
        self.delta = nn.Embedding(len(item_hashes) + 1, width + 1, padding_idx=0)
        self.event_projection = nn.Linear(3, width)
        self.dropout = nn.Dropout(settings.dropout)
        self.attention_norm, self.mlp_norm, self.output_norm = (nn.LayerNorm(width) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(2 * width, width)
        )
        # The decay of attention with the items, and with the days, between two positions.
        self.decay = nn.Parameter(torch.tensor([0.5, 0.5]))
        for layer in self.project.values():
            nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
        for table in (self.values, self.delta):
            nn.init.normal_(table.weight, std=0.01)
            nn.init.zeros_(table.weight[0])

    def content(self, items: SequenceItems) -> torch.Tensor:
        """The content vectors of items, without deltas: (B, width + 1)."""
        content = self.values(items.values)
        for space, layer in self.project.items():
            content = content + layer(items.vectors[space])
        return content  # type: ignore[no-any-return]

    def forward(self, items: torch.Tensor, gaps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The vectors of users after each of their items: (B, L, width + 1).

        `items` (B, L, width + 1), oldest first, padded at the end; `gaps` and `weights` (B, L) are those of
        `ItemSequence`.
        """
        event_features = torch.stack([torch.exp(-_HOURS_A_DAY * gaps), torch.log1p(gaps), weights], -1)
        hidden = self.dropout(items[..., :-1] + self.event_projection(event_features))
        normed = self.attention_norm(hidden)
        attention = self.q_proj(normed) @ self.k_proj(normed).transpose(1, 2) / self.settings.width**0.5
        attention = attention + self._decay(gaps)
        length = items.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=items.device).triu(1)
        attention = attention.masked_fill(later, float("-inf"))
        hidden = hidden + self.dropout(self.out_proj(attention.softmax(-1) @ self.v_proj(normed)))
        hidden = self.output_norm(hidden + self.dropout(self.mlp(self.mlp_norm(hidden))))
        return torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)

    def _decay(self, gaps: torch.Tensor) -> torch.Tensor:
        """The loss of attention with distance, (B, L, L): in items, and in days to the next item."""
        position = torch.arange(gaps.shape[1], device=gaps.device)
        steps = (position[:, None] - position[None, :]).clamp(min=0)
        end = gaps.cumsum(1)
        days = (end[:, :, None] - (end - gaps)[:, None, :]).clamp(min=0)
        return -self.decay[0] * torch.log1p(steps) - self.decay[1] * torch.log1p(days)


class _LastPosition:
    """`SequenceNet` after the last item of one user, in NumPy.

    torch spends a millisecond on starting some twenty small operations.
    """

    def __init__(self, net: SequenceNet) -> None:
        def weights(layer: nn.Module) -> tuple[np.ndarray, np.ndarray]:
            arrays = dict(layer.named_parameters())
            return arrays["weight"].detach().numpy(), arrays["bias"].detach().numpy()

        self._layers = {name: weights(layer) for name, layer in net.named_modules() if name in _LAYERS}
        self._decay, self._width = net.decay.detach().numpy(), net.settings.width

    def __call__(self, items: np.ndarray, gaps: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The vector of a user, float32 (width + 1,), from items (L, width + 1), gaps and weights (L,)."""
        event_features = np.stack([np.exp(-_HOURS_A_DAY * gaps), np.log1p(gaps), weights], axis=1)
        hidden = items[:, :-1] + self._linear("event_projection", event_features)
        normed = self._norm("attention_norm", hidden)
        scores = self._linear("k_proj", normed) @ self._linear("q_proj", normed[-1]) / self._width**0.5
        steps = np.arange(len(gaps) - 1, -1, -1)
        end = gaps.cumsum()
        days = np.maximum(end[-1] - (end - gaps), 0)
        scores -= self._decay[0] * np.log1p(steps) + self._decay[1] * np.log1p(days)
        attention = np.exp(scores - scores.max())
        context = attention @ self._linear("v_proj", normed) / attention.sum()
        last = hidden[-1] + self._linear("out_proj", context)
        inner = self._linear("mlp.0", self._norm("mlp_norm", last))
        inner *= 0.5 * (1 + erf(inner / np.sqrt(2)))  # GELU (Hendrycks and Gimpel, 2016)
        last = self._norm("output_norm", last + self._linear("mlp.3", inner))
        return np.append(last, 1).astype(np.float32)

    def _linear(self, name: str, values: np.ndarray) -> np.ndarray:
        weight, bias = self._layers[name]
        return np.asarray(values @ weight.T + bias)

    def _norm(self, name: str, values: np.ndarray) -> np.ndarray:
        weight, bias = self._layers[name]
        centered = values - values.mean(-1, keepdims=True)
        variance = (centered * centered).mean(-1, keepdims=True)
        return np.asarray(centered / np.sqrt(variance + _NORM_EPSILON) * weight + bias)


class SequenceView:
    """A model over the rows of an item table, which may grow and change.

    The vectors of items are cached, and computed again, in place, for changed rows. An item without a vector
    in a space counts as one with a zero vector.
    """

    def __init__(self, net: SequenceNet, table: ItemTable) -> None:
        self._net, self._table = net.eval(), table
        self._item_hashes = net.item_hashes.numpy()
        self._forward = _LastPosition(net)
        self._arrays = RowArrays(table, [net.settings.width + 1] * 2, self._item_arrays)

    @classmethod
    def load(cls, directory: Path, table: ItemTable) -> "SequenceView":
        """Read what `write_sequence` wrote."""
        parameters = json.loads((directory / SETTINGS_FILE).read_text())
        parameters["values"] = [tuple(pair) for pair in parameters["values"]]
        state = load_file(directory / WEIGHTS_FILE)
        net = SequenceNet(SequenceSettings(**parameters), state["item_hashes"].numpy())
        net.load_state_dict(state)
        view = cls(net, table)
        view._items()  # now, not during a request
        return view

    def user(self, query: UserQuery) -> np.ndarray | None:
        """The vector of a user, float32 (width + 1,); None for a user without items."""
        if self not in query.derived:
            query.derived[self] = self._user(query)
        vector: np.ndarray | None = query.derived[self]
        return vector

    def _user(self, query: UserQuery) -> np.ndarray | None:
        sequence = query.item_sequence()
        if not len(sequence.rows):
            return None
        vectors, _ = self._items()
        return self._forward(vectors[sequence.rows], sequence.gaps, sequence.weights)

    def scores(self, user: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The log odds that table rows (C,) are next, and the same without their deltas: float32 (C,).

        Up to a constant for each user.
        """
        vectors, content = self._items()
        return dot_products(vectors, rows, user), dot_products(content, rows, user)

    def log_odds(self, user: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The first part of `scores`."""
        return dot_products(self._items()[0], rows, user)

    @property
    def vectors(self) -> np.ndarray:
        """The vectors of all rows, with deltas: float32 (N, width + 1)."""
        length = self._table.length
        return self._items()[0][:length]

    def _items(self) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of at least all rows, with deltas and without: float32 (N+, width + 1)."""
        vectors, content = self._arrays.current()
        return vectors, content

    def _item_arrays(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of rows, with deltas and without."""
        items = read_items(self._table, rows, self._net.settings, self._item_hashes)
        with torch.inference_mode():
            content = self._net.content(items)
            return (content + self._net.delta(items.delta_rows)).numpy(), content.numpy()


def dot_products(vectors: np.ndarray, rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The dot products of some rows, int64 (C,), of float32 (N, D) with a vector (D,): float32 (C,)."""
    return _dot_products(vectors, np.ascontiguousarray(rows), vector)


@kernel(array(np.float32, 2), array(np.int64), array(np.float32), reorder=True)
def _dot_products(vectors: np.ndarray, rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    result = np.empty(len(rows), np.float32)
    for index in range(len(rows)):
        row, total = rows[index], np.float32(0)
        for column in range(len(vector)):
            total += vectors[row, column] * vector[column]
        result[index] = total
    return result


def write_sequence(directory: Path, net: SequenceNet) -> None:
    """Write a model."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), directory / WEIGHTS_FILE)
    (directory / SETTINGS_FILE).write_text(json.dumps(asdict(net.settings)) + "\n")


def read_items(
    table: ItemTable, rows: np.ndarray, settings: SequenceSettings, item_hashes: np.ndarray
) -> SequenceItems:
    """The items of table rows, int64 (B,), for a model with deltas for `item_hashes`."""
    vectors = {}
    for space, size in settings.spaces.items():
        column = table.vectors(space)
        values = np.zeros((len(rows), size), np.float32) if column is None else np.float32(column[0][rows])
        vectors[space] = torch.from_numpy(values)
    delta_rows = find(item_hashes, table.item_hashes[rows]) + 1
    return SequenceItems(
        vectors, torch.from_numpy(_values(table, rows, settings.values)), torch.from_numpy(delta_rows)
    )


def _values(table: ItemTable, rows: np.ndarray, values: Sequence[tuple[str, str]]) -> np.ndarray:
    index = {value: position for position, value in enumerate(values, 1)}
    columns = [np.zeros((len(rows), 1), np.int64)]
    for attribute in sorted({attribute for attribute, _ in values}):
        column = table.texts_of_rows(attribute, rows)
        if column is not None:
            codes, vocabulary = column
            index_of_code = np.zeros(int(codes.max(initial=-1)) + 2, np.int64)  # the last one is for none
            for (name, text), position in index.items():
                code = vocabulary.get(text) if name == attribute else None
                if code is not None and code < len(index_of_code) - 1:
                    index_of_code[code] = position
            columns.append(index_of_code[codes])
    return np.concatenate(columns, axis=1)
