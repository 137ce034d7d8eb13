"""The events of a shop in the form in which the ranking service stores them."""

import numpy as np

from services.ranking.state.event_columns import EventColumns, EventState
from training.data.shop import ShopData


def state_of(shop: ShopData) -> EventState:
    """All events of a shop, recorded at the time they occurred; a user's key is the code of the user id."""
    events = shop.events
    state = EventState(shop.settings.event_types)
    state.append(
        EventColumns(
            user=events.user.astype(np.int64),
            item_hash=events.number,
            kind=events.kind,
            channel=np.append(state.channel_codes(events.channel_names), np.int16(-1))[events.channel],
            occurred=events.time,
            recorded=events.time,
            price=events.price,
            quantity=np.ones(len(events.price), np.int64),
            sequence=np.arange(1, len(events) + 1),
        ),
        {("user", user): code for code, user in enumerate(events.user_ids)},
    )
    return state
