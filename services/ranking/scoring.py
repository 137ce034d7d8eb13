"""Candidates into scores: the feature row, the CTR head and the reranker, as far as the bundle has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from services.item_table import ItemTable
from services.ranking.blend import blend
from services.ranking.ctr import CtrHead
from services.ranking.features import Features
from services.ranking.moment import Moment
from services.ranking.query import Query
from services.ranking.reranker import Reranker


@dataclass(frozen=True)
class Scores:
    """Scores float32 (C,), those of each component, and P(event | shown) float64 (C,) by event type."""

    values: np.ndarray
    components: Mapping[str, np.ndarray]
    probabilities: Mapping[str, np.ndarray] = field(default_factory=dict)


def ctr_column(event_type: str) -> str:
    """The name of the reranker's column that holds the CTR head's logit for an event type."""
    return f"ctr_{event_type}"


class Scorer:
    """The models of a bundle over one feature function; hand-set weights when there is no reranker.

    Raises:
        FailedPrecondition: a model reads a column that is not there.
    """

    def __init__(
        self, features: Features, table: ItemTable, ctr: Path | None = None, reranker: Path | None = None
    ) -> None:
        self._features, self._table = features, table
        self._ctr = CtrHead(ctr, features.names) if ctr else None
        types = self._ctr.settings.types if self._ctr else ()
        self.columns = (*features.names, *(ctr_column(t) for t in types))
        self._reranker = Reranker(reranker, self.columns) if reranker else None

    def score(self, query: Query, rows: np.ndarray, moment: Moment) -> Scores:
        """Score candidate table rows, int64 (C,), for a person at a moment."""
        return self._final(query, rows, self._features.matrix(query, rows, moment), self._vectors())

    def ablated(
        self, query: Query, rows: np.ndarray, moment: Moment, kinds: Mapping[str, Sequence[str]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores (C,), and by kind those (C,) as if its columns, and the space of its name, were unknown."""
        matrix, vectors = self._features.matrix(query, rows, moment), self._vectors()
        place = {name: at for at, name in enumerate(self._features.names)}
        without = {}
        for kind, names in kinds.items():
            blank, seen = matrix.copy(), dict(vectors)
            blank[:, [place[name] for name in names]] = np.nan
            if kind in seen:
                seen[kind] = np.broadcast_to(np.float16(0), seen[kind].shape)
            without[kind] = self._final(query, rows, blank, seen).values
        return self._final(query, rows, matrix, vectors).values, without

    def _final(
        self, query: Query, rows: np.ndarray, matrix: np.ndarray, vectors: Mapping[str, np.ndarray]
    ) -> Scores:
        components = {"blend": blend(self._features.names, matrix)}
        probabilities: dict[str, np.ndarray] = {}
        if self._ctr is not None:
            logits = self._ctr.logits(query, rows, matrix, vectors)
            probabilities = self._ctr.probabilities(logits)
            components |= {ctr_column(t): logits[:, at] for at, t in enumerate(self._ctr.settings.types)}
            matrix = np.concatenate([matrix, logits], axis=1)
        if self._reranker is not None:
            components["reranker"] = self._reranker.score(matrix)
        final = components.get("reranker", components["blend"])
        return Scores(final, components, probabilities)

    def _vectors(self) -> dict[str, np.ndarray]:
        """The vectors of the head's spaces; zeros for a space that no item has a vector in yet."""
        found = {}
        for space, dimension in self._ctr.settings.spaces.items() if self._ctr else ():
            column = self._table.vectors(space)
            empty = np.zeros((self._table.length, dimension), np.float16)
            found[space] = empty if column is None else column[0]
        return found
