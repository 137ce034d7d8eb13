"""Training sees the candidates and features that serving gives, over one graph and the same vectors."""

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from vitrine.catalog.v1 import event_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import deadline, store
from services.bundle import Bundle, Catalogue, publish, write_catalogue
from services.catalog import item_number
from services.gateway.wish import Wish
from services.ranking.behaviour import BehaviourStore
from services.ranking.graph import ItemGraph
from services.ranking.ranking import Person
from services.replay import import_events
from services.settings import Settings
from services.wiring import App
from tests.models import make_image_encoder, make_text_encoder
from tests.pasts import (
    DAYS,
    FIRST,
    GRANULARITIES,
    HOUR,
    WEIGHTS,
    Deed,
    Granularity,
    Served,
    assert_alike,
    deeds_of,
    graph_of,
    items_of,
    moment_of,
    questions_of,
    sequence_of,
    settings_of,
    shop_of,
    trained,
    vectors_of,
)
from training import pipeline
from training.dataset import Shop
from training.queries import DAY, Question
from training.replay import Replay
from training.shop_settings import Task


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
        domain = app.now.ranking
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
