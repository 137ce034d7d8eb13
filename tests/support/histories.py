"""Synthetic shops: items, interactions, and the models fitted on them."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from services.catalog.bundle import creation_time
from services.catalog.item_table import ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.ranking.models.co_occurrence import ItemGraph
from services.ranking.models.sequence import write_sequence
from services.ranking.models.taste import PriceScale, TasteModel, TasteSettings, write_taste
from tests.support.models import DIMENSION
from training.data.config import ItemColumns, RankingTraining, SequenceTraining, ShopConfig, Time
from training.data.dataset import Events, ShopData
from training.data.images import ShopImages
from training.examples.point_in_time import PointInTime
from training.examples.queries import DAY, EvalQuery, baskets, make_eval_queries
from training.retrieval.item_graph import content_relation, fit_item_graph
from training.retrieval.sequence import Engagements, fit_sequence

HOUR = DAY // 24

FIRST = 20_000
DAYS = 12
WEIGHTS = {"impression": 0.0, "click": 0.25, "purchase": 1.0}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Granularity = Literal["hour", "day"]
GRANULARITIES: tuple[Granularity, ...] = ("hour", "day")


class Interaction(NamedTuple):
    """A row of the events of a shop; `time` in microseconds since 1970."""

    user: str
    item: str
    kind: str
    time: int
    price: float = math.nan


def datetime_of(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)


def shop_config(granularity: Granularity, **more: object) -> ShopConfig:
    result = ShopConfig(
        items=ItemColumns(text_attributes=("colour",), number_attributes=("size",)),
        event_types=WEIGHTS,
        time=Time(granularity=granularity),
        ranking=RankingTraining(ranking_days=3, candidates_per_query=20),
    )
    return result.model_copy(update=more)


def make_items(count: int, *, priced: bool = True, windows: bool = False) -> list[Item]:
    """Items in families of three and three colors, some of them new; `windows` takes some off sale."""
    result = []
    for n in range(count):
        start, end = datetime_of((FIRST - (20 + n % 9 if n % 4 == 0 else 300)) * DAY), None
        if windows and n % 5 == 1:
            start = datetime_of((FIRST + DAYS + 30) * DAY)
        if windows and n % 5 == 2:
            end = datetime_of((FIRST + 5) * DAY)
        result.append(
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
    return result


def random_interactions(count: int, seed: int, *, unknown_items: bool = True) -> list[Interaction]:
    """Interactions of ten users, one basket a user on most days; the last fifth of the items has none."""
    choice = np.random.default_rng(seed)
    result = []
    for day in range(DAYS):
        for user in range(10):
            if choice.random() < 0.3:
                continue
            begin = (FIRST + day) * DAY + int(choice.integers(0, 20)) * HOUR
            for at in range(int(choice.integers(1, 6))):
                number = int(choice.integers(0, count * 4 // 5))
                kind = str(choice.choice(["purchase", "click", "impression"], p=[0.6, 0.3, 0.1]))
                item = f"gone{number % 5}" if unknown_items and choice.random() < 0.1 else f"i{number}"
                price = float(choice.integers(1, 99)) if choice.random() < 0.5 else math.nan
                result.append(Interaction(f"p{user}", item, kind, begin + at * HOUR // 7, price))
    return result


def make_shop(items: list[Item], interactions: Sequence[Interaction], settings: ShopConfig) -> ShopData:
    interactions = sorted(interactions, key=lambda interaction: interaction.time)
    if settings.time.granularity == "day":
        interactions = [
            interaction._replace(time=interaction.time - interaction.time % DAY)
            for interaction in interactions
        ]
    user_ids = sorted({interaction.user for interaction in interactions})
    item_ids = sorted({interaction.item for interaction in interactions})
    item = np.array([item_ids.index(interaction.item) for interaction in interactions], np.int32)
    events = Events(
        event_ids=np.array([f"e{n}" for n in range(len(interactions))], object),
        user=np.array([user_ids.index(interaction.user) for interaction in interactions], np.int32),
        user_ids=user_ids,
        item=item,
        item_ids=item_ids,
        number=np.array([item_hash(i) for i in item_ids], np.int64)[item],
        kind=np.array(
            [list(settings.event_types).index(interaction.kind) for interaction in interactions], np.int16
        ),
        time=np.array([interaction.time for interaction in interactions], np.int64),
        price=np.array([interaction.price for interaction in interactions]),
        position=np.zeros(len(interactions), np.int32),
        session=np.full(len(interactions), -1, np.int32),
        session_ids=[],
        channel=np.array([int(interaction.user[1:]) % 3 - 1 for interaction in interactions], np.int32),
        channel_names=["web", "store"],
    )
    return ShopData(settings, items, events, ShopImages(Path("/nowhere")), {})


def random_vectors(count: int, seed: int = 1) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Unit vectors, float16, in both spaces; every third item has no image."""
    choice = np.random.default_rng(seed)
    present = {"text": np.ones(count, bool), "image": np.arange(count) % 3 > 0}
    vectors = {}
    for space, mask in present.items():
        values = choice.standard_normal((count, DIMENSION))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        vectors[space] = np.where(mask[:, None], values, 0).astype(np.float16)
    return vectors, present


def fit_graph(shop: ShopData, vectors: dict[str, np.ndarray], present: dict[str, np.ndarray]) -> ItemGraph:
    """The item graph of co-occurrence and content relations, as the pipeline builds it."""
    events = shop.events
    item_hashes = np.array([item_hash(item.id) for item in shop.items], np.int64)
    nodes = np.unique(np.concatenate([item_hashes, events.number]))
    graphs = fit_item_graph(
        events.user.astype(np.int64), baskets(events), events.time, events.number, nodes=nodes
    )
    content = {
        space: content_relation(
            vectors[space], present[space], item_hashes, nodes, events.number, threshold=0.3
        )
        for space in vectors
    }
    return ItemGraph(graphs.item_hashes, {**graphs.relations, **content})


def fit_sequence_model(
    shop: ShopData, vectors: dict[str, np.ndarray], present: dict[str, np.ndarray], directory: Path
) -> Path | None:
    """A sequence model after one epoch, or None if the shop has nothing to learn from."""
    table = ItemTable.of(shop.items, vectors, present, [creation_time(item) for item in shop.items])
    engagements = Engagements.of(shop.events, dict(shop.settings.event_types), table, (FIRST + DAYS) * DAY)
    net = fit_sequence(engagements, table, SequenceTraining(epochs=1, embedding_size=8), ["colour"])
    if net is None:
        return None
    write_sequence(directory, net)
    return directory


def drawn_taste_model(shop: ShopData, directory: Path) -> Path:
    """A taste model of random effects, in which items of even number count as new."""
    random = np.random.default_rng(3)
    hashes = np.sort(np.array([item_hash(item.id) for item in shop.items[1::2]], np.int64))
    settings = TasteSettings(
        attributes=("colour", "family_id"),
        variances=(0.8, 0.2, 0.4, 0.1),
        value_effects={"colour": {"red": 0.3, "blue": -0.2, "gone": 1.0}},
        price_effects=(0.1, -0.2),
        intercept=-1.0,
        strong_slope=0.6,
        strong_intercept=-0.5,
        price=PriceScale("colour", {"red": 3.0, "green": 3.5}, 3.2, 0.7),
    )
    write_taste(
        directory, TasteModel(settings, hashes, random.standard_normal(len(hashes)).astype(np.float32))
    )
    return directory


def make_queries(shop: ShopData, since: int = FIRST + 5) -> list[EvalQuery]:
    """Evaluation queries of the shop, and two of an unknown user: without a session and with one."""
    targets = tuple(shop.settings.targets)
    queries = make_eval_queries(shop.events, dict(shop.settings.event_types), targets, since * DAY)
    late, none = (FIRST + DAYS - 2) * DAY + 10 * HOUR + 17, np.empty(0, np.int64)
    queries.append(EvalQuery("nobody", late, (), none))
    queries.append(EvalQuery("nobody", late, ((item_hash("i3"), "click"), (item_hash("i8"), "click")), none))
    return queries


class RankingInput(NamedTuple):
    """What ranks the items of a query: sources by item hash, and the feature matrix with its item hashes."""

    sources: dict[int, set[str]]
    item_hashes: np.ndarray
    matrix: np.ndarray


def training_input(past: PointInTime, query: EvalQuery) -> RankingInput:
    """The ranking input that training computes for a query."""
    now, user_query = past.stats_at(query.as_of), past.query(query)
    rows, scores = past.candidates(user_query, query.as_of, past.live(query.as_of))
    bits = past.source_bits(scores)
    names = past.source_names
    sources = {
        int(past.table.item_hashes[row]): {n for at, n in enumerate(names) if bit >> at & 1}
        for row, bit in zip(rows.tolist(), bits.tolist(), strict=True)
    }
    matrix = past.features(query.as_of).matrix(user_query, np.arange(past.table.length), now)
    return RankingInput(sources, past.table.item_hashes, matrix)


def assert_same_input(serving: RankingInput, training: RankingInput) -> None:
    assert serving.sources == training.sources
    one, other = np.argsort(serving.item_hashes), np.argsort(training.item_hashes)
    np.testing.assert_array_equal(serving.item_hashes[one], training.item_hashes[other])
    left, right = serving.matrix[one], training.matrix[other]
    whole = (left == np.round(left)) & (np.abs(left) > 1)
    np.testing.assert_array_equal(left[whole], right[whole])
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
