"""The sequence model: what a person's items, in the order they came, make likely next.

A causal transformer over a person's latest items (SASRec, Kang and McAuley, 2018) gives a vector, to be
multiplied with items'. An item is what its text, photograph and attribute values make of it, plus a
delta of its own that training drops at random (DropoutNet, Volkovs et al., 2017), so that an item nobody
has engaged with is placed by what is known of it. Knows rows of an item table, not how it is trained.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from services.item_table import ItemTable
from services.ranking.graph import find
from services.ranking.query import Query

SETTINGS_FILE = "sequence.json"
WEIGHTS_FILE = "sequence.safetensors"
_ROWS_AT_ONCE = 4096
_HOURS_A_DAY = 24.0


@dataclass(frozen=True)
class SequenceSettings:
    """The shape of a model.

    `spaces` maps a space to its dimension; `values` are the (attribute, text) pairs that have an
    embedding; `width` is that of vectors.
    """

    spaces: Mapping[str, int]
    values: Sequence[tuple[str, str]]
    width: int = 64
    dropout: float = 0.2


@dataclass(frozen=True)
class Items:
    """B items as the model reads them.

    `vectors` float32 (B, D) by space, zeros for none; `values` int64 (B, W), places in the settings' values
    plus one, and `known` int64 (B,), places in the model's numbers plus one; 0 for none.
    """

    vectors: Mapping[str, torch.Tensor]
    values: torch.Tensor
    known: torch.Tensor


class SequenceNet(nn.Module):
    """The network over items `numbers`, int64 (K,), rising, that have a delta.

    An item is float32 (width + 1,), the last of which says how likely it is in itself.
    """

    numbers: torch.Tensor

    def __init__(self, settings: SequenceSettings, numbers: np.ndarray) -> None:
        super().__init__()
        self.settings, width = settings, settings.width
        self.register_buffer("numbers", torch.from_numpy(numbers.astype(np.int64)))
        self.project = nn.ModuleDict(
            {space: nn.Linear(size, width + 1, bias=False) for space, size in settings.spaces.items()}
        )
        self.values = nn.EmbeddingBag(len(settings.values) + 1, width + 1, mode="sum", padding_idx=0)
        self.delta = nn.Embedding(len(numbers) + 1, width + 1, padding_idx=0)
        self.marks = nn.Linear(3, width)
        self.dropout = nn.Dropout(settings.dropout)
        self.attended, self.mixed, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.ask, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mix = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(2 * width, width)
        )
        # How much less an item counts the more items, and the more time, came after it.
        self.fading = nn.Parameter(torch.tensor([0.5, 0.5]))
        for layer in self.project.values():
            nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
        for table in (self.values, self.delta):
            nn.init.normal_(table.weight, std=0.01)
            nn.init.zeros_(table.weight[0])

    def content(self, items: Items) -> torch.Tensor:
        """What is known of items makes of them: (B, width + 1)."""
        found = self.values(items.values)
        for space, layer in self.project.items():
            found = found + layer(items.vectors[space])
        return found  # type: ignore[no-any-return]

    def forward(self, items: torch.Tensor, gaps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """People after each of their items: (B, L, width + 1), to be multiplied with items.

        `items` (B, L, width + 1), oldest first, padded behind; `gaps` and `weights` (B, L) as a `Walk`
        has them.
        """
        marks = torch.stack([torch.exp(-_HOURS_A_DAY * gaps), torch.log1p(gaps), weights], -1)
        hidden = self.dropout(items[..., :-1] + self.marks(marks))
        asked = self.attended(hidden)
        near = self.ask(asked) @ self.key(asked).transpose(1, 2) / self.settings.width**0.5
        near = near + self._faded(gaps)
        length = items.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=items.device).triu(1)
        near = near.masked_fill(later, float("-inf"))
        hidden = hidden + self.dropout(self.out(near.softmax(-1) @ self.value(asked)))
        hidden = self.norm(hidden + self.dropout(self.mix(self.mixed(hidden))))
        return torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)

    def _faded(self, gaps: torch.Tensor) -> torch.Tensor:
        """What attention (B, L, L) loses with distance, in items and in days up to what comes next."""
        place = torch.arange(gaps.shape[1], device=gaps.device)
        steps = (place[:, None] - place[None, :]).clamp(min=0)
        until = gaps.cumsum(1)
        days = (until[:, :, None] - (until - gaps)[:, None, :]).clamp(min=0)
        return -self.fading[0] * torch.log1p(steps) - self.fading[1] * torch.log1p(days)


class SequenceView:
    """A model seen from the rows of an item table, which may grow and change.

    Vectors of items are kept, and made anew, in place, for rows that changed. An item without a vector in a
    space is as one whose vector there is zero.
    """

    def __init__(self, net: SequenceNet, table: ItemTable) -> None:
        self._net, self._table = net.eval(), table
        self._numbers = net.numbers.numpy()
        self._refreshing = threading.Lock()
        self._version, self._built = -1, 0
        width = net.settings.width + 1
        self._content = np.empty((0, width), np.float32)
        self._whole = np.empty((0, width), np.float32)

    @classmethod
    def load(cls, directory: Path, table: ItemTable) -> "SequenceView":
        """Read what `write_sequence` wrote."""
        written = json.loads((directory / SETTINGS_FILE).read_text())
        written["values"] = [tuple(pair) for pair in written["values"]]
        state = load_file(directory / WEIGHTS_FILE)
        net = SequenceNet(SequenceSettings(**written), state["numbers"].numpy())
        net.load_state_dict(state)
        view = cls(net, table)
        view._items()  # not within somebody's request
        return view

    @torch.inference_mode()
    def person(self, query: Query) -> np.ndarray | None:
        """A person as float32 (width + 1,); None of whom nothing is known."""
        walk = query.walk()
        if not len(walk.rows):
            return None
        whole, _ = self._items()
        parts = (torch.from_numpy(part).unsqueeze(0) for part in (whole[walk.rows], walk.gaps, walk.weights))
        return np.asarray(self._net(*parts)[0, -1].numpy())

    def scores(self, person: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of table rows (C,), the log odds of coming next, and the same as if each were new: float32 (C,).

        Up to a constant for each person.
        """
        whole, content = self._items()
        return whole[rows] @ person, content[rows] @ person

    def chances(self, person: np.ndarray) -> np.ndarray:
        """How likely each of the table's rows is to come next: float32 (N,), one in all."""
        whole, _ = self._items()
        odds = whole[: self._table.length] @ person
        chance = np.exp(odds - odds.max(initial=-np.inf))
        return np.asarray(chance / max(float(chance.sum()), 1e-30))

    def _items(self) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of every row and of more to come: with deltas and without, float32 (N+, width + 1)."""
        if self._version != self._table.version or self._built < self._table.length:
            with self._refreshing:
                self._refresh()
        return self._whole, self._content

    def _refresh(self) -> None:
        length = self._table.length
        rows, version = self._table.changed_since(self._version)
        most = max(length, int(rows.max(initial=-1)) + 1)
        whole, content = (_grown(kept, most) for kept in (self._whole, self._content))
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[begin : begin + _ROWS_AT_ONCE]
            items = read_items(self._table, some, self._net.settings, self._numbers)
            with torch.inference_mode():
                made = self._net.content(items)
                content[some], whole[some] = made.numpy(), (made + self._net.delta(items.known)).numpy()
        self._whole, self._content = whole, content
        self._version, self._built = version, length


def write_sequence(directory: Path, net: SequenceNet) -> None:
    """Write a model."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), directory / WEIGHTS_FILE)
    (directory / SETTINGS_FILE).write_text(json.dumps(asdict(net.settings)) + "\n")


def read_items(table: ItemTable, rows: np.ndarray, settings: SequenceSettings, numbers: np.ndarray) -> Items:
    """The items of table rows, int64 (B,), as a model with deltas for `numbers` reads them."""
    vectors = {}
    for space, size in settings.spaces.items():
        column = table.vectors(space)
        mine = np.zeros((len(rows), size), np.float32) if column is None else np.float32(column[0][rows])
        vectors[space] = torch.from_numpy(mine)
    known = find(numbers, table.item_numbers[rows]) + 1
    return Items(vectors, torch.from_numpy(_values(table, rows, settings.values)), torch.from_numpy(known))


def _values(table: ItemTable, rows: np.ndarray, values: Sequence[tuple[str, str]]) -> np.ndarray:
    place = {value: at for at, value in enumerate(values, 1)}
    columns = [np.zeros((len(rows), 1), np.int64)]
    for attribute in sorted({attribute for attribute, _ in values}):
        column = table.texts(attribute)
        if column is not None:
            codes, vocabulary = column
            # A copy, before the vocabulary is asked, which a writer may be adding to.
            mine = codes[rows]
            of_code = np.zeros(int(mine.max(initial=-1)) + 2, np.int64)  # the last one is for none
            for (name, text), at in place.items():
                code = vocabulary.get(text) if name == attribute else None
                if code is not None and code < len(of_code) - 1:
                    of_code[code] = at
            columns.append(of_code[mine])
    return np.concatenate(columns, axis=1)


def _grown(kept: np.ndarray, length: int) -> np.ndarray:
    """The same array if it holds `length` rows, or a copy with room for them, twice as long at least."""
    if length <= len(kept):
        return kept
    room = np.zeros((max(length, 2 * len(kept)), kept.shape[1]), np.float32)
    room[: len(kept)] = kept
    return room
