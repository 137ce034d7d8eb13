"""A small shop with a known right answer, as a bundle: two worlds whose items are bought together."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from services.bundle import Catalogue, Profile, publish, write_catalogue
from services.catalog import Attribute, Item, item_number, item_text
from services.embedding.encoders import TextEncoder
from services.ranking.graph import ItemGraph, Relation
from tests.models import make_image_encoder, make_text_encoder

UNTIL = datetime(2026, 3, 1, tzinfo=UTC)
WORLDS = ("garden", "kitchen")
PER_WORLD = 20


def items() -> list[Item]:
    made = []
    for first, world in enumerate(WORLDS):
        for n in range(PER_WORLD):
            colour = ("red", "blue")[n % 2]
            made.append(
                Item(
                    id=f"{world}-{n:02}",
                    title=f"{world} thing {n + first * PER_WORLD}",  # no two have a rare word in common
                    attributes=(Attribute("world", (world,)), Attribute("colour", (colour,))),
                    family_id=f"{world}-family-{n // 2}",
                    price=float(n + 1),
                    available_from=UNTIL - timedelta(days=400),
                )
            )
    return made


def graph() -> ItemGraph:
    """Within a world every two items were bought together once, across worlds none."""
    numbers = np.array(sorted(item_number(item.id) for item in items()), np.int64)
    world = {item_number(item.id): item.id.split("-")[0] for item in items()}
    near = [[m for m, b in enumerate(numbers) if b != a and world[int(b)] == world[int(a)]] for a in numbers]
    start = np.cumsum([0, *(len(n) for n in near)]).astype(np.int64)
    flat = np.array([m for row in near for m in row], np.int32)
    return ItemGraph(numbers, {"baskets": Relation(start, flat, np.full(len(flat), 0.05, np.float32))})


EVENT_TYPES = {"impression": 0.0, "click": 0.3, "purchase": 1.0}


def make_bundle(
    root: Path,
    *,
    seed: int = 0,
    until: datetime = UNTIL,
    event_types: dict[str, float] | None = None,
    more: Callable[[Path], None] | None = None,
) -> Path:
    """The shop's bundle; `more` writes further components into the directory that it is given."""
    staged = root / "staged"
    staged.mkdir(parents=True)
    text = TextEncoder(make_text_encoder(staged / "text", seed=seed))
    make_image_encoder(staged / "image")
    all_items = items()
    vectors = text.encode([item_text(item) for item in all_items]).vectors
    present = np.ones(len(all_items), bool)
    write_catalogue(staged / "catalogue", Catalogue(all_items, {"text": vectors}, {"text": present}))
    graph().save(staged / "graph")
    if more is not None:
        more(staged)
    (staged / "popular").mkdir()
    order = list(all_items)
    random.Random(0).shuffle(order)
    np.save(staged / "popular" / "numbers.npy", np.array([item_number(i.id) for i in order], np.int64))
    profile = Profile(
        event_types=event_types or EVENT_TYPES,
        targets=("purchase",),
        granularity="hour",
        attributes=("world", "colour"),
    )
    return publish(staged, root / "bundles", profile, until)
