"""A served Rank selects candidates by the first phase, over rows that equal those of training."""

import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from vitrine.catalog.v1 import event_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from cli.import_events import import_events
from services.catalog.bundle import Bundle, BundleCatalog, publish, write_catalog
from services.catalog.candidate_sources import NAMES
from services.catalog.items import item_hash
from services.core import deadline
from services.gateway.query import RecommendQuery, SessionItem
from services.gateway.query import User as QueryUser
from services.ranking.models.first_phase import (
    COLUMNS,
    FirstPhase,
    FirstPhaseScorer,
    SourceColumn,
    first_phase_rows,
    write_first_phase,
)
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import RerankerModel, write_reranker
from services.ranking.models.scaler import FeatureScaler
from services.ranking.state.item_stats import ItemStats
from services.serving.app import App
from services.serving.settings import Settings
from tests.support.histories import (
    DAYS,
    FIRST,
    datetime_of,
    fit_graph,
    fit_sequence_model,
    make_items,
    make_queries,
    make_shop,
    random_interactions,
    random_vectors,
    shop_config,
)
from tests.support.models import make_image_encoder, make_text_encoder
from tests.support.shop_server import NOW, Shop, violations
from tests.support.shops import items, make_bundle
from training import pipeline
from training.examples.feature_rows import evaluation_rows
from training.examples.point_in_time import PointInTime
from training.examples.queries import DAY

DEPTH = 6
IDS = [item.id for item in items()]


def choice_of(columns: tuple[str, ...], weights: Mapping[str, float]) -> ConditionalLogit:
    weight = [weights.get(name, 0.0) for name in columns]
    return ConditionalLogit(list(columns), FeatureScaler.plain(len(columns)), weight)


FIRST_PHASE = choice_of(COLUMNS, {"popular": 1.0})


def write_models(staging: Path, depth: int = DEPTH) -> None:
    """A first phase that goes by the source "popular", and a second one that goes by price and basket."""
    directory = staging / "reranker"
    directory.mkdir()
    weights = {"price": -1.0, "baskets_session": 20.0}
    write_reranker(directory, RerankerModel(choice_of(tuple(weights), weights), None))
    write_first_phase(directory, FirstPhase(FIRST_PHASE, depth))


@pytest.fixture(scope="module")
def two_phase_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("two_phases"), more=write_models)


@pytest.fixture
async def ranking(two_phase_bundle: Path, tmp_path: Path) -> AsyncIterator[Any]:
    """A stub of the ranking service."""
    app = App(Shop(two_phase_bundle, tmp_path / "state", "one").settings())
    await app.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        yield ranking_grpc.RankingServiceStub(channel)
    await app.stop()


def rank_request(ids: list[str], *sources: tuple[str, list[int], list[float]]) -> ranking_pb.RankRequest:
    session = [event_pb2.SessionItem(item_id="garden-03")]
    request = ranking_pb.RankRequest(user=ranking_pb.User(session=session), item_ids=ids)
    request.as_of.FromDatetime(NOW)
    for source, indices, scores in sources:
        request.sources.add(source=source, indices=indices, scores=scores)
    return request


@pytest.mark.parametrize("seed", range(4))
async def test_the_second_phase_scores_as_without_a_first_one(ranking: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ids = generator.permutation([*IDS, "unknown"]).tolist()
    known = np.array([item_id != "unknown" for item_id in ids])
    popular = generator.permutation(len(ids)).astype(float) + 1
    quota = sorted(generator.permutation(len(ids))[:5].tolist())
    every = await ranking.Rank(rank_request(ids))
    response = await ranking.Rank(
        rank_request(ids, ("popular", list(range(len(ids))), popular.tolist()), ("quota", quota, [1.0] * 5))
    )
    assert not every.second_phase
    expected, scores = np.array(every.scores), np.array(response.scores)
    assert np.isnan(expected[~known]).all()
    assert np.isnan(scores[~known]).all()
    best = sorted(np.flatnonzero(known), key=lambda row: -popular[row])[:DEPTH]
    selected = sorted({int(row) for row in [*best, *quota] if known[row]})
    assert list(response.second_phase) == selected
    np.testing.assert_allclose(scores[selected], expected[selected], rtol=1e-6)
    components = {part.component: part.scores for part in response.components}
    for part in every.components:
        np.testing.assert_allclose(
            components[part.component], np.array(part.scores)[selected], rtol=1e-5, atol=1e-6
        )
    others = [row for row in np.flatnonzero(known) if row not in selected]
    assert (scores[others] < scores[selected].min()).all()
    assert (np.diff(scores[sorted(others, key=lambda row: popular[row])]) > 0).all()


async def test_a_candidate_without_a_source_is_below_those_of_the_source(ranking: Any) -> None:
    proposed = list(range(1, 2 * DEPTH, 2))
    request = rank_request(IDS[: 2 * DEPTH], ("popular", proposed, [1.0] * DEPTH))
    assert list((await ranking.Rank(request)).second_phase) == proposed


async def test_few_candidates_have_no_first_phase(ranking: Any) -> None:
    request = rank_request(IDS[:DEPTH], ("popular", [0], [1.0]))
    response = await ranking.Rank(request)
    assert not response.second_phase
    assert list(response.scores) == list((await ranking.Rank(rank_request(IDS[:DEPTH]))).scores)
    assert all(len(part.scores) == DEPTH for part in response.components)


WRONG_SOURCES = {
    "sources[0].indices": [("popular", [40], [1.0]), ("text", [0], [1.0])],
    "sources[1].indices": [("popular", [0], [1.0]), ("text", [0, 1 << 31], [1.0, 2.0])],
    "sources[1].indices ": [("popular", [0], [1.0]), ("text", [3, 2], [1.0, 2.0])],
    "sources[0].indices ": [("popular", [1, 1], [1.0, 2.0])],
    "sources[0].scores": [("popular", [0, 1], [1.0])],
    "sources[1].scores": [("popular", [0], [1.0]), ("quota", [], [1.0])],
    "sources[2].scores": [("popular", [], []), ("text", [3], [1.0]), ("image", [0, 1], [1.0, np.nan])],
    "sources[2].source": [("popular", [0], [1.0]), ("text", [0], [1.0]), ("popular", [1], [1.0])],
    "sources": [("popular", [0], [1.0])] * 17,
}


@pytest.mark.parametrize("field", WRONG_SOURCES)
async def test_a_wrong_source_is_an_invalid_argument_that_names_the_field(ranking: Any, field: str) -> None:
    assert len(IDS) == 40
    assert await violations(ranking.Rank(rank_request(IDS, *WRONG_SOURCES[field]))) == [field.strip()]


@pytest.mark.parametrize("score", [np.inf, -np.inf, np.nan])
async def test_scores_of_sources_are_finite(ranking: Any, score: float) -> None:
    call = ranking.Rank(rank_request(IDS, ("popular", [0, 1], [1.0, score])))
    assert await violations(call) == ["sources[0].scores"]


def source_matrix(sources: Sequence[SourceColumn], count: int) -> np.ndarray:
    """Scores (`count`, S) in the order of `NAMES`, NaN where a source does not propose a candidate."""
    matrix = np.full((count, len(NAMES)), np.nan, np.float32)
    for name, indices, scores in sources:
        if name in NAMES:
            matrix[indices, NAMES.index(name)] = scores
    return matrix


Served = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.mark.parametrize("granularity", ["hour", "day"])
async def test_a_served_rank_reads_the_rows_of_training(
    granularity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = make_shop(
        make_items(160), random_interactions(160, seed=0, unknown_items=False), shop_config(granularity)
    )
    vectors, present = random_vectors(len(shop.items))
    graph = fit_graph(shop, vectors, present)
    sequence = fit_sequence_model(shop, vectors, present, tmp_path / "sequence")
    past = PointInTime(shop, dict.fromkeys(range(FIRST, FIRST + DAYS + 1), graph), vectors, present, sequence)
    staging = tmp_path / "staged"
    staging.mkdir()
    make_text_encoder(staging / "text")
    make_image_encoder(staging / "image")
    catalog = [
        replace(item, image_hash=bytes([at, 1])) if present["image"][at] else item
        for at, item in enumerate(shop.items)
    ]
    write_catalog(staging / "catalog", BundleCatalog(catalog, vectors, present))
    graph.save(staging / "graph")
    assert sequence is not None
    shutil.copytree(sequence, staging / "sequence")
    write_models(staging, depth=1)
    bundle = Bundle(
        publish(staging, tmp_path / "bundles", pipeline.shop_schema(shop), datetime_of(FIRST * DAY))
    )
    settings = Settings(bundle=bundle.directory, state=tmp_path / "state", address="127.0.0.1:0")
    import_events(settings, bundle, shop)
    served: Served = []
    score = FirstPhaseScorer.score

    def recorded(
        scorer: FirstPhaseScorer, sources: Sequence[SourceColumn], rows: np.ndarray, stats: ItemStats
    ) -> np.ndarray:
        of_sources = source_matrix(sources, len(rows))
        matrix = first_phase_rows(of_sources, rows, stats)
        served.append((matrix, rows, of_sources))
        scores = score(scorer, sources, rows, stats)
        np.testing.assert_allclose(scores, FIRST_PHASE.terms(matrix).sum(1), rtol=1e-5, atol=1e-5)
        return scores

    monkeypatch.setattr(FirstPhaseScorer, "score", recorded)
    ids = {item_hash(i): i for i in [*(item.id for item in shop.items), *shop.events.item_ids]}
    app = App(settings)
    await app.start()
    assert app.gateway is not None
    table = app.current.ranking.view.table
    proposing = set[str]()
    for question in make_queries(shop):
        session = tuple(SessionItem(ids[n], kind) for n, kind in question.session)
        user = QueryUser(question.user_id, session=session)
        query = RecommendQuery(
            user, datetime_of(question.as_of), exclude_purchased=shop.settings.task.exclude_purchased
        )
        served.clear()
        with deadline.within(300):
            page = await app.gateway.pipeline.run(query)
        assert not page.degraded
        expected = evaluation_rows(past, [question], np.ones(len(shop.items), bool))
        [(matrix, rows, sources)] = served
        order = np.argsort(table.item_hashes[rows])
        expected_order = np.argsort(past.table.item_hashes[expected.items])
        np.testing.assert_array_equal(
            table.item_hashes[rows][order], past.table.item_hashes[expected.items][expected_order]
        )
        np.testing.assert_allclose(matrix[order], expected.first_phase[expected_order], rtol=1e-5, atol=1e-5)
        proposing |= {
            name for name, column in zip(NAMES, sources.T, strict=True) if not np.isnan(column).all()
        }
    await app.stop()
    assert proposing == set(NAMES)
