"""Synthetic shops of a given size: a bundle with all components, and a state with events; both are kept."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

import numpy as np

from bench.serving import drawn_events, drawn_models
from bench.serving.drawn_catalog import ATTRIBUTES, SPACES, UNTIL, DrawnItems, draw_vectors
from bench.serving.shops import Shop, prepared
from cli.import_events import import_events
from services.catalog.bundle import Bundle, BundleCatalog, ShopSchema, publish, published, write_catalog
from services.serving.settings import Settings
from training.data.config import ShopConfig
from training.data.events import Events
from training.data.images import ShopImages
from training.data.shop import ShopData

_MAX_POPULAR = 2000
_RECIPE = 3
"""Raise it if anything is drawn differently: bundles of another recipe are made anew."""


def synthetic_shop(count: int, cache: Path) -> Shop:
    """A shop of `count` drawn items; its bundle and state are kept in `cache`."""
    items = DrawnItems(count)
    ids = items.ids
    hashes = drawn_events.hashes_of(ids)

    def write(staged: Path) -> ShopSchema:
        drawn_models.write_encoders(staged)
        graph = drawn_events.draw_graph(items.cluster, items.weights, hashes)
        graph.save(staged / "graph")
        drawn_models.write_rankers(staged, graph)
        drawn_models.write_sequence_model(staged, hashes)
        present = {space: np.ones(count, bool) for space in SPACES}
        write_catalog(staged / "catalog", BundleCatalog(items, draw_vectors(items), present))
        write_popular(staged, hashes, items.weights)
        return ShopSchema(drawn_events.EVENT_TYPES, ("purchase",), "hour", tuple(ATTRIBUTES))

    bundle = kept_bundle(cache / f"synthetic-{count}", write, UNTIL)

    def events() -> Events:
        return drawn_events.draw_events(items.cluster, items.weights, ids, hashes, UNTIL)

    return drawn_shop("synthetic", bundle, ids, items.weights, events)


def kept_bundle(folder: Path, write: Callable[[Path], ShopSchema], until: datetime) -> Path:
    """The bundle under `folder`; unless it is there, `write` writes its components into a directory."""
    recipe = folder / "recipe.json"
    if recipe.is_file() and json.loads(recipe.read_text()) == _RECIPE:
        return published(folder / "bundles")[-1]
    shutil.rmtree(folder, ignore_errors=True)
    staged = folder / "staged"
    staged.mkdir(parents=True)
    schema = write(staged)
    bundle = publish(staged, folder / "bundles", schema, until)
    recipe.write_text(json.dumps(_RECIPE))
    return bundle


def write_popular(staged: Path, hashes: np.ndarray, weights: np.ndarray) -> None:
    """Write the component of popular items."""
    (staged / "popular").mkdir()
    np.save(staged / "popular" / "numbers.npy", hashes[np.argsort(-weights)[:_MAX_POPULAR]])


def drawn_shop(
    name: str, bundle_path: Path, item_ids: list[str], weights: np.ndarray, draw: Callable[[], Events]
) -> Shop:
    """A shop over a bundle, with drawn events in its state, which is kept next to the bundles."""
    bundle = Bundle(bundle_path)
    state = bundle_path.parents[1] / f"state-{bundle.version}"
    types = dict(bundle.profile.event_types)

    def load_events() -> None:
        shop = ShopData(  # the import reads events only
            ShopConfig(event_types=types), [], draw(), cast(ShopImages, None), {}
        )
        import_events(Settings(bundle=bundle_path, state=state), bundle, shop)

    assert bundle.until is not None  # noqa: S101 - drawn bundles have it
    time = bundle.until + timedelta(hours=12)
    count = len(item_ids)
    return Shop(
        name=name,
        bundle=bundle_path,
        state=state,
        user_ids=drawn_events.user_ids(count),
        user_weights=np.bincount(drawn_events.draw_users(count)).astype(np.float64),
        item_ids=item_ids,
        item_weights=weights,
        event_types=list(types),
        time=time,
        first_start_seconds=prepared(bundle_path, state, time, load_events),
        interactions=drawn_events.event_count(count),
        events=draw,
    )
