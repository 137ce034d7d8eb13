"""The past replayed: the services' own candidates and feature rows as of any moment.

The twin of what gateway and ranking do for a request, without a server between.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from services.bundle import created
from services.embedding.index import centre
from services.interests import PER_INTEREST, PER_SOURCE, interests
from services.item_table import ItemTable
from services.ranking.basis import Basis
from services.ranking.features import Features
from services.ranking.graph import GraphView, ItemGraph
from services.ranking.moment import TICKS, Moment, moment
from services.ranking.query import MAX_HISTORY, Query, recency
from services.ranking.ranking import Person, make_query
from services.ranking.sequence import SequenceView
from services.ranking.sources import Sources
from services.ranking.state import BehaviourState, Columns
from training.dataset import Shop
from training.queries import DAY, Question

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Replay:
    """A shop's items and events, seen through graphs and vectors.

    `graphs` maps a day since 1970 to the graph that its questions see, which knows earlier days
    alone; `vectors` and `present` are by space, (M, D) and bool (M,), in the order of the shop's items;
    `sequence` is the directory of a sequence model that knows none of those days.
    """

    def __init__(
        self,
        shop: Shop,
        graphs: Mapping[int, ItemGraph],
        vectors: Mapping[str, np.ndarray],
        present: Mapping[str, np.ndarray],
        sequence: Path | None = None,
    ) -> None:
        settings = shop.settings
        self.table = ItemTable.of(shop.items, vectors, present, [created(item) for item in shop.items])
        self.state = state_of(shop)
        views = {day: GraphView(graph, self.table) for day, graph in graphs.items()}
        attributes, numbers = settings.items.text_attributes, settings.items.number_attributes
        walks = SequenceView.load(sequence, self.table) if sequence else None
        parts = {day: Basis(self.table, view, attributes, numbers, walks) for day, view in views.items()}
        self._features = {day: Features(part) for day, part in parts.items()}
        self._sources = {day: Sources(part) for day, part in parts.items()}
        self.names = next(iter(self._features.values())).names
        self._vectors = {space: values.astype(np.float32) for space, values in vectors.items()}
        self._present = present
        self._day = settings.time.granularity == "day"
        self._exclude_bought = settings.task.exclude_bought
        self._tick = TICKS[settings.time.granularity]
        self._targets = np.array([self.state.kinds[t] for t in settings.targets], np.int16)
        self._moment: Moment | None = None
        self._pools: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}

    def at(self, as_of: int) -> Moment:
        """The shop at the last tick before `as_of`, microseconds since 1970."""
        tick = as_of - as_of % self._tick
        if self._moment is None or self._moment.tick != tick:
            self._moment = moment(self.state, self.table, tick)
        return self._moment

    def query(self, question: Question) -> Query:
        """The person of a question in rows of the table."""
        cut = question.as_of - question.as_of % DAY if self._day else question.as_of
        past = self.state.history(question.user_id, "", cut, MAX_HISTORY)
        person = Person(question.user_id, session=question.session)
        return make_query(self.state, self.table, person, past, cut, self._targets)

    def features(self, now: Moment) -> Features:
        """The feature function of a moment's day."""
        return self._features[now.tick // DAY]

    def live(self, as_of: int) -> np.ndarray:
        """Which rows may be recommended at a moment, bool (M,)."""
        return self.table.available(_EPOCH + timedelta(microseconds=as_of))

    @property
    def source_names(self) -> list[str]:
        """The sources, in the order of the bits that `candidates` gives."""
        return [*next(iter(self._sources.values())).by_name, *self._vectors]

    def candidates(self, query: Query, now: Moment, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the sources propose: rising rows int64 (C,), and who proposed each, bits int64 (C,).

        `allowed` is bool (M,); the session is never proposed, nor what was bought where the task says so.
        """
        found = [mine for _, mine in self.proposals(query, now, allowed)]
        rows, place = np.unique(np.concatenate(found), return_inverse=True)
        bits = np.repeat(1 << np.arange(len(found)), [len(f) for f in found])
        proposed = np.zeros(len(rows), np.int64)
        np.bitwise_or.at(proposed, place, bits)
        return rows, proposed

    def proposals(self, query: Query, now: Moment, allowed: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The rows that each source proposes, in the order of `source_names`, made when asked for."""
        out = query.session
        if self._exclude_bought:
            out = np.concatenate([out, query.history[query.bought]])
        rest = allowed.copy()
        rest[out] = False
        sources = self._sources[now.tick // DAY]
        for name in sources.by_name:
            yield name, sources.candidates(name, query, now, rest, PER_SOURCE)[0]
        for space in self._vectors:
            yield space, self._near(space, query, allowed, out)

    def related(self, query: Query, now: Moment, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Which of `rows`, int64 (C,), each relation of the graph ties to the person: bool (C,)."""
        near = self._sources[now.tick // DAY].related(query)
        return {relation: scores[rows] > 0 for relation, scores in near.items()}

    def _near(self, space: str, query: Query, allowed: np.ndarray, out: np.ndarray) -> np.ndarray:
        rows = np.concatenate([query.session, query.history])[:MAX_HISTORY]
        weights = np.concatenate([query.session_weights, query.weights * recency(query.ages)])[:MAX_HISTORY]
        values, present = self._vectors[space], self._present[space]
        centres = []
        for interest in interests(rows.tolist(), weights.tolist()):
            mine = np.array(interest.numbers)
            share = np.array(interest.weights or np.ones(len(mine)), np.float32)
            known = present[mine]
            if known.any():
                centres.append(centre(values[mine[known]], share[known]))
        pool, pooled = self._pool(space, allowed)
        if not centres or not len(pool):
            return np.empty(0, np.int64)
        scores = np.stack(centres) @ pooled.T
        scores[:, np.isin(pool, out)] = -np.inf
        most = min(PER_INTEREST, len(pool))
        best = np.unique(np.argpartition(-scores, most - 1, axis=1)[:, :most])
        return np.setdiff1d(pool[best], out)

    def _pool(self, space: str, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows that may be found in a space and their vectors, kept from one question to the next."""
        key = hash(allowed.tobytes())
        if self._pools.get(space, (None,))[0] != key:
            pool = np.flatnonzero(allowed & self._present[space])
            self._pools[space] = (key, pool, self._vectors[space][pool])
        return self._pools[space][1:]


def state_of(shop: Shop) -> BehaviourState:
    """Every event of a shop, recorded when it happened; a person is the code of their user id."""
    events = shop.events
    state = BehaviourState(shop.settings.event_types)
    state.append(
        Columns(
            user=events.user.astype(np.int64),
            number=events.number,
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
