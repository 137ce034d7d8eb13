"""Scores of candidates: feature rows, then the CTR head and the reranker if the bundle has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from services.catalog.item_table import ItemTable
from services.ranking.features.feature_matrix import Features
from services.ranking.features.similarities import Similarities
from services.ranking.models.baseline_scorer import baseline_scores
from services.ranking.models.ctr_head import CtrHead, CtrInput, CtrItems, history_rows, item_vectors
from services.ranking.models.first_phase import FirstPhaseScorer, SourceColumn, read_first_phase, with_others
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
        first = read_first_phase(reranker) if reranker else None
        self._first_phase = FirstPhaseScorer(first) if first else None
        # A head that gives neither a column nor a probability is not run.
        if self._ctr and self._reranker and not self._ctr.settings.shown:
            names = {ctr_column(t) for t in types}
            if not names & set(self._reranker.columns_read):
                self._ctr = None
        self._ctr_items = CtrItems(self._ctr, table) if self._ctr else None

    def score(
        self,
        query: UserQuery,
        rows: np.ndarray,
        stats: ItemStats,
        sources: Sequence[SourceColumn] = (),
        required: np.ndarray | None = None,
    ) -> Scores:
        """Score candidate table rows, int64 (C,), for a user.

        With the `sources` of the candidates, the first phase of the bundle chooses those for the models;
        those `required`, bool (C,), are always among them.
        """
        model = self._first_phase
        if model is None or not sources or len(rows) <= model.depth:
            return self._second_phase(query, rows, stats)
        first = model.score(sources, rows, stats)
        is_selected = np.zeros(len(rows), bool) if required is None else required.copy()
        is_selected[np.argpartition(-first, model.depth)[: model.depth]] = True
        selected = np.flatnonzero(is_selected)
        scores = self._second_phase(query, rows[selected], stats)
        return replace(scores, values=with_others(scores.values, selected, first), selected=selected)

    def ablated(
        self, query: UserQuery, rows: np.ndarray, stats: ItemStats, kinds: Mapping[str, Sequence[str]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores (C,), and by kind those (C,) with its columns, and the space of the same name, unknown."""
        matrix = self._features.matrix(query, rows, stats)
        index = {name: position for position, name in enumerate(self._features.names)}
        without = {}
        for kind, names in kinds.items():
            masked = matrix.copy()
            masked[:, [index[name] for name in names]] = np.nan
            without[kind] = self._final(masked, self._logits_without(kind, query, rows, masked)).values
        return self._final(matrix, self._logits_without("", query, rows, matrix)).values, without

    def _second_phase(self, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> Scores:
        similarities = Similarities(self._table, query, rows)
        matrix = self._features.matrix(query, rows, stats, similarities)
        logits = None
        if self._ctr is not None and self._ctr_items is not None:
            history = history_rows(query)
            spaces = self._ctr.settings.tier_spaces
            cosines = {space: self._cosines(space, similarities, len(history)) for space in spaces}
            read = CtrInput(self._ctr_items.of(history), self._ctr_items.of(rows), cosines)
            logits = self._ctr.logits_of(query, matrix, read)
        return self._final(matrix, logits)

    @staticmethod
    def _cosines(space: str, similarities: Similarities, count: int) -> np.ndarray:
        """The cosines of candidates and the first `count` of the user's items, float32 (C, `count`)."""
        in_space = similarities.space(space)
        if in_space is None:
            return np.zeros((similarities.count, count), np.float32)
        return in_space.cosines[:, :count]

    def _logits_without(
        self, space: str, query: UserQuery, rows: np.ndarray, matrix: np.ndarray
    ) -> np.ndarray | None:
        """The logits (C, T) of the CTR head, if there is one, as if no item had a vector in `space`."""
        if self._ctr is None:
            return None
        used = np.concatenate([rows, history_rows(query)])
        vectors = item_vectors(self._table, used, self._ctr.settings)
        if space in vectors:  # that of attributes has the name of a kind as well
            vectors[space][:] = 0
        return self._ctr.logits(
            query,
            matrix,
            {s: v[: len(rows)] for s, v in vectors.items()},
            {s: v[len(rows) :] for s, v in vectors.items()},
        )

    def _final(self, matrix: np.ndarray, logits: np.ndarray | None) -> Scores:
        components: dict[str, np.ndarray] = {}
        probabilities: dict[str, np.ndarray] = {}
        if self._ctr is not None and logits is not None:
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
