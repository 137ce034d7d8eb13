"""The choice model and the reranker find the likeliest weights and serve as trained."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.catalog.item_table import ItemTable
from services.core.errors import FailedPrecondition
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.models.baseline_scorer import baseline_scores
from services.ranking.models.co_occurrence import GraphView
from services.ranking.models.ctr import CtrModel, CtrSettings, write_ctr
from services.ranking.models.ctr_head import CtrHead
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import Reranker, RerankerModel, write_reranker
from services.ranking.models.scaler import FeatureScaler
from services.ranking.scoring.scorer import Scorer, ctr_column
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import DAY, item_stats
from services.ranking.state.user_query import UserQuery
from tests.support import shops
from tests.support.fits import Fits
from tests.support.prediction_models import served_logits
from training.examples.ranking_groups import RankingGroups
from training.ranking import list_trees, shrinkage
from training.ranking.reranker import fit_reranker
from training.ranking.shrinkage import ChoiceRecipe, fit_recipe
from training.ranking.validation import validation_mask

pytestmark = pytest.mark.usefixtures("single_thread")
TWO = ("fame", "taste")
LIKELIHOOD = ChoiceRecipe("fame", climbs=False)
TEXT, IMAGE = 6, 8


def test_contributions_of_the_columns_sum_to_the_score() -> None:
    model = reranker_of(("a", "b", "c"))
    matrix = np.random.default_rng(1).random((40, 3)).astype(np.float32)
    rest = model.score(matrix) - model.contributions(matrix).sum(1)
    np.testing.assert_allclose(rest, rest[0], atol=1e-5)
    assert np.ptp(model.score(matrix)) > 0.1


def reranker_of(columns: tuple[str, ...]) -> RerankerModel:
    """A model that likes the second column and dislikes the last, over questions of ten candidates."""
    matrix = np.random.default_rng(0).random((4000, len(columns))).astype(np.float32)
    label = (matrix[:, 1] - matrix[:, -1] > 0.5).astype(np.float32)
    return fit_reranker(lists(matrix, label), columns, trees=5).model


def lists(matrix: np.ndarray, grade: np.ndarray) -> RankingGroups:
    """Lists of ten rows, one a second."""
    count = len(matrix) // 10
    weight = np.ones(len(matrix), np.float32)
    return RankingGroups(matrix, grade, weight, np.full(count, 10), np.arange(count) * 1_000_000)


def test_sampled_rows_stay_complete_and_in_their_list() -> None:
    size = np.array([3, 1, 7, 2, 5])
    number = np.arange(18, dtype=np.float32)
    groups = RankingGroups(number[:, None], number % 3, number + 1, size, np.arange(5))
    both = RankingGroups.concatenate([groups, groups.take(np.array([True, False, True, False, True]))])
    choice = ConditionalLogit(["number"], FeatureScaler([1.0], [1.0], [2.0]), [0.5])
    data, gain = list_trees.dataset(RerankerModel(choice, None), both)
    assert gain == [0, 0.5, 1]
    matrix = np.asarray(data.data)[:, 0]
    expected = [*np.split(number, np.cumsum(size)[:-1]), number[:3], number[4:11], number[13:]]
    assert np.asarray(data.group).tolist() == [len(one) for one in expected]
    np.testing.assert_array_equal(np.asarray(data.label), matrix % 3)
    np.testing.assert_array_equal(np.asarray(data.weight), matrix + 1)
    expected_score = choice.terms(matrix[:, None])[:, 0]
    np.testing.assert_array_equal(np.asarray(data.init_score), expected_score)
    for rows, expected_rows in zip(
        np.split(matrix, np.cumsum(np.asarray(data.group))[:-1]), expected, strict=True
    ):
        np.testing.assert_array_equal(np.sort(rows), expected_rows)
    assert not np.array_equal(matrix, np.concatenate(expected))


def test_ties_do_not_rank_the_target_first() -> None:
    """Of noise no number of trees helps to put answers first, wherever they stood."""
    choice = np.random.default_rng(0)
    ranks = []
    for first in (True, False):
        grade = np.zeros((400, 10), np.float32)
        grade[np.arange(400), 0 if first else choice.integers(0, 10, 400)] = 1
        noise = lists(np.zeros((4000, 2), np.float32), grade.ravel())
        record: dict[str, Any] = {}
        data, _ = list_trees.dataset(
            RerankerModel(ConditionalLogit(TWO, FeatureScaler.plain(2), [0.0] * 2), None), noise
        )
        lightgbm.train(
            list_trees._PARAMETERS, data, 1, [data], callbacks=[lightgbm.record_evaluation(record)]
        )
        ranks.append(record["training"]["ndcg@20"][0])
    assert ranks[0] == pytest.approx(ranks[1], abs=0.05)


def test_the_number_of_trees_is_validated_on_unseen_days(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries = lists(*liking_of_the_middle(10_000))
    queries = replace(queries, time=queries.time // 1_000_000 * DAY // 240)  # five days, 240 a day
    fits = Fits(monkeypatch, shrinkage)
    model = fit_reranker(queries, TWO, 20, recipe=LIKELIHOOD).model
    # The fifth is cut at 800 of 1,000; the day begins at 720.
    assert [len(groups.size) for groups in fits.groups] == [720, 1000]
    (training, validation), (final,) = fits.tree_rows
    for (data, scores), rows, choice in (
        (training, queries.matrix[:7200], fit_recipe(fits.groups[0], TWO, LIKELIHOOD)),
        (validation, queries.matrix[7200:], fit_recipe(fits.groups[0], TWO, LIKELIHOOD)),
        (final, queries.matrix, model.choice),
    ):
        np.testing.assert_array_equal(np.sort(data, axis=0), np.sort(rows, axis=0))
        np.testing.assert_allclose(scores, choice.terms(data).sum(1), rtol=1e-5)


def noise(seed: int, moments: int) -> RankingGroups:
    """Two hundred lists of ten rows that nothing tells apart."""
    choice = np.random.default_rng(seed)
    grade = np.zeros((200, 10), np.float32)
    grade[np.arange(200), choice.integers(0, 10, 200)] = 1
    groups = lists(choice.random((2000, 2)).astype(np.float32), grade.ravel())
    return replace(groups, time=np.arange(200) * moments // 200 * DAY)


def test_noise_mostly_gives_no_trees() -> None:
    """One in forty gains by a 95% interval by chance; of the best of forty numbers it would be more."""
    has_trees = [fit_reranker(noise(seed, 50), TWO, 200).model.trees is not None for seed in range(24)]
    assert sum(has_trees) <= 2


def test_an_exact_number_of_trees_is_not_questioned() -> None:
    assert fit_reranker(noise(0, 50), TWO, 0, exact=True).model.tree_count == 0
    assert fit_reranker(noise(0, 50), TWO, 7, exact=True).model.tree_count == 7


@pytest.mark.parametrize("moments", [1, 2, 200])
def test_some_lists_are_always_held_out(moments: int) -> None:
    late = validation_mask(noise(0, moments))
    assert 0 < late.sum() <= len(late) / 2
    trees = fit_reranker(noise(0, moments), TWO, 200).model.trees
    assert trees is None or trees.num_trees() < 100


def test_one_list_grows_no_tree() -> None:
    grade = (np.arange(10) == 3).astype(np.float32)
    one = lists(np.random.default_rng(0).random((10, 2)).astype(np.float32), grade)
    assert fit_reranker(one, TWO, 5).model.trees is None


def liking_of_the_middle(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two columns, and a taste for what is neither low nor high in the first, which no sum knows."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(0, 1, (count, 2)).astype(np.float32)
    return matrix, (generator.random(count) < 0.3 * (np.abs(matrix[:, 0]) < 0.7)).astype(np.float32)


def test_trees_grow_only_for_nonlinear_effects() -> None:
    matrix, is_taken = liking_of_the_middle(20_000)
    assert fit_reranker(lists(matrix, is_taken), TWO, 20).model.trees is not None
    generator = np.random.default_rng(0)
    chance = 1 / (1 + np.exp(2 - 2 * np.sign(matrix[:, 0])))  # a sum of one column says it all
    plain = (generator.random(len(matrix)) < chance).astype(np.float32)
    assert fit_reranker(lists(np.sign(matrix), plain), TWO, 20).model.trees is None


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=8), min_size=1)
)
def test_a_row_with_more_weight_takes_more_places(lists_of_rows: list[list[tuple[int, int]]]) -> None:
    generator = np.random.default_rng(0)
    grade = np.array([g for one in lists_of_rows for g, _ in one], np.float32)
    # What has a grade stands for itself alone.
    weight = np.array([1 if g else w for one in lists_of_rows for g, w in one], np.float32)
    groups = RankingGroups(
        np.zeros((len(grade), 1), np.float32),
        grade,
        weight,
        np.array([len(one) for one in lists_of_rows]),
        np.arange(len(lists_of_rows)),
    )
    score = generator.permutation(len(grade)).astype(float)
    expected, start = [], 0
    for one in lists_of_rows:
        rows = slice(start, start + len(one))
        start += len(one)
        if not grade[rows].any():
            continue
        order = np.argsort(-score[rows])
        spread = np.repeat(grade[rows][order], weight[rows][order].astype(int))
        gains = [g / math.log2(2 + at) for at, g in enumerate(spread[:5])]
        ideal = [g / math.log2(2 + at) for at, g in enumerate(np.sort(grade[rows])[::-1][:5])]
        expected.append(sum(gains) / sum(ideal))
    np.testing.assert_allclose(groups.ndcg(score, 5), expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_lists_suffice_for_a_model(count: int) -> None:
    few = lists(
        np.random.default_rng(0).random((10 * count, 2)).astype(np.float32), np.arange(10 * count) % 10 == 3
    )
    few = replace(few, grade=few.grade.astype(np.float32))
    assert np.isfinite(fit_reranker(few, TWO, 5).model.score(few.matrix)).all()


def test_a_served_reranker_scores_as_the_fitted_one(tmp_path: Path) -> None:
    columns = ("price", "popular_7d", "age, in days")
    model = reranker_of(columns)
    write_reranker(tmp_path, model)
    names = ("age, in days", "noise", "popular_7d", "price")
    matrix = np.random.default_rng(1).random((50, 4)).astype(np.float32)
    matrix[::7, 2] = np.nan
    reranker = Reranker(tmp_path, names)
    expected = model.score(matrix[:, [3, 2, 0]])
    np.testing.assert_allclose(reranker.score(matrix), expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(expected) > 0
    best, worst = np.array([[0.1, 0, 0.9, 0.5]], np.float32), np.array([[0.9, 0, 0.1, 0.5]], np.float32)
    assert reranker.score(best) > reranker.score(worst)
    assert reranker.score(matrix[:0]).shape == (0,)
    with pytest.raises(FailedPrecondition, match="popular_7d"):
        Reranker(tmp_path, ("age, in days", "price"))


def test_a_model_without_trees_is_written_and_served(tmp_path: Path) -> None:
    choice = ConditionalLogit(["a", "b"], FeatureScaler.plain(2), [1.0, -2.0])
    write_reranker(tmp_path, RerankerModel(choice, None))
    matrix = np.random.default_rng(0).random((20, 2)).astype(np.float32)
    scores = Reranker(tmp_path, ["a", "b"]).score(matrix)
    np.testing.assert_allclose(scores, np.log1p(matrix) @ [1.0, -2.0], rtol=1e-4, atol=1e-5)
    contributions = RerankerModel(choice, None).contributions(matrix).sum(1)
    np.testing.assert_allclose(contributions, scores, rtol=1e-4, atol=1e-5)


def small_shop() -> tuple[Features, ItemTable, UserQuery]:
    items = shops.items()
    text = np.random.default_rng(0).standard_normal((len(items), TEXT))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    table = ItemTable.of(
        items,
        {"text": text.astype(np.float32)},
        {"text": np.ones(len(items), bool)},
        [shops.UNTIL] * len(items),
    )
    features = Features(RankingContext(table, GraphView(shops.graph(), table), ["colour"]))
    ones = np.ones(3, np.float32)
    query = UserQuery(
        np.array([4]), ones[:1], np.array([1, 2, 3]), 5 * ones, 0.5 * ones, ones > 0, np.full(3, -1)
    )
    return features, table, query


def test_a_scorer_uses_what_the_bundle_has(tmp_path: Path) -> None:
    features, table, query = small_shop()
    now, rows = item_stats(EventState({"purchase": 1.0}), table, 30_000 * DAY), np.arange(5, 25)
    matrix = features.matrix(query, rows, now)
    by_hand = Scorer(features, table).score(query, rows, now)
    assert list(by_hand.components) == ["blend"]
    np.testing.assert_array_equal(by_hand.values, baseline_scores(features.names, matrix))
    assert np.ptp(by_hand.values) > 0
    assert by_hand.probabilities == {}

    column = table.vectors("text")
    assert column is not None
    vectors = {"text": column[0], "image": np.zeros((table.length, IMAGE), np.float16)}
    torch.manual_seed(0)
    shape = CtrSettings(
        {"text": TEXT, "image": IMAGE},  # no item has a photograph yet
        ("click", "purchase"),
        ("price", "age_days"),
        FeatureScaler.plain(2),
        shown=True,
        slope=(1.0, 1.0),
        offset=(0.0, 0.0),
    )
    head_at, trees_at = tmp_path / "ctr", tmp_path / "reranker"
    head_at.mkdir()
    trees_at.mkdir()
    write_ctr(head_at, CtrModel(shape))
    logits = served_logits(CtrHead(head_at, features.names), query, rows, matrix, vectors)
    with_head = Scorer(features, table, head_at)
    assert with_head.columns == (*features.names, "ctr_click", "ctr_purchase")
    scores = with_head.score(query, rows, now)
    assert list(scores.components) == ["ctr_click", "ctr_purchase", "blend"]
    np.testing.assert_array_equal(scores.values, by_hand.values)
    np.testing.assert_allclose(scores.components["ctr_purchase"], logits[:, 1], atol=1e-5)
    np.testing.assert_allclose(scores.probabilities["click"], 1 / (1 + np.exp(-logits[:, 0])), rtol=1e-4)

    columns = ("price", ctr_column("purchase"), ctr_column("click"))
    model = reranker_of(columns)
    write_reranker(trees_at, model)
    with pytest.raises(FailedPrecondition, match="ctr_purchase"):
        Scorer(features, table, None, trees_at)
    full = Scorer(features, table, head_at, trees_at).score(query, rows, now)
    assert list(full.components) == ["ctr_click", "ctr_purchase", "reranker"]
    inputs = np.stack([matrix[:, features.names.index("price")], logits[:, 1], logits[:, 0]], 1)
    np.testing.assert_allclose(full.values, model.score(inputs), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(full.values, full.components["reranker"])
