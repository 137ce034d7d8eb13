"""The one function that builds a feature row, for training and serving alike.

A row describes a candidate for a person at a moment. It is made of the behaviour recorded
before that moment, the request's own session, the item graph, the sequence model, and the items'
vectors, titles, attributes and numbers. Missing stays NaN. Knows nothing of transport or models.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from services.errors import FailedPrecondition
from services.ranking.basis import Basis
from services.ranking.moment import WINDOWS, Moment
from services.ranking.order import ORDER_PARTS, Order
from services.ranking.query import SEEDS, Query, recency

_SPACES = ("text", "image")
# How many engagements as in the whole shop are added to an item's, and to a person's own.
_CHANNEL_PRIOR = 5.0
_HABIT_PRIOR = 2.0
_GRAPH_PARTS = ("session", "session_most", "history", "latest")
_SIMILARITIES = ("session", "session_most", "history", "history_most", "latest")
_ATTRIBUTE_PARTS = ("session", "history", "latest")
# What the sequence model makes of a candidate, as it is and as if it were new.
SEQUENCE_COLUMNS = ("sequence_next", "sequence_as_new")

# What describes the candidate itself beside the person, vectors and attributes aside.
CANDIDATE_COLUMNS = (
    *(f"popular_{days}d" for days in WINDOWS),
    "popular_ever",
    "rising",
    "age_days",
    "idle_days",
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
    """Feature rows over what the ranking service knows."""

    def __init__(self, basis: Basis) -> None:
        self._table, self._graph, self._sequence = basis.table, basis.graph, basis.sequence
        self._attributes, self._numbers = tuple(basis.attributes), tuple(basis.numbers)
        self._alike, self._titles = basis.alike, basis.titles
        self._order = Order(basis.table, basis.numbers)
        self._counts: tuple[Moment, dict[str, tuple[np.ndarray, np.ndarray]]] | None = None
        self._relations = tuple(name for name in basis.graph.names if name not in _SPACES)
        self.parts: dict[str, tuple[str, ...]] = {
            "counts": CANDIDATE_COLUMNS,
            "graph": tuple(f"{r}_{part}" for r in self._relations for part in _GRAPH_PARTS),
            **{space: tuple(f"{space}_{part}" for part in _SIMILARITIES) for space in _SPACES},
            "sequence": SEQUENCE_COLUMNS,
            "words": tuple(f"words_{part}" for part in _SIMILARITIES),
            "labels": (
                *(f"attributes_{part}" for part in _ATTRIBUTE_PARTS),
                *(f"{a}_{part}" for a in self._attributes for part in ("session", "history", "share_7d")),
                *(f"{number}_{part}" for number in self._numbers for part in ORDER_PARTS),
            ),
        }
        """The names of the columns of each of `blocks`, in their order."""
        self.names: tuple[str, ...] = tuple(name for names in self.parts.values() for name in names)
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise FailedPrecondition(f"an attribute's name makes {twice[0]!r}, which is another feature")

    def matrix(self, query: Query, rows: np.ndarray, moment: Moment) -> np.ndarray:
        """Feature rows float32 (C, F) of candidate table rows, int64 (C,), in the order of `names`."""
        columns = [column for _, block in self.blocks(query, rows, moment) for column in block]
        return np.stack([np.broadcast_to(np.float32(c), rows.shape) for c in columns], axis=1)

    def blocks(self, query: Query, rows: np.ndarray, moment: Moment) -> Iterator[tuple[str, list[Column]]]:
        """The columns of `matrix` one part of the bundle after the other, each made when it is asked for."""
        yield (
            "counts",
            [
                *self._item_side(rows, moment),
                *self._price(query, rows, moment),
                *self._person(query, rows),
                *self._family(query, rows, moment),
                channel_fit(query, rows, moment),
            ],
        )
        yield "graph", [c for r in self._relations for c in self._behaviour(r, query, rows)]
        for space in _SPACES:
            yield space, self._similarity(space, query, rows)
        yield "sequence", self._next(query, rows)
        yield "words", self._words(query, rows, moment)
        labels = self._likeness(query, rows, moment)
        for attribute in self._attributes:
            labels += self._attribute(attribute, query, rows, moment)
        for number in self._numbers:
            labels += self._order.columns(number, query, rows, moment)
        yield "labels", labels

    def unsold(self, matrix: np.ndarray, rows: np.ndarray, moment: Moment) -> np.ndarray:
        """The `matrix` (C, F) of table rows (C,) as if nobody had ever engaged with the candidate.

        Each candidate by itself. Training shows some rows this way, so that what has no past is
        ranked by what is known of it (DropoutNet, Volkovs et al., 2017).
        """
        column = {name: at for at, name in enumerate(self.names)}
        behaviour = [*(f"popular_{days}d" for days in WINDOWS), "popular_ever", "bought_before"]
        behaviour += [f"{r}_{part}" for r in self._relations for part in _GRAPH_PARTS]
        blank, own = matrix.copy(), matrix[:, column["popular_7d"]]
        blank[:, column["family_popular_7d"]] -= own
        blank[:, [column[name] for name in behaviour]] = 0
        blank[:, column["rising"]] = 1
        known, as_new = (column[name] for name in SEQUENCE_COLUMNS)
        blank[:, known] = blank[:, as_new]
        blank[:, column["channel_fit"]] *= 0  # where nothing is known of channels, nothing is
        unknown = ("age_days", "idle_days", "markdown", "markdown_to_session")
        blank[:, [column[name] for name in unknown]] = np.nan
        stated = self._table.numbers("price")
        price = np.full(len(rows), np.nan) if stated is None else stated[rows, 0]
        ratio = price / matrix[:, column["price"]]
        blank[:, column["price"]] = price
        for name in ("price_to_session", "price_to_history"):
            blank[:, column[name]] *= ratio
        for attribute in self._attributes:
            counted, at = self._counted(attribute, moment), column[f"{attribute}_share_7d"]
            if counted is not None:
                total = float(counted[1].sum())
                blank[:, at] = (blank[:, at] * max(total, 1.0) - own) / np.maximum(total - own, 1.0)
        return blank

    @staticmethod
    def _item_side(rows: np.ndarray, moment: Moment) -> list[Column]:
        popular = moment.popular[rows]
        rising = (popular[:, 0] + 1) / (popular[:, 2] / 7 + 1)
        return [*popular.T, rising, moment.age[rows], moment.idle[rows]]

    @staticmethod
    def _price(query: Query, rows: np.ndarray, moment: Moment) -> list[Column]:
        price, session = moment.price[rows], query.session
        markdown = price / moment.highest[rows]
        return [
            price,
            price / _mean(moment.price[session]),
            price / _mean(moment.price[query.history]),
            markdown,
            markdown / _mean(moment.price[session] / moment.highest[session]),
        ]

    @staticmethod
    def _person(query: Query, rows: np.ndarray) -> list[Column]:
        last = query.ages[0] if len(query.ages) else np.nan
        bought = np.isin(rows, query.history[query.bought])
        return [np.float32(len(query.session)), np.float32(len(query.history)), np.float32(last), bought]

    def _family(self, query: Query, rows: np.ndarray, moment: Moment) -> list[Column]:
        counted = self._counted("family_id", moment)
        if counted is None:
            return [np.float32(np.nan)] * 3
        codes, total = counted
        mine, size = codes[rows], len(total)
        return [
            _share(mine, codes[query.session], size) * len(query.session),
            _share(mine, codes[query.history], size) * len(query.history),
            np.where(mine >= 0, np.append(total, np.nan)[mine], np.nan),
        ]

    def _behaviour(self, relation: str, query: Query, rows: np.ndarray) -> list[Column]:
        session = query.session[:SEEDS]
        near, worth, _ = self._graph.edges(relation, session, np.ones(len(session), np.float32))
        at, kept = self._among(near, rows)
        total = np.bincount(at, worth[kept], len(rows))
        most = np.zeros(len(rows), np.float32)
        np.maximum.at(most, at, worth[kept])
        weights = recency(query.ages[:SEEDS]) * query.weights[:SEEDS]
        found: list[Column] = [total, most]
        for seeds, weight in ((query.history[:SEEDS], weights), query.latest()):
            near, worth, _ = self._graph.edges(relation, seeds, weight)
            at, kept = self._among(near, rows)
            found.append(np.bincount(at, worth[kept], len(rows)))
        return found

    def _among(self, nodes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `rows` each node stands, int64 (K,), and which nodes those are, bool."""
        mine = self._graph.nodes(rows)
        place = np.full(self._graph.size + 1, -1, np.int64)
        place[mine] = np.arange(len(rows))
        place[-1] = -1  # rows without a node
        at = place[nodes]
        return at[at >= 0], at >= 0

    def _similarity(self, space: str, query: Query, rows: np.ndarray) -> list[Column]:
        column = self._table.vectors(space)
        if column is None:
            return [np.float32(np.nan)] * len(_SIMILARITIES)
        values, present = column
        mine = values[rows].astype(np.float32)
        found: list[Column] = []
        for known in (query.session[:SEEDS], query.history[:SEEDS]):
            seeds = known[present[known]]
            if not len(seeds):
                found += [np.float32(np.nan)] * 2
                continue
            near = mine @ values[seeds].astype(np.float32).T
            near[~present[rows]] = np.nan
            found += [near.mean(1), near.max(1)]
        seeds, weights = query.latest()
        seeds, weights = seeds[present[seeds]], weights[present[seeds]]
        if not len(seeds):
            return [*found, np.float32(np.nan)]
        centre = weights @ values[seeds].astype(np.float32) / max(float(weights.sum()), 1e-9)
        return [*found, np.where(present[rows], mine @ centre, np.nan)]

    def _next(self, query: Query, rows: np.ndarray) -> list[Column]:
        person = self._sequence.person(query) if self._sequence else None
        if self._sequence is None or person is None:
            return [np.float32(np.nan)] * len(SEQUENCE_COLUMNS)
        return list(self._sequence.scores(person, rows))

    def _words(self, query: Query, rows: np.ndarray, moment: Moment) -> list[Column]:
        session, history = query.session[:SEEDS], query.history[:SEEDS]
        alike = self._titles.each(np.concatenate([session, history]), rows, moment)
        found: list[Column] = []
        for part in (alike[:, : len(session)], alike[:, len(session) :]):
            found += [part.mean(1), part.max(1)] if part.shape[1] else [np.float32(np.nan)] * 2
        return [*found, self._titles.to(*query.latest(), rows, moment)]

    def _likeness(self, query: Query, rows: np.ndarray, moment: Moment) -> list[Column]:
        parts = [(items, np.ones(len(items), np.float32)) for items in (query.session, query.history[:SEEDS])]
        return [self._alike.to(*part, rows, moment) for part in (*parts, query.latest())]

    def _attribute(self, name: str, query: Query, rows: np.ndarray, moment: Moment) -> list[Column]:
        counted = self._counted(name, moment)
        if counted is None:
            return [np.float32(np.nan)] * 3
        codes, total = counted
        mine, size = codes[rows], len(total)
        share = total / max(float(total.sum()), 1.0)
        return [
            _share(mine, codes[query.session], size),
            _share(mine, codes[query.history], size),
            np.where(mine >= 0, np.append(share, np.nan)[mine], np.nan),
        ]

    def _counted(self, attribute: str, moment: Moment) -> tuple[np.ndarray, np.ndarray] | None:
        """The first value of each row, int32 (N,), and last week's engagements by value, float64 (V,).

        Both as they were when the moment was first asked for: the feed may write other values since.
        """
        kept = self._counts
        if kept is None or kept[0] is not moment:
            self._counts = kept = (moment, {})
        if attribute not in kept[1]:
            column = self._table.texts(attribute)
            if column is None:
                return None
            codes = column[0][: len(moment.age), 0].copy()
            known, size = codes >= 0, int(codes.max(initial=-1)) + 1
            kept[1][attribute] = codes, np.bincount(codes[known], moment.popular[known, 2], size)
        return kept[1][attribute]


def channel_fit(query: Query, rows: np.ndarray, moment: Moment) -> Column:
    """How much likelier candidates (C,) are where the person probably is than anywhere: float32 (C,).

    log sum over channels c of P(c | person) P(c | item) / P(c). Where the person is follows from where the
    items of the session are bought, each counting on its own, and from where the person was before. NaN
    where no two channels are known.
    """
    total = moment.channels.sum(0, dtype=np.float64)
    if np.count_nonzero(total) < 2:  # noqa: PLR2004 - of one there is nothing to tell
        return np.float32(np.nan)
    used = total > 0
    share = total[used] / total.sum()

    def lift(items: np.ndarray) -> np.ndarray:
        counts = moment.channels[items][:, used].astype(np.float64)
        size = counts.sum(1, keepdims=True) + _CHANNEL_PRIOR
        return np.asarray((counts + _CHANNEL_PRIOR * share) / size / share)

    where = query.channels[:SEEDS]
    known = (where >= 0) & (where < len(total))  # the moment may be older than a channel
    visits = np.bincount(where[known], recency(query.ages[:SEEDS])[known], len(total))[used]
    habit = (visits + _HABIT_PRIOR * share) / (visits.sum() + _HABIT_PRIOR)
    log_odds = np.log(habit) + np.log(lift(query.session[:SEEDS])).sum(0)
    chance = np.exp(log_odds - log_odds.max())
    return np.asarray(np.log(lift(rows) @ (chance / chance.sum())), np.float32)


def _mean(prices: np.ndarray) -> np.float32:
    known = prices[~np.isnan(prices)]
    return np.float32(known.mean()) if len(known) and known.mean() > 0 else np.float32(np.nan)


def _share(mine: np.ndarray, others: np.ndarray, size: int) -> np.ndarray:
    """Which part of `others` holds the same code; NaN where there are none or the code is missing."""
    if not len(others):
        return np.full(len(mine), np.nan, np.float32)
    part = np.bincount(others[others >= 0], minlength=size) / len(others)
    return np.where(mine >= 0, np.append(part, np.nan)[mine], np.nan).astype(np.float32)
