"""Shops with a made-up past: items, what people did with them, and what is fitted on it."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from services.bundle import created
from services.catalog import Attribute, Item, item_number
from services.item_table import ItemTable
from services.ranking.graph import ItemGraph
from services.ranking.sequence import write_sequence
from tests.models import DIMENSION
from training.dataset import Events, Shop
from training.item_graph import content_relation, fit_item_graph
from training.photographs import Photographs
from training.queries import DAY, Question, baskets, make_questions
from training.replay import Replay
from training.sequence import Engagements, fit_sequence
from training.shop_settings import (
    ItemColumns,
    RankingTraining,
    SequenceTraining,
    ShopSettings,
    Time,
)

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


def trained(past: Replay, question: Question) -> Served:
    """What training sees of a question."""
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
