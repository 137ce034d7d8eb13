"""A small shop as a bundle, with known recommendations: users purchase items of one world together."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from services.catalog.bundle import BundleCatalog, ShopSchema, publish, write_catalog
from services.catalog.items import Attribute, Item, item_hash, item_text
from services.embedding.encoders.encoders import TextEncoder
from services.ranking.models.co_occurrence import ItemGraph, Relation
from tests.support.models import make_image_encoder, make_text_encoder

UNTIL = datetime(2026, 3, 1, tzinfo=UTC)
WORLDS = ("garden", "kitchen")
PER_WORLD = 20


def items() -> list[Item]:
    result = []
    for first, world in enumerate(WORLDS):
        for n in range(PER_WORLD):
            colour = ("red", "blue")[n % 2]
            result.append(
                Item(
                    id=f"{world}-{n:02}",
                    title=f"{world} thing {n + first * PER_WORLD}",  # no two titles share a rare word
                    attributes=(Attribute("world", (world,)), Attribute("colour", (colour,))),
                    family_id=f"{world}-family-{n // 2}",
                    price=float(n + 1),
                    available_from=UNTIL - timedelta(days=400),
                )
            )
    return result


def family(item_id: str) -> str:
    """An id of the family of an item of the shop."""
    world, number = item_id.split("-")
    return f"{world}-{int(number) // 2}"


def is_red(item_id: str) -> bool:
    return int(item_id.split("-")[1]) % 2 == 0


def price(item_id: str) -> int:
    return int(item_id.split("-")[1]) + 1


def graph() -> ItemGraph:
    """A graph that connects every two items of one world and no items of different worlds."""
    item_hashes = np.array(sorted(item_hash(item.id) for item in items()), np.int64)
    world = {item_hash(item.id): item.id.split("-")[0] for item in items()}
    near = [
        [m for m, b in enumerate(item_hashes) if b != a and world[int(b)] == world[int(a)]]
        for a in item_hashes
    ]
    start = np.cumsum([0, *(len(n) for n in near)]).astype(np.int64)
    flat = np.array([m for row in near for m in row], np.int32)
    return ItemGraph(item_hashes, {"baskets": Relation(start, flat, np.full(len(flat), 0.05, np.float32))})


EVENT_TYPES = {"impression": 0.0, "click": 0.3, "purchase": 1.0}


def make_bundle(
    root: Path,
    *,
    seed: int = 0,
    until: datetime = UNTIL,
    event_types: dict[str, float] | None = None,
    catalog: list[Item] | None = None,
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Publish the bundle of the shop or of another `catalog`; `more` writes components into it."""
    staging = root / "staged"
    staging.mkdir(parents=True)
    text = TextEncoder(make_text_encoder(staging / "text", seed=seed))
    make_image_encoder(staging / "image")
    all_items = items() if catalog is None else catalog
    vectors = text.encode([item_text(item) for item in all_items]).vectors
    present = np.ones(len(all_items), bool)
    write_catalog(staging / "catalog", BundleCatalog(all_items, {"text": vectors}, {"text": present}))
    graph().save(staging / "graph")
    if more is not None:
        more(staging)
    (staging / "popular").mkdir()
    order = list(all_items)
    random.Random(0).shuffle(order)
    np.save(staging / "popular" / "numbers.npy", np.array([item_hash(i.id) for i in order], np.int64))
    profile = ShopSchema(
        event_types=event_types or EVENT_TYPES,
        targets=("purchase",),
        granularity="hour",
        attributes=("world", "colour"),
    )
    return publish(staging, root / "bundles", profile, until)
