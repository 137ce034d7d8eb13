"""The item graph: which items go together. Fitted by training, read here.

A relation holds, for each item, its neighbours and how much each of them is worth to somebody
who has the item. Knows item numbers, and the rows of an item table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from services.item_table import ItemTable

_FILE = "graph.safetensors"


@dataclass(frozen=True)
class Relation:
    """Rows of neighbours in CSR form over M items.

    `start` int64 (M + 1), `neighbours` int32 (E,), `weights` float32 (E,) of the edges out of each item.
    """

    start: np.ndarray
    neighbours: np.ndarray
    weights: np.ndarray


_PARTS = tuple(field.name for field in fields(Relation))


@dataclass(frozen=True)
class ItemGraph:
    """Relations by name over items `numbers`, int64 (M,), rising."""

    numbers: np.ndarray
    relations: Mapping[str, Relation]

    def save(self, directory: Path) -> None:
        """Write the graph into a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {"numbers": self.numbers}
        for name, relation in self.relations.items():
            for part in _PARTS:
                arrays[f"{name}.{part}"] = getattr(relation, part)
        save_file(arrays, directory / _FILE)

    @classmethod
    def load(cls, directory: Path) -> "ItemGraph":
        """Read what `save` wrote."""
        arrays = load_file(directory / _FILE)
        names = sorted({key.rsplit(".", 1)[0] for key in arrays if "." in key})
        return cls(
            arrays["numbers"],
            {name: Relation(*(arrays[f"{name}.{part}"] for part in _PARTS)) for name in names},
        )

    @classmethod
    def empty(cls) -> "ItemGraph":
        """A graph of no items."""
        return cls(np.empty(0, np.int64), {})


class GraphView:
    """A graph seen from the rows of an item table, which may grow."""

    def __init__(self, graph: ItemGraph, table: ItemTable) -> None:
        self._graph, self._table = graph, table
        self._node_of_row = np.empty(0, np.int64)

    @property
    def names(self) -> list[str]:
        """The relations."""
        return list(self._graph.relations)

    @property
    def size(self) -> int:
        """The number of nodes."""
        return len(self._graph.numbers)

    def nodes(self, rows: np.ndarray) -> np.ndarray:
        """The node of each table row, -1 where there is none."""
        if len(self._node_of_row) < self._table.length:
            self._node_of_row = find(self._graph.numbers, self._table.item_numbers)
        return np.asarray(self._node_of_row[rows])

    def edges(
        self, relation: str, rows: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The edges out of weighted items: nodes int64 (E,), weights float32 (E,), seeds int64 (E,).

        An edge weighs its own weight times its item's; a seed is a place in `rows`.
        """
        found = self._graph.relations[relation]
        nodes = self.nodes(rows)
        seeds = np.flatnonzero(nodes >= 0)
        begin, size = found.start[nodes[seeds]], np.diff(found.start)[nodes[seeds]]
        seed = np.repeat(seeds, size)
        at = np.arange(len(seed)) + np.repeat(begin - (np.cumsum(size) - size), size)
        return found.neighbours[at], (found.weights[at] * weights[seed]).astype(np.float32), seed

    def spread(self, relation: str, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sum of the edges out of weighted items: float32 (M,) over nodes."""
        near, worth, _ = self.edges(relation, rows, weights)
        return np.bincount(near, worth, len(self._graph.numbers)).astype(np.float32)

    def to_rows(self, scores: np.ndarray) -> np.ndarray:
        """Scores over nodes as float32 (N,) over the table's rows, 0 where there is no node."""
        nodes = self.nodes(np.arange(self._table.length))
        return np.where(nodes >= 0, np.append(scores, 0)[nodes], 0).astype(np.float32)


def find(rising: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each wanted number in a rising array, -1 where it is not: int64."""
    if not len(rising):
        return np.full(len(wanted), -1, np.int64)
    at = np.minimum(np.searchsorted(rising, wanted), len(rising) - 1)
    return np.where(rising[at] == wanted, at, -1).astype(np.int64)
