"""Training rows for the rankers contain no information from the future."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.catalog.items import item_hash
from services.ranking.models.baseline_scorer import baseline_scores
from services.ranking.models.co_occurrence import ItemGraph
from tests.support.histories import (
    DAYS,
    FIRST,
    GRANULARITIES,
    HOUR,
    WEIGHTS,
    Granularity,
    Interaction,
    assert_same_input,
    fit_graph,
    make_items,
    make_queries,
    make_shop,
    random_interactions,
    random_vectors,
    shop_config,
    training_input,
)
from tests.support.models import make_text_encoder
from training import pipeline
from training.core.decisions import Decision
from training.core.stages import Stages
from training.data.dataset import ShopData
from training.data.encoder_settings import TextTraining
from training.encoders import fit_encoders
from training.encoders.fit_encoders import FittedEncoders
from training.evaluation import evaluate
from training.evaluation.page_likelihood import BUNDLE
from training.examples.feature_rows import evaluation_rows, page_rows, training_rows
from training.examples.point_in_time import PointInTime
from training.examples.queries import DAY, EvalQuery, make_eval_queries
from training.examples.training_set import TrainingSet
from training.examples.windows import choose_windows


def learned_past(shop: ShopData, root: Path) -> tuple[PointInTime, FittedEncoders, ItemGraph]:
    """What the pipeline replays the past with, and the graph it publishes."""
    stages, windows = Stages(root), choose_windows(shop.events, shop.settings)
    until = windows.since
    encoders = fit_encoders.encode(stages, shop, shop.settings, until)
    graphs = pipeline._graph_stage(stages, shop, encoders, windows)
    by_day = {int(path.name): ItemGraph.load(path) for path in graphs.iterdir() if path.name.isdigit()}
    walks = pipeline._sequence_stage(stages, shop, shop.settings, encoders, until)
    past = PointInTime(shop, by_day, encoders.fold, encoders.present, walks / "before")
    return past, encoders, ItemGraph.load(graphs / "final")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_planted_basket_does_not_move_its_own_rows(
    granularity: Granularity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept(part: str, baseline: str, measure: str, *_: np.ndarray) -> Decision:
        return Decision(part, baseline, measure, accepted=True, queries=0, gain=None)

    # So few baskets would not decide for a projection.
    monkeypatch.setattr(fit_encoders, "decide", accept)
    base = make_text_encoder(tmp_path / "base")
    text = TextTraining(base=str(base), steps=2, batch=8, projection_steps=5, max_tokens=8)
    settings = shop_config(granularity, text=text)
    items, interactions = make_items(30), random_interactions(30, seed=3, unknown_items=False)
    start = (FIRST + DAYS - 2) * DAY + 5 * HOUR
    item_ids = {interaction.item for interaction in interactions}
    never = [item.id for item in items if item.id not in item_ids]
    once = sorted(item_ids)[0]
    own_items = [
        interaction
        for interaction in interactions
        if interaction.user != "p0" or interaction.time // DAY != FIRST + DAYS - 2
    ]
    basket = [
        Interaction("p0", item, "purchase", start + n, 7.0) for n, item in enumerate((once, *never[:2]))
    ]
    without, whole = make_shop(items, own_items, settings), make_shop(items, [*own_items, *basket], settings)
    queries = make_eval_queries(whole.events, WEIGHTS, settings.targets, (FIRST + DAYS - 3) * DAY)
    own_queries = [q for q in queries if q.user_id == "p0" and q.as_of // DAY == FIRST + DAYS - 2]
    assert len(own_queries) == 1
    (before, fold, plain), (after, tuned, after_rows) = (
        learned_past(shop, tmp_path / name) for name, shop in (("one", without), ("other", whole))
    )
    assert_same_input(training_input(before, own_queries[0]), training_input(after, own_queries[0]))
    every = np.ones(len(items), bool)
    one, other = (evaluation_rows(past, own_queries, every) for past in (before, after))
    np.testing.assert_array_equal(one.items, other.items)
    np.testing.assert_array_equal(one.matrix, other.matrix)
    assert np.isfinite(one.matrix[:, one.names.index("sequence_next")]).any()
    np.testing.assert_array_equal(fold.fold["text"], tuned.fold["text"])
    # What is published does know it.
    assert not np.array_equal(fold.final["text"], tuned.final["text"])
    size = {
        name: len(graph.relations["baskets"].weights) for name, graph in (("a", plain), ("b", after_rows))
    }
    assert size["b"] > size["a"]


def graphs_by_day(
    shop: ShopData, vectors: dict[str, np.ndarray], present: dict[str, np.ndarray]
) -> PointInTime:
    """The past through the pipeline's own graphs, with these vectors."""
    encoders = FittedEncoders(base=vectors, present=present)
    with TemporaryDirectory() as root:
        graphs = pipeline._graph_stage(
            Stages(Path(root)), shop, encoders, choose_windows(shop.events, shop.settings)
        )
        by_day = {int(path.name): ItemGraph.load(path) for path in graphs.iterdir() if path.name.isdigit()}
    return PointInTime(shop, by_day, vectors, present)


@given(st.integers(0, 10_000), st.integers(0, 3 * 24 - 1), st.sampled_from(GRANULARITIES))
@hypothesis_settings(deadline=None, max_examples=10)
def test_later_events_change_nothing(seed: int, hour: int, granularity: Granularity) -> None:
    items, interactions = make_items(30), random_interactions(30, seed=seed % 5, unknown_items=False)
    as_of = (FIRST + DAYS - 3) * DAY + hour * HOUR
    cut = as_of - as_of % DAY if granularity == "day" else as_of
    choice = np.random.default_rng(seed)

    def another(interaction: Interaction) -> Interaction:
        return interaction._replace(item=f"i{choice.integers(30)}", user=f"p{choice.integers(10)}", price=1.0)

    last = Interaction("p9", "i0", "purchase", (FIRST + DAYS) * DAY - 1)
    everyone = [Interaction(f"p{n}", f"i{n}", "click", FIRST * DAY) for n in range(10)]
    other = [another(interaction) if interaction.time >= cut else interaction for interaction in interactions]
    other.append(Interaction("p0", "i3", "purchase", (FIRST + DAYS) * DAY - 2))
    session = ((item_hash("i1"), "click"), (item_hash("i2"), "purchase"))
    vectors, present = random_vectors(30)
    matrices = []
    for history in (interactions, other):
        shop = make_shop(items, [*everyone, *history, last], shop_config(granularity))
        past = graphs_by_day(shop, vectors, present)
        none = np.empty(0, np.int64)
        matrices.append(
            [training_input(past, EvalQuery(f"p{n}", as_of, session[: n % 3], none)) for n in range(4)]
        )
    for one, two in zip(*matrices, strict=True):
        assert one.sources == two.sources
        np.testing.assert_array_equal(one.matrix, two.matrix)


@pytest.mark.parametrize("with_prices", [True, False])
def test_a_row_without_interactions_equals_that_of_an_item_without_events(*, with_prices: bool) -> None:
    settings = shop_config("hour")
    items, interactions = (
        make_items(30, priced=with_prices),
        random_interactions(30, seed=4, unknown_items=False),
    )
    vectors, present = random_vectors(30)
    as_of = (FIRST + DAYS) * DAY - HOUR

    def past_of(history: list[Interaction]) -> PointInTime:
        shop = make_shop(items, history, settings)
        graph = fit_graph(shop, vectors, present)
        return PointInTime(shop, dict.fromkeys(range(FIRST, FIRST + DAYS + 1), graph), vectors, present)

    whole = past_of(interactions)
    count = 0
    for user in ("p0", "p1", "p2"):
        question = EvalQuery(user, as_of, ((item_hash("i1"), "purchase"),), np.empty(0, np.int64))
        own_items = {interaction.item for interaction in interactions if interaction.user == user} | {"i1"}
        now, query = whole.stats_at(as_of), whole.query(question)
        features = whole.features(as_of)
        for row in (2, 9, 14, 20, 23):
            if items[row].id in own_items:
                continue
            count += 1
            rows = np.array([row])
            matrix = features.without_interactions(features.matrix(query, rows, now), rows, now)
            without = past_of(
                [interaction for interaction in interactions if interaction.item != items[row].id]
            )
            then, query_without = without.stats_at(as_of), without.query(question)
            expected = without.features(as_of).matrix(query_without, np.array([row]), then)
            for name, a, b in zip(whole.names, matrix[0], expected[0], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=f"{name} of {items[row].id}")
    assert count > 3


def test_targets_are_kept_and_sampled_negatives_are_weighted() -> None:
    items, sample_size = make_items(60), 11
    shop = make_shop(items, random_interactions(60, seed=5), shop_config("hour"))
    vectors, present = random_vectors(60)
    past = graphs_by_day(shop, vectors, present)
    queries = make_eval_queries(shop.events, WEIGHTS, ("click", "purchase"), (FIRST + DAYS - 3) * DAY)
    rows = training_rows(past, queries, sample_size, 0.1)
    assert rows is not None
    assert 0 < len(rows.eval_queries) <= len(queries)
    assert 0 < rows.no_interactions.mean() < 0.3
    query_keys = {(q.user_id, q.as_of) for q in rows.eval_queries}
    start = 0
    for question, size, count in zip(rows.eval_queries, rows.size.tolist(), rows.targets, strict=True):
        span = slice(start, start + size)
        start += size
        now, query = past.stats_at(question.as_of), past.query(question)
        has_events = ~np.isnan(now.age)
        every, _ = past.candidates(query, question.as_of, past.live(question.as_of) & has_events)
        items_of_query, label, weight = rows.items[span], rows.label[span] > 0, rows.weight[span]
        assert len(set(items_of_query.tolist())) == size
        assert set(items_of_query.tolist()) <= set(every.tolist())
        assert has_events[items_of_query].all()
        answer = past.table.rows(question.targets.tolist())
        assert count == len(answer)
        grade = dict(zip(answer.tolist(), question.grades.tolist(), strict=True))
        assert rows.label[span].tolist() == [grade.get(row, 0) for row in items_of_query.tolist()]
        assert set(items_of_query[label].tolist()) == set(answer.tolist()) & set(every.tolist())
        others = every[~np.isin(every, answer)]
        assert weight.sum() == pytest.approx(len(others) + label.sum(), rel=1e-5)
        is_sampled = ~label & (weight > 1)
        assert is_sampled.sum() <= sample_size - sample_size // 2
        score = baseline_scores(past.names, past.features(question.as_of).matrix(query, others, now))
        best = others[np.argsort(-score, kind="stable")[: sample_size // 2]]
        assert set(best.tolist()) <= set(items_of_query[weight == 1].tolist())
        # A row is the feature function's own, or the same without the item's behavior.
        matrix = past.features(question.as_of).matrix(query, items_of_query, now)
        is_hidden = rows.no_interactions[span]
        matrix[is_hidden] = past.features(question.as_of).without_interactions(
            matrix[is_hidden], items_of_query[is_hidden], now
        )
        np.testing.assert_allclose(rows.matrix[span], matrix, rtol=1e-5, atol=1e-6)
    assert set(rows.label.tolist()) == {0.0, 0.25, 1.0}
    missing_queries = [q for q in queries if (q.user_id, q.as_of) not in query_keys]
    for question in missing_queries:
        now, query = past.stats_at(question.as_of), past.query(question)
        every, _ = past.candidates(query, question.as_of, past.live(question.as_of) & ~np.isnan(now.age))
        assert not np.isin(past.table.rows(question.targets.tolist()), every).any()


def test_page_items_are_graded_by_their_strongest_interaction() -> None:
    shop = make_shop(make_items(20), random_interactions(20, seed=5), shop_config("hour"))
    past = graphs_by_day(shop, *random_vectors(20))
    moment = (FIRST + DAYS - 1) * DAY
    targets = np.array([item_hash(name) for name in ("i3", "unknown", "i0", "i7", "i1")], np.int64)
    page = EvalQuery("p1", moment, (), targets, positions=np.array([7, 8, 2, 3, 0], np.int32))
    interactions = np.array([[1, 0], [1, 1], [0, 0], [1, 1], [0, 1]], np.float32)
    graded_rows = page_rows(
        past,
        [page, replace(page, targets=targets[1:2], positions=page.positions[1:2])],
        [interactions, interactions[1:2]],
        np.array([0.25, 0.8]),
        0.1,
    )
    assert graded_rows is not None
    rows, labels, positions = graded_rows
    assert positions.tolist() == [7, 2, 3, 0]
    assert past.table.ids(rows.items) == ["i3", "i0", "i7", "i1"]
    np.testing.assert_array_equal(labels, interactions[[0, 2, 3, 4]])
    np.testing.assert_allclose(rows.label, [0.25, 0, 0.8, 0.8])
    assert rows.size.tolist() == [4]
    assert rows.weight.tolist() == [1] * 4
    now = past.stats_at(moment)
    features = past.features(moment)
    matrix = features.matrix(past.query(page), rows.items, now)
    blank = features.without_interactions(matrix, rows.items, now)
    np.testing.assert_array_equal(rows.matrix, np.where(rows.no_interactions[:, None], blank, matrix))


def test_session_items_are_no_rows_of_the_page() -> None:
    shop = make_shop(make_items(20), random_interactions(20, seed=5), shop_config("hour"))
    past = graphs_by_day(shop, *random_vectors(20))
    targets = np.array([item_hash(name) for name in ("i3", "i0", "i7")], np.int64)
    page = EvalQuery("p1", (FIRST + DAYS - 1) * DAY, ((item_hash("i0"), "click"),), targets)
    rows = page_rows(past, [page], [np.array([[0], [1], [1]], np.float32)], np.ones(1), 0.1)
    assert rows is not None
    assert past.table.ids(rows[0].items) == ["i3", "i7"]
    assert rows[2].tolist() == [0, 0]
    assert rows[1].ravel().tolist() == rows[0].label.tolist() == [0, 1]


def test_one_page_row_in_ten_has_no_interactions() -> None:
    shop = make_shop(make_items(20), random_interactions(20, seed=5), shop_config("hour"))
    past = graphs_by_day(shop, *random_vectors(20))
    targets = np.array([item_hash(f"i{n}") for n in range(20)], np.int64)
    page = EvalQuery("p1", (FIRST + DAYS - 1) * DAY, (), targets)
    rows = page_rows(past, [page] * 50, [np.zeros((20, 1), np.float32)] * 50, np.ones(1), 0.1)
    assert rows is not None
    assert 0.06 < rows[0].no_interactions.mean() < 0.14


def test_the_gain_on_logged_pages_is_split_by_known_users_and_popular_items() -> None:
    shop = make_shop(make_items(20), random_interactions(20, seed=5), shop_config("hour"))
    past = graphs_by_day(shop, *random_vectors(20))
    moment, place = (FIRST + DAYS - 1) * DAY, np.arange(1, 13, dtype=np.int32)
    targets = np.array([item_hash(f"i{n}") for n in range(12)], np.int64)
    pages = [EvalQuery(user, moment, (), targets, positions=place) for user in ["p1", "nobody", "nobody"] * 4]
    interactions = [np.eye(12, dtype=np.float32)[:, [n]] for n in range(12)]
    pages.append(pages[0])
    interactions.append(np.zeros((12, 1), np.float32))  # a page without a choice is left out
    page_data = page_rows(past, pages, interactions, np.ones(1), 0.1)
    assert page_data is not None
    late = TrainingSet(page_data[0], *page_data, ["click"], has_impressions=True)
    bands = dict(
        zip(past.table.rows(targets[:5].tolist()).tolist(), ["head"] * 2 + ["tail"] * 3, strict=True)
    )
    scores = {BUNDLE: np.random.default_rng(0).random(13 * 12)}
    slices = evaluate._logged_pages(scores, late, bands)["page_slices"]
    rows = {kind: {name: of["rows"] for name, of in by_slice.items()} for kind, by_slice in slices.items()}
    assert rows == {
        "position": {"1": 12, "2": 12, "3": 12, "4-5": 24, "6-10": 60, "11+": 24},
        "user": {"returning": 48, "new": 96},
        "item": {"head": 24, "tail": 36, "strict_cold": 84},
    }


@pytest.mark.parametrize("parts", [["text"], ["image"], ["text", "image"]])
def test_without_a_modality_its_neighbors_propose_nothing(parts: list[str]) -> None:
    shop = make_shop(make_items(90), random_interactions(90, seed=5), shop_config("hour"))
    vectors, present = random_vectors(90)
    present["text"][::2], vectors["text"][::2] = False, 0
    graph, days, every = fit_graph(shop, vectors, present), range(FIRST, FIRST + DAYS + 1), np.ones(90, bool)
    whole = PointInTime(shop, dict.fromkeys(days, graph), vectors, present)
    relations = {name: of for name, of in graph.relations.items() if name not in parts}
    parts_left = {space: values for space, values in vectors.items() if space not in parts}
    lacking = ItemGraph(graph.item_hashes, relations)
    without = PointInTime(shop, dict.fromkeys(days, lacking), parts_left, present)
    queries = make_queries(shop)
    rows, other = evaluation_rows(whole, queries, every), evaluation_rows(without, queries, every)
    is_proposed = evaluate.proposed_by_others(whole, rows, parts)
    start = np.cumsum(rows.size) - rows.size
    items_by_query = [
        rows.items[a : a + n][is_proposed[a : a + n]] for a, n in zip(start, rows.size, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(items_by_query), other.items)
    # Some had no other source than the graph.
    by_graph = rows.sources & (1 << whole.source_names.index("co_occurrence")) != 0
    assert (by_graph & ~is_proposed).any()


def test_without_engagements_there_are_no_training_rows() -> None:
    interactions = [Interaction("p0", f"i{n}", "purchase", FIRST * DAY + n) for n in range(4)]
    shop = make_shop(make_items(8), interactions, shop_config("hour"))
    vectors, present = random_vectors(8)
    graph = fit_graph(shop, vectors, present)
    past = PointInTime(shop, {FIRST: graph}, vectors, present)
    queries = make_eval_queries(shop.events, WEIGHTS, ("purchase",), FIRST * DAY)
    assert len(queries) == 1
    assert training_rows(past, queries, 10, 0.1) is None
    assert evaluation_rows(past, queries, np.zeros(8, bool)).size.tolist() == [0]
