"""The first phase of ranking selects the best candidates, and orders the others below them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.candidate_sources import NAMES
from services.catalog.item_table import ItemTable
from services.catalog.items import Item
from services.core.errors import FailedPrecondition
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.models.co_occurrence import GraphView
from services.ranking.models.first_phase import (
    COLUMNS,
    FIRST_PHASE_FILE,
    FirstPhase,
    FirstPhaseScorer,
    SourceColumn,
    first_phase_rows,
    read_first_phase,
    with_others,
    without_interactions,
    write_first_phase,
)
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import RerankerModel, write_reranker
from services.ranking.models.scaler import FeatureScaler
from services.ranking.scoring.scorer import Scorer
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import DAY, ITEM_COLUMNS, ItemStats, item_stats
from services.ranking.state.user_query import UserQuery
from tests.support import shops

NOW = 30_000 * DAY
BEHAVIOR = ("co_occurrence", "popular", "trending", "attribute_affinity")
# Eighths, so that many scores are equal.
SCORES = st.integers(-400, 400).map(lambda n: n / 8)


@st.composite
def phases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First scores of candidates, the selected ones and their second scores."""
    count = draw(st.integers(1, 20))
    kind = draw(st.sampled_from(["any", "constant", "nearly constant"]))
    first = np.array([draw(SCORES) if kind == "any" else 2.5 for _ in range(count)])
    if kind == "nearly constant":
        first += np.array([draw(st.integers(-9, 9)) for _ in range(count)]) * 1e-6
    selected = np.flatnonzero([draw(st.booleans()) for _ in range(count)])
    if not len(selected):
        selected = np.array([draw(st.integers(0, count - 1))])
    relation = draw(st.sampled_from(["any", "constant", "opposite", "alike"]))
    if relation == "any":
        second = np.array([draw(SCORES) for _ in selected])
    else:
        slope = {"constant": 0.0, "opposite": -2.0, "alike": 2.0}[relation]
        second = slope * first[selected] + draw(SCORES)
    return first.astype(np.float32), selected, second.astype(np.float32)


@given(phases())
def test_the_others_come_below_the_selected_ones_in_the_order_of_the_first_phase(
    scores: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    first, selected, second = scores
    every = with_others(second, selected, first)
    assert every.dtype == np.float32
    assert every.shape == first.shape
    assert np.isfinite(every).all()
    np.testing.assert_array_equal(every[selected], second)
    others = np.setdiff1d(np.arange(len(first)), selected)
    assert (every[others] < second.min()).all()
    by_first = others[np.argsort(first[others], kind="stable")]
    steps, gains = np.diff(first[by_first]), np.diff(every[by_first])
    assert (gains >= 0).all()
    assert (gains[steps >= 0.125] > 0).all()
    assert (gains[steps == 0] == 0).all()


@given(
    st.lists(SCORES, min_size=3, max_size=20, unique=True),
    st.integers(1, 40).map(lambda n: n / 8),
    SCORES,
    st.integers(2, 19),
)
def test_the_others_lie_on_the_line_of_the_selected_ones(
    scores: list[float], slope: float, offset: float, depth: int
) -> None:
    first = np.array(sorted(scores, reverse=True), np.float32)
    selected = np.arange(min(depth, len(first) - 1))
    line = slope * first + offset
    every = with_others(line[selected].astype(np.float32), selected, first)
    np.testing.assert_allclose(every, line, atol=0.002, rtol=1e-4)


def weights_of(**of_columns: float) -> FirstPhase:
    weight = [of_columns.get(name, 0.0) for name in COLUMNS]
    return FirstPhase(ConditionalLogit(list(COLUMNS), FeatureScaler.plain(len(COLUMNS)), weight), 4)


def test_a_model_reads_back_as_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    scales = FeatureScaler.of(generator.random((50, len(COLUMNS))).astype(np.float32))
    weight = generator.standard_normal(len(COLUMNS)).tolist()
    model = FirstPhase(ConditionalLogit(list(COLUMNS), scales, weight), 123)
    assert read_first_phase(tmp_path) is None
    write_first_phase(tmp_path, model)
    assert read_first_phase(tmp_path) == model


def test_a_model_over_an_unknown_column_is_refused(tmp_path: Path) -> None:
    write_first_phase(tmp_path, weights_of())
    document = json.loads((tmp_path / FIRST_PHASE_FILE).read_text())
    document["choice"]["columns"][0] = "another source"
    (tmp_path / FIRST_PHASE_FILE).write_text(json.dumps(document))
    with pytest.raises(FailedPrecondition, match="'another source', which is not a column"):
        read_first_phase(tmp_path)


def test_a_model_reads_only_its_own_columns(tmp_path: Path) -> None:
    names = [COLUMNS[-1], COLUMNS[0]]
    write_first_phase(tmp_path, FirstPhase(ConditionalLogit(names, FeatureScaler.plain(2), [2.0, 3.0]), 4))
    model = read_first_phase(tmp_path)
    assert model is not None
    weight = [0.0] * len(COLUMNS)
    weight[-1], weight[0] = 2.0, 3.0
    whole = FirstPhase(ConditionalLogit(list(COLUMNS), FeatureScaler.plain(len(COLUMNS)), weight), 4)
    table = ItemTable.of([Item("a"), Item("b")], {}, {}, [shops.UNTIL] * 2)
    stats = item_stats(EventState({"purchase": 1.0}), table, NOW)
    inputs = source_lists(np.arange(2 * len(NAMES), dtype=np.float32).reshape(2, -1)), np.arange(2), stats
    expected = FirstPhaseScorer(whole).score(*inputs)
    np.testing.assert_allclose(FirstPhaseScorer(model).score(*inputs), expected, rtol=1e-6)


def stats_of(generator: np.random.Generator, count: int) -> ItemStats:
    """Random statistics; every other item has no interactions."""
    unknown = np.where(np.arange(count) % 2, np.nan, 1)
    popular = np.nan_to_num(generator.integers(0, 9, (count, 5)) * unknown[:, None]).astype(np.float32)
    age, idle = (generator.random((2, count)) * 50 * unknown).astype(np.float32)
    price = np.ones(count, np.float32)
    nothing, hours = np.zeros((count, 0), np.float32), np.zeros((count, 3), np.float32)
    return ItemStats(
        tick=NOW,
        counted=count,
        popular=popular,
        age=age,
        idle=idle,
        price=price,
        highest=price,
        channels=nothing,
        recent=hours,
        shown=hours,
        share=hours[:, :2],
        listed=age,
    )


def random_sources(generator: np.random.Generator, count: int) -> np.ndarray:
    scores = generator.integers(0, 5, (count, len(NAMES))).astype(np.float32)
    scores[generator.random(scores.shape) < 0.6] = np.nan
    return scores


def source_lists(scores: np.ndarray) -> list[SourceColumn]:
    """The lists of sources whose scores are the columns of (C, S), NaN for no candidate."""
    lists = [
        (name, np.flatnonzero(~np.isnan(of_source)), of_source)
        for name, of_source in zip(NAMES, scores.T, strict=True)
    ]
    return [(name, indices, of_source[indices]) for name, indices, of_source in lists]


@given(st.integers(0, 1 << 30), st.integers(1, 30), st.integers(0, 6), st.sets(st.sampled_from(COLUMNS)))
@settings(deadline=None)
def test_scores_are_the_sums_of_the_terms_of_rows(seed: int, count: int, more: int, read: set[str]) -> None:
    generator = np.random.default_rng(seed)
    stats, columns = stats_of(generator, count + more), [name for name in COLUMNS if name in read]
    scales = FeatureScaler.of(generator.standard_normal((40, len(columns))) * 3)
    choice = ConditionalLogit(columns, scales, generator.standard_normal(len(columns)).tolist())
    scorer = FirstPhaseScorer(FirstPhase(choice, 3))
    index = [COLUMNS.index(name) for name in columns]
    for length in (count, count + more):  # items arrive within a tick
        extended = first_rows(stats, length)
        rows = generator.permutation(length)
        scores = random_sources(generator, length)
        expected = choice.terms(first_phase_rows(scores, rows, extended)[:, index]).sum(1, dtype=np.float64)
        quota = "quota", rows[:2], np.ones(2, np.float32)
        first = scorer.score([*source_lists(scores), quota], rows, extended)
        assert first.dtype == np.float32
        np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-5)


def first_rows(stats: ItemStats, length: int) -> ItemStats:
    """The statistics of the first rows, before the others arrived."""
    parts = ("popular", "age", "idle", "price", "highest", "channels")
    return replace(stats, **{name: getattr(stats, name)[:length] for name in parts})


def test_a_row_has_the_scores_of_its_sources_and_the_statistics_of_its_item() -> None:
    generator, rows = np.random.default_rng(0), np.array([3, 0, 2])
    scores, stats = random_sources(generator, 3), stats_of(generator, 5)
    matrix = first_phase_rows(scores, rows, stats)
    assert matrix.dtype == np.float32
    value = dict(zip(COLUMNS, matrix.T, strict=True))
    for column, name in enumerate(NAMES):
        proposed = ~np.isnan(scores[:, column])
        np.testing.assert_array_equal(value[f"{name}_proposed"], proposed)
        np.testing.assert_array_equal(value[name], np.where(proposed, scores[:, column], 0))
    np.testing.assert_array_equal(value["popular_7d"], stats.popular[rows, 2])
    np.testing.assert_array_equal(value["popular_ever"], stats.popular[rows, 4])
    np.testing.assert_array_equal(value["age_days"], stats.age[rows])
    np.testing.assert_array_equal(value["idle_days"], stats.idle[rows])
    rising = (stats.popular[rows, 0] + 1) / (stats.popular[rows, 2] / 7 + 1)
    np.testing.assert_allclose(value["rising"], rising, rtol=1e-6)


def test_a_row_without_interactions_is_that_of_an_item_without_events() -> None:
    generator, count = np.random.default_rng(1), 8
    scores, stats, rows = random_sources(generator, count), stats_of(generator, count), np.arange(count)
    unknown = np.full(count, np.nan, np.float32)
    none = replace(stats, popular=np.zeros_like(stats.popular), age=unknown, idle=unknown)
    new = scores.copy()
    new[:, [NAMES.index(name) for name in BEHAVIOR]] = np.nan
    matrix = first_phase_rows(scores, rows, stats)
    before = matrix.copy()
    np.testing.assert_array_equal(without_interactions(matrix), first_phase_rows(new, rows, none))
    np.testing.assert_array_equal(matrix, before)


@pytest.mark.parametrize("name", [*NAMES, *ITEM_COLUMNS])
def test_a_model_orders_by_the_column_that_it_weighs(name: str) -> None:
    generator, count = np.random.default_rng(2), 30
    scores, stats = random_sources(generator, count), stats_of(generator, count)
    rows = generator.permutation(count)
    column = first_phase_rows(scores, rows, stats)[:, COLUMNS.index(name)]
    first = FirstPhaseScorer(weights_of(**{name: -1.0})).score(source_lists(scores), rows, stats)
    assert first.dtype == np.float32
    known = ~np.isnan(column)
    expected = -np.log1p(np.abs(column[known])) * np.sign(column[known])
    np.testing.assert_allclose(first[known], expected, rtol=1e-5)
    assert (first[~known] == 0).all()  # an unknown value counts as the mean


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Features, ItemTable, Path]:
    """The features and the table of the small shop, and a directory with both models."""
    table = ItemTable.of(shops.items(), {}, {}, [shops.UNTIL] * len(shops.items()))
    features = Features(RankingContext(table, GraphView(shops.graph(), table), ["colour"]))
    directory = tmp_path_factory.mktemp("reranker")
    columns = ["price", "baskets_session", "colour_session"]
    weight = [-1.0, 3.0, 0.5]
    write_reranker(directory, RerankerModel(ConditionalLogit(columns, FeatureScaler.plain(3), weight), None))
    return features, table, directory


@given(
    st.integers(0, 1 << 30),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from([(), ("popular",), ("popular", "text", "age_days")]),
    st.sampled_from([None, 0.0, 0.2, 1.0]),
)
@settings(deadline=None)
def test_the_second_phase_scores_the_best_candidates_and_those_required(
    shop: tuple[Features, ItemTable, Path],
    seed: int,
    depth: int,
    count: int,
    columns: tuple[str, ...],
    required_share: float | None,
) -> None:
    features, table, directory = shop
    generator = np.random.default_rng(seed)
    model = replace(weights_of(**dict.fromkeys(columns, float(generator.choice([-1, 1])))), depth=depth)
    write_first_phase(directory, model)
    scorer, stats = Scorer(features, table, reranker=directory), stats_of(generator, table.length)
    rows = generator.permutation(table.length)[:count]
    sources = source_lists(random_sources(generator, len(rows)))
    required = None if required_share is None else generator.random(count) < required_share
    ones = np.ones(1, np.float32)
    query = UserQuery(np.array([4]), ones, np.array([7]), ones, ones, ones > 0, np.full(1, -1, np.int16))
    every = scorer.score(query, rows, stats)
    scores = scorer.score(query, rows, stats, sources, required)
    assert every.selected is None
    assert len(scores.values) == count
    if count <= depth:
        assert scores.selected is None
        np.testing.assert_array_equal(scores.values, every.values)
        return
    selected, first = scores.selected, FirstPhaseScorer(model).score(sources, rows, stats)
    assert selected is not None
    assert (np.diff(selected) > 0).all()
    is_selected = np.isin(np.arange(count), selected)
    free = is_selected if required is None else is_selected & ~required
    if required is not None:
        assert is_selected[required].all()
    assert np.count_nonzero(free) <= depth <= len(selected)
    least = np.sort(first)[-depth]
    assert is_selected[first > least].all()
    assert (first[free] >= least).all()
    # The number that the required ones add is that of those outside the best.
    outside = 0 if required is None else np.count_nonzero(required & (first < least))
    assert depth + outside <= len(selected)
    np.testing.assert_allclose(scores.values[selected], every.values[selected], rtol=1e-5, atol=1e-6)
    for name, values in scores.components.items():
        np.testing.assert_allclose(values, every.components[name][selected], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores.values, with_others(scores.values[selected], selected, first))
    assert (scores.values[~is_selected] < scores.values[selected].min()).all()


def test_nothing_changes_without_sources_or_without_a_first_phase(
    shop: tuple[Features, ItemTable, Path], tmp_path: Path
) -> None:
    features, table, directory = shop
    stats = item_stats(EventState({"purchase": 1.0}), table, NOW)
    nobody = np.empty(0, np.float32)
    query = UserQuery(nobody.astype(int), nobody, nobody.astype(int), nobody, nobody, nobody > 0, nobody)
    rows = np.arange(table.length)
    sources = source_lists(random_sources(np.random.default_rng(3), table.length))
    write_first_phase(directory, weights_of(popular=1.0))
    (tmp_path / "choice.json").write_text((directory / "choice.json").read_text())
    both = Scorer(features, table, reranker=directory)
    only = Scorer(features, table, reranker=tmp_path)
    expected = both.score(query, rows, stats)
    assert expected.selected is None
    unchanged = only.score(query, rows, stats, sources, np.ones(len(rows), bool))
    assert unchanged.selected is None
    np.testing.assert_array_equal(unchanged.values, expected.values)
    selected = both.score(query, rows, stats, sources).selected
    assert selected is not None
    assert len(selected) == 4
