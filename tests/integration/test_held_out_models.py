"""The report's models never score a query of a user that they are fitted on."""

from dataclasses import replace

import numpy as np
import pytest

from tests.integration.test_training_rows import graphs_by_day
from tests.support.histories import (
    WEIGHTS,
    make_items,
    random_interactions,
    random_vectors,
    shop_config,
)
from tests.support.histories import make_shop as shop_of
from training.data.config import ShopConfig
from training.evaluation import held_out_models
from training.evaluation.held_out_models import HeldOutModels, Split, split_of
from training.examples.feature_rows import evaluation_rows
from training.examples.point_in_time import PointInTime
from training.examples.queries import EvalQuery, make_eval_queries
from training.examples.training_set import TrainingSet, make_training_set
from training.examples.windows import Windows, choose_windows
from training.ranking.fit_models import fit_models

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def case() -> tuple[PointInTime, ShopConfig, TrainingSet, list[EvalQuery], Windows]:
    items, interactions = make_items(30), random_interactions(30, seed=3, unknown_items=False)
    settings = shop_config("hour")
    shop = shop_of(items, interactions, settings)
    vectors, present = random_vectors(len(items))
    past = graphs_by_day(shop, vectors, present)
    windows = choose_windows(shop.events, settings)
    queries = make_eval_queries(shop.events, WEIGHTS, settings.targets, windows.since)
    data = make_training_set(past, shop, settings, queries, windows.since)
    assert data is not None
    return past, settings, data, queries, windows


def users(queries: list[EvalQuery]) -> set[str]:
    return {query.user_id for query in queries}


def test_few_queries_are_crossed_by_user(
    case: tuple[PointInTime, ShopConfig, TrainingSet, list[EvalQuery], Windows],
) -> None:
    past, settings, data, queries, windows = case
    split = split_of(data, queries, windows, 1000)
    assert split.is_crossed
    assert split.since == windows.since
    assert len(split.queries) == len(queries)
    covered = np.sort(np.concatenate([fold.queries for fold in split.folds]))
    np.testing.assert_array_equal(covered, np.arange(len(split.queries)))
    for fold in split.folds:
        of_fold = users([split.queries[index] for index in fold.queries])
        assert not of_fold & users(list(fold.training.rows.eval_queries))
    whole = fit_models(data, settings, {})
    held_out = HeldOutModels(split, settings, {}, whole)
    rows = evaluation_rows(past, split.queries, np.ones(past.table.length, bool))
    scores = held_out.scores(rows)
    for fold, models in zip(split.folds, held_out.models, strict=True):
        mask = np.isin(rows.group(), fold.queries)
        np.testing.assert_allclose(scores[mask], models.score(rows.take(fold.queries), {}))
    assert held_out.first.recipe == whole.recipe


def test_enough_queries_of_the_last_days_need_no_folds(
    case: tuple[PointInTime, ShopConfig, TrainingSet, list[EvalQuery], Windows],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, data, queries, windows = case
    monkeypatch.setattr(held_out_models, "MIN_QUERIES", 1)
    split = split_of(data, queries, windows, 1000)
    (fold,) = split.folds
    assert split.since == windows.evaluated_from
    assert all(query.as_of >= windows.evaluated_from for query in split.queries)
    assert all(query.as_of < windows.evaluated_from for query in fold.training.rows.eval_queries)


def test_no_evaluation_has_no_folds(
    case: tuple[PointInTime, ShopConfig, TrainingSet, list[EvalQuery], Windows],
) -> None:
    _, _, data, queries, windows = case
    assert split_of(data, queries, windows, 0).folds == []
    empty: Split = split_of(replace(data), [], windows, 1000)
    assert empty.folds == []
