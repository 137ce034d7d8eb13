"""Shops of any size like a trained one: its items, vectors and graph resampled, its models as they are.

An item is a copy of an item of the bundle under another id, with jittered vectors. Its title says which copy
it is, because vectors belong to contents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import overload

import numpy as np

from bench.serving import drawn_events
from bench.serving.shops import Shop
from bench.serving.synthetic import drawn_shop, kept_bundle, write_popular
from services.catalog.bundle import Bundle, BundleCatalog, ShopSchema, write_catalog
from services.catalog.items import Item
from services.ranking.models.co_occurrence import ItemGraph, Relation
from training.data.events import Events

_JITTER = 0.02
_PAGE = 50_000
_MODELS = ("text", "image", "ctr", "reranker", "sequence", "propensity")


class ResampledItems(Sequence[Item]):
    """The copies of items: item n is the `copy`-th copy of `items[rows[n]]`."""

    def __init__(self, items: Sequence[Item], rows: np.ndarray) -> None:
        self._items, self._rows = items, rows
        order = np.argsort(rows, kind="stable")
        first = np.searchsorted(rows[order], rows[order])
        self._copy = np.empty(len(rows), np.int64)
        self._copy[order] = np.arange(len(rows)) - first

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """One item, or a list of them."""
        if isinstance(index, slice):
            return [self._item(row) for row in range(*index.indices(len(self)))]
        return self._item(range(len(self))[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(len(self)))

    @property
    def ids(self) -> list[str]:
        """The ids of all items."""
        return [f"i{row:07}" for row in range(len(self))]

    def _item(self, row: int) -> Item:
        item, copy = self._items[int(self._rows[row])], int(self._copy[row])
        image_hash = item.image_hash and copy.to_bytes(4, "big") + item.image_hash[4:]
        family = item.family_id and f"{item.family_id}-{copy}"[-128:]
        title = f"{item.title} v{copy}"
        return replace(item, id=f"i{row:07}", title=title, family_id=family, image_hash=image_hash)


def resampled_shop(source: Path, count: int, cache: Path) -> Shop:
    """A shop of `count` items like those of the bundle `source`; its bundle and state are kept in `cache`.

    Without trained models, as for a bundle of few events, the services use hand-set weights as they do there.
    """
    bundle = Bundle(source)
    catalog = bundle.catalog()
    random, size = np.random.default_rng([count, 5]), len(catalog.items)
    rows = random.permutation(size)[:count] if count <= size else random.integers(0, size, count)
    items = ResampledItems(catalog.items, rows)
    ids = items.ids
    hashes = drawn_events.hashes_of(ids)
    directory = bundle.component("graph")
    graph = ItemGraph.load(directory) if directory else ItemGraph.empty()
    source_hashes = drawn_events.hashes_of([item.id for item in catalog.items])
    weights = _weights(graph, source_hashes)[rows] * random.uniform(0.5, 1.5, count)

    def write(staged: Path) -> ShopSchema:
        for part in _MODELS:
            if (path := bundle.component(part)) is not None:
                copytree(path, staged / part)
        resampled_graph(graph, source_hashes, rows, hashes).save(staged / "graph")
        vectors = {space: jittered(values, rows, random) for space, values in catalog.vectors.items()}
        present = {space: values[rows] for space, values in catalog.present.items()}
        write_catalog(staged / "catalog", BundleCatalog(items, vectors, present))
        write_popular(staged, hashes, weights)
        return bundle.profile

    assert bundle.until is not None  # noqa: S101 - a trained bundle has it
    until = bundle.until
    directory = kept_bundle(cache / f"like-{bundle.version}-{count}", write, until)

    def events() -> Events:
        # Copies of one item are a cluster: a user who likes one likes its variants.
        types = len(bundle.profile.event_types)
        return drawn_events.draw_events(rows, weights, ids, hashes, until, types)

    return drawn_shop(f"like {bundle.version}", directory, ids, weights, events)


def jittered(vectors: np.ndarray, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Vectors float16 (N, D) near those at `rows` (N,), of the same length; zeros stay zeros."""
    result = np.empty((len(rows), vectors.shape[1]), np.float16)
    for start in range(0, len(rows), _PAGE):
        page = np.float32(vectors[rows[start : start + _PAGE]])
        length = np.linalg.norm(page, axis=1, keepdims=True)
        page += _JITTER * length * random.standard_normal(page.shape, np.float32)
        page *= length / np.maximum(np.linalg.norm(page, axis=1, keepdims=True), 1e-9)
        result[start : start + _PAGE] = page
    return result


def resampled_graph(
    graph: ItemGraph, source_hashes: np.ndarray, rows: np.ndarray, hashes: np.ndarray
) -> ItemGraph:
    """The graph of copies: an edge of an item leads from each of its copies to one copy of its neighbor.

    `source_hashes` (M,) are those of the source's items, `rows` (N,) the item that each copy is of, `hashes`
    (N,) those of the copies. Neighbors without a copy are left out.
    """
    random = np.random.default_rng(len(rows))
    node_of_hash = np.searchsorted(graph.item_hashes, source_hashes)
    is_node = np.isin(source_hashes, graph.item_hashes)
    row_of_node = np.full(len(graph.item_hashes), -1)
    row_of_node[node_of_hash[is_node]] = np.flatnonzero(is_node)
    copies = np.argsort(rows, kind="stable")
    start_of_row = np.searchsorted(rows[copies], np.arange(len(source_hashes) + 1))
    order = np.argsort(hashes)  # the copy of each node of the new graph
    node_of_copy = np.empty(len(order), np.int64)
    node_of_copy[order] = np.arange(len(order))
    source_node = np.where(is_node[rows[order]], node_of_hash[rows[order]], len(graph.item_hashes))
    relations = {}
    for name, relation in graph.relations.items():
        begin = np.append(relation.start, relation.start[-1])[source_node]
        size = np.append(np.diff(relation.start), 0)[source_node]
        node = np.repeat(np.arange(len(order)), size)
        edge = np.arange(len(node)) + np.repeat(begin - (np.cumsum(size) - size), size)
        target_row = row_of_node[relation.neighbors[edge]]
        count = np.where(target_row >= 0, np.diff(start_of_row)[target_row], 0)
        has_copy = count > 0
        pick = start_of_row[target_row] + (count * random.random(len(count))).astype(np.int64)
        target = node_of_copy[copies[pick[has_copy]]]
        degree = np.bincount(node[has_copy], minlength=len(order))
        start = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
        relations[name] = Relation(start, target.astype(np.int32), relation.weights[edge][has_copy])
    return ItemGraph(hashes[order], relations)


def _weights(graph: ItemGraph, hashes: np.ndarray) -> np.ndarray:
    """How popular items are, float64 (M,): by the number of their edges, which grows with their baskets."""
    degree = np.zeros(len(graph.item_hashes) + 1)
    for relation in graph.relations.values():
        degree[:-1] += np.diff(relation.start)
    place = np.searchsorted(graph.item_hashes, hashes)
    known = np.isin(hashes, graph.item_hashes)
    return np.asarray(np.where(known, degree[np.where(known, place, -1)], 0) + 1.0)
