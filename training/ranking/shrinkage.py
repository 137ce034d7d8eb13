"""The choice model of a shop, shrunk toward a simple score as far as held-out baskets ask for it.

A simple score is hand-set weights, or the column that alone ranks the baskets best, with some of these. A
fit with little penalty on its column and a strong one on the others stays close to it; with an endless
penalty it is the simple score. Held-out baskets choose the score and the penalty. If they do not show that
the fit beats the best simple score, the simple score is used. If they are too few to show anything, a fit
with a strong penalty is used where it gains a standard error.

Of many groups, a late part decides; of less than a thousand, each of five parts in turn. Of few baskets, the
users are cut into parts, and the queries of each part are ranked by a model of the others: over all their
candidates, new items included, and with trees.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.ranking.models.baseline_scorer import HAND_SET, baseline_scores
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import RerankerModel
from services.ranking.models.scaler import FeatureScaler
from training.core.decisions import Decision, decide
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import PENALTY, fit_choice
from training.ranking.coordinate_ascent import DEPTH, ascend
from training.ranking.list_trees import grow
from training.ranking.validation import MIN_GROUPS, best_count, mean_and_error, validation_mask

PENALTIES = (PENALTY, 1e-2, 1e-1, 0.3, 1.0)
TREES = (20, 50)
_PENALTIES_WITH_TREES = (PENALTY, 0.1)
_STRONG = 0.1  # and more, where held-out groups are no proof
ALONE = math.inf
"""The penalty that leaves the simple score alone."""
_MAX_GROUPS = 2000
_FOLDS, _MANY = 5, 1000
_COLUMN_GROUPS = 500
_MIN_TRAINING_GROUPS = 10
_SCALE_ROWS = 20_000
_TIE_BREAK = 0.1  # the weight of hand-set weights next to a column alone


@dataclass(frozen=True)
class ChoiceRecipe:
    """How a choice model is fitted: toward which column, how strongly, and whether nDCG is climbed after.

    `trees` is the number of trees on top, if the recipe says.
    """

    anchor: str = HAND_SET
    penalty: float = PENALTY
    climbs: bool = True
    trees: int = 0


@dataclass(frozen=True)
class CrossValidation:
    """The lists of all candidates of Q queries, and the part of the users that each belongs to, int64 (Q,).

    `training_part` int64 (G,) are those of the groups that models are fitted on.
    """

    lists: RankingGroups
    part: np.ndarray
    training_part: np.ndarray


Held = Mapping[ChoiceRecipe, np.ndarray]
"""The nDCG@20 of recipes on the same held-out groups, float64 (Q,) each."""


def choose_recipe(
    groups: RankingGroups, columns: Sequence[str], validation: CrossValidation | None = None
) -> tuple[ChoiceRecipe, list[Decision]]:
    """The recipe for these groups, and whether the fitted model beats the simple score on held-out groups.

    With a `validation`, it also decides about trees.
    """
    if validation is None:
        groups = _sample(groups.take(_graded(groups)), _MAX_GROUPS)
    column = best_column(_sample(validation.lists if validation else groups, _COLUMN_GROUPS), columns)
    anchors = list(dict.fromkeys([column, HAND_SET]))
    recipes = [ChoiceRecipe(anchor, ALONE, climbs=False) for anchor in anchors]
    recipes += [ChoiceRecipe(anchor, penalty, climbs=False) for anchor in anchors for penalty in PENALTIES]
    if validation is None:
        ndcg = _group_ndcg(groups, columns, recipes)
    else:
        ndcg = _crossed_ndcg(groups, columns, recipes, validation)
    simple = max((r for r in recipes if r.penalty == ALONE), key=lambda r: _mean(ndcg[r]))
    plain, values = _best_crossed(ndcg, lambda r: r.penalty < ALONE and not r.trees)
    decision = _decision(simple, values, ndcg[simple])
    if not decision.accepted:
        strong, values = _best_crossed(ndcg, lambda r: ALONE > r.penalty >= _STRONG and not r.trees)
        plain = simple
        if decision.is_thin and _gains_an_error(values, ndcg[simple]):
            plain, part = strong, f"the fitted ranker, drawn to {_words(simple)}"
            reason = "it stays close to that and gains more than a standard error"
            decision = replace(_decision(simple, values, ndcg[simple], part), accepted=True, reason=reason)
    if validation is None:
        return plain, [decision]
    with_trees, values = _best_crossed(ndcg, lambda r: r.trees > 0)
    base_values = ndcg[plain] if len(values) else np.empty(0)
    baseline = "the weighted sum alone" if plain.penalty < ALONE else _words(simple)
    of_trees = decide("trees", baseline, f"of nDCG@{DEPTH}", values, base_values)
    if not of_trees.accepted:
        return plain, [decision, of_trees]
    if not decision.accepted:  # the fit is not, with its trees it is
        decision = _decision(simple, values, ndcg[simple], "the fitted ranker with trees")
    return with_trees, [decision, of_trees]


def fit_recipe(groups: RankingGroups, columns: Sequence[str], recipe: ChoiceRecipe) -> ConditionalLogit:
    """The choice model of a recipe; without the column of its simple score, it starts from hand-set weights.

    Its last column is `HAND_SET` if it starts from these.
    """
    names, is_alone = list(columns), math.isinf(recipe.penalty)
    if recipe.anchor not in names or is_alone:
        names.append(HAND_SET)
        groups = with_hand_set(groups, columns)
    anchor = names.index(recipe.anchor if recipe.anchor in columns else HAND_SET)
    if is_alone:
        sample = np.random.default_rng(0).permutation(len(groups.matrix))[:_SCALE_ROWS]
        scales = FeatureScaler.of(groups.matrix[sample])
        # A column may be unknown for some users, such as the history of new ones.
        weight = [_TIE_BREAK if name == HAND_SET else 0.0 for name in names]
        weight[anchor] = 1.0
        return ConditionalLogit(names, scales, weight)
    penalty = np.full(len(names), recipe.penalty)
    penalty[anchor] = min(PENALTY, recipe.penalty)
    choice = fit_choice(groups, names, penalty)
    return ascend(choice, groups) if recipe.climbs else choice


def best_column(groups: RankingGroups, columns: Sequence[str]) -> str:
    """The column by which alone the groups are ranked best, or `HAND_SET`; `HAND_SET` for few groups."""
    if len(groups.size) < _MIN_TRAINING_GROUPS:
        return HAND_SET
    names, matrix = [HAND_SET, *columns], with_hand_set(groups, columns).matrix
    matrix = np.column_stack([matrix[:, -1], matrix[:, :-1]])
    ndcg = [groups.ndcg(np.nan_to_num(column, nan=-np.inf), DEPTH).mean() for column in matrix.T]
    return names[int(np.argmax(ndcg))]


def with_hand_set(groups: RankingGroups, columns: Sequence[str]) -> RankingGroups:
    """The groups with a last column of hand-set scores."""
    scores = baseline_scores(columns, groups.matrix)
    return replace(groups, matrix=np.column_stack([groups.matrix, scores]))


def _group_ndcg(groups: RankingGroups, columns: Sequence[str], recipes: Sequence[ChoiceRecipe]) -> Held:
    """The nDCG of each recipe on held-out groups, and of the best one after a climb; empty for few groups.

    A late part of many groups is held out, and each of five random parts of fewer.
    """
    count = len(groups.size)
    if count < _MIN_TRAINING_GROUPS:
        return dict.fromkeys(recipes, np.empty(0))
    part = np.random.default_rng(0).permutation(count) % _FOLDS
    is_many = count >= _MANY
    masks = [validation_mask(groups)] if is_many else [part == fold for fold in range(_FOLDS)]
    parts = [(groups.take(~mask), groups.take(mask)) for mask in masks]
    choices = [{r: fit_recipe(training, columns, r) for r in recipes} for training, _ in parts]
    ndcg = {
        recipe: np.concatenate(
            [_ndcg(of_part[recipe], late, columns) for of_part, (_, late) in zip(choices, parts, strict=True)]
        )
        for recipe in recipes
    }
    best = _best(ndcg, lambda recipe: recipe.penalty < ALONE)
    after_climb = [
        _ndcg(_climb(of_part[best], training, columns), late, columns)
        for of_part, (training, late) in zip(choices, parts, strict=True)
    ]
    return ndcg | {replace(best, climbs=True): np.concatenate(after_climb)}


def _crossed_ndcg(
    groups: RankingGroups,
    columns: Sequence[str],
    recipes: Sequence[ChoiceRecipe],
    validation: CrossValidation,
) -> Held:
    """The nDCG of each recipe, and with trees, on the lists of a validation, part by part of the users."""
    ndcg: dict[ChoiceRecipe, list[np.ndarray]] = {recipe: [np.empty(0)] for recipe in recipes}
    for part in np.unique(validation.part).tolist():
        training = groups.take(validation.training_part != part)
        lists = validation.lists.take(validation.part == part)
        if not len(training.size):
            continue
        for recipe in recipes:
            model = RerankerModel(fit_recipe(training, columns, recipe), None)
            score = model.linear_score(lists.matrix)
            ndcg[recipe].append(lists.ndcg(score, DEPTH))
            if recipe.penalty not in _PENALTIES_WITH_TREES or len(groups.size) < _MIN_TRAINING_GROUPS:
                continue
            trees = grow(model, training, max(TREES))
            for count in TREES:
                total = score + trees.predict(lists.matrix, num_iteration=count)
                ndcg.setdefault(replace(recipe, trees=count), [np.empty(0)]).append(lists.ndcg(total, DEPTH))
    return {recipe: np.concatenate(parts) for recipe, parts in ndcg.items()}


def _best(ndcg: Held, condition: Callable[[ChoiceRecipe], bool]) -> ChoiceRecipe:
    return max((recipe for recipe in ndcg if condition(recipe)), key=lambda recipe: _mean(ndcg[recipe]))


def _best_crossed(ndcg: Held, condition: Callable[[ChoiceRecipe], bool]) -> tuple[ChoiceRecipe, np.ndarray]:
    """The best recipe, and the nDCG that the choice of the best is worth, float64 (Q,).

    The best of many gains by chance as well, so each half of the queries is measured with the recipe that is
    best for the other half.
    """
    recipes = [recipe for recipe in ndcg if condition(recipe)]
    if not recipes or len(ndcg[recipes[0]]) < MIN_GROUPS:
        return (recipes[0] if recipes else ChoiceRecipe()), np.empty(0)
    values = np.stack([ndcg[recipe] for recipe in recipes])
    best, crossed = best_count(np.arange(len(recipes)), values)
    return recipes[best], crossed


def _decision(
    simple: ChoiceRecipe, values: np.ndarray, simple_values: np.ndarray, part: str = "the fitted ranker"
) -> Decision:
    return decide(part, _words(simple), f"of nDCG@{DEPTH}", values, simple_values)


def _gains_an_error(values: np.ndarray, simple_values: np.ndarray) -> bool:
    """Whether the gain is more than one standard error."""
    if len(values) < MIN_GROUPS:
        return False
    mean, error = mean_and_error(values - simple_values)
    return mean > error


def _words(simple: ChoiceRecipe) -> str:
    return (
        "hand-set weights"
        if simple.anchor == HAND_SET
        else f"the column {simple.anchor} and hand-set weights"
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _climb(choice: ConditionalLogit, groups: RankingGroups, columns: Sequence[str]) -> ConditionalLogit:
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
