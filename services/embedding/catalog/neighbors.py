"""The nearest items of each item in one space, kept from search to search.

A search by an item that was searched by before needs no index. Changes of the catalog are added when an entry
is read, so that a new item is found at once.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.catalog.item_table import ItemTable
from services.core.ordering import best_first
from services.embedding.index.vector_index import VectorIndex

_CAPACITY = 20_000
_SPARE = 64
SCORE_DIGITS = 5
_MAX_CHANGES = 512
_MIN_LENGTH = 1e-12


@dataclass(frozen=True)
class _Entry:
    """All items that come before or at an item, best first, as of the first `position` changes.

    That item has the score `floor`, -inf if the entry has every item, and the hash `floor_hash`; of equal
    scores the lower hash comes first. `rows` int32 (K,) of the item table, `scores` float32 (K,).
    """

    rows: np.ndarray
    scores: np.ndarray
    floor: float
    floor_hash: int
    position: int


class Neighbors:
    """Nearest items in one index; any thread may search, one thread at a time notes changes."""

    def __init__(self, index: VectorIndex, table: ItemTable) -> None:
        self._index, self._table, self._lock = index, table, threading.Lock()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._changes: list[int] = []
        self._start = 0  # of `_changes`, in the count of all changes

    def note(self, item_hashes: Collection[int]) -> None:
        """Note that the vectors of items have changed in the index, or are deleted."""
        with self._lock:
            self._changes.extend(item_hashes)
            if (surplus := len(self._changes) - 2 * _MAX_CHANGES) > 0:
                del self._changes[:surplus]
                self._start += surplus

    def search(
        self, item_hashes: Sequence[int], limit: int, mask: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
        """The `limit` nearest rows of each item that the mask, bool (N,), allows.

        Returns rows int64 and scores float32, best first, of the items for which enough neighbors are known,
        and the other items.
        """
        entries = self._current(item_hashes, limit)
        all_rows, all_scores, rest = [], [], []
        for item_hash in item_hashes:
            entry = entries.get(item_hash)
            if entry is None:
                continue  # it has no vector
            usable = np.flatnonzero(entry.rows < len(mask))
            usable = usable[mask[entry.rows[usable]]][:limit]
            if len(usable) < limit and entry.floor > -np.inf:
                rest.append(item_hash)
                continue
            all_rows.append(entry.rows[usable].astype(np.int64))
            all_scores.append(entry.scores[usable])
        return all_rows, all_scores, rest

    def _current(self, item_hashes: Sequence[int], limit: int) -> dict[int, _Entry]:
        """An entry of at least `limit` rows for each item with a vector, as of the latest change."""
        with self._lock:
            position = self._start + len(self._changes)
            changes, start = self._changes, self._start
            entries = dict[int, _Entry]()
            stale = dict[int, tuple[_Entry, list[int]]]()
            for item_hash in item_hashes:
                entry = self._entries.get(item_hash)
                if entry is None or entry.position < start:
                    continue
                self._entries.move_to_end(item_hash)
                later = changes[entry.position - start :]
                if not later:
                    entries[item_hash] = entry
                elif len(later) <= _MAX_CHANGES and item_hash not in later:
                    stale[item_hash] = entry, later
        fresh = {item_hash: self._updated(item_hash, *old, position) for item_hash, old in stale.items()}
        known = {n: e for n, e in {**entries, **fresh}.items() if len(e.rows) >= limit or e.floor == -np.inf}
        missing = [item_hash for item_hash in dict.fromkeys(item_hashes) if item_hash not in known]
        if missing:
            fresh |= self._searched(missing, limit, position)
        with self._lock:
            for item_hash, entry in fresh.items():
                self._entries[item_hash] = entry
            while len(self._entries) > _CAPACITY:
                self._entries.popitem(last=False)
        return {**known, **fresh}

    def _searched(self, item_hashes: Sequence[int], limit: int, position: int) -> dict[int, _Entry]:
        positions, vectors = self._index.vectors(item_hashes)
        if not len(positions):
            return {}
        entries = {}
        results = self._index.search(_unit(vectors), limit + _SPARE)
        for place, hits in zip(positions.tolist(), results, strict=True):
            rows = self._table.rows(hits.hashes)
            present = np.flatnonzero(rows >= 0)
            complete = len(hits.hashes) < limit + _SPARE
            entry = self._entry(rows[present], hits.scores[present], -np.inf, 0, position)
            if not complete and len(entry.rows):
                last = int(self._table.item_hashes[entry.rows[-1]])
                entry = replace(entry, floor=float(entry.scores[-1]), floor_hash=last)
            entries[item_hashes[place]] = entry
        return entries

    def _entry(
        self, rows: np.ndarray, scores: np.ndarray, floor: float, floor_hash: int, position: int
    ) -> _Entry:
        """An entry, best first, ties by item hash.

        The last bits of a score depend on which vectors were multiplied together, so scores are rounded:
        equal items stay equal.
        """
        rounded = np.round(scores, SCORE_DIGITS).astype(np.float32)
        order = best_first(rounded, self._table.item_hashes[rows])
        return _Entry(rows[order].astype(np.int32), rounded[order], floor, floor_hash, position)

    def _updated(self, item_hash: int, entry: _Entry, changes: list[int], position: int) -> _Entry:
        """The entry with the scores of changed items."""
        changed = np.array(sorted(set(changes)), np.int64)
        unchanged = np.flatnonzero(~np.isin(entry.rows, self._table.rows(changed)))
        places, vectors = self._index.vectors([item_hash, *changed.tolist()])
        if not len(places) or places[0] != 0:  # it was deleted meanwhile
            return _Entry(np.empty(0, np.int32), np.empty(0, np.float32), 0.0, 0, position)
        scores = np.round(vectors[1:] @ _unit(vectors[:1])[0], SCORE_DIGITS).astype(np.float32)
        hashes = changed[places[1:] - 1]
        rows = self._table.rows(hashes)
        before = (scores > entry.floor) | ((scores == np.float32(entry.floor)) & (hashes <= entry.floor_hash))
        added = np.flatnonzero(before & (rows >= 0))
        rows = np.concatenate([entry.rows[unchanged], rows[added]])
        scores = np.concatenate([entry.scores[unchanged], scores[added]])
        return self._entry(rows, scores, entry.floor, entry.floor_hash, position)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors (N, D) at unit length, as a search by a group has them: float16 changes the length."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _MIN_LENGTH))
