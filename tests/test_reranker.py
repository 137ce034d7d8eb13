"""Choice model, reranker and scorer: the likeliest weights, served as trained."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from services.errors import FailedPrecondition
from services.item_table import ItemTable
from services.ranking.basis import Basis
from services.ranking.blend import blend
from services.ranking.ctr import CtrHead, CtrModel, CtrSettings, write_ctr
from services.ranking.features import Features
from services.ranking.graph import GraphView
from services.ranking.moment import DAY, moment
from services.ranking.query import Query
from services.ranking.reranker import ConditionalLogit, Reranker, RerankerModel, write_reranker
from services.ranking.scales import Scales
from services.ranking.scoring import Scorer, ctr_column
from services.ranking.state import BehaviourState
from tests import shops
from training import reranker as reranker_fit
from training.choice import fit_choice
from training.lists import Lists
from training.reranker import _late, fit_reranker

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = ("fame", "taste")
TEXT, IMAGE = 6, 8


def choices(seed: int, weight: Sequence[float], count: int = 2000) -> Lists:
    """Lists of two to nine rows, of which one is chosen with exp(weight x row) for its odds."""
    generator = np.random.default_rng(seed)
    size = generator.integers(2, 10, count)
    # A median of 1 is its own unit.
    matrix = generator.exponential(1 / np.log(2), (int(size.sum()), len(weight))).astype(np.float32)
    score = np.log1p(matrix) @ np.array(weight) + generator.gumbel(size=len(matrix))
    start = np.cumsum(size) - size
    grade = np.zeros(len(matrix), np.float32)
    for first, length in zip(start, size, strict=True):
        grade[first + np.argmax(score[first : first + length])] = 1
    return Lists(matrix, grade, np.ones(len(matrix), np.float32), size, np.arange(count))


def test_the_weights_behind_choices_are_found() -> None:
    wanted = np.array([1.5, -1.0, 0.0])
    found = fit_choice(choices(0, wanted.tolist(), 5000), ("a", "b", "c"))
    np.testing.assert_allclose(np.array(found.weight) / np.array(found.scales.scale), wanted, atol=0.15)


def cost(lists: Lists, choice: ConditionalLogit, weight: np.ndarray) -> float:
    """The penalised listwise loss, list by list."""
    scaled = choice.scales.apply(lists.matrix).astype(np.float64)
    total, start = 0.0, 0
    for size in lists.size:
        mine = slice(start, start + size)
        logs = log_softmax(scaled[mine] @ weight + np.log(lists.weight[mine]))
        total -= lists.grade[mine] @ logs
        start += size
    return total / float(lists.grade.sum()) + 0.0005 * float(weight @ weight)


@given(st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_no_other_weights_make_the_choices_likelier(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lists = choices(seed, [1.0, -0.5], 60)
    lists = replace(lists, weight=generator.integers(1, 5, len(lists.weight)).astype(np.float32))
    choice = fit_choice(lists, TWO)
    best = np.array(choice.weight)
    least = cost(lists, choice, best)
    for step in generator.standard_normal((20, 2)):
        assert cost(lists, choice, best + 0.05 * step) > least


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan])
def test_a_row_that_does_not_weigh_anything_is_refused(weight: float) -> None:
    lists = choices(0, [1.0, -0.5], 20)
    lists.weight[3] = weight
    with pytest.raises(ValueError, match="must weigh more than 0"):
        fit_choice(lists, TWO)


def test_a_list_of_which_nothing_was_chosen_teaches_nothing() -> None:
    lists = choices(1, [1.0, -1.0], 200)
    silent = replace(lists, grade=np.zeros_like(lists.grade))
    assert fit_choice(Lists.joined([lists, silent]), TWO) == fit_choice(lists, TWO)
    nothing = fit_choice(silent, TWO)
    assert nothing.weight == [0.0, 0.0]
    assert not nothing.terms(lists.matrix).any()


def test_an_unknown_value_counts_as_average_and_an_unknown_column_as_nothing() -> None:
    lists = choices(2, [1.0, -1.0, 0.5], 300)
    lists.matrix[:, 2] = np.nan
    lists.matrix[::7, 0] = np.nan
    choice = fit_choice(lists, ("a", "b", "c"))
    assert choice.weight[2] == 0
    terms = choice.terms(lists.matrix)
    assert np.isfinite(terms).all()
    assert not terms[::7, 0].any()


def test_what_the_columns_contribute_adds_up_to_the_score() -> None:
    model = fitted_reranker(("a", "b", "c"))
    matrix = np.random.default_rng(1).random((40, 3)).astype(np.float32)
    rest = model.score(matrix) - model.contributions(matrix).sum(1)
    np.testing.assert_allclose(rest, rest[0], atol=1e-5)
    assert np.ptp(model.score(matrix)) > 0.1


def fitted_reranker(columns: tuple[str, ...]) -> RerankerModel:
    """A model that likes the second column and dislikes the last, over questions of ten candidates."""
    matrix = np.random.default_rng(0).random((4000, len(columns))).astype(np.float32)
    liked = (matrix[:, 1] - matrix[:, -1] > 0.5).astype(np.float32)
    return fit_reranker(lists(matrix, liked), columns, trees=5)


def lists(matrix: np.ndarray, grade: np.ndarray) -> Lists:
    """Lists of ten rows, one a second."""
    count = len(matrix) // 10
    weight = np.ones(len(matrix), np.float32)
    return Lists(matrix, grade, weight, np.full(count, 10), np.arange(count) * 1_000_000)


def test_rows_stay_whole_and_in_their_list() -> None:
    size = np.array([3, 1, 7, 2, 5])
    number = np.arange(18, dtype=np.float32)
    known = Lists(number[:, None], number % 3, number + 1, size, np.arange(5))
    both = Lists.joined([known, known.take(np.array([True, False, True, False, True]))])
    choice = ConditionalLogit(["number"], Scales([1.0], [1.0], [2.0]), [0.5])
    data, gain = reranker_fit._dataset(choice, both)
    assert gain == [0, 0.5, 1]
    matrix = np.asarray(data.data)[:, 0]
    expected = [*np.split(number, np.cumsum(size)[:-1]), number[:3], number[4:11], number[13:]]
    assert np.asarray(data.group).tolist() == [len(one) for one in expected]
    np.testing.assert_array_equal(np.asarray(data.label), matrix % 3)
    np.testing.assert_array_equal(np.asarray(data.weight), matrix + 1)
    expected_score = choice.terms(matrix[:, None])[:, 0]
    np.testing.assert_array_equal(np.asarray(data.init_score), expected_score)
    for mine, wanted in zip(np.split(matrix, np.cumsum(np.asarray(data.group))[:-1]), expected, strict=True):
        np.testing.assert_array_equal(np.sort(mine), wanted)
    assert not np.array_equal(matrix, np.concatenate(expected))


def offers() -> tuple[Lists, Lists]:
    """Lists of all there is and of what was on offer: fame decides what is, taste what is taken of it."""
    choice = np.random.default_rng(0)
    matrix = choice.random((40_000, 2)).astype(np.float32)
    fame, taste = matrix.T
    offered = choice.random(40_000) < fame**2
    taken = (offered & (choice.random(40_000) < taste)).astype(np.float32)
    seen = np.flatnonzero(offered)[:10_000]
    return lists(matrix, taken), lists(matrix[seen], taken[seen])


def test_what_was_passed_over_counts_more_than_what_was_never_on_offer() -> None:
    asked, shown = offers()
    alone, both = (fame_for_taste(fit_reranker(asked, TWO, 40, shown=pages)) for pages in (None, shown))
    assert 0 < both < 0.8 * alone


def fame_for_taste(model: RerankerModel) -> float:
    """How much more a model makes of fame than of taste."""
    low, high, rest = np.full(50, 0.4), np.full(50, 0.9), np.linspace(0.4, 0.9, 50)

    def gained(column: int) -> float:
        ends = [np.stack([end, rest][:: 1 - 2 * column], axis=1) for end in (low, high)]
        before, after = (model.score(end.astype(np.float32)) for end in ends)
        return float(np.mean(after - before))

    return gained(0) / gained(1)


def test_an_answer_is_not_well_placed_before_anything_is_learned() -> None:
    """Of noise no number of trees helps to put answers first, wherever they stood."""
    choice = np.random.default_rng(0)
    found = []
    for first in (True, False):
        grade = np.zeros((400, 10), np.float32)
        grade[np.arange(400), 0 if first else choice.integers(0, 10, 400)] = 1
        noise = lists(np.zeros((4000, 2), np.float32), grade.ravel())
        record: dict[str, Any] = {}
        data, _ = reranker_fit._dataset(ConditionalLogit(TWO, Scales.plain(2), [0.0] * 2), noise)
        lightgbm.train(
            reranker_fit._PARAMETERS, data, 1, [data], callbacks=[lightgbm.record_evaluation(record)]
        )
        found.append(record["training"]["ndcg@20"][0])
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_how_many_trees_are_enough_is_judged_by_days_that_nothing_learned_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, shown = lists(*liked_in_between(40_000)), lists(*liked_in_between(10_000))
    asked = replace(asked, when=asked.when // 1_000_000 * DAY // 1000)  # four days
    shown = replace(shown, when=shown.when // 1_000_000 * DAY // 240)  # five days, 240 a day
    chosen: list[Lists] = []
    sets: list[list[tuple[np.ndarray, np.ndarray]]] = []
    train = lightgbm.train

    def fitted(known: Lists, columns: Sequence[str]) -> ConditionalLogit:
        chosen.append(known)
        return fit_choice(known, columns)

    def watched(parameters: dict[str, object], rows: lightgbm.Dataset, *rest: Any, **more: Any) -> Any:
        every = [rows, *more.get("valid_sets", [])]  # LightGBM frees them afterwards
        sets.append([(np.array(data.data), np.array(data.init_score)) for data in every])
        return train(parameters, rows, *rest, **more)

    monkeypatch.setattr(reranker_fit, "fit_choice", fitted)
    monkeypatch.setattr(reranker_fit, "ascend", lambda choice, _: choice)
    monkeypatch.setattr(lightgbm, "train", watched)
    model = fit_reranker(asked, TWO, 20, shown=shown)
    # The fifth is cut at 800 of 1,000; the day begins at 720.
    early = int((asked.when < 3 * DAY).sum())
    assert [len(known.size) for known in chosen] == [early + 720, len(asked.size) + 1000]
    np.testing.assert_allclose(chosen[1].grade[: len(asked.grade)], 0.1 * asked.grade)
    np.testing.assert_array_equal(chosen[1].grade[len(asked.grade) :], shown.grade)
    (tried, held), (final,) = sets
    for (data, scores), rows, choice in (
        (tried, shown.matrix[:7200], fit_choice(chosen[0], TWO)),
        (held, shown.matrix[7200:], fit_choice(chosen[0], TWO)),
        (final, shown.matrix, model.choice),
    ):
        np.testing.assert_array_equal(np.sort(data, axis=0), np.sort(rows, axis=0))
        np.testing.assert_allclose(scores, choice.terms(data).sum(1), rtol=1e-5)


def noise(seed: int, moments: int) -> Lists:
    """Two hundred lists of ten rows that nothing tells apart."""
    choice = np.random.default_rng(seed)
    grade = np.zeros((200, 10), np.float32)
    grade[np.arange(200), choice.integers(0, 10, 200)] = 1
    made = lists(choice.random((2000, 2)).astype(np.float32), grade.ravel())
    return replace(made, when=np.arange(200) * moments // 200 * DAY)


def test_of_noise_the_best_number_of_trees_is_mostly_none() -> None:
    """One in six gains a standard error by chance; of the best of forty numbers it would be half."""
    grown = [fit_reranker(noise(seed, 50), TWO, 200).trees is not None for seed in range(24)]
    assert sum(grown) <= 9


@pytest.mark.parametrize("moments", [1, 2, 200])
def test_however_lists_lie_in_time_some_are_held_out(moments: int) -> None:
    late = _late(noise(0, moments))
    assert 0 < late.sum() <= len(late) / 2
    for shown in (None, noise(0, moments)):
        trees = fit_reranker(noise(0, moments), TWO, 200, shown=shown).trees
        assert trees is None or trees.num_trees() < 100


def test_what_pages_teach_must_not_spoil_what_is_asked_of_everything() -> None:
    """On pages the taste is for what is in between, of everything for the rest."""
    matrix, taken = liked_in_between(20_000)
    pages = lists(matrix, taken)
    pages = replace(pages, when=np.arange(len(pages.size)) // 400 * DAY)
    other = (np.random.default_rng(1).random(len(matrix)) < 0.3 * (np.abs(matrix[:, 0]) > 0.7)).astype(
        np.float32
    )
    for grade, grown in ((taken, True), (other, False)):
        asked = replace(pages, grade=grade)
        assert (fit_reranker(asked, TWO, 20, shown=pages).trees is not None) == grown


def test_of_one_list_no_tree_is_grown() -> None:
    grade = (np.arange(10) == 3).astype(np.float32)
    one = lists(np.random.default_rng(0).random((10, 2)).astype(np.float32), grade)
    assert fit_reranker(one, TWO, 5).trees is None


def liked_in_between(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two columns, and a taste for what is neither low nor high in the first, which no sum knows."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(0, 1, (count, 2)).astype(np.float32)
    return matrix, (generator.random(count) < 0.3 * (np.abs(matrix[:, 0]) < 0.7)).astype(np.float32)


def test_trees_are_grown_where_a_sum_cannot_say_it_and_only_there() -> None:
    matrix, taken = liked_in_between(20_000)
    assert fit_reranker(lists(matrix, taken), TWO, 20).trees is not None
    generator = np.random.default_rng(0)
    chance = 1 / (1 + np.exp(2 - 2 * np.sign(matrix[:, 0])))  # a sum of one column says it all
    plain = (generator.random(len(matrix)) < chance).astype(np.float32)
    assert fit_reranker(lists(np.sign(matrix), plain), TWO, 20).trees is None


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=8), min_size=1)
)
def test_a_row_that_weighs_more_takes_more_places(drawn: list[list[tuple[int, int]]]) -> None:
    generator = np.random.default_rng(0)
    grade = np.array([g for one in drawn for g, _ in one], np.float32)
    # What has a grade stands for itself alone.
    weight = np.array([1 if g else w for one in drawn for g, w in one], np.float32)
    known = Lists(
        np.zeros((len(grade), 1), np.float32),
        grade,
        weight,
        np.array([len(one) for one in drawn]),
        np.arange(len(drawn)),
    )
    score = generator.permutation(len(grade)).astype(float)
    expected, start = [], 0
    for one in drawn:
        mine = slice(start, start + len(one))
        start += len(one)
        if not grade[mine].any():
            continue
        order = np.argsort(-score[mine])
        spread = np.repeat(grade[mine][order], weight[mine][order].astype(int))
        gains = [g / math.log2(2 + at) for at, g in enumerate(spread[:5])]
        ideal = [g / math.log2(2 + at) for at, g in enumerate(np.sort(grade[mine])[::-1][:5])]
        expected.append(sum(gains) / sum(ideal))
    np.testing.assert_allclose(known.ndcg(score, 5), expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_lists_makes_a_model(count: int) -> None:
    few = lists(
        np.random.default_rng(0).random((10 * count, 2)).astype(np.float32), np.arange(10 * count) % 10 == 3
    )
    few = replace(few, grade=few.grade.astype(np.float32))
    for shown in (None, few):
        model = fit_reranker(few, TWO, 5, shown=shown)
        assert np.isfinite(model.score(few.matrix)).all()


def test_a_served_reranker_scores_as_the_fitted_one(tmp_path: Path) -> None:
    columns = ("price", "popular_7d", "age, in days")
    model = fitted_reranker(columns)
    write_reranker(tmp_path, model)
    names = ("age, in days", "noise", "popular_7d", "price")
    matrix = np.random.default_rng(1).random((50, 4)).astype(np.float32)
    matrix[::7, 2] = np.nan
    served = Reranker(tmp_path, names)
    expected = model.score(matrix[:, [3, 2, 0]])
    np.testing.assert_allclose(served.score(matrix), expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(expected) > 0
    best, worst = np.array([[0.1, 0, 0.9, 0.5]], np.float32), np.array([[0.9, 0, 0.1, 0.5]], np.float32)
    assert served.score(best) > served.score(worst)
    assert served.score(matrix[:0]).shape == (0,)
    with pytest.raises(FailedPrecondition, match="popular_7d"):
        Reranker(tmp_path, ("age, in days", "price"))


def test_a_model_without_trees_is_written_and_served(tmp_path: Path) -> None:
    choice = ConditionalLogit(["a", "b"], Scales.plain(2), [1.0, -2.0])
    write_reranker(tmp_path, RerankerModel(choice, None))
    matrix = np.random.default_rng(0).random((20, 2)).astype(np.float32)
    served = Reranker(tmp_path, ["a", "b"]).score(matrix)
    np.testing.assert_allclose(served, np.log1p(matrix) @ [1.0, -2.0], rtol=1e-4, atol=1e-5)
    contributed = RerankerModel(choice, None).contributions(matrix).sum(1)
    np.testing.assert_allclose(contributed, served, rtol=1e-4, atol=1e-5)


def small_shop() -> tuple[Features, ItemTable, Query]:
    items = shops.items()
    text = np.random.default_rng(0).standard_normal((len(items), TEXT))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    table = ItemTable.of(
        items,
        {"text": text.astype(np.float32)},
        {"text": np.ones(len(items), bool)},
        [shops.UNTIL] * len(items),
    )
    features = Features(Basis(table, GraphView(shops.graph(), table), ["colour"]))
    ones = np.ones(3, np.float32)
    query = Query(
        np.array([4]), ones[:1], np.array([1, 2, 3]), 5 * ones, 0.5 * ones, ones > 0, np.full(3, -1)
    )
    return features, table, query


def test_a_scorer_uses_what_the_bundle_has(tmp_path: Path) -> None:
    features, table, query = small_shop()
    now, rows = moment(BehaviourState({"purchase": 1.0}), table, 30_000 * DAY), np.arange(5, 25)
    matrix = features.matrix(query, rows, now)
    by_hand = Scorer(features, table).score(query, rows, now)
    assert list(by_hand.components) == ["blend"]
    np.testing.assert_array_equal(by_hand.values, blend(features.names, matrix))
    assert np.ptp(by_hand.values) > 0
    assert by_hand.probabilities == {}

    column = table.vectors("text")
    assert column is not None
    stored = {"text": column[0], "image": np.zeros((table.length, IMAGE), np.float16)}
    torch.manual_seed(0)
    shape = CtrSettings(
        {"text": TEXT, "image": IMAGE},  # no item has a photograph yet
        ("click", "purchase"),
        ("price", "age_days"),
        Scales.plain(2),
        shown=True,
        slope=(1.0, 1.0),
        offset=(0.0, 0.0),
    )
    head_at, trees_at = tmp_path / "ctr", tmp_path / "reranker"
    head_at.mkdir()
    trees_at.mkdir()
    write_ctr(head_at, CtrModel(shape))
    logits = CtrHead(head_at, features.names).logits(query, rows, matrix, stored)
    with_head = Scorer(features, table, head_at)
    assert with_head.columns == (*features.names, "ctr_click", "ctr_purchase")
    scored = with_head.score(query, rows, now)
    assert list(scored.components) == ["blend", "ctr_click", "ctr_purchase"]
    np.testing.assert_array_equal(scored.values, by_hand.values)
    np.testing.assert_allclose(scored.components["ctr_purchase"], logits[:, 1], atol=1e-5)
    np.testing.assert_allclose(scored.probabilities["click"], 1 / (1 + np.exp(-logits[:, 0])), rtol=1e-4)

    columns = ("price", ctr_column("purchase"), ctr_column("click"))
    model = fitted_reranker(columns)
    write_reranker(trees_at, model)
    with pytest.raises(FailedPrecondition, match="ctr_purchase"):
        Scorer(features, table, None, trees_at)
    full = Scorer(features, table, head_at, trees_at).score(query, rows, now)
    assert list(full.components) == ["blend", "ctr_click", "ctr_purchase", "reranker"]
    read = np.stack([matrix[:, features.names.index("price")], logits[:, 1], logits[:, 0]], 1)
    np.testing.assert_allclose(full.values, model.score(read), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(full.values, full.components["reranker"])


@given(
    st.lists(st.integers(-1000, 1000), min_size=3, max_size=30),
    st.sampled_from([2.0**-20, 2.0**-10, 1.0, 2.0**10]),
)
@settings(deadline=None)
def test_columns_mean_the_same_in_whatever_unit_they_come(values: list[int], unit: float) -> None:
    column = np.array([*values, np.nan], np.float32)[:, None]
    one, other = (Scales.of(column * np.float32(u)).apply(column * np.float32(u)) for u in (1.0, unit))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    order = np.argsort(column[:-1, 0], kind="stable")
    assert (np.diff(one[order, 0]) >= 0).all()  # what is more stays more
    assert one[-1, 0] == 0  # unknown is average
