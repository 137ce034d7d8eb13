"""The CTR head scores alone as in a batch, serves as trained, and reads nothing of the days it predicts."""

import zlib
from dataclasses import replace
from pathlib import Path

import lightgbm
import numpy as np
import pytest
import torch

from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.core.errors import FailedPrecondition
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.models.attribute_vectors import ATTRIBUTES, DIMENSION
from services.ranking.models.co_occurrence import GraphView, ItemGraph
from services.ranking.models.ctr import MAX_HISTORY, CtrModel, CtrSettings, write_ctr
from services.ranking.models.ctr_head import CtrHead, CtrItems
from services.ranking.models.ctr_head import item_vectors as item_vectors_of
from services.ranking.models.scaler import FeatureScaler
from services.ranking.scoring.scorer import Scorer
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import DAY, item_stats
from services.ranking.state.user_query import UserQuery
from tests.support import shops
from tests.support.prediction_models import served_logits
from training.core.metrics import classification_metrics
from training.data.config import RankingTraining, ShopConfig
from training.evaluation import evaluate
from training.examples.feature_rows import FeatureRows
from training.examples.queries import EvalQuery
from training.examples.ranking_groups import RankingGroups
from training.examples.training_set import TrainingSet
from training.ranking.ctr import calibrate, ctr_settings, fit_ctr, out_of_fold_logits, score
from training.ranking.fit_models import CtrHeads, FittedModels, fit_models
from training.ranking.reranker import fit_reranker

pytestmark = pytest.mark.usefixtures("single_thread")

NAMES = ("popular_7d", "price", "noise", "age_days")
ITEMS, TEXT, IMAGE = 300, 6, 8


def unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True), np.float32)


def item_vectors() -> dict[str, np.ndarray]:
    """Every fifth item has no photograph, item 0 has no vector at all."""
    choice = np.random.default_rng(0)
    text, image = (unit(choice.standard_normal((ITEMS, size))) for size in (TEXT, IMAGE))
    image[::5] = 0
    text[0] = 0
    return {"text": text, "image": image}


def user(history: np.ndarray, session: np.ndarray) -> UserQuery:
    return UserQuery(
        session=session,
        session_weights=np.ones(len(session), np.float32),
        history=history,
        ages=np.linspace(1, 20, len(history), dtype=np.float32),
        weights=np.full(len(history), 0.5, np.float32),
        purchased=np.ones(len(history), bool),
        channels=np.full(len(history), -1, np.int16),
    )


def taste_rows(users: int, vectors: dict[str, np.ndarray], seed: int, *, size: int = 20) -> FeatureRows:
    """People whose past is near a taste of theirs; of the candidates they like the nearest quarter."""
    choice = np.random.default_rng(seed)
    queries, items, labels = [], [], []
    for _ in range(users):
        near = vectors["text"] @ unit(choice.standard_normal(TEXT))
        past = choice.permutation(np.argsort(-near)[:20])[:8]
        candidates = choice.permutation(np.setdiff1d(np.arange(1, ITEMS), past))[:size]
        queries.append(user(past[2:], past[:2]))
        items.append(candidates)
        labels.append(near[candidates] > np.quantile(near[candidates], 0.75))
    return rows_of(queries, items, labels, seed)


def rows_of(
    queries: list[UserQuery], items: list[np.ndarray], labels: list[np.ndarray], seed: int
) -> FeatureRows:
    flat = np.concatenate(items).astype(np.int64)
    matrix = np.random.default_rng(seed).exponential(5, (len(flat), len(NAMES))).astype(np.float32)
    label = np.concatenate(labels).astype(np.float32)
    none = np.empty(0, np.int64)
    return FeatureRows(
        names=NAMES,
        matrix=matrix,
        first_phase=np.empty((len(flat), 0), np.float32),
        items=flat,
        sources=np.zeros(len(flat), np.int64),
        label=label,
        weight=np.ones(len(flat), np.float32),
        no_interactions=np.zeros(len(flat), bool),
        size=np.array([len(i) for i in items], np.int64),
        eval_queries=[EvalQuery(f"p{at}", at // 10 * DAY + at, (), none) for at in range(len(queries))],
        user_queries=queries,
        targets=np.ones(len(queries), np.int64),
    )


def odd_rows() -> FeatureRows:
    """Nobody, a past longer than is read, a session alone; 1 to 60 candidates, one that has no vector."""
    choice = np.random.default_rng(3)
    none = np.empty(0, np.int64)
    long = choice.integers(0, ITEMS, MAX_HISTORY + 30)
    queries = [user(none, none), user(long, long[:70]), user(none, long[:3]), user(long[:1], none)]
    sizes = (7, 60, 1, 20)
    items = [np.concatenate([[0], choice.permutation(np.arange(1, ITEMS))[: size - 1]]) for size in sizes]
    return rows_of(queries, items, [np.arange(size) % 3 == 0 for size in sizes], seed=4)


def random_head(vectors: dict[str, np.ndarray], rows: FeatureRows, **more: object) -> CtrModel:
    torch.manual_seed(5)
    settings = replace(ctr_settings(rows, vectors, ("click", "purchase"), shown=True), **more)  # type: ignore[arg-type]
    return CtrModel(settings).eval()


@pytest.mark.parametrize("plain", [False, True])
def test_scores_are_the_same_alone_in_a_batch_and_served(*, plain: bool, tmp_path: Path) -> None:
    vectors, rows = item_vectors(), odd_rows()
    model = random_head(vectors, rows, plain=plain, slope=(2.0, 0.5), offset=(-1.0, 0.25))
    together = score(model, rows, vectors)
    write_ctr(tmp_path, model)
    head = CtrHead(tmp_path, ("other", *reversed(NAMES)))
    group, matrix = rows.group(), np.concatenate([rows.matrix, np.full((len(rows.items), 1), np.nan)], 1)
    for at, query in enumerate(rows.user_queries):
        in_group = group == at
        alone = score(model, rows.take(np.array([at])), vectors)
        np.testing.assert_allclose(together[in_group], alone, atol=1e-5)
        logits = served_logits(head, query, rows.items[in_group], matrix[in_group][:, ::-1], vectors)
        np.testing.assert_allclose(together[in_group], logits, atol=1e-5)
        order = np.random.default_rng(at).permutation(int(in_group.sum()))
        reordered_logits = served_logits(
            head, query, rows.items[in_group][order], matrix[in_group][order][:, ::-1], vectors
        )
        np.testing.assert_allclose(reordered_logits, logits[order], atol=1e-5)
        probabilities = head.probabilities(logits)
        assert list(probabilities) == ["click", "purchase"]
        np.testing.assert_allclose(
            probabilities["click"], 1 / (1 + np.exp(1 - 2.0 * logits[:, 0])), rtol=1e-4
        )
        np.testing.assert_allclose(
            probabilities["purchase"], 1 / (1 + np.exp(-0.25 - 0.5 * logits[:, 1])), rtol=1e-4
        )
    assert together.std() > 1e-3


def test_projections_follow_the_items(tmp_path: Path) -> None:
    vectors = item_vectors()
    write_ctr(tmp_path, random_head(vectors, odd_rows()))
    head, table = CtrHead(tmp_path, NAMES), ItemTable()
    projections = CtrItems(head, table)
    for end, changed in ((5, 0), (40, 3), (ITEMS, 20)):
        # Some items come, and others get the vectors of another item.
        numbers = [*range(table.length, end), *range(changed)]
        sources = [*range(table.length, end), *range(end - changed, end)]
        table.apply(
            Change(
                item_hash(f"i{n}"),
                end,
                Item(f"i{n}"),
                shops.UNTIL,
                {s: v[of] for s, v in vectors.items() if v[of].any()},
            )
            for n, of in zip(numbers, sources, strict=True)
        )
        rows = np.arange(table.length)[::-1]
        fresh = head.projections(item_vectors_of(table, rows, head.settings))
        np.testing.assert_allclose(projections.of(rows), fresh, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_a_scorer_gives_the_head_the_history_that_it_reads(*, plain: bool, tmp_path: Path) -> None:
    """Users with sessions and histories around the limits, and items and users without vectors."""
    vectors, choice = item_vectors(), np.random.default_rng(6)
    present = {space: np.asarray(values.any(1)) for space, values in vectors.items()}
    # Every third item has no color, and every other has two.
    colors = [("red", "blue", "green")[n % 3 : n % 3 + 1 + n % 2] if n % 3 else () for n in range(ITEMS)]
    attributes = [(Attribute("color", texts),) if texts else () for texts in colors]
    items = [Item(f"i{n}", price=float(n + 1), attributes=attributes[n]) for n in range(ITEMS)]
    table = ItemTable.of(items, vectors, present, [shops.UNTIL] * ITEMS)
    stats = item_stats(EventState({"purchase": 1.0}), table, 30_000 * DAY)
    features = Features(RankingContext(table, GraphView(ItemGraph.empty(), table)))
    torch.manual_seed(7)
    sizes, scales = {"text": TEXT, "image": IMAGE, ATTRIBUTES: DIMENSION}, FeatureScaler.plain(2)
    columns = ("price", "text_session")
    shape = CtrSettings(sizes, ("click",), columns, scales, plain=plain, attributes=("color",))
    write_ctr(tmp_path, CtrModel(shape))
    head, scorer = CtrHead(tmp_path, features.names), Scorer(features, table, tmp_path)
    stored = {space: table.vectors(space)[0].astype(np.float32) for space in vectors}  # type: ignore[index]
    stored[ATTRIBUTES] = np.zeros((ITEMS, DIMENSION), np.float32)
    for row, texts in enumerate(colors):
        for text in texts:
            stored[ATTRIBUTES][row, zlib.crc32(f"color={text}".encode()) % DIMENSION] = len(texts) ** -0.5
    for session, history in ((0, 0), (1, 0), (0, 1), (3, 40), (49, 60), (50, 60), (51, 0), (120, 200)):
        query = user(choice.integers(0, ITEMS, history), choice.integers(0, ITEMS, session))
        rows = choice.permutation(ITEMS)[:40]
        matrix = features.matrix(query, rows, stats)
        expected = served_logits(head, query, rows, matrix, stored)[:, 0]
        logits = scorer.score(query, rows, stats).components["ctr_click"]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert np.ptp(logits) > 1e-3


def test_unknown_values_never_give_a_score_of_nan(tmp_path: Path) -> None:
    vectors, rows = item_vectors(), odd_rows()
    matrix = rows.matrix.copy()
    matrix[::2, 0], matrix[1::3, 1], matrix[:, 3] = np.nan, np.inf, np.nan
    unknown = replace(rows, matrix=matrix)
    finite = replace(rows, matrix=np.where(np.isfinite(matrix), matrix, np.nan))
    shape = ctr_settings(finite, vectors, ("click", "purchase"), shown=True)
    assert np.isfinite([*shape.scales.unit, *shape.scales.mean, *shape.scales.scale]).all()
    labels = np.stack([rows.label, 1 - rows.label], 1)
    model = fit_ctr(shape, finite, labels, vectors, epochs=2)
    assert np.isfinite(score(model, unknown, vectors)).all()
    unfit = CtrModel(replace(shape, shown=False))
    write_ctr(tmp_path, unfit)
    assert CtrHead(tmp_path, NAMES).probabilities(np.zeros((3, 2), np.float32)) == {}


def test_a_head_that_reads_a_missing_column_is_refused(tmp_path: Path) -> None:
    write_ctr(tmp_path, random_head(item_vectors(), odd_rows()))
    with pytest.raises(FailedPrecondition, match="price"):
        CtrHead(tmp_path, ("popular_7d", "noise", "age_days"))


def test_a_taste_is_learned_and_generalizes_to_new_users() -> None:
    vectors = item_vectors()
    rows, unseen = taste_rows(192, vectors, seed=1), taste_rows(50, vectors, seed=2)
    aucs = {}
    for plain in (False, True):
        shape = ctr_settings(rows, vectors, ("purchase",), shown=False, plain=plain)
        model = fit_ctr(shape, rows, rows.label[:, None], vectors, epochs=12)
        logits = score(model, unseen, vectors)[:, 0].astype(np.float64)
        aucs[plain] = classification_metrics(1 / (1 + np.exp(-logits)), unseen.label)["auc"]
    assert aucs[False] > 0.8
    assert aucs[False] > aucs[True] + 0.1


def test_the_same_seed_gives_the_same_head() -> None:
    vectors = item_vectors()
    rows = taste_rows(70, vectors, seed=1)
    shape = ctr_settings(rows, vectors, ("purchase",), shown=False)
    one, two = (score(fit_ctr(shape, rows, rows.label[:, None], vectors, 2), rows, vectors) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    other = score(fit_ctr(shape, rows, rows.label[:, None], vectors, 2, seed=1), rows, vectors)
    assert not np.array_equal(one, other)


def test_out_of_fold_logits_ignore_labels_of_their_own_day_and_later() -> None:
    vectors = item_vectors()
    rows, others = taste_rows(40, vectors, seed=1), taste_rows(40, vectors, seed=2)
    others = replace(others, eval_queries=[replace(q, user_id=f"x{q.user_id}") for q in others.eval_queries])
    shape = ctr_settings(rows, vectors, ("purchase",), shown=False)
    labels, part = rows.label[:, None], rows.group() // 10
    before = out_of_fold_logits(shape, rows, labels, [rows, others], vectors, epochs=2)
    for scores in before:
        assert np.isnan(scores[part == 0]).all()
        assert np.isfinite(scores[part > 0]).all()
    for day in range(4):
        flipped = np.where((part == day)[:, None], 1 - labels, labels)
        after = out_of_fold_logits(shape, rows, flipped, [rows, others], vectors, epochs=2)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old[part <= day], new[part <= day])
            for later in range(day + 1, 4):
                assert not np.array_equal(old[part == later], new[part == later])


def test_folds_never_split_a_day() -> None:
    """The people of a day share its fashions: a head that knows some of them knows too much of the others."""
    vectors = item_vectors()
    rows = taste_rows(40, vectors, seed=1)
    shape = ctr_settings(rows, vectors, ("purchase",), shown=False)
    for days in (2, 3):
        moments = [at * days * DAY // 40 for at in range(40)]
        of_days = replace(
            rows,
            eval_queries=[replace(q, as_of=at) for q, at in zip(rows.eval_queries, moments, strict=True)],
        )
        (scores,) = out_of_fold_logits(shape, of_days, rows.label[:, None], [of_days], vectors, epochs=1)
        day = (np.array(moments) // DAY)[rows.group()]
        np.testing.assert_array_equal(np.isnan(scores[:, 0]), day == 0)


def test_within_one_day_folds_never_split_a_user() -> None:
    vectors = item_vectors()
    rows = taste_rows(40, vectors, seed=1)
    rows = replace(rows, eval_queries=[replace(q, as_of=q.as_of % DAY) for q in rows.eval_queries])
    shape = ctr_settings(rows, vectors, ("purchase",), shown=False)
    labels = rows.label[:, None]
    (before,) = out_of_fold_logits(shape, rows, labels, [rows], vectors, epochs=2)
    group = rows.group()
    for who in (0, 7):
        of_user = group == who
        flipped = labels.copy()
        flipped[of_user] = 1 - flipped[of_user]
        (after,) = out_of_fold_logits(shape, rows, flipped, [rows], vectors, epochs=2)
        np.testing.assert_array_equal(before[of_user], after[of_user])
        assert not np.array_equal(before[~of_user], after[~of_user])
    same = replace(rows, eval_queries=[replace(q, user_id="ann") for q in rows.eval_queries])
    assert np.isnan(out_of_fold_logits(shape, same, labels, [same], vectors, epochs=1)[0]).all()


def test_a_training_set_before_the_first_query_is_empty() -> None:
    rows = taste_rows(5, item_vectors(), seed=1)
    training_set = TrainingSet(
        rows, rows, rows.label[:, None], positions(rows), ["purchase"], has_impressions=False
    )
    assert [q.as_of for q in training_set.before(3).rows.eval_queries] == [0, 1, 2]
    nothing = training_set.before(0)
    assert (len(nothing.rows.size), len(nothing.ctr_rows.items), len(nothing.labels)) == (0, 0, 0)


def test_a_sample_of_a_training_set_keeps_labels_with_their_rows() -> None:
    vectors = item_vectors()
    rows, pages = taste_rows(9, vectors, seed=1), taste_rows(6, vectors, seed=2, size=4)
    marks = np.arange(len(pages.items), dtype=np.float32)[:, None]
    some = TrainingSet(rows, pages, marks, positions(pages), ["click"], has_impressions=True).sample(4)
    assert (len(some.rows.size), len(some.ctr_rows.size)) == (4, 4)
    sample_rows = some.labels[:, 0].astype(int)
    np.testing.assert_array_equal(pages.matrix[sample_rows], some.ctr_rows.matrix)
    np.testing.assert_array_equal(positions(pages)[sample_rows], some.positions)
    assert (np.diff(sample_rows) > 0).all()
    alike = TrainingSet(
        rows, rows, rows.label[:, None], positions(rows), ["click"], has_impressions=False
    ).sample(4)
    np.testing.assert_array_equal(alike.rows.matrix, alike.ctr_rows.matrix)
    np.testing.assert_array_equal(alike.labels[:, 0], alike.ctr_rows.label)
    assert (
        len(
            TrainingSet(rows, rows, rows.label[:, None], positions(rows), ["click"], has_impressions=False)
            .sample(99)
            .rows.size
        )
        == 9
    )


def plain_rows(days: list[int]) -> FeatureRows:
    """A row for each question, one on each of `days`."""
    nobody = user(np.empty(0, np.int64), np.empty(0, np.int64))
    rows = rows_of([nobody] * len(days), [np.zeros(1)] * len(days), [np.zeros(1)] * len(days), seed=0)
    queries = [replace(q, as_of=day * DAY) for q, day in zip(rows.eval_queries, days, strict=True)]
    return replace(rows, eval_queries=queries)


def test_calibration_corrects_an_overconfident_head() -> None:
    choice = np.random.default_rng(0)
    truth = choice.normal(-1, 1.5, (8000, 2))
    labels = (choice.random((8000, 2)) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    logits = (4 * truth + [2.0, -3.0]).astype(np.float32)
    shape = CtrSettings({"text": 2}, ("click", "purchase"), (), FeatureScaler.plain(0), shown=True)
    early = choice.normal(0, 1, (1000, 2)).astype(np.float32)  # of heads that knew little; they do not count
    early[:10] = np.nan
    rows = plain_rows([0] * 1000 + [1] * 4000)
    calibration = calibrate(
        shape, rows, np.concatenate([early, logits[:4000]]), np.concatenate([early > 0, labels[:4000]])
    )
    np.testing.assert_allclose(calibration.slope, 0.25, atol=0.03)
    for at in range(2):
        late, label = logits[4000:, at].astype(np.float64), labels[4000:, at]
        raw = classification_metrics(1 / (1 + np.exp(-late)), label)
        probability = 1 / (1 + np.exp(-(calibration.slope[at] * late + calibration.offset[at])))
        assert raw["ece"] > 0.1
        assert classification_metrics(probability, label)["ece"] < 0.03


def test_rows_without_interactions_do_not_calibrate() -> None:
    generator = np.random.default_rng(0)
    shape = CtrSettings({"text": 2}, ("click",), (), FeatureScaler.plain(0), shown=True)
    logits = generator.normal(0, 2, (400, 1)).astype(np.float32)
    label = (generator.random((400, 1)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    rows, no_interactions = plain_rows([0] * 400), generator.random(400) < 0.5
    spoilt = np.where(no_interactions[:, None], -logits, logits)
    calibration = calibrate(shape, replace(rows, no_interactions=no_interactions), spoilt, label)
    assert calibration.slope[0] == pytest.approx(1, abs=0.35)
    assert calibrate(shape, rows, spoilt, label).slope[0] < 0.5


def test_only_columns_that_vary_within_a_query_are_important() -> None:
    generator = np.random.default_rng(0)
    rows = taste_rows(150, item_vectors(), seed=1)
    matrix = generator.random((len(rows.items), 3)).astype(np.float32)
    matrix[:, 2] = rows.group() % 7  # the same for a whole question
    label = (matrix[:, 0] > 0.7).astype(np.float32)
    when = np.array([q.as_of for q in rows.eval_queries])
    groups = RankingGroups(matrix, label, rows.weight, rows.size, when)
    model = fit_reranker(groups, ("a", "b", "person"), 20).model
    models = FittedModels(None, model, np.arange(3))
    importance = evaluate._importance(models, rows, matrix)
    assert importance["trees"] == (model.trees.num_trees() if model.trees else 0)
    share = importance["importance"]
    assert sum(share.values()) == pytest.approx(1)
    assert share["a"] > 0.8
    assert share["a"] > 10 * max(share["b"], share["person"])
    nothing = evaluate._importance(models, rows.take(np.empty(0, np.int64)), matrix[:0])
    assert nothing["importance"] == {}


def test_one_class_calibrates_to_finite_values_and_no_logits_to_identity() -> None:
    shape = CtrSettings({"text": 2}, ("click",), (), FeatureScaler.plain(0), shown=True)
    rows, logits = plain_rows([0] * 50), np.linspace(-2, 2, 50, dtype=np.float32)[:, None]
    calibration = calibrate(shape, rows, logits, np.zeros((50, 1), np.float32))
    assert np.isfinite([*calibration.slope, *calibration.offset]).all()
    unknown = calibrate(shape, rows, np.full((50, 1), np.nan, np.float32), np.zeros((50, 1), np.float32))
    assert (unknown.slope, unknown.offset) == ((1.0,), (0.0,))


def impression_training_set(lists: int, vectors: dict[str, np.ndarray]) -> TrainingSet:
    queries, pages = taste_rows(lists, vectors, seed=1), taste_rows(lists, vectors, seed=2, size=6)
    labels = np.stack([pages.label, np.zeros(len(pages.items), np.float32)], axis=1)
    types = ["click", "purchase"]
    return TrainingSet(queries, pages, labels, positions(pages), types, has_impressions=True)


def positions(rows: FeatureRows) -> np.ndarray:
    """The places of rows that are pages."""
    start = np.cumsum(rows.size) - rows.size
    return np.asarray(np.arange(len(rows.items)) - np.repeat(start, rows.size) + 1)


def test_a_head_that_does_not_improve_ranking_is_no_column() -> None:
    vectors = item_vectors()
    training_set = impression_training_set(60, vectors)  # too few for it to learn anything
    settings = ShopConfig(ranking=RankingTraining(trees=20, ctr_epochs=1))
    models = fit_models(training_set, settings, vectors)
    assert models.model.choice.columns == list(NAMES)
    assert models.head is not None
    rows = replace(training_set.rows, label=np.random.default_rng(5).permutation(training_set.rows.label))
    alone = TrainingSet(rows, rows, rows.label[:, None], positions(rows), ["click"], has_impressions=False)
    silent = fit_models(alone, settings, vectors)
    assert (silent.head, silent.model.features) == (None, tuple(NAMES))
    assert np.isfinite([models.score(rows, vectors), silent.score(rows, vectors)]).all()


@pytest.mark.parametrize("pages", [60, 400])
def test_models_without_a_part_keep_the_decisions(pages: int) -> None:
    vectors = item_vectors()
    training_set = impression_training_set(pages, vectors)
    settings = ShopConfig(ranking=RankingTraining(trees=20, ctr_epochs=1))
    whole = fit_models(training_set, settings, vectors)
    assert ("ctr_click" in whole.model.choice.columns) == (pages == 400)
    data = lightgbm.Dataset(training_set.rows.matrix, training_set.rows.label > 0)
    trees = lightgbm.train({"objective": "binary", "verbosity": -1, "min_data_in_leaf": 1}, data, 7)
    like = replace(whole, model=replace(whole.model, trees=trees))  # on their own, neither would have trees
    ablated = fit_models(training_set, settings, vectors, ("text",), like=like)
    assert ablated.model.tree_count == (7 if pages == 400 else 1)  # sixty pages have no leaf of 300 rows
    assert ablated.model.choice.columns == whole.model.choice.columns


def test_a_shop_with_impressions_trains_all_models() -> None:
    vectors = item_vectors()
    training_set = impression_training_set(400, vectors)
    rows, settings = training_set.rows, ShopConfig(ranking=RankingTraining(trees=20, ctr_epochs=3))
    whole, blind = (fit_models(training_set, settings, vectors, without) for without in ((), ("ctr",)))
    assert whole.model.choice.columns == [*NAMES, "ctr_click", "ctr_purchase"]
    assert whole.columns.tolist() == list(range(len(NAMES) + 2))
    assert whole.head is not None
    assert whole.head.settings.slope[0] > 0
    assert np.isfinite([*whole.head.settings.slope, *whole.head.settings.offset]).all()
    assert (blind.head, blind.model.choice.columns) == (None, list(NAMES))
    heads = CtrHeads(training_set, 3)
    fit_models(training_set, settings, vectors, ("text",), heads)
    for _ in range(2):  # as fitted anew, and as it was kept
        again = fit_models(training_set, settings, vectors, (), heads)
        np.testing.assert_array_equal(again.score(rows, vectors), whole.score(rows, vectors))
    alone = replace(
        training_set,
        has_impressions=False,
        ctr_rows=rows,
        labels=rows.label[:, None],
        positions=positions(rows),
        types=["click"],
    )
    unseen = fit_models(alone, settings, vectors)
    fresh = taste_rows(20, vectors, seed=3)
    one, other = (model.score(fresh, vectors) for model in (whole, unseen))
    assert np.isfinite([one, other]).all()
    assert not np.allclose(one, other)


def test_the_effect_of_positions_is_not_taken_for_a_taste() -> None:
    """What stands first is clicked, whatever it is: a head that knows the positions has nothing to learn."""
    generator, none = np.random.default_rng(8), np.empty(0, np.int64)
    vectors = item_vectors()
    first = generator.integers(1, ITEMS // 2, 400)
    others = generator.integers(ITEMS // 2, ITEMS, (400, 4))
    items = [np.append(one, rest) for one, rest in zip(first, others, strict=True)]
    rows = rows_of([user(none, none)] * 400, items, [np.arange(5) == 0] * 400, seed=9)
    rows = replace(rows, matrix=np.zeros_like(rows.matrix))
    labels = np.zeros((2000, 1), np.float32)
    clicked = generator.random(2000) < np.tile([0.8, 0.1, 0.1, 0.1, 0.1], 400)
    labels[:, 0] = clicked
    shape = ctr_settings(rows, vectors, ("click",), shown=True)
    gaps = []
    for positions in (None, np.tile(np.arange(1, 6), 400)):
        logit = score(fit_ctr(shape, rows, labels, vectors, 12, positions=positions), rows, vectors)[:, 0]
        gaps.append(logit[::5].mean() - np.delete(logit, np.s_[::5]).mean())
    assert gaps[1] < 0.5 * gaps[0]
