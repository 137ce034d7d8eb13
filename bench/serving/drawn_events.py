"""Events and an item graph for a drawn catalog: users come back to few clusters and to what is popular."""

from dataclasses import dataclass
from datetime import datetime

import numpy as np

from services.catalog.items import item_hash
from services.ranking.models.co_occurrence import ItemGraph, Relation
from training.data.events import Events

EVENT_TYPES = {"click": 0.3, "purchase": 1.0}
EVENTS_PER_ITEM, USERS_PER_ITEM = 2.0, 0.6
# Mean edges of an item by relation. Most items have none, as most are never bought.
_EDGES = {"baskets": 10, "people": 40}
_MAX_EDGES = 300
_CLUSTER_SHARE = 0.7
_PURCHASE_SHARE = 0.3
_MEAN_AGE_DAYS = 20.0
_MICROSECONDS_A_DAY = 86_400e6


@dataclass(frozen=True)
class ItemPicker:
    """Draws items of clusters, and popular items.

    `order` int64 (N,) has the rows by cluster, the popular ones of each first; `start` int64 (C + 1,) the
    place of each cluster in it; `cumulative` float64 (N,) the summed weights of rows.
    """

    order: np.ndarray
    start: np.ndarray
    cumulative: np.ndarray

    @classmethod
    def of(cls, cluster: np.ndarray, weights: np.ndarray) -> "ItemPicker":
        """A picker over rows with these clusters (N,) and weights (N,)."""
        count = np.bincount(cluster)
        start = np.concatenate([[0], np.cumsum(count)])
        return cls(np.lexsort((-weights, cluster)), start, np.cumsum(weights))

    def of_clusters(self, random: np.random.Generator, clusters: np.ndarray) -> np.ndarray:
        """A row of each cluster (K,); an empty cluster gives a row of the next one."""
        size = self.start[clusters + 1] - self.start[clusters]
        place = self.start[clusters] + (size * random.random(len(clusters)) ** 2).astype(np.int64)
        return np.asarray(self.order[np.minimum(place, len(self.order) - 1)])

    def popular(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Rows (K,), by their weights."""
        draws = random.random(count) * self.cumulative[-1]
        rows = np.searchsorted(self.cumulative, draws)
        return np.asarray(np.minimum(rows, len(self.cumulative) - 1))

    def near(self, random: np.random.Generator, clusters: np.ndarray) -> np.ndarray:
        """Rows (K,), most of them of the cluster at their place, the others popular ones."""
        is_near = random.random(len(clusters)) < _CLUSTER_SHARE
        return np.where(is_near, self.of_clusters(random, clusters), self.popular(random, len(clusters)))


def draw_events(
    cluster: np.ndarray,
    weights: np.ndarray,
    item_ids: list[str],
    item_hashes: np.ndarray,
    until: datetime,
    types: int = len(EVENT_TYPES),
    seed: int = 0,
) -> Events:
    """Events of the drawn users before a time; a few users have most of the events."""
    random = np.random.default_rng([seed, 3])
    users, user = user_ids(len(cluster)), draw_users(len(cluster), seed)
    count = len(user)
    tastes = random.integers(0, int(cluster.max()) + 1, (len(users), 2))
    item = ItemPicker.of(cluster, weights).near(random, tastes[user, random.integers(0, 2, count)])
    age = random.exponential(_MEAN_AGE_DAYS, count) * _MICROSECONDS_A_DAY
    time = (until.timestamp() * 1e6 - 1 - age).astype(np.int64)
    order = np.argsort(time, kind="stable")
    is_last_type = random.random(count) < _PURCHASE_SHARE
    return Events(
        event_ids=np.array([f"e{number}" for number in range(count)], object),
        user=user[order].astype(np.int32),
        user_ids=users,
        item=item[order].astype(np.int32),
        item_ids=item_ids,
        number=item_hashes[item[order]],
        kind=np.where(is_last_type, types - 1, random.integers(0, types, count)).astype(np.int16),
        time=time[order],
        price=np.full(count, np.nan),
        position=np.zeros(count, np.int32),
        session=np.full(count, -1, np.int32),
        session_ids=[],
        channel=np.full(count, -1, np.int32),
        channel_names=[],
    )


def draw_users(items: int, seed: int = 0) -> np.ndarray:
    """The user of each event in a shop of so many items, int64 (E,): one each, and the others skewed."""
    users, random = len(user_ids(items)), np.random.default_rng([seed, 2])
    extra = (users * random.random(event_count(items) - users) ** 3).astype(np.int64)
    return np.concatenate([np.arange(users), extra])


def user_ids(items: int) -> list[str]:
    """The users of a shop of so many items."""
    return [f"u{number:07}" for number in range(max(1, int(USERS_PER_ITEM * items)))]


def event_count(items: int) -> int:
    """The number of events of a shop of so many items."""
    return max(1, int(EVENTS_PER_ITEM * items))


def draw_graph(cluster: np.ndarray, weights: np.ndarray, item_hashes: np.ndarray, seed: int = 0) -> ItemGraph:
    """A graph whose edges lead to items of the same cluster and to popular ones; popular items have most."""
    random, picker = np.random.default_rng([seed, 4]), ItemPicker.of(cluster, weights)
    node = np.argsort(item_hashes)  # the row of each node
    node_of_row = np.empty(len(node), np.int64)
    node_of_row[node] = np.arange(len(node))
    share = weights[node] / weights.mean()
    relations = {}
    for name, mean in _EDGES.items():
        degree = np.minimum(random.poisson(mean * share / 3), _MAX_EDGES)
        source = np.repeat(node, degree)
        target = picker.near(random, cluster[source])
        edge_weights = (0.05 * random.exponential(1.0, len(source))).astype(np.float32)
        start = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
        relations[name] = Relation(start, node_of_row[target].astype(np.int32), edge_weights)
    return ItemGraph(item_hashes[node], relations)


def hashes_of(item_ids: list[str]) -> np.ndarray:
    """The hashes of items, int64 (N,)."""
    return np.fromiter(map(item_hash, item_ids), np.int64, len(item_ids))
