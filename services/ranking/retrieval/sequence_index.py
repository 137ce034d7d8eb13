"""Retrieval by the sequence model without scoring the whole catalog: an inverted file of item vectors.

The vectors are in clusters; a query scans those whose centers score highest (IVF, Jégou et al., 2011).
A small catalog is scanned as a whole.
"""

import threading

import numpy as np

from services.core.ranges import concatenated
from services.ranking.models.sequence import SequenceView

_SCANNED_ROWS = 20_000
_PROBE_SHARE = 0.06
_TRAINING_ROWS = 40_000


class SequenceIndex:
    """The best rows for a user's vector; any thread may use it.

    A new row is scanned by every query, until so many are new that the clusters are made again, in a thread
    of their own. A catalog that was small when this was built is scanned until its clusters are made.
    """

    def __init__(self, view: SequenceView) -> None:
        self._view, self._lock = view, threading.Lock()
        self._clusters: _Clusters | None = None
        self._building: threading.Thread | None = None
        if len(view.vectors) >= _SCANNED_ROWS:
            self._build(view.vectors)

    def search(self, user: np.ndarray, allowed: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 (K,) of the mask `allowed`, bool (N,), and their log odds float32 (K,), in no order."""
        self._refresh()
        clusters = self._clusters
        if clusters is None or np.count_nonzero(allowed) <= _SCANNED_ROWS // 4:
            rows = np.flatnonzero(allowed)
        else:
            rows = clusters.rows(user)
            rows = np.concatenate([rows[rows < len(allowed)], np.arange(clusters.count, len(allowed))])
            rows = rows[allowed[rows]]
        return rows, self._view.log_odds(user, rows)

    def _refresh(self) -> None:
        vectors = self._view.vectors
        count = 0 if self._clusters is None else self._clusters.count
        if len(vectors) < _SCANNED_ROWS or len(vectors) <= count * 9 // 8 + _SCANNED_ROWS // 8:
            return
        with self._lock:
            if self._building is None or not self._building.is_alive():
                self._building = threading.Thread(target=self._build, args=(vectors,))
                self._building.start()

    def _build(self, vectors: np.ndarray) -> None:
        self._clusters = _Clusters(vectors)


class _Clusters:
    """Rows by the nearest of some centers; a row whose vector changes stays until they are made anew."""

    def __init__(self, vectors: np.ndarray) -> None:
        import faiss  # noqa: PLC0415 - a ranking service of a small shop needs no FAISS

        self.count = len(vectors)
        centers = int(np.sqrt(self.count))
        generator = np.random.default_rng(0)
        sample = np.sort(generator.permutation(self.count)[: min(_TRAINING_ROWS, self.count)])
        kmeans = faiss.Kmeans(vectors.shape[1], centers, niter=6, seed=1, max_points_per_centroid=128)
        kmeans.train(np.ascontiguousarray(vectors[sample]))
        _, nearest = kmeans.index.search(np.ascontiguousarray(vectors), 1)
        order = np.argsort(nearest[:, 0], kind="stable")
        self._rows = order.astype(np.int32)
        self._start = np.searchsorted(nearest[order, 0], np.arange(centers + 1))
        self._sizes, self._centers = np.diff(self._start), kmeans.centroids
        self._probes = max(8, int(centers * _PROBE_SHARE))

    def rows(self, user: np.ndarray) -> np.ndarray:
        """The rows of the clusters whose centers score highest, int64 (K,)."""
        best = np.argpartition(-(self._centers @ user), self._probes)[: self._probes]
        sizes = self._sizes[best]
        return np.asarray(self._rows[concatenated(self._start[:-1][best], sizes)], np.int64)
