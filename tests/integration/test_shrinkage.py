"""Few baskets move a ranker little from the simple score, many as far as they know better."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.ranking.models.baseline_scorer import HAND_SET, baseline_scores
from services.ranking.models.reranker import Reranker, RerankerModel, write_reranker
from training.examples.ranking_groups import RankingGroups
from training.ranking import shrinkage
from training.ranking.conditional_logit import PENALTY
from training.ranking.coordinate_ascent import DEPTH
from training.ranking.reranker import fit_reranker
from training.ranking.shrinkage import (
    ALONE,
    ChoiceRecipe,
    CrossValidation,
    best_column,
    choose_recipe,
    fit_recipe,
)

pytestmark = pytest.mark.usefixtures("single_thread")

COLUMNS = ("text_session_most", "popular_7d", *(f"noise_{n}" for n in range(12)))
ROWS = 60


def groups_of(count: int, weight: np.ndarray, seed: int = 0) -> RankingGroups:
    """So many lists, each with a target drawn by the softmax of a weighted sum of columns."""
    generator = np.random.default_rng(seed)
    matrix = generator.random((count * ROWS, len(COLUMNS))).astype(np.float32)
    utility = (matrix @ weight).reshape(count, ROWS) + generator.gumbel(size=(count, ROWS))
    grade = np.zeros((count, ROWS), np.float32)
    grade[np.arange(count), utility.argmax(1)] = 1
    return RankingGroups(
        matrix,
        grade.ravel(),
        np.ones(count * ROWS, np.float32),
        np.full(count, ROWS),
        np.arange(count) * 3_600_000_000,
    )


def weights(text: float = 0.0, noise: float = 0.0) -> np.ndarray:
    values = np.zeros(len(COLUMNS))
    values[0], values[2:] = text, noise * np.linspace(-1, 1, len(COLUMNS) - 2)
    return values


def crossed(groups: RankingGroups) -> CrossValidation:
    part = np.arange(len(groups.size)) % 5
    return CrossValidation(groups, part, part)


def ndcg(recipe: ChoiceRecipe, training: RankingGroups, fresh: RankingGroups) -> float:
    model = RerankerModel(fit_recipe(training, COLUMNS, recipe), None)
    return float(fresh.ndcg(model.linear_score(fresh.matrix), DEPTH).mean())


def test_the_best_single_column_is_found() -> None:
    assert best_column(groups_of(300, weights(text=8)), COLUMNS) == "text_session_most"
    assert best_column(groups_of(5, weights(text=8)), COLUMNS) == HAND_SET


def test_what_many_baskets_know_replaces_the_simple_score() -> None:
    recipe, (decision,) = choose_recipe(groups_of(1500, weights(text=4, noise=6)), COLUMNS)
    assert decision.accepted
    assert decision.gain is not None
    assert decision.gain.low > 0
    assert recipe.penalty < ALONE


@pytest.mark.parametrize("count", [30, 90])
def test_a_few_baskets_are_never_worse_than_the_simple_score(count: int) -> None:
    """Where one column says all, a fit of fourteen columns to a few baskets would lose."""
    truth = weights(text=8)
    shrunk, fitted, simple = [], [], []
    for seed in range(8):
        training, fresh = groups_of(count, truth, seed), groups_of(400, truth, 100 + seed)
        recipe, _ = choose_recipe(training, COLUMNS, crossed(training))
        shrunk.append(ndcg(recipe, training, fresh))
        fitted.append(ndcg(ChoiceRecipe("text_session_most", PENALTY, climbs=False), training, fresh))
        simple.append(ndcg(ChoiceRecipe("text_session_most", ALONE, climbs=False), training, fresh))
    assert np.mean(fitted) < np.mean(simple)
    loss, full_loss = np.mean(simple) - np.mean(shrunk), np.mean(simple) - np.mean(fitted)
    assert loss < 0.5 * full_loss


def test_nothing_but_noise_leaves_the_simple_score() -> None:
    rejected = 0
    for seed in range(6):
        groups = groups_of(200, weights(), seed)
        recipe, (decision, of_trees) = choose_recipe(groups, COLUMNS, crossed(groups))
        assert not of_trees.accepted
        rejected += recipe.penalty == ALONE
        assert decision.accepted == (recipe.penalty < ALONE)
    assert rejected >= 5


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_baskets_leave_hand_set_weights(count: int) -> None:
    recipe, (decision,) = choose_recipe(groups_of(count, weights(text=8)), COLUMNS)
    assert recipe == ChoiceRecipe(HAND_SET, ALONE, climbs=False)
    assert not decision.accepted
    assert "too few to tell" in str(decision)


def test_a_recipe_without_its_column_uses_hand_set_weights() -> None:
    groups = groups_of(50, weights(text=8))
    choice = fit_recipe(groups, COLUMNS, ChoiceRecipe("sequence_next", 0.1))
    assert choice.columns[-1] == HAND_SET


def test_hand_set_weights_alone_rank_as_without_a_reranker(tmp_path: Path) -> None:
    groups = groups_of(50, weights(text=8))
    model = RerankerModel(fit_recipe(groups, COLUMNS, ChoiceRecipe(HAND_SET, ALONE)), None)
    write_reranker(tmp_path, model)
    names = ("price", *COLUMNS[::-1])
    matrix = np.random.default_rng(1).random((40, len(names))).astype(np.float32)
    served = Reranker(tmp_path, names)
    assert HAND_SET not in served.columns_read
    expected = baseline_scores(names, matrix)
    np.testing.assert_array_equal(np.argsort(-served.score(matrix)), np.argsort(-expected))
    contributions = model.contributions(groups.matrix)
    assert contributions.shape == (len(groups.matrix), len(COLUMNS) + 1)
    np.testing.assert_allclose(contributions.sum(1), model.score(groups.matrix), rtol=1e-4, atol=1e-4)


def test_trees_of_few_baskets_are_cross_validated() -> None:
    """What is neither low nor high is liked, which no sum knows."""
    groups = groups_of(300, weights())
    middle = np.abs(groups.matrix[:, 0] - 0.5) < 0.05
    utility = (5 * middle).reshape(300, ROWS) + np.random.default_rng(1).gumbel(size=(300, ROWS))
    grade = np.zeros((300, ROWS), np.float32)
    grade[np.arange(300), utility.argmax(1)] = 1
    groups = replace(groups, grade=grade.ravel())
    recipe, (_, of_trees) = choose_recipe(groups, COLUMNS, crossed(groups))
    assert of_trees.accepted
    assert recipe.trees in shrinkage.TREES
    model = fit_reranker(groups, COLUMNS, 100, validation=crossed(groups)).model
    assert model.tree_count == recipe.trees
