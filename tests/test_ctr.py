"""CTR head, reranker, scorer: alone as in a batch, served as trained, blind to what they have to foretell."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import torch

from services.errors import FailedPrecondition
from services.item_table import ItemTable
from services.ranking.blend import blend
from services.ranking.ctr import MAX_HISTORY, CtrHead, CtrModel, CtrSettings, write_ctr
from services.ranking.features import Features, Query
from services.ranking.graph import GraphView
from services.ranking.moment import DAY, moment
from services.ranking.reranker import Reranker, write_reranker
from services.ranking.scoring import Scorer, ctr_column
from services.ranking.state import BehaviourState
from tests import shops
from training import reranker as reranker_fit
from training.ctr import calibrated, ctr_settings, fit_ctr, foretold, score
from training.lesson import Lesson
from training.metrics import classification_metrics
from training.queries import Question
from training.rankers import fit_models
from training.reranker import Lists, fit_reranker
from training.rows import Rows
from training.shop_settings import RankingTraining, ShopSettings

NAMES = ("popular_7d", "price", "noise", "age_days")
ITEMS, TEXT, IMAGE = 300, 6, 8


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True), np.float32)


def catalogue() -> dict[str, np.ndarray]:
    """Every fifth item has no photograph, item 0 has no vector at all."""
    choice = np.random.default_rng(0)
    text, image = (unit(choice.standard_normal((ITEMS, size))) for size in (TEXT, IMAGE))
    image[::5] = 0
    text[0] = 0
    return {"text": text, "image": image}


def person(history: np.ndarray, session: np.ndarray) -> Query:
    return Query(
        session=session,
        session_weights=np.ones(len(session), np.float32),
        history=history,
        ages=np.linspace(1, 20, len(history), dtype=np.float32),
        weights=np.full(len(history), 0.5, np.float32),
        bought=np.ones(len(history), bool),
    )


def taste_rows(people: int, vectors: dict[str, np.ndarray], seed: int, *, size: int = 20) -> Rows:
    """People whose past is near a taste of theirs; of the candidates they like the nearest quarter."""
    choice = np.random.default_rng(seed)
    queries, items, labels = [], [], []
    for _ in range(people):
        near = vectors["text"] @ unit(choice.standard_normal(TEXT))
        past = choice.permutation(np.argsort(-near)[:20])[:8]
        candidates = choice.permutation(np.setdiff1d(np.arange(1, ITEMS), past))[:size]
        queries.append(person(past[2:], past[:2]))
        items.append(candidates)
        labels.append(near[candidates] > np.quantile(near[candidates], 0.75))
    return rows_of(queries, items, labels, seed)


def rows_of(queries: list[Query], items: list[np.ndarray], labels: list[np.ndarray], seed: int) -> Rows:
    flat = np.concatenate(items).astype(np.int64)
    matrix = np.random.default_rng(seed).exponential(5, (len(flat), len(NAMES))).astype(np.float32)
    label = np.concatenate(labels).astype(np.float32)
    none = np.empty(0, np.int64)
    return Rows(
        names=NAMES,
        matrix=matrix,
        items=flat,
        sources=np.zeros(len(flat), np.int64),
        label=label,
        weight=np.ones(len(flat), np.float32),
        unsold=np.zeros(len(flat), bool),
        size=np.array([len(i) for i in items], np.int64),
        questions=[Question(f"p{at}", at // 10 * DAY + at, (), none) for at in range(len(queries))],
        queries=queries,
        targets=np.ones(len(queries), np.int64),
    )


def odd_rows() -> Rows:
    """Nobody, a past longer than is read, a session alone; 1 to 60 candidates, one that has no vector."""
    choice = np.random.default_rng(3)
    none = np.empty(0, np.int64)
    long = choice.integers(0, ITEMS, MAX_HISTORY + 30)
    queries = [person(none, none), person(long, long[:70]), person(none, long[:3]), person(long[:1], none)]
    sizes = (7, 60, 1, 20)
    items = [np.concatenate([[0], choice.permutation(np.arange(1, ITEMS))[: size - 1]]) for size in sizes]
    return rows_of(queries, items, [np.arange(size) % 3 == 0 for size in sizes], seed=4)


def random_head(vectors: dict[str, np.ndarray], rows: Rows, **more: object) -> CtrModel:
    torch.manual_seed(5)
    settings = replace(ctr_settings(rows, vectors, ("click", "purchase"), shown=True), **more)  # type: ignore[arg-type]
    return CtrModel(settings).eval()


@pytest.mark.parametrize("plain", [False, True])
def test_scores_are_the_same_alone_in_a_batch_and_served(*, plain: bool, tmp_path: Path) -> None:
    vectors, rows = catalogue(), odd_rows()
    model = random_head(vectors, rows, plain=plain, slope=(2.0, 0.5), offset=(-1.0, 0.25))
    together = score(model, rows, vectors)
    write_ctr(tmp_path, model)
    served = CtrHead(tmp_path, ("other", *reversed(NAMES)))
    group, matrix = rows.group(), np.concatenate([rows.matrix, np.full((len(rows.items), 1), np.nan)], 1)
    for at, query in enumerate(rows.queries):
        mine = group == at
        alone = score(model, rows.take(np.array([at])), vectors)
        np.testing.assert_allclose(together[mine], alone, atol=1e-5)
        logits = served.logits(query, rows.items[mine], matrix[mine][:, ::-1], vectors)
        np.testing.assert_allclose(together[mine], logits, atol=1e-5)
        order = np.random.default_rng(at).permutation(int(mine.sum()))
        moved = served.logits(query, rows.items[mine][order], matrix[mine][order][:, ::-1], vectors)
        np.testing.assert_allclose(moved, logits[order], atol=1e-5)
        told = served.probabilities(logits)
        assert list(told) == ["click", "purchase"]
        np.testing.assert_allclose(told["click"], 1 / (1 + np.exp(1 - 2.0 * logits[:, 0])), rtol=1e-4)
        np.testing.assert_allclose(told["purchase"], 1 / (1 + np.exp(-0.25 - 0.5 * logits[:, 1])), rtol=1e-4)
    assert together.std() > 1e-3


def test_what_is_not_known_never_makes_a_score_that_is_no_number(tmp_path: Path) -> None:
    vectors, rows = catalogue(), odd_rows()
    matrix = rows.matrix.copy()
    matrix[::2, 0], matrix[1::3, 1], matrix[:, 3] = np.nan, np.inf, np.nan
    unknown = replace(rows, matrix=matrix)
    finite = replace(rows, matrix=np.where(np.isfinite(matrix), matrix, np.nan))
    shape = ctr_settings(finite, vectors, ("click", "purchase"), shown=True)
    assert np.isfinite([*shape.mean, *shape.scale]).all()
    labels = np.stack([rows.label, 1 - rows.label], 1)
    model = fit_ctr(shape, finite, labels, vectors, epochs=2)
    assert np.isfinite(score(model, unknown, vectors)).all()
    unfit = CtrModel(replace(shape, shown=False))
    write_ctr(tmp_path, unfit)
    assert CtrHead(tmp_path, NAMES).probabilities(np.zeros((3, 2), np.float32)) == {}


def test_a_head_that_reads_a_missing_column_is_refused(tmp_path: Path) -> None:
    write_ctr(tmp_path, random_head(catalogue(), odd_rows()))
    with pytest.raises(FailedPrecondition, match="price"):
        CtrHead(tmp_path, ("popular_7d", "noise", "age_days"))


def test_a_taste_is_learned_and_carries_over_to_people_never_seen() -> None:
    vectors = catalogue()
    rows, unseen = taste_rows(192, vectors, seed=1), taste_rows(50, vectors, seed=2)
    found = {}
    for plain in (False, True):
        shape = ctr_settings(rows, vectors, ("purchase",), shown=False, plain=plain)
        model = fit_ctr(shape, rows, rows.label[:, None], vectors, epochs=12)
        logits = score(model, unseen, vectors)[:, 0].astype(np.float64)
        found[plain] = classification_metrics(1 / (1 + np.exp(-logits)), unseen.label)["auc"]
    assert found[False] > 0.8
    assert found[False] > found[True] + 0.1


def test_the_same_seed_gives_the_same_head() -> None:
    vectors = catalogue()
    rows = taste_rows(70, vectors, seed=1)
    shape = ctr_settings(rows, vectors, ("purchase",), shown=False)
    one, two = (score(fit_ctr(shape, rows, rows.label[:, None], vectors, 2), rows, vectors) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    other = score(fit_ctr(shape, rows, rows.label[:, None], vectors, 2, seed=1), rows, vectors)
    assert not np.array_equal(one, other)


def test_what_is_foretold_knows_nothing_of_its_own_days_or_later() -> None:
    vectors = catalogue()
    rows, others = taste_rows(40, vectors, seed=1), taste_rows(40, vectors, seed=2)
    others = replace(others, questions=[replace(q, user_id=f"x{q.user_id}") for q in others.questions])
    shape = ctr_settings(rows, vectors, ("purchase",), shown=False)
    labels, part = rows.label[:, None], rows.group() // 10
    before = foretold(shape, rows, labels, [rows, others], vectors, epochs=2)
    for scores in before:
        assert np.isnan(scores[part == 0]).all()
        assert np.isfinite(scores[part > 0]).all()
    for changed in range(4):
        flipped = np.where((part == changed)[:, None], 1 - labels, labels)
        after = foretold(shape, rows, flipped, [rows, others], vectors, epochs=2)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old[part <= changed], new[part <= changed])
            for later in range(changed + 1, 4):
                assert not np.array_equal(old[part == later], new[part == later])


def test_days_are_never_cut_in_two() -> None:
    """The people of a day share its fashions: a head that knows some of them knows too much of the others."""
    vectors = catalogue()
    rows = taste_rows(40, vectors, seed=1)
    shape = ctr_settings(rows, vectors, ("purchase",), shown=False)
    for days in (2, 3):
        moments = [at * days * DAY // 40 for at in range(40)]
        of_days = replace(
            rows, questions=[replace(q, as_of=at) for q, at in zip(rows.questions, moments, strict=True)]
        )
        (scores,) = foretold(shape, of_days, rows.label[:, None], [of_days], vectors, epochs=1)
        day = (np.array(moments) // DAY)[rows.group()]
        np.testing.assert_array_equal(np.isnan(scores[:, 0]), day == 0)


def test_of_one_day_a_head_never_saw_the_person_it_scores() -> None:
    vectors = catalogue()
    rows = taste_rows(40, vectors, seed=1)
    rows = replace(rows, questions=[replace(q, as_of=q.as_of % DAY) for q in rows.questions])
    shape = ctr_settings(rows, vectors, ("purchase",), shown=False)
    labels = rows.label[:, None]
    (before,) = foretold(shape, rows, labels, [rows], vectors, epochs=2)
    group = rows.group()
    for who in (0, 7):
        mine = group == who
        flipped = labels.copy()
        flipped[mine] = 1 - flipped[mine]
        (after,) = foretold(shape, rows, flipped, [rows], vectors, epochs=2)
        np.testing.assert_array_equal(before[mine], after[mine])
        assert not np.array_equal(before[~mine], after[~mine])
    same = replace(rows, questions=[replace(q, user_id="ann") for q in rows.questions])
    assert np.isnan(foretold(shape, same, labels, [same], vectors, epochs=1)[0]).all()


def test_a_lesson_before_the_first_question_holds_nothing() -> None:
    rows = taste_rows(5, catalogue(), seed=1)
    lesson = Lesson(rows, rows, rows.label[:, None], ["purchase"], shown=False)
    assert [q.as_of for q in lesson.before(3).rows.questions] == [0, 1, 2]
    nothing = lesson.before(0)
    assert (len(nothing.rows.size), len(nothing.seen.items), len(nothing.labels)) == (0, 0, 0)


def plain_rows(days: list[int]) -> Rows:
    """A row for each question, one on each of `days`."""
    nobody = person(np.empty(0, np.int64), np.empty(0, np.int64))
    rows = rows_of([nobody] * len(days), [np.zeros(1)] * len(days), [np.zeros(1)] * len(days), seed=0)
    asked = [replace(q, as_of=day * DAY) for q, day in zip(rows.questions, days, strict=True)]
    return replace(rows, questions=asked)


def test_calibration_mends_an_overconfident_head() -> None:
    choice = np.random.default_rng(0)
    truth = choice.normal(-1, 1.5, (8000, 2))
    labels = (choice.random((8000, 2)) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    logits = (4 * truth + [2.0, -3.0]).astype(np.float32)
    shape = CtrSettings({"text": 2}, ("click", "purchase"), (), (), (), shown=True)
    early = choice.normal(0, 1, (1000, 2)).astype(np.float32)  # of heads that knew little; they do not count
    early[:10] = np.nan
    rows = plain_rows([0] * 1000 + [1] * 4000)
    mended = calibrated(
        shape, rows, np.concatenate([early, logits[:4000]]), np.concatenate([early > 0, labels[:4000]])
    )
    np.testing.assert_allclose(mended.slope, 0.25, atol=0.03)
    for at in range(2):
        late, label = logits[4000:, at].astype(np.float64), labels[4000:, at]
        raw = classification_metrics(1 / (1 + np.exp(-late)), label)
        made = 1 / (1 + np.exp(-(mended.slope[at] * late + mended.offset[at])))
        assert raw["ece"] > 0.1
        assert classification_metrics(made, label)["ece"] < 0.03


def test_labels_of_one_class_are_calibrated_to_numbers_and_nothing_to_nothing() -> None:
    shape = CtrSettings({"text": 2}, ("click",), (), (), (), shown=True)
    rows, logits = plain_rows([0] * 50), np.linspace(-2, 2, 50, dtype=np.float32)[:, None]
    mended = calibrated(shape, rows, logits, np.zeros((50, 1), np.float32))
    assert np.isfinite([*mended.slope, *mended.offset]).all()
    unknown = calibrated(shape, rows, np.full((50, 1), np.nan, np.float32), np.zeros((50, 1), np.float32))
    assert (unknown.slope, unknown.offset) == ((1.0,), (0.0,))


def test_models_of_a_shop_that_logs_what_it_showed() -> None:
    vectors = catalogue()
    asked, pages = taste_rows(60, vectors, seed=1), taste_rows(60, vectors, seed=2, size=6)
    labels = np.stack([pages.label, np.zeros(len(pages.items), np.float32)], axis=1)
    lesson = Lesson(asked, pages, labels, ["click", "purchase"], shown=True)
    settings = ShopSettings(ranking=RankingTraining(trees=20, ctr_epochs=1))
    whole, blind = (fit_models(lesson, settings, vectors, without) for without in ("", "ctr"))
    assert whole.names == (*NAMES, "ctr_click", "ctr_purchase")
    assert [whole.names[at] for at in whole.columns] == list(whole.names)
    assert whole.head is not None
    assert whole.head.settings.slope[0] > 0
    assert np.isfinite([*whole.head.settings.slope, *whole.head.settings.offset]).all()
    assert (blind.head, blind.names) == (None, NAMES)
    alone = replace(lesson, shown=False, seen=asked, labels=asked.label[:, None], types=["click"])
    unseen = fit_models(alone, settings, vectors)
    fresh = taste_rows(20, vectors, seed=3)
    one, other = (model.score(fresh, vectors) for model in (whole, unseen))
    assert np.isfinite([one, other]).all()
    assert not np.allclose(one, other)


def fitted_reranker(columns: tuple[str, ...]) -> lightgbm.Booster:
    """Trees that like the second column and dislike the last, over questions of ten candidates."""
    matrix = np.random.default_rng(0).random((4000, len(columns))).astype(np.float32)
    return fit_reranker(lists(matrix, (matrix[:, 1] - matrix[:, -1] > 0.5).astype(np.float32)), trees=5)


def lists(matrix: np.ndarray, grade: np.ndarray) -> Lists:
    """Lists of ten rows, one a second."""
    count = len(matrix) // 10
    weight = np.ones(len(matrix), np.float32)
    return Lists(matrix, grade, weight, np.full(count, 10), np.arange(count) * 1_000_000)


def test_rows_stay_whole_and_in_their_list() -> None:
    size = np.array([3, 1, 7, 2, 5])
    number = np.arange(18, dtype=np.float32)
    known = Lists(number[:, None], number % 3, number + 1, size, np.arange(5))
    data = reranker_fit._dataset(
        [known, known.take(np.array([True, False, True, False, True]))], np.arange(3.0)
    )
    matrix = np.asarray(data.data)[:, 0]
    expected = [*np.split(number, np.cumsum(size)[:-1]), number[:3], number[4:11], number[13:]]
    assert np.asarray(data.group).tolist() == [len(one) for one in expected]
    np.testing.assert_array_equal(np.asarray(data.label), matrix % 3)
    np.testing.assert_array_equal(np.asarray(data.weight), matrix + 1)
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
    alone, both = (fame_for_taste(fit_reranker(asked, 40, shown=pages)) for pages in (None, shown))
    assert 0 < both < 0.8 * alone


def fame_for_taste(model: lightgbm.Booster) -> float:
    """How much more a model makes of fame than of taste."""
    low, high, rest = np.full(50, 0.4), np.full(50, 0.9), np.linspace(0.4, 0.9, 50)

    def gained(column: int) -> float:
        ends = [np.stack([end, rest][:: 1 - 2 * column], axis=1) for end in (low, high)]
        before, after = (np.asarray(model.predict(end)) for end in ends)
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
        data = reranker_fit._dataset([noise], np.array([0.0, 1.0]))
        lightgbm.train(
            reranker_fit._PARAMETERS, data, 1, [data], callbacks=[lightgbm.record_evaluation(record)]
        )
        found.append(record["training"]["ndcg@20"][0])
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_how_many_trees_are_enough_is_judged_by_a_time_that_nothing_learned_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, shown = offers()
    late = replace(shown, when=shown.when + asked.when[3200] - shown.when[100])
    sets: list[list[np.ndarray]] = []
    train = lightgbm.train

    def watched(parameters: dict[str, object], rows: lightgbm.Dataset, *rest: Any, **more: Any) -> Any:
        sets.append([np.sort(np.asarray(data.data), axis=0) for data in (rows, *more.get("valid_sets", []))])
        return train(parameters, rows, *rest, **more)

    monkeypatch.setattr(lightgbm, "train", watched)
    fit_reranker(asked, 20, shown=late)
    tried, held = sets[0]
    np.testing.assert_array_equal(held, np.sort(asked.matrix[32_000:], axis=0))
    early = np.concatenate([asked.matrix[:32_000], late.matrix[:1000]])
    np.testing.assert_array_equal(tried, np.sort(early, axis=0))
    (final,) = sets[1]
    assert len(final) == len(asked.matrix) + len(late.matrix)


def test_a_served_reranker_gives_lightgbms_own_prediction(tmp_path: Path) -> None:
    columns = ("price", "popular_7d", "age, in days")
    model = fitted_reranker(columns)
    write_reranker(tmp_path, model, columns)
    names = ("age, in days", "noise", "popular_7d", "price")
    matrix = np.random.default_rng(1).random((50, 4)).astype(np.float32)
    matrix[::7, 2] = np.nan
    served = Reranker(tmp_path, names)
    expected = np.asarray(model.predict(matrix[:, [3, 2, 0]]))
    np.testing.assert_allclose(served.score(matrix), expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(expected) > 0
    best, worst = np.array([[0.1, 0, 0.9, 0.5]], np.float32), np.array([[0.9, 0, 0.1, 0.5]], np.float32)
    assert served.score(best) > served.score(worst)
    assert served.score(matrix[:0]).shape == (0,)
    with pytest.raises(FailedPrecondition, match="popular_7d"):
        Reranker(tmp_path, ("age, in days", "price"))


def small_shop() -> tuple[Features, ItemTable, Query]:
    items = shops.items()
    text = unit(np.random.default_rng(0).standard_normal((len(items), TEXT)))
    table = ItemTable.of(
        items, {"text": text}, {"text": np.ones(len(items), bool)}, [shops.UNTIL] * len(items)
    )
    features = Features(table, GraphView(shops.graph(), table), ["colour"])
    return features, table, person(np.array([1, 2, 3]), np.array([4]))


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
        (0.0, 0.0),
        (1.0, 1.0),
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
    write_reranker(trees_at, model, columns)
    with pytest.raises(FailedPrecondition, match="ctr_purchase"):
        Scorer(features, table, None, trees_at)
    full = Scorer(features, table, head_at, trees_at).score(query, rows, now)
    assert list(full.components) == ["blend", "ctr_click", "ctr_purchase", "reranker"]
    read = np.stack([matrix[:, features.names.index("price")], logits[:, 1], logits[:, 0]], 1)
    np.testing.assert_allclose(full.values, np.asarray(model.predict(read)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(full.values, full.components["reranker"])
