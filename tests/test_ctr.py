"""The CTR head: alone as in a batch, served as trained, blind to what it has to foretell."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.errors import FailedPrecondition
from services.ranking.ctr import MAX_HISTORY, CtrHead, CtrModel, CtrSettings, write_ctr
from services.ranking.moment import DAY
from services.ranking.query import Query
from services.ranking.scales import Scales
from training import judging
from training.ctr import calibrated, ctr_settings, fit_ctr, foretold, score
from training.lesson import Lesson
from training.lists import Lists
from training.metrics import classification_metrics
from training.queries import Question
from training.rankers import Fitted, Heads, fit_models
from training.reranker import fit_reranker
from training.rows import Rows
from training.shop_settings import RankingTraining, ShopSettings

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("popular_7d", "price", "noise", "age_days")
ITEMS, TEXT, IMAGE = 300, 6, 8


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
        channels=np.full(len(history), -1, np.int16),
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
    assert np.isfinite([*shape.scales.unit, *shape.scales.mean, *shape.scales.scale]).all()
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


def test_some_of_a_lesson_keeps_labels_with_their_rows() -> None:
    vectors = catalogue()
    rows, pages = taste_rows(9, vectors, seed=1), taste_rows(6, vectors, seed=2, size=4)
    marks = np.arange(len(pages.items), dtype=np.float32)[:, None]
    some = Lesson(rows, pages, marks, ["click"], shown=True).some(4)
    assert (len(some.rows.size), len(some.seen.size)) == (4, 4)
    kept = some.labels[:, 0].astype(int)
    np.testing.assert_array_equal(pages.matrix[kept], some.seen.matrix)
    assert (np.diff(kept) > 0).all()
    alike = Lesson(rows, rows, rows.label[:, None], ["click"], shown=False).some(4)
    np.testing.assert_array_equal(alike.rows.matrix, alike.seen.matrix)
    np.testing.assert_array_equal(alike.labels[:, 0], alike.seen.label)
    assert len(Lesson(rows, rows, rows.label[:, None], ["click"], shown=False).some(99).rows.size) == 9


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
    shape = CtrSettings({"text": 2}, ("click", "purchase"), (), Scales.plain(0), shown=True)
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


def test_rows_without_their_past_do_not_calibrate() -> None:
    generator = np.random.default_rng(0)
    shape = CtrSettings({"text": 2}, ("click",), (), Scales.plain(0), shown=True)
    logits = generator.normal(0, 2, (400, 1)).astype(np.float32)
    label = (generator.random((400, 1)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    rows, unsold = plain_rows([0] * 400), generator.random(400) < 0.5
    spoilt = np.where(unsold[:, None], -logits, logits)
    mended = calibrated(shape, replace(rows, unsold=unsold), spoilt, label)
    assert mended.slope[0] == pytest.approx(1, abs=0.35)
    assert calibrated(shape, rows, spoilt, label).slope[0] < 0.5


def test_only_what_moves_the_candidates_of_a_question_apart_is_important() -> None:
    generator = np.random.default_rng(0)
    rows = taste_rows(150, catalogue(), seed=1)
    matrix = generator.random((len(rows.items), 3)).astype(np.float32)
    matrix[:, 2] = rows.group() % 7  # the same for a whole question
    liked = (matrix[:, 0] > 0.7).astype(np.float32)
    when = np.array([q.as_of for q in rows.questions])
    model = fit_reranker(Lists(matrix, liked, rows.weight, rows.size, when), ("a", "b", "person"), 20)
    fitted = Fitted(None, model, np.arange(3))
    found = judging._importance(fitted, rows, matrix)
    assert found["trees"] == (model.trees.num_trees() if model.trees else 0)
    share = found["importance"]
    assert sum(share.values()) == pytest.approx(1)
    assert share["a"] > 0.8
    assert share["a"] > 10 * max(share["b"], share["person"])
    nothing = judging._importance(fitted, rows.take(np.empty(0, np.int64)), matrix[:0])
    assert nothing["importance"] == {}


def test_labels_of_one_class_are_calibrated_to_numbers_and_nothing_to_nothing() -> None:
    shape = CtrSettings({"text": 2}, ("click",), (), Scales.plain(0), shown=True)
    rows, logits = plain_rows([0] * 50), np.linspace(-2, 2, 50, dtype=np.float32)[:, None]
    mended = calibrated(shape, rows, logits, np.zeros((50, 1), np.float32))
    assert np.isfinite([*mended.slope, *mended.offset]).all()
    unknown = calibrated(shape, rows, np.full((50, 1), np.nan, np.float32), np.zeros((50, 1), np.float32))
    assert (unknown.slope, unknown.offset) == ((1.0,), (0.0,))


def shown_lesson(lists: int, vectors: dict[str, np.ndarray]) -> Lesson:
    asked, pages = taste_rows(lists, vectors, seed=1), taste_rows(lists, vectors, seed=2, size=6)
    labels = np.stack([pages.label, np.zeros(len(pages.items), np.float32)], axis=1)
    return Lesson(asked, pages, labels, ["click", "purchase"], shown=True)


def test_a_head_that_does_not_help_to_order_is_no_column_and_serves_probabilities_or_nothing() -> None:
    vectors = catalogue()
    lesson = shown_lesson(60, vectors)  # too few for it to learn anything
    settings = ShopSettings(ranking=RankingTraining(trees=20, ctr_epochs=1))
    told = fit_models(lesson, settings, vectors)
    assert told.model.choice.columns == list(NAMES)
    assert told.head is not None
    asked = replace(lesson.rows, label=np.random.default_rng(5).permutation(lesson.rows.label))
    alone = Lesson(asked, asked, asked.label[:, None], ["click"], shown=False)
    silent = fit_models(alone, settings, vectors)
    assert (silent.head, silent.model.choice.columns) == (None, list(NAMES))
    assert np.isfinite([told.score(asked, vectors), silent.score(asked, vectors)]).all()


def test_models_of_a_shop_that_logs_what_it_showed() -> None:
    vectors = catalogue()
    lesson = shown_lesson(400, vectors)
    asked, settings = lesson.rows, ShopSettings(ranking=RankingTraining(trees=20, ctr_epochs=3))
    whole, blind = (fit_models(lesson, settings, vectors, without) for without in ((), ("ctr",)))
    assert whole.model.choice.columns == [*NAMES, "ctr_click", "ctr_purchase"]
    assert whole.columns.tolist() == list(range(len(NAMES) + 2))
    assert whole.head is not None
    assert whole.head.settings.slope[0] > 0
    assert np.isfinite([*whole.head.settings.slope, *whole.head.settings.offset]).all()
    assert (blind.head, blind.model.choice.columns) == (None, list(NAMES))
    heads = Heads(lesson, 3)
    fit_models(lesson, settings, vectors, ("text",), heads)
    for _ in range(2):  # as fitted anew, and as it was kept
        again = fit_models(lesson, settings, vectors, (), heads)
        np.testing.assert_array_equal(again.score(asked, vectors), whole.score(asked, vectors))
    alone = replace(lesson, shown=False, seen=asked, labels=asked.label[:, None], types=["click"])
    unseen = fit_models(alone, settings, vectors)
    fresh = taste_rows(20, vectors, seed=3)
    one, other = (model.score(fresh, vectors) for model in (whole, unseen))
    assert np.isfinite([one, other]).all()
    assert not np.allclose(one, other)
