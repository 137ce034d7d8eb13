"""Choose the users and items of a tour: users with a history, and a session for an anonymous user.

Reads the shop directory, not the gateway.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from services.catalog.items import Item
from training.data.dataset import ShopData

_MAX_CANDIDATES = 100


def purchases_of(shop: ShopData, user_id: str) -> list[str]:
    """The distinct ids of a user's purchases, latest first."""
    events = shop.events
    rows = np.flatnonzero((events.user == events.user_ids.index(user_id)) & _purchases(shop))
    return list(dict.fromkeys(events.item_ids[i] for i in events.item[rows[::-1]]))


def _purchases(shop: ShopData) -> np.ndarray:
    types = list(shop.settings.event_types)
    return np.isin(shop.events.kind, [types.index(name) for name in shop.settings.targets])


def sample_buyers(shop: ShopData, count: int, limit: int) -> list[str]:
    """Users with many purchases, `limit` at most, each with a favorite type that the others do not have."""
    types = {item.id: _attribute(item, "type") for item in shop.items}
    purchase_counts = Counter(shop.events.user[_purchases(shop)].tolist())
    ranked = sorted(purchase_counts.items(), key=lambda pair: (-pair[1], pair[0]))
    candidates = [shop.events.user_ids[user] for user, n in ranked if n <= limit]
    user_of_type: dict[str, str] = {}
    for user_id in candidates[:_MAX_CANDIDATES]:
        favorite = Counter(types.get(i, "") for i in purchases_of(shop, user_id)).most_common(1)[0][0]
        user_of_type.setdefault(favorite, user_id)
    return list(user_of_type.values())[:count]


def sample_session(items: Sequence[Item]) -> list[str]:
    """Two items of one color, pattern and style and of different types; any two where there are none."""
    first: dict[tuple[str, ...], Item] = {}
    for item in items:
        look = tuple(_attribute(item, name) for name in ("colour", "pattern", "style"))
        previous = first.setdefault(look, item)
        if _attribute(previous, "type") != _attribute(item, "type") and "floral" in look:
            return [previous.id, item.id]
    return [item.id for item in items[:2]]


def similar_items(items: Sequence[Item], attributes: Mapping[str, str], count: int) -> list[str]:
    """The `count` items that share the most of some attribute values; of equal ones, the shop's first."""
    shared = {item.id: sum(_attribute(item, n) == text for n, text in attributes.items()) for item in items}
    return sorted(shared, key=lambda item_id: -shared[item_id])[:count]


def _attribute(item: Item, name: str) -> str:
    return next((a.texts[0] for a in item.attributes if a.name == name and a.texts), "")
