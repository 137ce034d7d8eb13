"""The item graph: items that occur together. Training fits it, ranking reads it.

A relation holds the neighbors of each item and their weights. Knows item hashes, and the rows of an item
table.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from services.catalog.item_table import ItemTable
from services.core.accumulator import Scratch
from services.core.growing_array import appended
from services.core.kernels import array, kernel
from services.core.sorted_arrays import find

_FILE = "graph.safetensors"
_NODES, _WEIGHTS = array(np.int64), array(np.float32)
_RELATION = array(np.int64), array(np.int32), array(np.float32)


@dataclass(frozen=True)
class Relation:
    """The neighbors of M items in CSR form.

    `start` int64 (M + 1), `neighbors` int32 (E,), `weights` float32 (E,) of the edges out of each item.
    """

    start: np.ndarray
    neighbors: np.ndarray
    weights: np.ndarray


_PARTS = tuple(field.name for field in fields(Relation))


@dataclass(frozen=True)
class ItemGraph:
    """Relations by name over items `item_hashes`, int64 (M,), in ascending order."""

    item_hashes: np.ndarray
    relations: Mapping[str, Relation]

    def save(self, directory: Path) -> None:
        """Write the graph into a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {"item_hashes": self.item_hashes}
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
            arrays["item_hashes"],
            {name: Relation(*(arrays[f"{name}.{part}"] for part in _PARTS)) for name in names},
        )

    @classmethod
    def empty(cls) -> "ItemGraph":
        """A graph of no items."""
        return cls(np.empty(0, np.int64), {})


class GraphView:
    """A graph over the rows of an item table, which may grow."""

    def __init__(self, graph: ItemGraph, table: ItemTable) -> None:
        self._graph, self._table = graph, table
        self._nodes = self._node_of_row = np.empty(0, np.int64)
        self._row_of_node = np.full(len(graph.item_hashes), -1, np.int64)
        self._count, self._lock, self._scratch = 0, threading.Lock(), Scratch()

    @property
    def names(self) -> list[str]:
        """The relations."""
        return list(self._graph.relations)

    @property
    def size(self) -> int:
        """The number of nodes."""
        return len(self._graph.item_hashes)

    def nodes(self, rows: np.ndarray) -> np.ndarray:
        """The node of each table row, -1 where there is none."""
        self._follow()
        return np.asarray(self._node_of_row[rows])

    def rows(self, nodes: np.ndarray) -> np.ndarray:
        """The table row of each node, -1 where there is none."""
        self._follow()
        return np.asarray(self._row_of_node[nodes])

    def _follow(self) -> None:
        """Look up the rows that the table got since."""
        if self._count == self._table.length:
            return
        with self._lock:
            start, item_hashes = self._count, self._table.item_hashes
            new = find(self._graph.item_hashes, item_hashes[start:])
            rows = np.flatnonzero(new >= 0)
            self._row_of_node[new[rows]] = rows + start
            self._nodes = appended(self._nodes, start, new)
            self._node_of_row = self._nodes[: len(item_hashes)]
            self._count = len(item_hashes)  # last: other threads look nothing up until then

    def edges(
        self, relation: str, rows: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The edges out of weighted items: nodes int64 (E,), weights float32 (E,), seeds int64 (E,).

        The weight of an edge is multiplied with that of its item; a seed is an index in `rows`.
        """
        graph = self._graph.relations[relation]
        return _edges(*_parts(graph), self.nodes(rows), np.ascontiguousarray(weights, np.float32))

    def connections(
        self, relation: str, seeds: np.ndarray, weights: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The edges from weighted items (S,) to each of rows (C,): their sum, and the highest.

        Both float64 (C,), 0 for none; the weight of an edge is multiplied with that of its item.
        """
        weights, scratch = np.ascontiguousarray(weights, np.float32), self._scratch.of(self.size)
        parts = _parts(self._graph.relations[relation])
        return _connections(*parts, self.nodes(seeds), weights, self.nodes(rows), scratch)


def _parts(relation: Relation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return relation.start, relation.neighbors, relation.weights


@kernel(*_RELATION, _NODES, _WEIGHTS)
def _edges(
    starts: np.ndarray,
    neighbors: np.ndarray,
    edge_weights: np.ndarray,
    nodes: np.ndarray,
    weights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edges out of weighted nodes, -1 for none; see `GraphView.edges`."""
    size = 0
    for node in nodes:
        if node >= 0:
            size += starts[node + 1] - starts[node]
    targets, totals = np.empty(size, np.int64), np.empty(size, np.float32)
    seeds, count = np.empty(size, np.int64), 0
    for seed in range(len(nodes)):
        if nodes[seed] >= 0:
            for edge in range(starts[nodes[seed]], starts[nodes[seed] + 1]):
                targets[count], seeds[count] = neighbors[edge], seed
                totals[count] = edge_weights[edge] * weights[seed]
                count += 1
    return targets, totals, seeds


@kernel(*_RELATION, _NODES, _WEIGHTS, _NODES, array(np.int32, writable=True))
def _connections(
    starts: np.ndarray,
    neighbors: np.ndarray,
    edge_weights: np.ndarray,
    nodes: np.ndarray,
    weights: np.ndarray,
    targets: np.ndarray,
    scratch: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The sum and the highest of the edges from weighted nodes to each of `targets`; a node -1 is none."""
    for index in range(len(targets)):
        if targets[index] >= 0:
            scratch[targets[index]] = index
    totals, highest = np.zeros(len(targets)), np.zeros(len(targets))
    for seed in range(len(nodes)):
        if nodes[seed] < 0:
            continue
        for edge in range(starts[nodes[seed]], starts[nodes[seed] + 1]):
            neighbor = neighbors[edge]
            place = scratch[neighbor]
            if 0 <= place < len(targets) and targets[place] == neighbor:
                weight = edge_weights[edge] * weights[seed]
                totals[place] += weight
                highest[place] = max(highest[place], weight)
    for index in range(len(targets)):  # a target that comes twice has its sum in the last place
        if targets[index] >= 0:
            place = scratch[targets[index]]
            totals[index], highest[index] = totals[place], highest[place]
    return totals, highest
