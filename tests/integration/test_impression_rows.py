"""Training and serving compute the same candidates and features."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from cli.import_events import import_events
from services.catalog.bundle import Bundle, BundleCatalog, publish, write_catalog
from services.catalog.items import item_hash
from services.core import deadline
from services.core.errors import FailedPrecondition
from services.gateway.query import RecommendQuery, SessionItem
from services.gateway.query import User as QueryUser
from services.ranking.events.event_store import EventStore
from services.ranking.models.co_occurrence import ItemGraph
from services.ranking.state.query_builder import User
from services.serving.app import App
from services.serving.loaded_bundle import RANKING
from services.serving.settings import Settings
from services.storage import store
from services.storage.database_lock import lock_database
from tests.support.histories import (
    DAYS,
    FIRST,
    GRANULARITIES,
    HOUR,
    WEIGHTS,
    Granularity,
    Interaction,
    RankingInput,
    assert_same_input,
    datetime_of,
    drawn_taste_model,
    fit_graph,
    fit_sequence_model,
    make_items,
    make_queries,
    make_shop,
    random_interactions,
    random_vectors,
    shop_config,
    training_input,
)
from tests.support.models import make_image_encoder, make_text_encoder
from training import pipeline
from training.data.config import Evaluation
from training.data.dataset import ShopData
from training.examples.point_in_time import PointInTime
from training.examples.queries import DAY, EvalQuery


async def serve(
    shop: ShopData,
    graph: ItemGraph,
    vectors: dict[str, np.ndarray],
    present: dict[str, np.ndarray],
    sequence: Path | None,
    taste: Path,
    questions: Sequence[EvalQuery],
    root: Path,
) -> list[RankingInput]:
    """The questions asked of the three services in one process, over a bundle of these parts."""
    staging = root / "staged"
    staging.mkdir()
    make_text_encoder(staging / "text")
    make_image_encoder(staging / "image")
    items = [
        replace(item, image_hash=bytes([at % 256, at // 256])) if present["image"][at] else item
        for at, item in enumerate(shop.items)
    ]
    write_catalog(staging / "catalog", BundleCatalog(items, vectors, present))
    graph.save(staging / "graph")
    if sequence is not None:
        shutil.copytree(sequence, staging / "sequence")
    shutil.copytree(taste, staging / "taste")
    bundle = Bundle(publish(staging, root / "bundles", pipeline.shop_schema(shop), datetime_of(FIRST * DAY)))
    settings = Settings(bundle=bundle.directory, state=root / "state", address="127.0.0.1:0")
    import_events(settings, bundle, shop)
    policy = shop.settings.task.exclude_purchased
    ids = {item_hash(i): i for i in [*(item.id for item in shop.items), *shop.events.item_ids]}

    inputs = []
    app = App(settings)
    await app.start()
    assert app.gateway is not None
    domain = app.current.ranking
    for question in questions:
        session = tuple(SessionItem(ids[n], kind) for n, kind in question.session)
        user = QueryUser(question.user_id, session=session)
        as_of = datetime_of(question.as_of)
        with deadline.within(300):
            page = await app.gateway.pipeline.run(RecommendQuery(user, as_of, exclude_purchased=policy))
        assert not page.degraded
        sources = {n: set(page.candidates.sources_of(n)) for n in page.item_hashes}
        query, _ = domain.query(User(question.user_id, session=question.session), as_of)
        table = domain.view.table
        matrix = domain.features.matrix(query, np.arange(table.length), domain.stats(as_of))
        inputs.append(RankingInput(sources, table.item_hashes.copy(), matrix))
    await app.stop()
    return inputs


async def both(
    shop: ShopData, questions: Sequence[EvalQuery], root: Path
) -> list[tuple[RankingInput, RankingInput]]:
    """What serving gives for each question and what training sees, through one graph and the same vectors."""
    vectors, present = random_vectors(len(shop.items))
    graph = fit_graph(shop, vectors, present)
    sequence = fit_sequence_model(shop, vectors, present, root / "sequence")
    taste = drawn_taste_model(shop, root / "taste")
    graphs = dict.fromkeys(range(FIRST, FIRST + DAYS + 1), graph)
    past = PointInTime(shop, graphs, vectors, present, sequence, taste)
    answers = await serve(shop, graph, vectors, present, sequence, taste, questions, root)
    return [(answer, training_input(past, q)) for q, answer in zip(questions, answers, strict=True)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("count", [60, 160])  # fewer and more than are looked for around an interest
async def test_training_sees_the_candidates_and_features_that_serving_gives(
    granularity: Granularity, count: int, tmp_path: Path
) -> None:
    shop = make_shop(
        make_items(count), random_interactions(count, seed=0, unknown_items=False), shop_config(granularity)
    )
    questions = make_queries(shop)
    assert len(questions) > 20
    for serving, training in await both(shop, questions, tmp_path):
        assert_same_input(serving, training)


async def test_an_unseen_item_is_proposed_in_training_and_serving(tmp_path: Path) -> None:
    interactions = [
        Interaction("p0", "i0", "purchase", FIRST * DAY),
        Interaction("p1", "i1", "click", FIRST * DAY),
    ]
    shop = make_shop(make_items(2), interactions, shop_config("hour"))
    queries = [EvalQuery(user, (FIRST + 2) * DAY, (), np.empty(0, np.int64)) for user in ("p0", "p1", "p2")]
    for serving, training in await both(shop, queries, tmp_path):
        assert_same_input(serving, training)


async def test_items_outside_the_catalog_are_no_interests(tmp_path: Path) -> None:
    shop = make_shop(make_items(160), random_interactions(160, seed=0), shop_config("hour"))
    late, session = (FIRST + DAYS) * DAY - 7, ((item_hash("gone1"), "purchase"),)
    query = EvalQuery("p0", late, session, np.empty(0, np.int64))
    for serving, training in await both(shop, [*make_queries(shop), query], tmp_path):
        assert_same_input(serving, training)


async def test_impressions_alone_are_neither_queried_nor_proposed(tmp_path: Path) -> None:
    shop = make_shop(
        make_items(160), random_interactions(160, seed=0, unknown_items=False), shop_config("hour")
    )
    late, none = (FIRST + DAYS) * DAY - 7, np.empty(0, np.int64)
    impressions = tuple((item_hash(f"i{n}"), "impression") for n in range(10, 20))
    purchases = ((item_hash("i30"), "purchase"),)
    sessions = (purchases, (*purchases, *impressions))
    queries = [EvalQuery("nobody", late, session, none) for session in sessions]
    (plain, _), (with_impressions, _) = await both(shop, queries, tmp_path)
    out = {number for number, _ in impressions}
    assert plain.sources.keys() & out
    assert not with_impressions.sources.keys() & out
    for number in plain.sources.keys() - out:  # those shown leave places to others at the end of a list
        assert plain.sources[number] <= with_impressions.sources[number]
    np.testing.assert_array_equal(plain.matrix, with_impressions.matrix)


async def test_a_long_history_is_truncated_alike(tmp_path: Path) -> None:
    busy = [
        Interaction("p0", f"i{n * 7 % 450}", "click", (FIRST + 4) * DAY + n * HOUR // 9) for n in range(260)
    ]
    shop = make_shop(
        make_items(500), [*random_interactions(500, seed=1, unknown_items=False), *busy], shop_config("hour")
    )
    session = tuple((item_hash(f"i{n}"), "click") for n in range(100, 190))
    late, none = (FIRST + 9) * DAY, np.empty(0, np.int64)
    for serving, training in await both(
        shop, [EvalQuery("p0", late, s, none) for s in (session, ())], tmp_path
    ):
        assert_same_input(serving, training)


async def test_excluded_purchases_take_no_candidate_slot(tmp_path: Path) -> None:
    settings = shop_config("hour", task=Evaluation(exclude_purchased=True))
    shop = make_shop(make_items(200), random_interactions(200, 2, unknown_items=False), settings)
    questions = make_queries(shop, since=FIRST + 8)
    for question, (serving, training) in zip(questions, await both(shop, questions, tmp_path), strict=True):
        of_user = [user == question.user_id for user in np.array(shop.events.user_ids)[shop.events.user]]
        is_purchase = (
            np.array(of_user)
            & (shop.events.kind == list(WEIGHTS).index("purchase"))
            & (shop.events.time < question.as_of)
        )
        assert not serving.sources.keys() & set(shop.events.number[is_purchase].tolist())
        assert_same_input(serving, training)


async def test_unavailable_items_take_no_candidate_slot(tmp_path: Path) -> None:
    shop = make_shop(
        make_items(200, windows=True), random_interactions(200, 2, unknown_items=False), shop_config("hour")
    )
    unavailable = {item_hash(item.id) for n, item in enumerate(shop.items) if n % 5 in (1, 2)}
    for serving, training in await both(shop, make_queries(shop, since=FIRST + 8), tmp_path):
        assert not unavailable & serving.sources.keys()
        assert_same_input(serving, training)


def test_an_import_refuses_what_write_events_refuses(tmp_path: Path) -> None:
    types = {"view": 0.1, "purchase": 1.0}
    future = (datetime(2037, 1, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
        microseconds=1
    )
    interactions = [Interaction("p0", "i0", "view", FIRST * DAY), Interaction("p0", "i1", "purchase", future)]
    interactions += [
        Interaction("p1", "i2", "purchase", FIRST * DAY + 1),
        Interaction("p1", "i3", "view", -1),
    ]
    shop = make_shop(make_items(4), interactions, shop_config("hour", event_types=types))
    staging = tmp_path / "staged"
    staging.mkdir()
    profile = replace(pipeline.shop_schema(shop), event_types={"purchase": 1.0})
    bundle = Bundle(publish(staging, tmp_path / "bundles", profile, datetime_of(FIRST * DAY)))
    settings = Settings(bundle=bundle.directory, state=tmp_path / "state")
    result = import_events(settings, bundle, shop)
    assert (result.recorded, result.duplicates, result.refused) == (1, 0, 3)
    reasons = "\n".join(result.refusals)
    for reason in ("occurred_at: is 2037-01-01", "type: is none of purchase", "before 1970"):
        assert reason in reasons
    again = import_events(settings, bundle, shop)
    assert (again.recorded, again.duplicates, again.refused) == (0, 1, 3)


def test_an_import_gives_every_event_its_own_type(tmp_path: Path) -> None:
    types = {"view": 0.1, "cart": 0.5, "purchase": 1.0, "impression": 0.0}  # in no order of the alphabet
    interactions = [Interaction("p0", f"i{n}", kind, FIRST * DAY + n) for n, kind in enumerate(types)]
    shop = make_shop(make_items(4), interactions, shop_config("hour", event_types=types))
    staging = tmp_path / "staged"
    staging.mkdir()
    bundle = Bundle(
        publish(staging, tmp_path / "bundles", pipeline.shop_schema(shop), datetime_of(FIRST * DAY))
    )
    settings = Settings(bundle=bundle.directory, state=tmp_path / "state")
    engine = store.open_engine(f"sqlite:///{tmp_path / 'state' / 'ranking'}.sqlite")
    (tmp_path / "state").mkdir()
    lock = lock_database(engine, RANKING, "one that serves")
    with pytest.raises(FailedPrecondition, match="in use by this process"):
        import_events(settings, bundle, shop)
    lock.release()
    assert import_events(settings, bundle, shop).recorded == 4
    events = EventStore(engine, types, lambda: datetime.now(UTC))
    assert events.counts() == {(item_hash(f"i{n}"), kind): 1 for n, kind in enumerate(types)}
    events.close()
    engine.dispose()
