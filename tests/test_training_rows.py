"""Training rows against serving's own, and against what they must not know."""

import asyncio
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import event_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import deadline, store
from services.bundle import Bundle, Catalogue, created, publish, write_catalogue
from services.catalog import Attribute, Item, item_number
from services.gateway.pipeline import Wish
from services.item_table import ItemTable
from services.ranking.behaviour import BehaviourStore
from services.ranking.blend import blend
from services.ranking.graph import ItemGraph
from services.ranking.ranking import Person
from services.ranking.sequence import write_sequence
from services.replay import import_events
from services.settings import Settings
from services.wiring import RANKING, App
from tests.models import DIMENSION, make_image_encoder, make_text_encoder
from training import encoding, pipeline
from training.dataset import Events, Shop
from training.encoding import Encoded
from training.item_graph import content_relation, fit_item_graph
from training.judging import proposed_without
from training.lesson import first_day
from training.photographs import Photographs
from training.queries import DAY, Question, baskets, make_questions
from training.replay import Replay
from training.rows import judging_rows, learning_rows, shown_rows
from training.sequence import Engagements, fit_sequence
from training.shop_settings import (
    ItemColumns,
    RankingTraining,
    SequenceTraining,
    ShopSettings,
    Task,
    TextTraining,
    Time,
)
from training.stages import Stages

HOUR = DAY // 24
FIRST = 20_000
DAYS = 12
WEIGHTS = {"impression": 0.0, "click": 0.25, "purchase": 1.0}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Granularity = Literal["hour", "day"]
GRANULARITIES: tuple[Granularity, ...] = ("hour", "day")


class Deed(NamedTuple):
    """One row of a shop's events; `time` in microseconds since 1970."""

    user: str
    item: str
    kind: str
    time: int
    price: float = math.nan


def moment_of(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)


def settings_of(granularity: Granularity, **more: object) -> ShopSettings:
    made = ShopSettings(
        items=ItemColumns(text_attributes=("colour",), number_attributes=("size",)),
        event_types=WEIGHTS,
        time=Time(granularity=granularity),
        ranking=RankingTraining(days=3, candidates=20),
    )
    return made.model_copy(update=more)


def items_of(count: int, *, priced: bool = True, windows: bool = False) -> list[Item]:
    """Families of three, three colours; some are rather new; with `windows` some are not for sale."""
    made = []
    for n in range(count):
        start, end = moment_of((FIRST - (20 + n % 9 if n % 4 == 0 else 300)) * DAY), None
        if windows and n % 5 == 1:
            start = moment_of((FIRST + DAYS + 30) * DAY)
        if windows and n % 5 == 2:
            end = moment_of((FIRST + 5) * DAY)
        made.append(
            Item(
                id=f"i{n}",
                title=f"thing {n}",
                attributes=(
                    Attribute("colour", (("red", "blue", "green")[n % 3],)),
                    *((Attribute("size", numbers=(n * 7 % 31 / 2,)),) if n % 6 else ()),
                ),
                family_id="" if n % 7 == 6 else f"f{n // 3}",
                price=5.0 + n if priced else None,
                available_from=start,
                available_until=end,
            )
        )
    return made


def deeds_of(count: int, seed: int, *, strangers: bool = True) -> list[Deed]:
    """Ten people, on most days a basket each; the last fifth of the items is never engaged with."""
    choice = np.random.default_rng(seed)
    made = []
    for day in range(DAYS):
        for person in range(10):
            if choice.random() < 0.3:
                continue
            begin = (FIRST + day) * DAY + int(choice.integers(0, 20)) * HOUR
            for at in range(int(choice.integers(1, 6))):
                number = int(choice.integers(0, count * 4 // 5))
                kind = str(choice.choice(["purchase", "click", "impression"], p=[0.6, 0.3, 0.1]))
                item = f"gone{number % 5}" if strangers and choice.random() < 0.1 else f"i{number}"
                price = float(choice.integers(1, 99)) if choice.random() < 0.5 else math.nan
                made.append(Deed(f"p{person}", item, kind, begin + at * HOUR // 7, price))
    return made


def shop_of(items: list[Item], deeds: Sequence[Deed], settings: ShopSettings) -> Shop:
    deeds = sorted(deeds, key=lambda deed: deed.time)
    if settings.time.granularity == "day":
        deeds = [deed._replace(time=deed.time - deed.time % DAY) for deed in deeds]
    user_ids = sorted({deed.user for deed in deeds})
    item_ids = sorted({deed.item for deed in deeds})
    item = np.array([item_ids.index(deed.item) for deed in deeds], np.int32)
    events = Events(
        event_ids=np.array([f"e{n}" for n in range(len(deeds))], object),
        user=np.array([user_ids.index(deed.user) for deed in deeds], np.int32),
        user_ids=user_ids,
        item=item,
        item_ids=item_ids,
        number=np.array([item_number(i) for i in item_ids], np.int64)[item],
        kind=np.array([list(settings.event_types).index(deed.kind) for deed in deeds], np.int16),
        time=np.array([deed.time for deed in deeds], np.int64),
        price=np.array([deed.price for deed in deeds]),
        position=np.zeros(len(deeds), np.int32),
        session=np.full(len(deeds), -1, np.int32),
        session_ids=[],
        channel=np.array([int(deed.user[1:]) % 3 - 1 for deed in deeds], np.int32),
        channel_names=["web", "store"],
    )
    return Shop(settings, items, events, Photographs(Path("/nowhere")), {})


def vectors_of(count: int, seed: int = 1) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Unit vectors float16 in both spaces; every third item has no photograph."""
    choice = np.random.default_rng(seed)
    present = {"text": np.ones(count, bool), "image": np.arange(count) % 3 > 0}
    found = {}
    for space, known in present.items():
        values = choice.standard_normal((count, DIMENSION))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        found[space] = np.where(known[:, None], values, 0).astype(np.float16)
    return found, present


def graph_of(shop: Shop, vectors: dict[str, np.ndarray], present: dict[str, np.ndarray]) -> ItemGraph:
    """Relations of behaviour and of content over all items, as the pipeline joins them."""
    events = shop.events
    numbers = np.array([item_number(item.id) for item in shop.items], np.int64)
    nodes = np.unique(np.concatenate([numbers, events.number]))
    fitted = fit_item_graph(
        events.user.astype(np.int64), baskets(events), events.time, events.number, nodes=nodes
    )
    content = {
        space: content_relation(vectors[space], present[space], numbers, nodes, events.number, threshold=0.3)
        for space in vectors
    }
    return ItemGraph(fitted.numbers, {**fitted.relations, **content})


def sequence_of(
    shop: Shop, vectors: dict[str, np.ndarray], present: dict[str, np.ndarray], directory: Path
) -> Path | None:
    """A sequence model that hardly learned anything; None when there is nothing to learn from."""
    table = ItemTable.of(shop.items, vectors, present, [created(item) for item in shop.items])
    engaged = Engagements.of(shop.events, dict(shop.settings.event_types), table, (FIRST + DAYS) * DAY)
    net = fit_sequence(engaged, table, SequenceTraining(epochs=1, width=8), ["colour"])
    if net is None:
        return None
    write_sequence(directory, net)
    return directory


def questions_of(shop: Shop, since: int = FIRST + 5) -> list[Question]:
    """Past questions, and what they do not have: a stranger, one with a session and one without."""
    targets = tuple(shop.settings.targets)
    asked = make_questions(shop.events, dict(shop.settings.event_types), targets, since * DAY)
    late, none = (FIRST + DAYS - 2) * DAY + 10 * HOUR + 17, np.empty(0, np.int64)
    asked.append(Question("nobody", late, (), none))
    asked.append(Question("nobody", late, ((item_number("i3"), "click"), (item_number("i8"), "click")), none))
    return asked


class Served(NamedTuple):
    """What serving made of a question: sources by item number, all features, and their order."""

    sources: dict[int, set[str]]
    numbers: np.ndarray
    matrix: np.ndarray


def serve(
    shop: Shop,
    graph: ItemGraph,
    vectors: dict[str, np.ndarray],
    present: dict[str, np.ndarray],
    sequence: Path | None,
    questions: Sequence[Question],
    root: Path,
) -> list[Served]:
    """The questions asked of the three services in one process, over a bundle of these parts."""
    staged = root / "staged"
    staged.mkdir()
    make_text_encoder(staged / "text")
    make_image_encoder(staged / "image")
    items = [
        replace(item, image_hash=bytes([at % 256, at // 256])) if present["image"][at] else item
        for at, item in enumerate(shop.items)
    ]
    write_catalogue(staged / "catalogue", Catalogue(items, vectors, present))
    graph.save(staged / "graph")
    if sequence is not None:
        shutil.copytree(sequence, staged / "sequence")
    bundle = Bundle(publish(staged, root / "bundles", pipeline.profile(shop), moment_of(FIRST * DAY)))
    settings = Settings(bundle=bundle.directory, state=root / "state", address="127.0.0.1:0")
    import_events(settings, bundle, shop)
    policy = shop.settings.task.exclude_bought
    ids = {item_number(i): i for i in [*(item.id for item in shop.items), *shop.events.item_ids]}

    async def ask() -> list[Served]:
        app = App(settings)
        await app.start()
        assert app.gateway is not None
        domain = app._local[RANKING]._ranking
        found = []
        for question in questions:
            session = [event_pb2.SessionItem(item_id=ids[n], type=kind) for n, kind in question.session]
            person = ranking_pb.Person(user_id=question.user_id, session=session)
            as_of = moment_of(question.as_of)
            with deadline.within(300):
                got = await app.gateway.pipeline.run(Wish(person, as_of, exclude_bought=policy))
            assert not got.degraded
            sources = {n: set(s) for n, s in got.candidates.sources.items() if n in set(got.numbers)}
            query, _ = domain.query(Person(question.user_id, session=question.session), as_of)
            table = domain.view.table
            matrix = domain.features.matrix(query, np.arange(table.length), domain.moment(as_of))
            found.append(Served(sources, table.item_numbers.copy(), matrix))
        await app.stop()
        return found

    return asyncio.run(ask())


def trained(past: Replay, question: Question) -> Served:
    """The same of training."""
    now, query = past.at(question.as_of), past.query(question)
    rows, bits = past.candidates(query, now, past.live(question.as_of))
    names = past.source_names
    sources = {
        int(past.table.item_numbers[row]): {n for at, n in enumerate(names) if bit >> at & 1}
        for row, bit in zip(rows.tolist(), bits.tolist(), strict=True)
    }
    matrix = past.features(now).matrix(query, np.arange(past.table.length), now)
    return Served(sources, past.table.item_numbers, matrix)


def assert_alike(served: Served, learned: Served) -> None:
    assert served.sources == learned.sources
    one, other = np.argsort(served.numbers), np.argsort(learned.numbers)
    np.testing.assert_array_equal(served.numbers[one], learned.numbers[other])
    left, right = served.matrix[one], learned.matrix[other]
    whole = (left == np.round(left)) & (np.abs(left) > 1)
    np.testing.assert_array_equal(left[whole], right[whole])
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def both(shop: Shop, questions: Sequence[Question], root: Path) -> list[tuple[Served, Served]]:
    """What serving gives for each question and what training sees, through one graph and the same vectors."""
    vectors, present = vectors_of(len(shop.items))
    graph = graph_of(shop, vectors, present)
    sequence = sequence_of(shop, vectors, present, root / "sequence")
    past = Replay(shop, dict.fromkeys(range(FIRST, FIRST + DAYS + 1), graph), vectors, present, sequence)
    answers = serve(shop, graph, vectors, present, sequence, questions, root)
    return [(answer, trained(past, q)) for q, answer in zip(questions, answers, strict=True)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("count", [60, 160])  # fewer and more than are looked for around an interest
def test_training_sees_the_candidates_and_features_that_serving_gives(
    granularity: Granularity, count: int, tmp_path: Path
) -> None:
    shop = shop_of(items_of(count), deeds_of(count, seed=0, strangers=False), settings_of(granularity))
    questions = questions_of(shop)
    assert len(questions) > 20
    for served, learned in both(shop, questions, tmp_path):
        assert_alike(served, learned)


def test_a_shop_of_one_more_item_than_was_seen_proposes_it_in_both(tmp_path: Path) -> None:
    deeds = [Deed("p0", "i0", "purchase", FIRST * DAY), Deed("p1", "i1", "click", FIRST * DAY)]
    shop = shop_of(items_of(2), deeds, settings_of("hour"))
    asked = [Question(user, (FIRST + 2) * DAY, (), np.empty(0, np.int64)) for user in ("p0", "p1", "p2")]
    for served, learned in both(shop, asked, tmp_path):
        assert_alike(served, learned)


def test_items_that_the_catalogue_does_not_know_are_no_interests(tmp_path: Path) -> None:
    shop = shop_of(items_of(160), deeds_of(160, seed=0), settings_of("hour"))
    late, session = (FIRST + DAYS) * DAY - 7, ((item_number("gone1"), "purchase"),)
    gone = Question("p0", late, session, np.empty(0, np.int64))
    for served, learned in both(shop, [*questions_of(shop), gone], tmp_path):
        assert_alike(served, learned)


def test_what_was_only_shown_is_neither_looked_for_nor_proposed(tmp_path: Path) -> None:
    shop = shop_of(items_of(160), deeds_of(160, seed=0, strangers=False), settings_of("hour"))
    late, none = (FIRST + DAYS) * DAY - 7, np.empty(0, np.int64)
    shown = tuple((item_number(f"i{n}"), "impression") for n in range(10, 20))
    bought = ((item_number("i30"), "purchase"),)
    sessions = (bought, (*bought, *shown))
    asked = [Question("nobody", late, session, none) for session in sessions]
    (plain, _), (seen, _) = both(shop, asked, tmp_path)
    out = {number for number, _ in shown}
    assert plain.sources.keys() & out
    assert not seen.sources.keys() & out
    for number in plain.sources.keys() - out:  # those shown leave places to others at the end of a list
        assert plain.sources[number] <= seen.sources[number]
    np.testing.assert_array_equal(plain.matrix, seen.matrix)


def test_a_past_longer_than_is_looked_at_is_cut_alike(tmp_path: Path) -> None:
    busy = [Deed("p0", f"i{n * 7 % 450}", "click", (FIRST + 4) * DAY + n * HOUR // 9) for n in range(260)]
    shop = shop_of(items_of(500), [*deeds_of(500, seed=1, strangers=False), *busy], settings_of("hour"))
    session = tuple((item_number(f"i{n}"), "click") for n in range(100, 190))
    late, none = (FIRST + 9) * DAY, np.empty(0, np.int64)
    for served, learned in both(shop, [Question("p0", late, s, none) for s in (session, ())], tmp_path):
        assert_alike(served, learned)


def test_what_was_bought_takes_no_place_where_it_is_to_be_left_out(tmp_path: Path) -> None:
    settings = settings_of("hour", task=Task(exclude_bought=True))
    shop = shop_of(items_of(200), deeds_of(200, 2, strangers=False), settings)
    questions = questions_of(shop, since=FIRST + 8)
    for question, (served, learned) in zip(questions, both(shop, questions, tmp_path), strict=True):
        mine = [user == question.user_id for user in np.array(shop.events.user_ids)[shop.events.user]]
        bought = (
            np.array(mine)
            & (shop.events.kind == list(WEIGHTS).index("purchase"))
            & (shop.events.time < question.as_of)
        )
        assert not served.sources.keys() & set(shop.events.number[bought].tolist())
        assert_alike(served, learned)


def test_what_is_not_for_sale_takes_no_place_of_what_is(tmp_path: Path) -> None:
    shop = shop_of(items_of(200, windows=True), deeds_of(200, 2, strangers=False), settings_of("hour"))
    gone = {item_number(item.id) for n, item in enumerate(shop.items) if n % 5 in (1, 2)}
    for served, learned in both(shop, questions_of(shop, since=FIRST + 8), tmp_path):
        assert not gone & served.sources.keys()
        assert_alike(served, learned)


def test_an_import_gives_every_event_its_own_type(tmp_path: Path) -> None:
    types = {"view": 0.1, "cart": 0.5, "purchase": 1.0, "impression": 0.0}  # in no order of the alphabet
    deeds = [Deed("p0", f"i{n}", kind, FIRST * DAY + n) for n, kind in enumerate(types)]
    shop = shop_of(items_of(4), deeds, settings_of("hour", event_types=types))
    staged = tmp_path / "staged"
    staged.mkdir()
    bundle = Bundle(publish(staged, tmp_path / "bundles", pipeline.profile(shop), moment_of(FIRST * DAY)))
    settings = Settings(bundle=bundle.directory, state=tmp_path / "state")
    assert import_events(settings, bundle, shop) == 4
    engine = store.open_engine(f"sqlite:///{tmp_path / 'state' / 'ranking'}.sqlite")
    kept = BehaviourStore(engine, types, lambda: datetime.now(UTC))
    assert kept.counts() == {(item_number(f"i{n}"), kind): 1 for n, kind in enumerate(types)}
    kept.close()
    engine.dispose()


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
