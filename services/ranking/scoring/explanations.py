"""Explanations of scores: the share of each kind of evidence, and the item of the user behind it.

The gain of a kind is the loss of score when that kind is unknown (ablation of feature groups, and of a
modality of the CTR head); its share is its part of the gains of all kinds. This is exact for a sum of terms;
for trees `contributions` of `RerankerModel` (SHAP) is the oracle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.scoring.scorer import Scorer
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.user_query import SEEDS, UserQuery

BEHAVIOR, TEXT, IMAGE, ATTRIBUTES, POPULARITY = "behavior", "text", "image", "attributes", "popularity"
KINDS = (BEHAVIOR, TEXT, IMAGE, ATTRIBUTES, POPULARITY)
_KIND_OF_PART = {
    "recent": POPULARITY,
    "impressions": BEHAVIOR,
    "graph": BEHAVIOR,
    "sequence": BEHAVIOR,
    "taste": BEHAVIOR,
    "text": TEXT,
    "image": IMAGE,
    "words": ATTRIBUTES,
    "labels": ATTRIBUTES,
}
_KIND_OF_COUNT = {
    "bought_before": BEHAVIOR,
    "price": ATTRIBUTES,
    "price_to_session": ATTRIBUTES,
    "price_to_history": ATTRIBUTES,
    "markdown": ATTRIBUTES,
    "markdown_to_session": ATTRIBUTES,
    "family_in_session": ATTRIBUTES,
    "family_in_history": ATTRIBUTES,
}
# Columns of the user: the same for each candidate.
_USER_COLUMNS = frozenset(("session_length", "history_length", "days_since_last"))


@dataclass(frozen=True)
class Explanations:
    """C candidates by kind: `shares` float32 (C, K), with rows of sum 1, in the order of `KINDS`.

    `seeds` int64 (C, K): the index of the most similar item by that kind in the session and then the
    history of the user, newest first; -1 for none.
    """

    shares: np.ndarray
    seeds: np.ndarray


def kinds_of(features: Features) -> dict[str, list[str]]:
    """The columns of each kind."""
    columns: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for part, names in features.parts.items():
        for name in names:
            if name not in _USER_COLUMNS:
                kind = _KIND_OF_COUNT.get(name, POPULARITY) if part == "counts" else _KIND_OF_PART[part]
                columns[kind].append(name)
    return columns


def shares_of(scores: np.ndarray, without: np.ndarray) -> np.ndarray:
    """The share of each kind, float32 (C, K), from scores (C,) and the scores without a kind (C, K).

    A kind that lowers a score has share 0; if all do, the one that lowers it least has share 1.
    """
    gain = np.maximum(scores[:, None] - without, 0)
    without_gain = gain.sum(1) <= 0
    gain[without_gain, without[without_gain].argmin(1)] = 1
    return np.asarray(gain / gain.sum(1, keepdims=True), np.float32)


class Explainer:
    """Explanations over the models and features of a bundle."""

    def __init__(self, scorer: Scorer, features: Features, context: RankingContext) -> None:
        self._scorer, self._features, self._context = scorer, features, context
        self._kinds = kinds_of(features)

    def explain(self, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> Explanations:
        """The explanations of candidate table rows, int64 (C,)."""
        scores, without = self._scorer.ablated(query, rows, stats, self._kinds)
        seeds = np.concatenate([query.session[:SEEDS], query.history[:SEEDS]])
        similarities = self._similarities(seeds, rows, stats)
        best = np.full((len(rows), len(KINDS)), -1, np.int64)
        for column, kind in enumerate(KINDS):
            similarity = similarities.get(kind)
            if similarity is not None and len(seeds):
                best[:, column] = np.where(similarity.max(1) > 0, similarity.argmax(1), -1)
        # `seeds` has only the first items of the session, and then those of the history.
        session_seeds = min(len(query.session), SEEDS)
        best = np.where(best >= session_seeds, best - session_seeds + len(query.session), best)
        return Explanations(shares_of(scores, np.stack([without[k] for k in KINDS], axis=1)), best)

    def _similarities(
        self, seeds: np.ndarray, rows: np.ndarray, stats: ItemStats
    ) -> Mapping[str, np.ndarray]:
        """The similarity of each of the rows (C,) to each seed (S,), by kind: float (C, S)."""
        similarities = {BEHAVIOR: self._co_occurrence(seeds, rows)}
        for space in (TEXT, IMAGE):
            column = self._context.table.vectors(space)
            if column is not None:
                values = column[0]
                similarities[space] = values[rows].astype(np.float32) @ values[seeds].astype(np.float32).T
        titles = self._context.title_similarity.each(seeds, rows, stats)
        attributes = self._context.attribute_similarity.each(seeds, rows, stats)
        similarities[ATTRIBUTES] = np.nan_to_num(titles) + np.nan_to_num(attributes)
        return similarities

    def _co_occurrence(self, seeds: np.ndarray, rows: np.ndarray) -> np.ndarray:
        graph = self._context.graph
        nodes = graph.nodes(rows).tolist()
        candidate_of: dict[int, int] = {node: position for position, node in enumerate(nodes) if node >= 0}
        total = np.zeros((len(rows), len(seeds)))
        for relation in _event_relations(graph.names):
            edges = graph.edges(relation, seeds, np.ones(len(seeds), np.float32))
            for node, weight, seed in zip(*(part.tolist() for part in edges), strict=True):
                if node in candidate_of:
                    total[candidate_of[node], seed] += weight
        return total


def _event_relations(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in (TEXT, IMAGE)]
