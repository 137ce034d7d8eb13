"""Scores of candidates: feature rows, then the CTR head and the reranker if the bundle has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from services.catalog.item_table import ItemTable
from services.ranking.features.feature_matrix import Features
from services.ranking.models.baseline_scorer import baseline_scores
from services.ranking.models.ctr import CtrHead
from services.ranking.models.first_phase import read_first_phase, with_others
from services.ranking.models.reranker import Reranker
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.user_query import UserQuery


@dataclass(frozen=True)
class Scores:
    """Scores float32 (C,), those of each component, and P(event | shown) float64 (C,) by event type.

    If the first phase left out candidates, `selected` int64 (K,) are the indices of the others, ascending,
    and components and probabilities are of these, (K,).
    """

    values: np.ndarray
    components: Mapping[str, np.ndarray]
    probabilities: Mapping[str, np.ndarray] = field(default_factory=dict)
    selected: np.ndarray | None = None


def ctr_column(event_type: str) -> str:
    """The name of the reranker's column that holds the CTR head's logit for an event type."""
    return f"ctr_{event_type}"


class Scorer:
    """The models of a bundle over one feature function; hand-set weights without a reranker.

    Raises:
        FailedPrecondition: a model reads a column that is missing.
    """

    def __init__(
        self, features: Features, table: ItemTable, ctr: Path | None = None, reranker: Path | None = None
    ) -> None:
        self._features, self._table = features, table
        self._ctr = CtrHead(ctr, features.names) if ctr else None
        types = self._ctr.settings.types if self._ctr else ()
        self.columns = (*features.names, *(ctr_column(t) for t in types))
        self._reranker = Reranker(reranker, self.columns) if reranker else None
        self._first_phase = read_first_phase(reranker) if reranker else None
        # A head that gives neither a column nor a probability is not run.
        if self._ctr and self._reranker and not self._ctr.settings.shown:
            names = {ctr_column(t) for t in types}
            if not names & set(self._reranker.columns_read):
                self._ctr = None

    def score(
        self,
        query: UserQuery,
        rows: np.ndarray,
        stats: ItemStats,
        sources: np.ndarray | None = None,
        required: np.ndarray | None = None,
    ) -> Scores:
        """Score candidate table rows, int64 (C,), for a user.

        With `sources`, float32 (C, S) in the order of `NAMES`, NaN for none, the first phase of the bundle
        chooses the candidates for the models; those `required`, bool (C,), are always among them.
        """
        model = self._first_phase
        if model is None or sources is None or len(rows) <= model.depth:
            return self._final(query, rows, self._features.matrix(query, rows, stats), self._vectors())
        first = model.score(sources, rows, stats)
        is_selected = np.zeros(len(rows), bool) if required is None else required.copy()
        is_selected[np.argpartition(-first, model.depth)[: model.depth]] = True
        selected = np.flatnonzero(is_selected)
        matrix = self._features.matrix(query, rows[selected], stats)
        scores = self._final(query, rows[selected], matrix, self._vectors())
        return replace(scores, values=with_others(scores.values, selected, first), selected=selected)

    def ablated(
        self, query: UserQuery, rows: np.ndarray, stats: ItemStats, kinds: Mapping[str, Sequence[str]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores (C,), and by kind those (C,) with its columns, and the space of the same name, unknown."""
        matrix, vectors = self._features.matrix(query, rows, stats), self._vectors()
        index = {name: position for position, name in enumerate(self._features.names)}
        without = {}
        for kind, names in kinds.items():
            masked, masked_vectors = matrix.copy(), dict(vectors)
            masked[:, [index[name] for name in names]] = np.nan
            if kind in masked_vectors:
                masked_vectors[kind] = np.broadcast_to(np.float16(0), masked_vectors[kind].shape)
            without[kind] = self._final(query, rows, masked, masked_vectors).values
        return self._final(query, rows, matrix, vectors).values, without

    def _final(
        self, query: UserQuery, rows: np.ndarray, matrix: np.ndarray, vectors: Mapping[str, np.ndarray]
    ) -> Scores:
        components: dict[str, np.ndarray] = {}
        probabilities: dict[str, np.ndarray] = {}
        if self._ctr is not None:
            logits = self._ctr.logits(query, rows, matrix, vectors)
            probabilities = self._ctr.probabilities(logits)
            components |= {
                ctr_column(t): logits[:, output] for output, t in enumerate(self._ctr.settings.types)
            }
            matrix = np.concatenate([matrix, logits], axis=1)
        if self._reranker is not None:
            components["reranker"] = final = self._reranker.score(matrix)
        else:
            components["blend"] = final = baseline_scores(self._features.names, matrix)
        return Scores(final, components, probabilities)

    def _vectors(self) -> dict[str, np.ndarray]:
        """The vectors of the head's spaces; zeros for a space without any vector."""
        vectors = {}
        for space, dimension in self._ctr.settings.spaces.items() if self._ctr else ():
            column = self._table.vectors(space)
            if column is None:
                vectors[space] = np.broadcast_to(np.float16(0), (self._table.length, dimension))
            else:
                vectors[space] = column[0]
        return vectors
