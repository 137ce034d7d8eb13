"""The choice model of a shop, shrunk toward a simple score as far as held-out baskets ask for it.

A simple score is hand-set weights, or the column that alone ranks the baskets best. A fit with little penalty
on its column and a strong one on the others stays close to it; with an endless penalty it is the simple
score. Held-out baskets choose the score and the penalty. If they cannot show that the fit beats the best
simple score, only a strong penalty is used, and none that loses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.ranking.models.baseline_scorer import HAND_SET, baseline_scores
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.scaler import FeatureScaler
from training.core.decisions import Decision, decide
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import PENALTY, fit_choice
from training.ranking.coordinate_ascent import DEPTH, ascend
from training.ranking.validation import validation_mask

PENALTIES = (PENALTY, 1e-2, 1e-1, 0.3, 1.0)
_STRONG = 0.1  # and more, where held-out groups are no proof
ALONE = math.inf
"""The penalty that leaves the simple score alone."""
_FOLDS = 5
_FEW = 1000  # fewer groups are cross-validated, more have a late part
_MAX_GROUPS = 2000
_COLUMN_GROUPS = 500
_MIN_GROUPS = 10
_SCALE_ROWS = 20_000


@dataclass(frozen=True)
class ChoiceRecipe:
    """How a choice model is fitted: toward which column, how strongly, and whether nDCG is climbed after."""

    anchor: str = HAND_SET
    penalty: float = PENALTY
    climbs: bool = True


def choose_recipe(groups: RankingGroups, columns: Sequence[str]) -> tuple[ChoiceRecipe, Decision]:
    """The recipe for these groups, and whether the fitted model beats the simple score on held-out groups."""
    groups = _sample(groups.take(_graded(groups)), _MAX_GROUPS)
    column = best_column(_sample(groups, _COLUMN_GROUPS), columns)
    anchors = list(dict.fromkeys([column, HAND_SET]))
    recipes = [
        ChoiceRecipe(anchor, penalty, climbs)
        for anchor in anchors
        for penalty, climbs in ((ALONE, False), *((p, c) for p in PENALTIES for c in (False, True)))
    ]
    ndcg = _held_out_ndcg(groups, columns, recipes)
    simple = max((r for r in recipes if r.penalty == ALONE), key=lambda r: _mean(ndcg[r]))
    fitted = [recipe for recipe in recipes if recipe.penalty < ALONE]
    best = max(fitted, key=lambda r: _mean(ndcg[r]))
    decision = _decision(simple, ndcg[best], ndcg[simple])
    if decision.accepted:
        return best, decision
    strong = [recipe for recipe in fitted if recipe.penalty >= _STRONG]
    best = max(strong, key=lambda r: _mean(ndcg[r]))
    if _mean(ndcg[best]) <= _mean(ndcg[simple]):
        return simple, _decision(simple, ndcg[best], ndcg[simple])
    decision = _decision(simple, ndcg[best], ndcg[simple], f"the fitted ranker, drawn to {_words(simple)}")
    return best, replace(decision, accepted=True)


def fit_recipe(groups: RankingGroups, columns: Sequence[str], recipe: ChoiceRecipe) -> ConditionalLogit:
    """The choice model of a recipe; without the column of its simple score, it starts from hand-set weights.

    Its last column is `HAND_SET` if it starts from these.
    """
    names = list(columns)
    if recipe.anchor not in names:
        names.append(HAND_SET)
        groups = with_hand_set(groups, columns)
    anchor = names.index(recipe.anchor if recipe.anchor in columns else HAND_SET)
    if math.isinf(recipe.penalty):
        sample = np.random.default_rng(0).permutation(len(groups.matrix))[:_SCALE_ROWS]
        scales = FeatureScaler.of(groups.matrix[sample])
        weight = [float(index == anchor) for index in range(len(names))]
        return ConditionalLogit(names, scales, weight)
    penalty = np.full(len(names), recipe.penalty)
    penalty[anchor] = min(PENALTY, recipe.penalty)
    choice = fit_choice(groups, names, penalty)
    return ascend(choice, groups) if recipe.climbs else choice


def best_column(groups: RankingGroups, columns: Sequence[str]) -> str:
    """The column by which alone the groups are ranked best, or `HAND_SET`; `HAND_SET` for few groups."""
    if len(groups.size) < _MIN_GROUPS:
        return HAND_SET
    names, matrix = [HAND_SET, *columns], with_hand_set(groups, columns).matrix
    matrix = np.column_stack([matrix[:, -1], matrix[:, :-1]])
    ndcg = [groups.ndcg(np.nan_to_num(column, nan=-np.inf), DEPTH).mean() for column in matrix.T]
    return names[int(np.argmax(ndcg))]


def with_hand_set(groups: RankingGroups, columns: Sequence[str]) -> RankingGroups:
    """The groups with a last column of hand-set scores."""
    scores = baseline_scores(columns, groups.matrix)
    return replace(groups, matrix=np.column_stack([groups.matrix, scores]))


def _held_out_ndcg(
    groups: RankingGroups, columns: Sequence[str], recipes: Sequence[ChoiceRecipe]
) -> dict[ChoiceRecipe, np.ndarray]:
    """The nDCG@20 of each recipe on held-out groups, float64 (Q,); empty if there are too few groups."""
    ndcg: dict[ChoiceRecipe, list[np.ndarray]] = {recipe: [np.empty(0)] for recipe in recipes}
    for held_out in _folds(groups):
        training, late = groups.take(~held_out), groups.take(held_out)
        for recipe in recipes:
            if recipe.climbs:
                continue
            choice = fit_recipe(training, columns, recipe)
            ndcg[recipe].append(_ndcg(choice, late, columns))
            if (climbing := replace(recipe, climbs=True)) in ndcg:
                ndcg[climbing].append(_ndcg(_climbed(choice, training, columns), late, columns))
    return {recipe: np.concatenate(parts) for recipe, parts in ndcg.items()}


def _decision(
    simple: ChoiceRecipe, values: np.ndarray, simple_values: np.ndarray, part: str = "the fitted ranker"
) -> Decision:
    return decide(part, _words(simple), f"of nDCG@{DEPTH}", values, simple_values)


def _words(simple: ChoiceRecipe) -> str:
    return "hand-set weights" if simple.anchor == HAND_SET else f"the column {simple.anchor} alone"


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _climbed(choice: ConditionalLogit, groups: RankingGroups, columns: Sequence[str]) -> ConditionalLogit:
    has_hand_set = len(choice.columns) > len(columns)
    return ascend(choice, with_hand_set(groups, columns) if has_hand_set else groups)


def _ndcg(choice: ConditionalLogit, groups: RankingGroups, columns: Sequence[str]) -> np.ndarray:
    has_hand_set = len(choice.columns) > len(columns)
    matrix = (with_hand_set(groups, columns) if has_hand_set else groups).matrix
    return groups.ndcg(choice.terms(matrix).sum(1, dtype=np.float64), DEPTH)


def _graded(groups: RankingGroups) -> np.ndarray:
    return np.asarray(np.bincount(groups.group(), groups.grade > 0, len(groups.size)) > 0)


def _sample(groups: RankingGroups, limit: int) -> RankingGroups:
    if len(groups.size) <= limit:
        return groups
    mask = np.zeros(len(groups.size), bool)
    mask[np.random.default_rng(0).permutation(len(groups.size))[:limit]] = True
    return groups.take(mask)


def _folds(groups: RankingGroups) -> list[np.ndarray]:
    """Held-out groups, bool (Q,) each: a late part of many groups, five random parts of few."""
    count = len(groups.size)
    if count >= _FEW:
        return [validation_mask(groups)]
    if count < _MIN_GROUPS:
        return []
    fold = np.random.default_rng(0).permutation(count) % _FOLDS
    return [fold == part for part in range(_FOLDS)]
