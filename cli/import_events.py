"""`vitrine import`: loads a shop's events into a state that no process serves."""

from datetime import UTC, datetime, timedelta

import numpy as np
import sqlalchemy as sa

from services.catalog.bundle import Bundle
from services.ranking.events.event_store import EventStore, ImportCounts
from services.ranking.events.events import Event, EventItem
from services.serving.loaded_bundle import RANKING
from services.serving.settings import Settings
from services.storage import store
from services.storage.database_lock import lock_database
from training.data.dataset import ShopData

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def import_events(settings: Settings, bundle: Bundle, shop: ShopData) -> ImportCounts:
    """Load a shop's events into a state that no process serves; refuses what WriteEvents refuses.

    Raises:
        FailedPrecondition: a process serves the state.
        StorageFull: the disk is full; no event was loaded.
    """
    settings.state.mkdir(parents=True, exist_ok=True)
    url = settings.ranking_database or f"sqlite:///{(settings.state / 'ranking').absolute()}.sqlite"
    engine = store.open_engine(url)
    lock = lock_database(engine, RANKING, "vitrine import")
    try:
        return _load_events(engine, bundle, shop)
    finally:
        engine.dispose()
        lock.release()


def _load_events(engine: sa.Engine, bundle: Bundle, shop: ShopData) -> ImportCounts:
    events = shop.events
    event_store = EventStore(engine, list(bundle.profile.event_types), lambda: datetime.now(UTC))
    types = list(shop.settings.event_types)  # `events.kind` has indices into it
    rows = zip(
        events.event_ids,
        events.user.tolist(),
        events.item.tolist(),
        events.kind.tolist(),
        events.time.tolist(),
        events.price.tolist(),
        events.position.tolist(),
        events.session.tolist(),
        events.channel.tolist(),
        strict=True,
    )
    counts = event_store.load(
        Event(
            event_id=event_id,
            type=types[kind],
            items=(
                EventItem(
                    events.item_ids[item], price=None if np.isnan(price) else price, position=position or None
                ),
            ),
            user_id=events.user_ids[user],
            session_id=events.session_ids[session] if session >= 0 else "",
            occurred=_EPOCH + timedelta(microseconds=micros),
            channel=events.channel_names[channel] if channel >= 0 else "",
        )
        for event_id, user, item, kind, micros, price, position, session, channel in rows
    )
    event_store.close()
    return counts.result()
