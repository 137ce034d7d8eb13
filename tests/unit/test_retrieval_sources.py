"""Every candidate source of ranking proposes the best items of a score over the whole catalog.

The score is written out here for every row. Items that arrive after the statistics of a tick count as well.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog import columns
from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash, title_words
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.features.tfidf_similarity import TfidfSimilarity
from services.ranking.models.co_occurrence import GraphView, ItemGraph, Relation
from services.ranking.models.sequence import SequenceNet, SequenceSettings, SequenceView
from services.ranking.retrieval import impact_index, sequence_index
from services.ranking.retrieval.candidate_sources import CandidateSources, ScoredRows
from services.ranking.state.event_columns import EventColumns, EventState
from services.ranking.state.item_stats import DAY, ItemStats, StatsGrowth, item_stats
from services.ranking.state.user_query import UserQuery

TICK = 100 * DAY
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NAMES = ("colour", "tags")
WORDS = ("jade", "skinny", "shirt", "blue", "cotton", "long")
VALUES = ("red", "blue", "green")
AGES = (-2.0, 0.0, 10.0, 29.999, 30.0, 50.0)  # in days, around the age of a new arrival
EXACT = ("co_occurrence", "popular", "trending", "new_arrivals", "variants")
SIMILAR = ("attribute_affinity", "title_keywords")
CONTENT_WEIGHT = 0.1
RELATIONS = st.sampled_from([("baskets", "next"), ("baskets", "next", "text"), ()])


def time_of(micros: float) -> datetime:
    return EPOCH + timedelta(microseconds=micros)


def random_item(number: int, generator: np.random.Generator, *, described: bool = False) -> Item:
    """An item of few words and values; a `described` one has some of each attribute."""
    arrival = None
    if generator.random() < 0.7:
        arrival = time_of(TICK - DAY * float(generator.choice(AGES)))
    least = int(described)
    return Item(
        id=f"i{number}",
        title=" ".join(generator.choice(WORDS, int(generator.integers(0, 5)))),
        attributes=tuple(
            Attribute(name, tuple(generator.permutation(VALUES)[:count].tolist()))
            for name in NAMES
            if (count := int(generator.integers(least, 3)))
        ),
        family_id=str(generator.choice(["", "f0", "f1", "f2"])),
        price=float(generator.integers(1, 9)),
        available_from=arrival,
    )


def change(number: int, item: Item, created: float = TICK - 20 * DAY) -> Change:
    vector = np.random.default_rng(number).standard_normal(4)
    vectors = {"text": vector / np.linalg.norm(vector)}
    return Change(item_hash(item.id), number + 1, item, time_of(created), vectors)


def state_of(rows: Sequence[int], days: Sequence[float], items: Sequence[Item]) -> EventState:
    """The purchases of items, each so many days before the tick."""
    state, count = EventState({"impression": 0.0, "purchase": 1.0}), len(rows)
    state.channel_codes(["web", "store"])
    times = TICK - (np.array(days) * DAY).astype(np.int64) - 1
    order = np.argsort(times, kind="stable")
    state.append(
        EventColumns(
            user=np.zeros(count, np.int64),
            item_hash=np.array([item_hash(items[rows[at]].id) for at in order], np.int64),
            kind=np.ones(count, np.int16),
            channel=(order % 3 - 1).astype(np.int16),
            occurred=times[order],
            recorded=times[order],
            price=np.full(count, 3.0),
            quantity=np.ones(count, np.int64),
            sequence=np.arange(1, count + 1),
        ),
        {("user", "0"): 0},
    )
    return state


def random_state(items: Sequence[Item], generator: np.random.Generator) -> EventState:
    count = int(generator.integers(0, 3 * len(items)))
    days = generator.choice([0.0, 0.5, 2.0, 6.0, 20.0, 90.0], count)
    return state_of(generator.integers(0, len(items), count).tolist(), days.tolist(), items)


def random_graph(hashes: Sequence[int], generator: np.random.Generator) -> ItemGraph:
    """Relations over these items and some that no table has; the weights are multiples of 1/16."""
    nodes = np.array(sorted([*hashes, 3, 5]), np.int64)

    def relation() -> Relation:
        sizes = generator.integers(0, 4, len(nodes))
        neighbors = generator.integers(0, len(nodes), int(sizes.sum())).astype(np.int32)
        weights = (generator.integers(1, 9, len(neighbors)) / 16).astype(np.float32)
        return Relation(np.cumsum([0, *sizes]).astype(np.int64), neighbors, weights)

    return ItemGraph(nodes, {name: relation() for name in ("baskets", "next", "text")})


def random_query(length: int, generator: np.random.Generator, least: int = 0) -> UserQuery:
    """A user of rows below `length`; weights are powers of two, so that their sums are exact."""
    session, history = (generator.integers(0, length, int(generator.integers(least, 5))) for _ in range(2))
    return UserQuery(
        session=session,
        session_weights=generator.choice([0.25, 1.0], len(session)).astype(np.float32),
        history=history,
        ages=np.sort(generator.choice([0.0, 14.0, 28.0], len(history))).astype(np.float32),
        weights=generator.choice([0.25, 1.0], len(history)).astype(np.float32),
        purchased=np.ones(len(history), bool),
        channels=np.zeros(len(history), np.int16),
    )


def untrained_net(table: ItemTable, seed: int, deviation: float = 0.5) -> SequenceNet:
    torch.manual_seed(seed)
    values = [("colour", "red"), ("colour", "blue")]
    net = SequenceNet(
        SequenceSettings(table.spaces, values, width=8), np.sort(table.item_hashes[: table.length // 2])
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=deviation)
    for embedding in (net.values, net.delta):
        torch.nn.init.zeros_(embedding.weight[0])  # that of an item without one
    return net.eval()


@dataclass(frozen=True)
class Oracle:
    """The scores of all rows by each source; `counted` rows were there when the statistics were computed."""

    items: Sequence[Item]
    counted: int
    stats: ItemStats
    query: UserQuery
    graph: ItemGraph
    view: SequenceView | None = None

    def scores(self, source: str) -> np.ndarray:
        """Float64 (N,); 0 or less is no candidate."""
        popular = self.stats.popular
        match source:
            case "popular":
                return np.asarray(popular[:, 2] + 1e-3 * popular[:, -1])
            case "trending":
                rate = popular[:, 0] / np.sqrt(popular[:, 2] + 1)
                return np.where(popular[:, 0] > 0, rate, 0)
            case "new_arrivals":
                return np.array([self._novelty(item) for item in self.items])
            case "variants":
                return self._variants()
            case "co_occurrence":
                return self._co_occurrence()
            case "attribute_affinity":
                values = [[self._values(item, name) for item in self.items] for name in NAMES]
                return np.asarray(self._similarity(values) * np.log1p(popular[:, 2].astype(np.float64)))
            case "title_keywords":
                words = [[title_words(item.title) for item in self.items]]
                return np.asarray(self._similarity(words) * (1 + np.log1p(popular[:, 2].astype(np.float64))))
        raise AssertionError(source)

    def odds(self) -> np.ndarray | None:
        """The odds of the sequence model, float64 (N,), up to a constant."""
        user = self.view.user(self.query) if self.view else None
        if self.view is None or user is None:
            return None
        return np.asarray(np.exp(self.view.scores(user, np.arange(len(self.items)))[0].astype(np.float64)))

    @staticmethod
    def _values(item: Item, name: str) -> tuple[str, ...]:
        return next((a.texts for a in item.attributes if a.name == name), ())

    def _novelty(self, item: Item) -> float:
        arrival = item.available_from or time_of(TICK - 20 * DAY)
        age = (TICK - (arrival - EPOCH) / timedelta(microseconds=1)) / DAY
        return 30 - max(age, 0) if age < 30 else 0.0

    def _variants(self) -> np.ndarray:
        weight = dict.fromkeys((item.family_id for item in self.items), 0.0)
        for seed, of_seed in zip(*self.query.seeds(), strict=True):
            weight[self.items[seed].family_id] += float(of_seed)
        of_family = np.array([weight[item.family_id] if item.family_id else 0.0 for item in self.items])
        return np.asarray(of_family * (1 + np.log1p(self.stats.popular[:, 2])))

    def _co_occurrence(self) -> np.ndarray:
        total = np.zeros(len(self.items))
        row_of = {item_hash(item.id): row for row, item in enumerate(self.items)}
        node_of = {value: node for node, value in enumerate(self.graph.item_hashes.tolist())}
        for seed, of_seed in zip(*self.query.seeds(), strict=True):
            if (node := node_of.get(item_hash(self.items[seed].id))) is None:
                continue
            for name, relation in self.graph.relations.items():
                for edge in range(relation.start[node], relation.start[node + 1]):
                    neighbor = int(self.graph.item_hashes[relation.neighbors[edge]])
                    weight = CONTENT_WEIGHT if name in ("text", "image") else 1.0
                    if neighbor in row_of:
                        total[row_of[neighbor]] += weight * float(relation.weights[edge]) * float(of_seed)
        return total

    def _similarity(self, attributes: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
        """The weighted mean of the TF-IDF cosines of all rows and the user's items.

        A new row has the terms of the counted ones, at most as many of an attribute as one of these.
        """
        parts = []
        for rows in attributes:
            counted = rows[: self.counted]
            terms = sorted({term for texts in counted for term in texts})
            frequency = Counter(term for texts in counted for term in texts)
            place, width = {term: at for at, term in enumerate(terms)}, max(map(len, counted))
            matrix = np.zeros((len(rows), len(terms)))
            for row, texts in enumerate(rows):
                for term in texts[:width]:
                    if term in place:
                        matrix[row, place[term]] = np.log(self.counted / frequency[term])
            parts.append(matrix)
        vectors = np.concatenate(parts, axis=1)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-6)
        seeds, weights = self.query.seeds()
        if not len(seeds):
            return np.zeros(len(self.items))
        return np.asarray(unit @ (weights @ unit[seeds]) / weights.sum())


def assert_best(found: ScoredRows, scores: np.ndarray, allowed: np.ndarray, limit: int) -> None:
    """The rows are `limit` of the best allowed ones, each with its score, up to rounding."""
    usable = allowed & (scores > 1e-9)
    assert len(set(found.rows.tolist())) == len(found.rows) == min(limit, np.count_nonzero(usable))
    assert usable[found.rows].all()
    np.testing.assert_allclose(found.scores, scores[found.rows], rtol=1e-4)
    assert (np.diff(found.scores) <= 0).all()
    usable[found.rows] = False
    if len(found.rows):
        assert scores[usable].max(initial=0) <= found.scores[-1] * (1 + 1e-4)


def assert_exact(
    found: ScoredRows, scores: np.ndarray, allowed: np.ndarray, limit: int, hashes: np.ndarray
) -> None:
    """The rows are the best allowed ones in their order, ties by item hash."""
    usable = np.flatnonzero(allowed & (scores > 0))
    best = usable[np.lexsort((hashes[usable], -scores[usable]))][:limit]
    assert found.rows.tolist() == best.tolist()
    np.testing.assert_array_equal(found.scores, scores[best].astype(np.float32))
    assert found.scores.dtype == np.float32


def check(
    sources: CandidateSources, oracle: Oracle, hashes: np.ndarray, allowed: np.ndarray, limit: int
) -> None:
    for name in (*EXACT, *SIMILAR):
        found, scores = (
            sources.candidates(name, oracle.query, oracle.stats, allowed, limit),
            oracle.scores(name),
        )
        # The weights of content have no exact sums.
        if name in EXACT and not (name == "co_occurrence" and "text" in oracle.graph.relations):
            assert_exact(found, scores, allowed, limit, hashes)
        else:
            assert_best(found, scores, allowed, limit)
    odds = oracle.odds()
    for of_source in (sources.candidates, sources.exact):
        found = of_source("sequence", oracle.query, oracle.stats, allowed, limit)
        if odds is None:
            assert not len(found.rows)
        else:
            assert_best(found, odds / odds[allowed].max(initial=1e-30), allowed, limit)


@given(st.integers(0, 1 << 30), st.integers(1, 12), st.integers(0, 5), st.integers(0, 18), RELATIONS)
@settings(deadline=None, max_examples=150)
def test_sources_equal_scores_of_the_whole_catalog_while_it_grows(
    seed: int, counted: int, more: int, limit: int, relations: tuple[str, ...]
) -> None:
    generator = np.random.default_rng(seed)
    items = [random_item(n, generator, described=not n) for n in range(counted + more)]
    table = ItemTable()
    table.apply(change(n, item) for n, item in enumerate(items[:counted]))
    graph = random_graph([item_hash(item.id) for item in items[::2]], generator)
    graph = ItemGraph(graph.item_hashes, {name: graph.relations[name] for name in relations})
    view = SequenceView(untrained_net(table, seed), table)
    sources = CandidateSources(RankingContext(table, GraphView(graph, table), NAMES, (), view))
    growth, stats = StatsGrowth(), item_stats(random_state(items[:counted], generator), table, TICK)
    for length in range(counted, counted + more + 1):
        if length > counted:
            table.apply([change(length - 1, items[length - 1])])
            stats = growth.extended(stats, table)
        assert stats.length == length
        # Terms are counted when the first user with items comes.
        query = random_query(length, generator, least=int(length == counted))
        allowed = generator.random(length) < 0.8
        check(
            sources,
            Oracle(items[:length], counted, stats, query, graph, view),
            table.item_hashes,
            allowed,
            limit,
        )


def skewed_items(count: int, generator: np.random.Generator) -> list[Item]:
    """Items whose words and values are frequent or rare, as those of shops."""

    def draw(size: int, exponent: float) -> str:
        return str(min(int(generator.pareto(exponent)), size))

    result = []
    for n in range(count):
        words = dict.fromkeys(f"w{draw(800, 0.4)}" for _ in range(int(generator.integers(3, 9))))
        tags = dict.fromkeys(f"t{draw(200, 0.5)}" for _ in range(int(generator.integers(1, 4))))
        attributes = (Attribute("colour", (f"c{draw(30, 0.6)}",)), Attribute("tags", tuple(tags)))
        result.append(Item(f"i{n}", " ".join(words), attributes=attributes, family_id=f"f{n // 3}"))
    return result


def recall(found: ScoredRows, scores: np.ndarray, allowed: np.ndarray, limit: int) -> float:
    """The share of the best `limit` allowed rows that are found."""
    usable = np.flatnonzero(allowed & (scores > 0))
    best = usable[np.argsort(-scores[usable], kind="stable")[:limit]]
    least = scores[best].min(initial=np.inf) * (1 - 1e-5)
    return float(np.count_nonzero(scores[found.rows] >= least)) / max(len(best), 1)


def popular_state(items: Sequence[Item], generator: np.random.Generator) -> EventState:
    """Purchases of which few items have most."""
    count = len(items)
    rows = np.minimum(generator.pareto(0.5, 3 * count), count - 1).astype(np.int64)
    days = generator.choice([0.0, 2.0, 20.0], len(rows))
    return state_of(generator.permutation(count)[rows].tolist(), days.tolist(), items)


def index_limits(patch: pytest.MonkeyPatch, postings: int, scanned: int, terms: int) -> None:
    patch.setattr(impact_index, "_POSTINGS", postings)
    patch.setattr(impact_index, "_SCANNED_ROWS", scanned)
    patch.setattr(impact_index, "_MAX_TERMS", terms)


@pytest.mark.parametrize("seed", range(3))
def test_an_inverted_index_finds_most_of_the_best_rows(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    index_limits(monkeypatch, postings=150, scanned=100, terms=32)
    generator, count, limit = np.random.default_rng(seed), 3000, 50
    items = skewed_items(count, generator)
    table, graph = ItemTable(), ItemGraph.empty()
    table.apply(change(n, item) for n, item in enumerate(items))
    stats = item_stats(popular_state(items, generator), table, TICK)
    sources = CandidateSources(RankingContext(table, GraphView(graph, table), NAMES))
    recalls: dict[str, list[float]] = {name: [] for name in SIMILAR}
    for _ in range(12):
        query, allowed = random_query(count, generator), generator.random(count) < 0.8
        oracle = Oracle(items, count, stats, query, graph)
        for name, of_source in recalls.items():
            scores = oracle.scores(name)
            assert_best(sources.exact(name, query, stats, allowed, limit), scores, allowed, limit)
            found = sources.candidates(name, query, stats, allowed, limit)
            assert len(set(found.rows.tolist())) == len(found.rows)
            assert allowed[found.rows].all()
            np.testing.assert_allclose(found.scores, scores[found.rows], rtol=1e-4)
            if len(query.seeds()[0]):
                of_source.append(recall(found, scores, allowed, limit))
                scored = sources.by_name[name](query, stats, allowed, limit)
                assert len(scored.rows) <= impact_index._EXACT_FACTOR * limit  # it is no scan
            else:
                assert not len(found.rows)
    for of_source in recalls.values():
        assert len(of_source) > 8
        assert min(of_source) >= 0.9
        assert np.mean(of_source) >= 0.95


def test_an_inverted_index_of_every_posting_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    index_limits(monkeypatch, postings=10_000, scanned=0, terms=10_000)
    monkeypatch.setattr(impact_index, "_EXACT_FACTOR", 100)
    generator, counted = np.random.default_rng(5), 300
    items = [random_item(n, generator, described=True) for n in range(counted + 20)]
    table, graph, growth = ItemTable(), ItemGraph.empty(), StatsGrowth()
    table.apply(change(n, item) for n, item in enumerate(items[:counted]))
    stats = item_stats(random_state(items[:counted], generator), table, TICK)
    sources = CandidateSources(RankingContext(table, GraphView(graph, table), NAMES))
    for length in (counted, counted + 1, counted + 20):
        table.apply(change(n, items[n]) for n in range(stats.length, length))
        stats = growth.extended(stats, table)
        for _ in range(10):
            query, allowed = random_query(length, generator), generator.random(length) < 0.8
            oracle = Oracle(items[:length], counted, stats, query, graph)
            for name in SIMILAR:
                for limit in (40, length):  # new items are among the last
                    found = sources.candidates(name, query, stats, allowed, limit)
                    assert_best(found, oracle.scores(name), allowed, limit)


def cluster_change(number: int, item: Item) -> Change:
    """An item near to one of 24 centers."""
    centers = np.random.default_rng(0).standard_normal((24, 6))
    vector = centers[number % 24] + 0.3 * np.random.default_rng(number).standard_normal(6)
    return Change(item_hash(item.id), number + 1, item, None, {"text": vector / np.linalg.norm(vector)})


def test_an_inverted_file_finds_most_of_the_best_rows_and_every_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sequence_index, "_SCANNED_ROWS", 400)
    generator, count, limit = np.random.default_rng(2), 3000, 50
    items = [random_item(n, generator) for n in range(count + 40)]
    table, graph, growth = ItemTable(), ItemGraph.empty(), StatsGrowth()
    table.apply(cluster_change(n, item) for n, item in enumerate(items[:count]))
    net = untrained_net(table, 0)
    with torch.no_grad():
        net.delta.weight *= 0.4  # less than the content, as after training
    view = SequenceView(net, table)
    sources = CandidateSources(RankingContext(table, GraphView(graph, table), (), (), view))
    stats, recalls = item_stats(random_state(items[:count], generator), table, TICK), list[float]()
    for length in (count, count + 40):
        table.apply(cluster_change(n, items[n]) for n in range(stats.length, length))
        stats = growth.extended(stats, table)
        for _ in range(15):
            query, allowed = random_query(length, generator), generator.random(length) < 0.8
            odds = Oracle(items[:length], count, stats, query, graph, view).odds()
            if odds is None:
                continue
            found = sources.candidates("sequence", query, stats, allowed, limit)
            assert allowed[found.rows].all()
            # The best of the scanned rows has the odds 1.
            np.testing.assert_allclose(found.scores, odds[found.rows] / odds[found.rows[0]], rtol=1e-4)
            recalls.append(recall(found, odds, allowed, limit))
            scored = sources.by_name["sequence"](query, stats, allowed, limit)
            assert len(scored.rows) < np.count_nonzero(allowed) / 2  # it is no scan
            new = np.arange(count, length)
            assert set(new[allowed[new]].tolist()) <= set(scored.rows.tolist())
    assert len(recalls) > 20
    assert min(recalls) >= 0.9
    assert np.mean(recalls) >= 0.95


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.lists(st.integers(0, 3), max_size=4))
@settings(deadline=None)
def test_statistics_with_rows_for_new_items_equal_those_computed_with_them(
    seed: int, counted: int, more: list[int]
) -> None:
    generator = np.random.default_rng(seed)
    items = [random_item(n, generator) for n in range(counted + sum(more))]
    state, growth = random_state(items[:counted], generator), StatsGrowth()
    whole, table = ItemTable(), ItemTable(capacity=2)
    whole.apply(change(n, item) for n, item in enumerate(items))
    table.apply(change(n, item) for n, item in enumerate(items[:counted]))
    expected, stats = item_stats(state, whole, TICK), item_stats(state, table, TICK)
    earlier = [stats]
    for count in more:
        table.apply(change(n, items[n]) for n in range(stats.length, stats.length + count))
        stats = growth.extended(stats, table)
        earlier.append(stats)
    assert stats.length == len(items)
    for one in earlier:  # an earlier one keeps its rows
        assert (one.tick, one.counted, one.derived) == (TICK, counted, earlier[0].derived)
        for name in ("popular", "age", "idle", "price", "highest", "channels"):
            of_all = getattr(expected, name)[: one.length]
            np.testing.assert_array_equal(getattr(one, name), of_all, strict=True)


def is_by_terms(name: str) -> bool:
    """Whether a feature rests on document frequencies, which count the items of the tick only."""
    return name.startswith(("words_", "attributes_"))


@given(st.integers(0, 1 << 30), st.integers(2, 10), st.integers(1, 4))
@settings(deadline=None)
def test_features_of_a_new_item_equal_those_of_a_table_that_had_it_from_the_start(
    seed: int, counted: int, more: int
) -> None:
    generator = np.random.default_rng(seed)
    items = [random_item(n, generator, described=not n) for n in range(counted + more)]
    items = [
        replace(item, attributes=(*item.attributes, Attribute("size", (), (float(n * 7 % 5),))))
        for n, item in enumerate(items)
    ]
    # The rank of a number is among those of items that were there at the tick.
    changes = [change(n, item, TICK + (1 if n >= counted else -DAY)) for n, item in enumerate(items)]
    state = random_state(items[:counted], generator)
    graph = random_graph([item_hash(item.id) for item in items], generator)
    whole, table = ItemTable(), ItemTable(capacity=2)
    whole.apply(changes)
    table.apply(changes[:counted])
    net = untrained_net(whole, seed)

    def features_of(items: ItemTable) -> Features:
        view = SequenceView(net, items)
        return Features(RankingContext(items, GraphView(graph, items), NAMES, ["size"], view))

    growing, other = features_of(table), features_of(whole)
    stats = item_stats(state, table, TICK)
    first = random_query(counted, generator, least=1)
    before = growing.matrix(first, np.arange(counted), stats)
    growth = StatsGrowth()
    for length in range(counted + 1, counted + more + 1):
        table.apply([changes[length - 1]])
        stats = growth.extended(stats, table)
        growing.matrix(random_query(length, generator), np.arange(length), stats)
    after = growing.matrix(first, np.arange(counted), stats)
    # The number of values above an item's is the only feature of it that a new item changes.
    kept = [at for at, name in enumerate(growing.names) if name != "size_above"]
    np.testing.assert_array_equal(after[:, kept], before[:, kept])
    query, rows = random_query(len(items), generator), np.arange(len(items))
    expected_stats = item_stats(state, whole, TICK)
    found, expected = growing.matrix(query, rows, stats), other.matrix(query, rows, expected_stats)
    for at, name in enumerate(growing.names):
        if not is_by_terms(name):
            np.testing.assert_allclose(found[:, at], expected[:, at], rtol=1e-5, atol=1e-6, err_msg=name)
    blank = growing.without_interactions(found, rows, stats)
    expected_blank = other.without_interactions(expected, rows, expected_stats)
    for at, name in enumerate(growing.names):
        if not is_by_terms(name):
            np.testing.assert_allclose(
                blank[:, at], expected_blank[:, at], rtol=1e-4, atol=1e-5, err_msg=name
            )


def passing_item(number: int, generation: int, generator: np.random.Generator) -> Item:
    """An item with texts that later generations do not have."""
    first, second = (f"{part}{generation // 3}" for part in "ab")
    attributes = (Attribute("colour", (first,)), Attribute("tags", (first, second)))
    title = f"{first} {second} {generator.choice(WORDS)}"
    return Item(f"i{number}", title, attributes=attributes, family_id=f"f{generation // 2}")


def vocabularies(table: ItemTable) -> dict[str, Mapping[str, int]]:
    rows, result = np.arange(1), {}
    for name in (*NAMES, "family_id"):
        column = table.texts_of_rows(name, rows)
        assert column is not None
        result[name] = column[1]
    return result | {"words": table.words_of_rows(rows)[1]}


@given(st.integers(0, 1 << 30), st.integers(4, 12))
@settings(deadline=None, max_examples=25)
def test_released_texts_between_two_new_items_leave_right_results(seed: int, count: int) -> None:
    """Codes of texts change when a column drops its unused texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_MIN_VOCABULARY", 8)
        patch.setattr(impact_index, "_EXACT_FACTOR", 100)
        index_limits(patch, postings=1000, scanned=0, terms=1000)
        generator, table = np.random.default_rng(seed), ItemTable(capacity=2)
        items = [passing_item(n, n, generator) for n in range(count)]
        table.apply(change(n, item) for n, item in enumerate(items))
        graph, growth = ItemGraph.empty(), StatsGrowth()
        context = RankingContext(table, GraphView(graph, table), NAMES)
        sources, similarity = CandidateSources(context), context.attribute_similarity
        stats, generation = item_stats(random_state(items, generator), table, TICK), count
        for _ in range(3):
            query = random_query(stats.length, generator, least=1)
            for name in ("variants", *SIMILAR):
                sources.candidates(name, query, stats, np.ones(stats.length, bool), 5)
            assert context.values.get("colour", stats) is not None
            before = vocabularies(table)
            while any(vocabulary is before[name] for name, vocabulary in vocabularies(table).items()):
                row, generation = int(generator.integers(0, len(items))), generation + 3
                items[row] = passing_item(row, generation, generator)
                table.apply([change(row, items[row])])
            items.append(passing_item(len(items), generation, generator))
            table.apply([change(len(items) - 1, items[-1])])
            stats = growth.extended(stats, table)
            rows, query = np.arange(stats.length), random_query(stats.length, generator, least=1)
            for at, name in enumerate(NAMES):
                values = context.values.get(name, stats)
                assert values is not None
                text_of = {code: text for text, code in values.vocabulary.items()}
                assert [text_of[code] for code in values.codes.tolist()] == [
                    item.attributes[at].texts[0] for item in items
                ]
            fresh = TfidfSimilarity.of_attributes(table, NAMES).to(*query.seeds(), rows, stats)
            np.testing.assert_allclose(similarity.to(*query.seeds(), rows, stats), fresh, atol=1e-6)
            # All is computed anew: from all rows of now, and their texts of now.
            allowed = generator.random(stats.length) < 0.8
            oracle = Oracle(items, stats.length, stats, query, graph)
            for name in SIMILAR:
                found = sources.candidates(name, query, stats, allowed, 5)
                assert_best(found, oracle.scores(name), allowed, 5)
            found = sources.candidates("variants", query, stats, allowed, 5)
            assert_exact(found, oracle.scores("variants"), allowed, 5, table.item_hashes)


@pytest.mark.parametrize("scanned", [0, 3000])
def test_a_request_with_earlier_statistics_gets_the_rows_of_these(
    monkeypatch: pytest.MonkeyPatch, scanned: int
) -> None:
    """Another request of the tick, with more rows, may have computed what a source reads."""
    index_limits(monkeypatch, postings=1000, scanned=scanned, terms=1000)
    monkeypatch.setattr(impact_index, "_EXACT_FACTOR", 100)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        items = [random_item(n, generator, described=True) for n in range(14)]
        table, growth = ItemTable(), StatsGrowth()
        table.apply(change(n, item) for n, item in enumerate(items[:8]))
        graph = random_graph([item_hash(item.id) for item in items], generator)
        context = RankingContext(table, GraphView(graph, table), NAMES)
        sources = CandidateSources(context)
        earlier = item_stats(random_state(items[:8], generator), table, TICK)
        table.apply(change(n, items[n]) for n in range(8, 14))
        later = growth.extended(earlier, table)
        query, allowed = random_query(8, generator, least=1), generator.random(8) < 0.8
        oracle = Oracle(items, len(items), later, query, graph)
        for name in (*EXACT, *SIMILAR):
            sources.candidates(name, query, later, np.ones(14, bool), 5)
            found = sources.candidates(name, query, earlier, allowed, 5)
            assert_best(found, oracle.scores(name)[:8], allowed, 5)
