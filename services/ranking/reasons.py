"""Why a candidate stands where it does: what each kind of evidence adds to its score, and the item behind it.

A kind's share is what the score loses when that kind is unknown (ablation of feature groups, and of the CTR
head's modality), of what it loses in all. For a sum of terms that is exact; for trees `contributions` of
`RerankerModel` (SHAP) is the oracle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.ranking.basis import Basis
from services.ranking.features import Features
from services.ranking.moment import Moment
from services.ranking.query import SEEDS, Query
from services.ranking.scoring import Scorer

BEHAVIOUR, TEXT, IMAGE, ATTRIBUTES, POPULARITY = "behaviour", "text", "image", "attributes", "popularity"
KINDS = (BEHAVIOUR, TEXT, IMAGE, ATTRIBUTES, POPULARITY)
_OF_PART = {
    "graph": BEHAVIOUR,
    "sequence": BEHAVIOUR,
    "text": TEXT,
    "image": IMAGE,
    "words": ATTRIBUTES,
    "labels": ATTRIBUTES,
}
_OF_COUNT = {
    "bought_before": BEHAVIOUR,
    "price": ATTRIBUTES,
    "price_to_session": ATTRIBUTES,
    "price_to_history": ATTRIBUTES,
    "markdown": ATTRIBUTES,
    "markdown_to_session": ATTRIBUTES,
    "family_in_session": ATTRIBUTES,
    "family_in_history": ATTRIBUTES,
}
# They say who asks, and nothing of a candidate.
_OF_NOBODY = frozenset(("session_length", "history_length", "days_since_last"))


@dataclass(frozen=True)
class Reasons:
    """Of C candidates, by kind: `shares` float32 (C, K), rows of which add up to 1, in the order of `KINDS`.

    `seeds` int64 (C, K): the place among the person's session and history, newest first, of the item that
    a kind rests on most, -1 for none.
    """

    shares: np.ndarray
    seeds: np.ndarray


def kinds_of(features: Features) -> dict[str, list[str]]:
    """The columns of each kind."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for part, names in features.parts.items():
        for name in names:
            if name not in _OF_NOBODY:
                kind = _OF_COUNT.get(name, POPULARITY) if part == "counts" else _OF_PART[part]
                found[kind].append(name)
    return found


def shares_of(whole: np.ndarray, without: np.ndarray) -> np.ndarray:
    """What each kind adds, of what all add: float32 (C, K) of scores (C,) and those without a kind (C, K).

    Kinds that pull a candidate down have no share; where all do, the least of them has all of it.
    """
    added = np.maximum(whole[:, None] - without, 0)
    nothing = added.sum(1) <= 0
    added[nothing, without[nothing].argmin(1)] = 1
    return np.asarray(added / added.sum(1, keepdims=True), np.float32)


class Reasoner:
    """Reasons over the models and features of a bundle."""

    def __init__(self, scorer: Scorer, features: Features, basis: Basis) -> None:
        self._scorer, self._features, self._basis = scorer, features, basis
        self._kinds = kinds_of(features)

    def reasons(self, query: Query, rows: np.ndarray, moment: Moment) -> Reasons:
        """Why candidate table rows, int64 (C,), stand where they do."""
        whole, without = self._scorer.ablated(query, rows, moment, self._kinds)
        seeds = np.concatenate([query.session[:SEEDS], query.history[:SEEDS]])
        near = self._near(seeds, rows, moment)
        best = np.full((len(rows), len(KINDS)), -1, np.int64)
        for at, kind in enumerate(KINDS):
            worth = near.get(kind)
            if worth is not None and len(seeds):
                best[:, at] = np.where(worth.max(1) > 0, worth.argmax(1), -1)
        # Places among the first of the session, then of the history.
        shown = min(len(query.session), SEEDS)
        best = np.where(best >= shown, best - shown + len(query.session), best)
        return Reasons(shares_of(whole, np.stack([without[k] for k in KINDS], axis=1)), best)

    def _near(self, seeds: np.ndarray, rows: np.ndarray, moment: Moment) -> Mapping[str, np.ndarray]:
        """How near each of the rows (C,) is to each seed (S,), by kind: float (C, S)."""
        found = {BEHAVIOUR: self._together(seeds, rows)}
        for space in (TEXT, IMAGE):
            column = self._basis.table.vectors(space)
            if column is not None:
                values = column[0]
                found[space] = values[rows].astype(np.float32) @ values[seeds].astype(np.float32).T
        alike = self._basis.titles.each(seeds, rows, moment), self._basis.alike.each(seeds, rows, moment)
        found[ATTRIBUTES] = np.nan_to_num(alike[0]) + np.nan_to_num(alike[1])
        return found

    def _together(self, seeds: np.ndarray, rows: np.ndarray) -> np.ndarray:
        graph = self._basis.graph
        place: dict[int, int] = {int(n): at for at, n in enumerate(graph.nodes(rows).tolist()) if n >= 0}
        total = np.zeros((len(rows), len(seeds)))
        for relation in _behavioural(graph.names):
            near, worth, seed = graph.edges(relation, seeds, np.ones(len(seeds), np.float32))
            for node, weight, at in zip(near.tolist(), worth.tolist(), seed.tolist(), strict=True):
                if node in place:
                    total[place[node], at] += weight
        return total


def _behavioural(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in (TEXT, IMAGE)]
