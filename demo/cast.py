"""Whom and what a tour shows: people with a history, and items for a stranger's visit.

Knows a shop as training reads it, and no gateway.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from services.catalog import Item
from training.dataset import Shop

_LOOKED_THROUGH = 100


def bought_by(shop: Shop, user_id: str) -> list[str]:
    """The ids of what a person bought, latest first, each once."""
    events = shop.events
    rows = np.flatnonzero((events.user == events.user_ids.index(user_id)) & _purchases(shop))
    return list(dict.fromkeys(events.item_ids[i] for i in events.item[rows[::-1]]))


def _purchases(shop: Shop) -> np.ndarray:
    types = list(shop.settings.event_types)
    return np.isin(shop.events.kind, [types.index(name) for name in shop.settings.targets])


def some_buyers(shop: Shop, count: int, most: int) -> list[str]:
    """People with many purchases, `most` at most, each with a favourite type that the others do not have."""
    types = {item.id: _attribute(item, "type") for item in shop.items}
    bought = Counter(shop.events.user[_purchases(shop)].tolist())
    ranked = sorted(bought.items(), key=lambda pair: (-pair[1], pair[0]))
    likely = [shop.events.user_ids[user] for user, n in ranked if n <= most]
    chosen: dict[str, str] = {}
    for user_id in likely[:_LOOKED_THROUGH]:
        favourite = Counter(types.get(i, "") for i in bought_by(shop, user_id)).most_common(1)[0][0]
        chosen.setdefault(favourite, user_id)
    return list(chosen.values())[:count]


def a_session(items: Sequence[Item]) -> list[str]:
    """Two items of one colour, pattern and style and of different types; any two where there are none."""
    first: dict[tuple[str, ...], Item] = {}
    for item in items:
        look = tuple(_attribute(item, name) for name in ("colour", "pattern", "style"))
        known = first.setdefault(look, item)
        if _attribute(known, "type") != _attribute(item, "type") and "floral" in look:
            return [known.id, item.id]
    return [item.id for item in items[:2]]


def _attribute(item: Item, name: str) -> str:
    return next((a.texts[0] for a in item.attributes if a.name == name and a.texts), "")
