"""What rows the rankers learn from, and what these must not know."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.catalog import item_number
from services.ranking.blend import blend
from services.ranking.graph import ItemGraph
from tests.models import make_text_encoder
from tests.pasts import (
    DAYS,
    FIRST,
    GRANULARITIES,
    HOUR,
    WEIGHTS,
    Deed,
    Granularity,
    assert_alike,
    deeds_of,
    graph_of,
    items_of,
    questions_of,
    settings_of,
    shop_of,
    trained,
    vectors_of,
)
from training import encoding, pipeline
from training.dataset import Shop
from training.encoding import Encoded
from training.judging import proposed_without
from training.lesson import first_day
from training.queries import DAY, Question, make_questions
from training.replay import Replay
from training.rows import judging_rows, learning_rows, shown_rows
from training.shop_settings import TextTraining
from training.stages import Stages


def learned_past(shop: Shop, root: Path) -> tuple[Replay, Encoded, ItemGraph]:
    """What the pipeline replays the past with, and the graph it publishes."""
    stages, until = Stages(root), first_day(shop.events, shop.settings) * DAY
    encoded = encoding.encode(stages, shop, shop.settings, until)
    graphs = pipeline._graph_stage(stages, shop, encoded, until)
    by_day = {int(path.name): ItemGraph.load(path) for path in graphs.iterdir() if path.name.isdigit()}
    walks = pipeline._sequence_stage(stages, shop, shop.settings, encoded, until)
    past = Replay(shop, by_day, encoded.fold, encoded.present, walks / "before")
    return past, encoded, ItemGraph.load(graphs / "final")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_planted_basket_does_not_move_its_own_rows(granularity: Granularity, tmp_path: Path) -> None:
    base = make_text_encoder(tmp_path / "base")
    text = TextTraining(base=str(base), steps=2, batch=8, head_steps=5, max_tokens=8)
    settings = settings_of(granularity, text=text)
    items, deeds = items_of(30), deeds_of(30, seed=3, strangers=False)
    start = (FIRST + DAYS - 2) * DAY + 5 * HOUR
    bought = {deed.item for deed in deeds}
    never = [item.id for item in items if item.id not in bought]
    once = sorted(bought)[0]
    mine = [deed for deed in deeds if deed.user != "p0" or deed.time // DAY != FIRST + DAYS - 2]
    planted = [Deed("p0", item, "purchase", start + n, 7.0) for n, item in enumerate((once, *never[:2]))]
    without, whole = shop_of(items, mine, settings), shop_of(items, [*mine, *planted], settings)
    asked = make_questions(whole.events, WEIGHTS, settings.targets, (FIRST + DAYS - 3) * DAY)
    own = [q for q in asked if q.user_id == "p0" and q.as_of // DAY == FIRST + DAYS - 2]
    assert len(own) == 1
    (before, fold, plain), (after, tuned, moved) = (
        learned_past(shop, tmp_path / name) for name, shop in (("one", without), ("other", whole))
    )
    assert_alike(trained(before, own[0]), trained(after, own[0]))
    every = np.ones(len(items), bool)
    one, other = (judging_rows(past, own, every) for past in (before, after))
    np.testing.assert_array_equal(one.items, other.items)
    np.testing.assert_array_equal(one.matrix, other.matrix)
    assert np.isfinite(one.matrix[:, one.names.index("sequence_next")]).any()
    np.testing.assert_array_equal(fold.fold["text"], tuned.fold["text"])
    # What is published does know it.
    assert not np.array_equal(fold.final["text"], tuned.final["text"])
    size = {name: len(graph.relations["baskets"].weights) for name, graph in (("a", plain), ("b", moved))}
    assert size["b"] > size["a"]


def graphs_by_day(shop: Shop, vectors: dict[str, np.ndarray], present: dict[str, np.ndarray]) -> Replay:
    """The past through the pipeline's own graphs, with these vectors."""
    encoded = Encoded(base=vectors, present=present)
    with TemporaryDirectory() as root:
        made = pipeline._graph_stage(
            Stages(Path(root)), shop, encoded, first_day(shop.events, shop.settings) * DAY
        )
        by_day = {int(path.name): ItemGraph.load(path) for path in made.iterdir() if path.name.isdigit()}
    return Replay(shop, by_day, vectors, present)


@given(st.integers(0, 10_000), st.integers(0, 3 * 24 - 1), st.sampled_from(GRANULARITIES))
@hypothesis_settings(deadline=None, max_examples=10)
def test_what_happens_later_changes_nothing(seed: int, hour: int, granularity: Granularity) -> None:
    items, deeds = items_of(30), deeds_of(30, seed=seed % 5, strangers=False)
    as_of = (FIRST + DAYS - 3) * DAY + hour * HOUR
    cut = as_of - as_of % DAY if granularity == "day" else as_of
    choice = np.random.default_rng(seed)

    def another(deed: Deed) -> Deed:
        return deed._replace(item=f"i{choice.integers(30)}", user=f"p{choice.integers(10)}", price=1.0)

    last = Deed("p9", "i0", "purchase", (FIRST + DAYS) * DAY - 1)
    everyone = [Deed(f"p{n}", f"i{n}", "click", FIRST * DAY) for n in range(10)]
    other = [another(deed) if deed.time >= cut else deed for deed in deeds]
    other.append(Deed("p0", "i3", "purchase", (FIRST + DAYS) * DAY - 2))
    session = ((item_number("i1"), "click"), (item_number("i2"), "purchase"))
    vectors, present = vectors_of(30)
    found = []
    for mine in (deeds, other):
        shop = shop_of(items, [*everyone, *mine, last], settings_of(granularity))
        past = graphs_by_day(shop, vectors, present)
        none = np.empty(0, np.int64)
        found.append([trained(past, Question(f"p{n}", as_of, session[: n % 3], none)) for n in range(4)])
    for one, two in zip(*found, strict=True):
        assert one.sources == two.sources
        np.testing.assert_array_equal(one.matrix, two.matrix)


@pytest.mark.parametrize("priced", [True, False])
def test_an_unsold_row_is_that_of_a_shop_where_the_item_had_no_events(*, priced: bool) -> None:
    settings = settings_of("hour")
    items, deeds = items_of(30, priced=priced), deeds_of(30, seed=4, strangers=False)
    vectors, present = vectors_of(30)
    as_of = (FIRST + DAYS) * DAY - HOUR

    def past_of(mine: list[Deed]) -> Replay:
        shop = shop_of(items, mine, settings)
        graph = graph_of(shop, vectors, present)
        return Replay(shop, dict.fromkeys(range(FIRST, FIRST + DAYS + 1), graph), vectors, present)

    whole = past_of(deeds)
    compared = 0
    for user in ("p0", "p1", "p2"):
        question = Question(user, as_of, ((item_number("i1"), "purchase"),), np.empty(0, np.int64))
        own = {deed.item for deed in deeds if deed.user == user} | {"i1"}
        now, query = whole.at(as_of), whole.query(question)
        features = whole.features(now)
        for row in (2, 9, 14, 20, 23):
            if items[row].id in own:
                continue
            compared += 1
            rows = np.array([row])
            got = features.unsold(features.matrix(query, rows, now), rows, now)
            without = past_of([deed for deed in deeds if deed.item != items[row].id])
            then, asked = without.at(as_of), without.query(question)
            expected = without.features(then).matrix(asked, np.array([row]), then)
            for name, a, b in zip(whole.names, got[0], expected[0], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=f"{name} of {items[row].id}")
    assert compared > 3


def test_answers_are_kept_and_what_is_drawn_stands_for_what_is_left_out() -> None:
    items, kept = items_of(60), 11
    shop = shop_of(items, deeds_of(60, seed=5), settings_of("hour"))
    vectors, present = vectors_of(60)
    past = graphs_by_day(shop, vectors, present)
    asked = make_questions(shop.events, WEIGHTS, ("click", "purchase"), (FIRST + DAYS - 3) * DAY)
    rows = learning_rows(past, asked, kept, 0.1)
    assert rows is not None
    assert 0 < len(rows.questions) <= len(asked)
    assert 0 < rows.unsold.mean() < 0.3
    told = {(q.user_id, q.as_of) for q in rows.questions}
    start = 0
    for question, size, count in zip(rows.questions, rows.size.tolist(), rows.targets, strict=True):
        mine = slice(start, start + size)
        start += size
        now, query = past.at(question.as_of), past.query(question)
        engaged = ~np.isnan(now.age)
        every, _ = past.candidates(query, now, past.live(question.as_of) & engaged)
        chosen, label, weight = rows.items[mine], rows.label[mine] > 0, rows.weight[mine]
        assert len(set(chosen.tolist())) == size
        assert set(chosen.tolist()) <= set(every.tolist())
        assert engaged[chosen].all()
        answer = past.table.rows(question.targets.tolist())
        assert count == len(answer)
        grade = dict(zip(answer.tolist(), question.grades.tolist(), strict=True))
        assert rows.label[mine].tolist() == [grade.get(row, 0) for row in chosen.tolist()]
        assert set(chosen[label].tolist()) == set(answer.tolist()) & set(every.tolist())
        others = every[~np.isin(every, answer)]
        assert weight.sum() == pytest.approx(len(others) + label.sum(), rel=1e-5)
        drawn = ~label & (weight > 1)
        assert drawn.sum() <= kept - kept // 2
        score = blend(past.names, past.features(now).matrix(query, others, now))
        best = others[np.argsort(-score, kind="stable")[: kept // 2]]
        assert set(best.tolist()) <= set(chosen[weight == 1].tolist())
        # A row is the feature function's own, or the same without the item's behaviour.
        matrix = past.features(now).matrix(query, chosen, now)
        hidden = rows.unsold[mine]
        matrix[hidden] = past.features(now).unsold(matrix[hidden], chosen[hidden], now)
        np.testing.assert_allclose(rows.matrix[mine], matrix, rtol=1e-5, atol=1e-6)
    assert set(rows.label.tolist()) == {0.0, 0.25, 1.0}
    missed = [q for q in asked if (q.user_id, q.as_of) not in told]
    for question in missed:
        now, query = past.at(question.as_of), past.query(question)
        every, _ = past.candidates(query, now, past.live(question.as_of) & ~np.isnan(now.age))
        assert not np.isin(past.table.rows(question.targets.tolist()), every).any()


def test_a_page_has_its_items_graded_by_the_weightiest_thing_done() -> None:
    shop = shop_of(items_of(20), deeds_of(20, seed=5), settings_of("hour"))
    past = graphs_by_day(shop, *vectors_of(20))
    moment = (FIRST + DAYS - 1) * DAY
    targets = np.array([item_number(name) for name in ("i3", "unknown", "i0", "i7", "i1")], np.int64)
    page = Question("p1", moment, (), targets)
    done = np.array([[1, 0], [1, 1], [0, 0], [1, 1], [0, 1]], np.float32)
    found = shown_rows(
        past, [page, replace(page, targets=targets[1:2])], [done, done[1:2]], np.array([0.25, 0.8]), 0.1
    )
    assert found is not None
    rows, labels = found
    assert past.table.ids(rows.items) == ["i3", "i0", "i7", "i1"]
    np.testing.assert_array_equal(labels, done[[0, 2, 3, 4]])
    np.testing.assert_allclose(rows.label, [0.25, 0, 0.8, 0.8])
    assert rows.size.tolist() == [4]
    assert rows.weight.tolist() == [1] * 4
    now = past.at(moment)
    features = past.features(now)
    matrix = features.matrix(past.query(page), rows.items, now)
    blank = features.unsold(matrix, rows.items, now)
    np.testing.assert_array_equal(rows.matrix, np.where(rows.unsold[:, None], blank, matrix))


def test_what_is_in_the_session_is_no_row_of_the_page() -> None:
    shop = shop_of(items_of(20), deeds_of(20, seed=5), settings_of("hour"))
    past = graphs_by_day(shop, *vectors_of(20))
    targets = np.array([item_number(name) for name in ("i3", "i0", "i7")], np.int64)
    page = Question("p1", (FIRST + DAYS - 1) * DAY, ((item_number("i0"), "click"),), targets)
    found = shown_rows(past, [page], [np.array([[0], [1], [1]], np.float32)], np.ones(1), 0.1)
    assert found is not None
    assert past.table.ids(found[0].items) == ["i3", "i7"]
    assert found[1].ravel().tolist() == found[0].label.tolist() == [0, 1]


def test_of_what_was_shown_one_row_in_ten_comes_without_a_past() -> None:
    shop = shop_of(items_of(20), deeds_of(20, seed=5), settings_of("hour"))
    past = graphs_by_day(shop, *vectors_of(20))
    targets = np.array([item_number(f"i{n}") for n in range(20)], np.int64)
    page = Question("p1", (FIRST + DAYS - 1) * DAY, (), targets)
    found = shown_rows(past, [page] * 50, [np.zeros((20, 1), np.float32)] * 50, np.ones(1), 0.1)
    assert found is not None
    assert 0.06 < found[0].unsold.mean() < 0.14


@pytest.mark.parametrize("parts", [["text"], ["image"], ["text", "image"]])
def test_without_a_modality_nothing_is_proposed_by_its_neighbours(parts: list[str]) -> None:
    shop = shop_of(items_of(90), deeds_of(90, seed=5), settings_of("hour"))
    vectors, present = vectors_of(90)
    present["text"][::2], vectors["text"][::2] = False, 0
    graph, days, every = graph_of(shop, vectors, present), range(FIRST, FIRST + DAYS + 1), np.ones(90, bool)
    whole = Replay(shop, dict.fromkeys(days, graph), vectors, present)
    relations = {name: of for name, of in graph.relations.items() if name not in parts}
    kept = {space: values for space, values in vectors.items() if space not in parts}
    lacking = ItemGraph(graph.numbers, relations)
    without = Replay(shop, dict.fromkeys(days, lacking), kept, present)
    asked = questions_of(shop)
    rows, other = judging_rows(whole, asked, every), judging_rows(without, asked, every)
    proposed = proposed_without(whole, rows, parts)
    start = np.cumsum(rows.size) - rows.size
    told = [rows.items[a : a + n][proposed[a : a + n]] for a, n in zip(start, rows.size, strict=True)]
    np.testing.assert_array_equal(np.concatenate(told), other.items)
    # Some had no other source than the graph.
    by_graph = rows.sources & (1 << whole.source_names.index("graph")) != 0
    assert (by_graph & ~proposed).any()


def test_before_anybody_engaged_with_anything_there_is_nothing_to_learn_from() -> None:
    deeds = [Deed("p0", f"i{n}", "purchase", FIRST * DAY + n) for n in range(4)]
    shop = shop_of(items_of(8), deeds, settings_of("hour"))
    vectors, present = vectors_of(8)
    graph = graph_of(shop, vectors, present)
    past = Replay(shop, {FIRST: graph}, vectors, present)
    asked = make_questions(shop.events, WEIGHTS, ("purchase",), FIRST * DAY)
    assert len(asked) == 1
    assert learning_rows(past, asked, 10, 0.1) is None
    assert judging_rows(past, asked, np.zeros(8, bool)).size.tolist() == [0]
