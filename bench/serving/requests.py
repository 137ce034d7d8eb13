"""Requests of a shop's visitors, serialized, and the events that they write."""

import itertools
from collections.abc import Iterator

import numpy as np
from vitrine.catalog.v1 import event_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from bench.serving.shops import Shop

PAGE = 20
# Of requests: users with an id and a session, users with an id alone, sessions without a user, nobody known.
SHARES = {"user and session": 0.4, "user": 0.3, "session": 0.25, "anonymous": 0.05}
_MAX_SESSION = 6


def recommend_requests(shop: Shop, count: int, seed: int = 0) -> list[bytes]:
    """Recommend requests for pages of 20, of the kinds in `SHARES`.

    Users are drawn by their events before; the one to six items of a session by their weights.
    """
    user_ids, item_ids = shop.user_ids, shop.item_ids
    random = np.random.default_rng([seed, 1])
    kinds = random.choice(len(SHARES), count, p=list(SHARES.values()))
    users = random.choice(len(user_ids), count, p=shop.user_weights / shop.user_weights.sum())
    sizes = random.integers(1, _MAX_SESSION + 1, count)
    share = shop.item_weights / shop.item_weights.sum()
    items = iter(random.choice(len(item_ids), int(sizes.sum()), p=share).tolist())
    requests = []
    for kind, user, size in zip(kinds.tolist(), users.tolist(), sizes.tolist(), strict=True):
        name = list(SHARES)[kind]
        request = pb.RecommendRequest(page_size=PAGE)
        if "user" in name:
            request.user_id = user_ids[user]
        session = itertools.islice(items, size)
        if "session" in name:
            request.session.extend(event_pb2.SessionItem(item_id=item_ids[item]) for item in session)
        requests.append(request.SerializeToString())
    return requests


def event_batches(shop: Shop, batch: int, count: int, prefix: str, seed: int = 0) -> Iterator[bytes]:
    """`count` WriteEvents requests of `batch` new events each, whose ids begin with `prefix`."""
    user_ids, item_ids, types = shop.user_ids, shop.item_ids, shop.event_types
    random = np.random.default_rng([seed, 2])
    for number in range(count):
        users = random.integers(0, len(user_ids), batch).tolist()
        items = random.integers(0, len(item_ids), batch).tolist()
        kinds = random.integers(0, len(types), batch).tolist()
        events = [
            event_pb2.Event(
                event_id=f"{prefix}-{number}-{index}",
                type=types[kind],
                user_id=user_ids[user],
                items=[event_pb2.EventItem(item_id=item_ids[item])],
            )
            for index, (user, item, kind) in enumerate(zip(users, items, kinds, strict=True))
        ]
        yield pb.WriteEventsRequest(events=events).SerializeToString()
