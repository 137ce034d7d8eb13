"""The one function that builds a feature row, for training and serving alike.

A row describes a candidate for a user at a point in time. Its sources are the events recorded before that
time, the session of the request, the item graph, the sequence model, and the vectors, titles, attributes and
numbers of items. A missing value stays NaN. Knows nothing of transport or models.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from services.core.errors import FailedPrecondition
from services.core.kernels import array, kernel
from services.ranking.features.context import RankingContext
from services.ranking.features.numeric_rank import RANK_PARTS, NumericRank
from services.ranking.features.similarities import Similarities
from services.ranking.features.user_impressions import IMPRESSION_COLUMNS, impression_columns
from services.ranking.models.taste import TASTE_COLUMNS
from services.ranking.state.item_stats import (
    ITEM_COLUMNS,
    RECENT_COLUMNS,
    WINDOWS,
    ItemStats,
    item_columns,
    recent_columns,
)
from services.ranking.state.user_query import SEEDS, UserQuery, recency

_SPACES = ("text", "image")
# Pseudo-counts of the shop's distribution, added to the interactions of an item and to those of a user.
_CHANNEL_PRIOR = 5.0
_HABIT_PRIOR = 2.0
_GRAPH_PARTS = ("session", "session_most", "history", "latest")
_SIMILARITIES = ("session", "session_most", "history", "history_most", "latest")
_ATTRIBUTE_PARTS = ("session", "history", "latest")
# The scores of the sequence model: of the candidate as it is, and as if it were new.
SEQUENCE_COLUMNS = ("sequence_next", "sequence_as_new")

# Columns of the candidate itself and of the user, without vectors and attributes.
CANDIDATE_COLUMNS = (
    *ITEM_COLUMNS,
    "price",
    "price_to_session",
    "price_to_history",
    "markdown",
    "markdown_to_session",
    "session_length",
    "history_length",
    "days_since_last",
    "bought_before",
    "family_in_session",
    "family_in_history",
    "family_popular_7d",
    "channel_fit",
)

Column = np.ndarray | np.float32
"""One feature: float32 (C,), or the same value for every candidate."""


class Features:
    """Feature rows over the items, events and models of a ranking context."""

    def __init__(self, context: RankingContext) -> None:
        self._table, self._graph, self._sequence = context.table, context.graph, context.sequence
        self._taste = context.taste
        self._attributes = tuple(context.attributes)
        self._numeric_attributes = tuple(context.numeric_attributes)
        self._attribute_similarity = context.attribute_similarity
        self._title_similarity = context.title_similarity
        self._numeric_rank = NumericRank(context.table, context.numeric_attributes)
        self._values = context.values
        self._relations = tuple(name for name in context.graph.names if name not in _SPACES)
        self.parts: dict[str, tuple[str, ...]] = {
            "counts": CANDIDATE_COLUMNS,
            "recent": RECENT_COLUMNS,
            "impressions": IMPRESSION_COLUMNS,
            "graph": tuple(f"{r}_{part}" for r in self._relations for part in _GRAPH_PARTS),
            **{space: tuple(f"{space}_{part}" for part in _SIMILARITIES) for space in _SPACES},
            "sequence": SEQUENCE_COLUMNS,
            "taste": TASTE_COLUMNS,
            "words": tuple(f"words_{part}" for part in _SIMILARITIES),
            "labels": (
                *(f"attributes_{part}" for part in _ATTRIBUTE_PARTS),
                *(f"{a}_{part}" for a in self._attributes for part in ("session", "history", "share_7d")),
                *(f"{a}_{part}" for a in self._numeric_attributes for part in RANK_PARTS),
            ),
        }
        """The column names of each of `blocks`, in their order."""
        self.names: tuple[str, ...] = tuple(name for names in self.parts.values() for name in names)
        if duplicates := [name for name, count in Counter(self.names).items() if count > 1]:
            raise FailedPrecondition(
                f"the name of an attribute gives the feature {duplicates[0]!r} a second time"
            )

    def matrix(
        self, query: UserQuery, rows: np.ndarray, stats: ItemStats, similarities: Similarities | None = None
    ) -> np.ndarray:
        """Feature rows float32 (C, F) of candidate table rows, int64 (C,), in the order of `names`.

        `similarities` are those of these candidates, if they are computed already.
        """
        matrix = np.empty((len(self.names), len(rows)), np.float32)
        columns = (column for _, block in self.blocks(query, rows, stats, similarities) for column in block)
        for target, column in zip(matrix, columns, strict=True):
            target[:] = column
        return np.ascontiguousarray(matrix.T)

    def blocks(
        self, query: UserQuery, rows: np.ndarray, stats: ItemStats, similarities: Similarities | None = None
    ) -> Iterator[tuple[str, list[Column]]]:
        """The columns of `matrix`, part by part; each part is computed when the iterator reaches it."""
        yield (
            "counts",
            [
                *item_columns(rows, stats),
                *self._price(query, rows, stats),
                *self._user(query, rows),
                *self._family(query, rows, stats),
                channel_fit(query, rows, stats),
            ],
        )
        yield "recent", list(recent_columns(rows, stats))
        yield "impressions", list(impression_columns(query.impressions, rows))
        yield "graph", [c for r in self._relations for c in self._co_occurrence(r, query, rows)]
        similarities = similarities or Similarities(self._table, query, rows)
        for space in _SPACES:
            yield space, self._similarity(space, query, similarities)
        yield "sequence", self._next_item(query, rows)
        yield "taste", self._likes(query, rows, stats)
        yield "words", self._title_words(query, rows, stats)
        labels = self._attribute_similarities(query, rows, stats)
        for attribute in self._attributes:
            labels += self._attribute(attribute, query, rows, stats)
        for attribute in self._numeric_attributes:
            labels += self._numeric_rank.columns(attribute, query, rows, stats)
        yield "labels", labels

    def without_interactions(self, matrix: np.ndarray, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """The `matrix` (C, F) of table rows (C,) as if there were no events of the candidate.

        Each candidate by itself. Training masks some rows in this way: the models learn to rank items
        without interactions by their content (DropoutNet, Volkovs et al., 2017).
        """
        column = {name: position for position, name in enumerate(self.names)}
        event_columns = [*(f"popular_{days}d" for days in WINDOWS), "popular_ever", "bought_before"]
        event_columns += [f"{r}_{part}" for r in self._relations for part in _GRAPH_PARTS]
        event_columns += [name for name in RECENT_COLUMNS if name.startswith(("popular_", "shown_"))]
        event_columns.append("shown_to_user")
        masked, own_popularity = matrix.copy(), matrix[:, column["popular_7d"]]
        masked[:, column["family_popular_7d"]] -= own_popularity
        masked[:, [column[name] for name in event_columns]] = 0
        masked[:, column["rising"]] = 1
        next_item, as_new = (column[name] for name in SEQUENCE_COLUMNS)
        masked[:, next_item] = masked[:, as_new]
        masked[:, column["taste_appeal"]] = masked[:, column["taste_as_new"]]
        masked[:, column["channel_fit"]] *= 0  # NaN stays NaN
        unknown = ["age_days", "idle_days", "markdown", "markdown_to_session", "hours_since_shown"]
        unknown += [name for name in RECENT_COLUMNS if name.startswith("engaged_share_")]
        masked[:, [column[name] for name in unknown]] = np.nan
        list_price = self._table.numbers("price")
        price = np.full(len(rows), np.nan) if list_price is None else list_price[rows, 0]
        ratio = _ratio(price, matrix[:, column["price"]])
        masked[:, column["price"]] = price
        for name in ("price_to_session", "price_to_history"):
            masked[:, column[name]] *= ratio
        for attribute in self._attributes:
            values, share = self._values.get(attribute, stats), column[f"{attribute}_share_7d"]
            if values is not None:
                total = float(values.total.sum())
                rest = np.maximum(total - own_popularity, 1.0)
                masked[:, share] = (masked[:, share] * max(total, 1.0) - own_popularity) / rest
        return masked

    @staticmethod
    def _price(query: UserQuery, rows: np.ndarray, stats: ItemStats) -> list[Column]:
        price, session = stats.price[rows], query.session
        markdown = _ratio(price, stats.highest[rows])
        return [
            price,
            price / _mean(stats.price[session]),
            price / _mean(stats.price[query.history]),
            markdown,
            markdown / _mean(_ratio(stats.price[session], stats.highest[session])),
        ]

    @staticmethod
    def _user(query: UserQuery, rows: np.ndarray) -> list[Column]:
        last = query.ages[0] if len(query.ages) else np.nan
        bought = np.isin(rows, query.history[query.purchased])
        return [np.float32(len(query.session)), np.float32(len(query.history)), np.float32(last), bought]

    def _family(self, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> list[Column]:
        values = self._values.get("family_id", stats)
        if values is None:
            return [np.float32(np.nan)] * 3
        return [
            values.share_in(query.session, rows) * len(query.session),
            values.share_in(query.history, rows) * len(query.history),
            values.of_values(values.total, rows),
        ]

    def _co_occurrence(self, relation: str, query: UserQuery, rows: np.ndarray) -> list[Column]:
        session, graph = query.session[:SEEDS], self._graph
        total, highest = graph.connections(relation, session, np.ones(len(session), np.float32), rows)
        weights = recency(query.ages[:SEEDS]) * query.weights[:SEEDS]
        history, _ = graph.connections(relation, query.history[:SEEDS], weights, rows)
        latest, _ = graph.connections(relation, *query.latest_seeds(), rows)
        return [total, highest, history, latest]

    @staticmethod
    def _similarity(space: str, query: UserQuery, similarities: Similarities) -> list[Column]:
        in_space = similarities.space(space)
        if in_space is None:
            return [np.float32(np.nan)] * len(_SIMILARITIES)
        cosines, present, item_present = in_space.cosines, in_space.present, in_space.item_present
        session = similarities.session
        end = min(session + SEEDS, len(item_present))
        return [
            *_mean_and_highest(cosines, present, item_present, 0, min(session, SEEDS)),
            *_mean_and_highest(cosines, present, item_present, session, end),
            _weighted_mean(cosines, present, item_present, query.latest_seeds()[1]),
        ]

    def _next_item(self, query: UserQuery, rows: np.ndarray) -> list[Column]:
        user = self._sequence.user(query) if self._sequence else None
        if self._sequence is None or user is None:
            return [np.float32(np.nan)] * len(SEQUENCE_COLUMNS)
        return list(self._sequence.scores(user, rows))

    def _likes(self, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> list[Column]:
        if self._taste is None:
            return [np.float32(np.nan)] * len(TASTE_COLUMNS)
        return list(self._taste.columns(query, rows, stats))

    def _title_words(self, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> list[Column]:
        session, history = query.session[:SEEDS], query.history[:SEEDS]
        cosine = self._title_similarity.each(np.concatenate([session, history]), rows, stats)
        columns: list[Column] = []
        for part in (cosine[:, : len(session)], cosine[:, len(session) :]):
            columns += [part.mean(1), part.max(1)] if part.shape[1] else [np.float32(np.nan)] * 2
        return [*columns, self._title_similarity.to(*query.latest_seeds(), rows, stats)]

    def _attribute_similarities(self, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> list[Column]:
        parts = [(items, np.ones(len(items), np.float32)) for items in (query.session, query.history[:SEEDS])]
        return [self._attribute_similarity.to(*part, rows, stats) for part in (*parts, query.latest_seeds())]

    def _attribute(self, name: str, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> list[Column]:
        attribute = self._values.get(name, stats)
        if attribute is None:
            return [np.float32(np.nan)] * 3
        return [
            attribute.share_in(query.session, rows),
            attribute.share_in(query.history, rows),
            attribute.of_values(attribute.share, rows),
        ]


@kernel(array(np.float32, 2), array(np.bool_), array(np.bool_), np.int64, np.int64)
def _mean_and_highest(
    cosines: np.ndarray, present: np.ndarray, item_present: np.ndarray, start: int, end: int
) -> np.ndarray:
    """The mean and the highest of the present columns from `start` to `end` of each row of cosines (C, U).

    float32 (2, C), NaN for a row that is not present, and without a present column.
    """
    result = np.full((2, len(cosines)), np.nan, np.float32)
    if not item_present[start:end].any():
        return result
    for candidate in range(len(cosines)):
        if present[candidate]:
            total, highest, count = 0.0, -np.inf, 0
            for item in range(start, end):
                if item_present[item]:
                    total += cosines[candidate, item]
                    highest = max(highest, cosines[candidate, item])
                    count += 1
            result[0, candidate], result[1, candidate] = total / count, highest
    return result


@kernel(array(np.float32, 2), array(np.bool_), array(np.bool_), array(np.float32))
def _weighted_mean(
    cosines: np.ndarray, present: np.ndarray, item_present: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The mean of the present of the first columns of each row of cosines (C, U), by `weights`: float32 (C,).

    NaN for a row that is not present, and without a present column.
    """
    result = np.full(len(cosines), np.nan, np.float32)
    if not item_present[: len(weights)].any():
        return result
    for candidate in range(len(cosines)):
        if present[candidate]:
            total, weight = 0.0, 1e-9
            for item in range(len(weights)):
                if item_present[item]:
                    total += cosines[candidate, item] * weights[item]
                    weight += weights[item]
            result[candidate] = total / weight
    return result


def channel_fit(query: UserQuery, rows: np.ndarray, stats: ItemStats) -> Column:
    """How well candidates (C,) fit the channel that the user probably uses: float32 (C,).

    log sum over channels c of P(c | user) P(c | item) / P(c). P(c | user) follows from the channels in which
    the items of the session sell, taken as independent, and from the channels of the user's history. NaN
    with fewer than two known channels.
    """
    total = stats.channels.sum(0, dtype=np.float64)
    if np.count_nonzero(total) < 2:  # noqa: PLR2004 - one channel carries no information
        return np.float32(np.nan)
    used = total > 0
    share = total[used] / total.sum()

    def lift(items: np.ndarray) -> np.ndarray:
        counts = stats.channels[items][:, used].astype(np.float64)
        size = counts.sum(1, keepdims=True) + _CHANNEL_PRIOR
        return np.asarray((counts + _CHANNEL_PRIOR * share) / size / share)

    channels = query.channels[:SEEDS]
    valid = (channels >= 0) & (channels < len(total))  # `stats` may be older than a channel
    visits = np.bincount(channels[valid], recency(query.ages[:SEEDS])[valid], len(total))[used]
    habit = (visits + _HABIT_PRIOR * share) / (visits.sum() + _HABIT_PRIOR)
    log_odds = np.log(habit) + np.log(lift(query.session[:SEEDS])).sum(0)
    odds = np.exp(log_odds - log_odds.max())
    return np.asarray(np.log(lift(rows) @ (odds / odds.sum())), np.float32)


def _mean(prices: np.ndarray) -> np.float32:
    valid = prices[~np.isnan(prices)]
    return np.float32(valid.mean()) if len(valid) and valid.mean() > 0 else np.float32(np.nan)


def _ratio(price: np.ndarray, base: np.ndarray) -> np.ndarray:
    """`price` over `base`, both (C,); NaN for a base of 0, as for a free item, or an unknown one."""
    unknown = np.full(np.broadcast_shapes(price.shape, base.shape), np.nan, np.result_type(price, base))
    return np.asarray(np.divide(price, base, out=unknown, where=base > 0))
