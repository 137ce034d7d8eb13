"""Fits the reranker: a choice model, and LambdaMART by LightGBM boosted from the choice model's scores.

`page_reranker` fits that of a shop that logs pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightgbm
import numpy as np

from services.ranking.models.reranker import RerankerModel
from training.core.decisions import MIN_QUERIES, Decision, decide
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import fit_choice
from training.ranking.coordinate_ascent import DEPTH
from training.ranking.list_trees import dataset, grow, parameters
from training.ranking.shrinkage import ChoiceRecipe, CrossValidation, choose_recipe, fit_recipe
from training.ranking.trees import PATIENCE, tree_counts
from training.ranking.validation import best_count, validation_mask

_HEAD, _WITHOUT_HEAD = "the scores of the CTR head", "a ranker without them"
_NDCG = f"of nDCG@{DEPTH}"


@dataclass(frozen=True)
class FittedReranker:
    """A model, the recipe of its choice model, and what held-out groups decided."""

    model: RerankerModel
    recipe: ChoiceRecipe
    decisions: Sequence[Decision] = ()


def fit_reranker(
    groups: RankingGroups,
    columns: Sequence[str],
    trees: int,
    *,
    recipe: ChoiceRecipe | None = None,
    exact: bool = False,
    validation: CrossValidation | None = None,
) -> FittedReranker:
    """Fit a model that ranks the candidates of past queries, with at most `trees` trees; so many if `exact`.

    The choice model follows `recipe`, or the one that held-out groups choose (`shrinkage`). Trees learn
    interactions of columns. The last fifth of the groups, cut between days, decides how many of them to
    use, and whether they help at all. If most groups are of the first day, a random fifth decides. Of few
    groups, a cross-`validation` decides.
    """
    decisions: list[Decision] = []
    if recipe is None:
        recipe, decisions = choose_recipe(groups, columns, validation)
    is_late = validation_mask(groups)
    count = trees if exact else min(trees, recipe.trees)
    if trees and not exact and validation is None and is_late.any():
        early = groups.take(~is_late)
        count, decision = _tree_count(
            RerankerModel(fit_recipe(early, columns, recipe), None), early, groups.take(is_late), trees
        )
        decisions.append(decision)
    plain = RerankerModel(fit_recipe(groups, columns, recipe), None)
    if not count:
        return FittedReranker(plain, recipe, decisions)
    return FittedReranker(replace(plain, trees=grow(plain, groups, count)), recipe, decisions)


def head_decision(groups: RankingGroups, columns: Sequence[str], tested: np.ndarray) -> Decision:
    """Whether the columns `tested`, bool (K,), improve a choice model on the validation groups, by nDCG@20.

    The models are fitted by likelihood alone.
    """
    is_late = validation_mask(groups)
    ndcg = [np.empty(0), np.empty(0)]
    if is_late.any():
        early, late, ndcg = groups.take(~is_late), groups.take(is_late), []
        for mask in (np.ones(len(columns), bool), ~tested):
            names = [name for name, selected in zip(columns, mask, strict=True) if selected]
            choice = fit_choice(early.select_columns(mask), names)
            ndcg.append(late.ndcg(choice.terms(late.matrix[:, mask]).sum(1, dtype=np.float64), DEPTH))
    return decide(_HEAD, _WITHOUT_HEAD, _NDCG, *ndcg)


def thin_head(groups: RankingGroups) -> Decision | None:
    """The decision against a CTR head if the validation groups are too few to decide for it, else None."""
    count = int(validation_mask(groups).sum())
    return Decision(_HEAD, _WITHOUT_HEAD, _NDCG, False, count, None) if count < MIN_QUERIES else None


def _tree_count(
    model: RerankerModel, training: RankingGroups, validation: RankingGroups, limit: int
) -> tuple[int, Decision]:
    """The best number of trees for the validation groups, 0 if they do not help, and the decision.

    Forty numbers are compared, up to the end of early stopping.
    """
    grades = np.unique(np.concatenate([training.grade, validation.grade]))
    training_data, gain = dataset(model, training, grades)
    validation_data, _ = dataset(model, validation, grades, training_data)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    booster = lightgbm.train(
        parameters(training, gain), training_data, limit, valid_sets=[validation_data], callbacks=[stop]
    )
    counts = tree_counts(booster.current_iteration())
    best, gains = best_count(counts, _gains(model, booster, validation, counts))
    decision = decide("trees", "the weighted sum alone", _NDCG, gains, np.zeros(len(gains)))
    return (best if decision.accepted else 0), decision


def _gains(
    model: RerankerModel, trees: lightgbm.Booster, groups: RankingGroups, counts: np.ndarray
) -> np.ndarray:
    """The gain in each group's nDCG@20 of the first `counts` trees, rising (K,): float64 (K, Q)."""
    score = model.linear_score(groups.matrix)
    base_ndcg, gains, used = groups.ndcg(score, DEPTH), [], 0
    for count in counts.tolist():
        score = score + trees.predict(groups.matrix, start_iteration=used, num_iteration=count - used)
        gains.append(groups.ndcg(score, DEPTH) - base_ndcg)
        used = count
    return np.stack(gains)
