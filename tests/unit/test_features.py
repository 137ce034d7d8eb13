"""Feature rows use only the past and equal a count by hand."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.core.errors import FailedPrecondition
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import CANDIDATE_COLUMNS, Features
from services.ranking.features.user_impressions import impression_columns
from services.ranking.models.co_occurrence import GraphView
from services.ranking.retrieval.candidate_sources import CandidateSources
from services.ranking.state.event_columns import EventColumns, EventState
from services.ranking.state.item_stats import (
    DAY,
    HOUR,
    RECENT_COLUMNS,
    WINDOWS,
    item_stats,
    recent_columns,
)
from services.ranking.state.query_builder import User, make_query
from services.ranking.state.user_query import UserQuery
from training.retrieval.item_graph import fit_item_graph

NOW = 40 * DAY
TYPES = {"impression": 0.0, "click": 0.25, "purchase": 1.0}
IDS = [f"i{n}" for n in range(6)]
NAMED = ("Jade", "Perrie", "Jade", "Mika", "jade!", "")
NUMBERS = np.array([item_hash(i) for i in IDS], np.int64)

Event = tuple[int, int, int, int]
EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 2), st.integers(0, 45 * 24)), max_size=40
)


def table() -> ItemTable:
    result = ItemTable()
    generator = np.random.default_rng(0)
    for at, item_id in enumerate(IDS):
        vector = generator.standard_normal(4)
        attributes: tuple[Attribute, ...] = (Attribute("colour", (("red", "blue")[at % 2],)),)
        if at != 4:
            attributes += (Attribute("size", numbers=(1.5 ** (at // 2),)),)
        title = f"{NAMED[at]} shirt"
        item = Item(item_id, title, attributes=attributes, family_id=f"f{at // 2}", price=10.0 + at)
        vectors = {"text": vector / np.linalg.norm(vector)}
        result.apply([Change(item_hash(item_id), at + 1, item, None, vectors)])
    return result


def columns(events: list[Event]) -> EventColumns:
    time = np.array([hour * HOUR for *_, hour in events], np.int64)
    return EventColumns(
        user=np.array([u for u, *_ in events], np.int64),
        item_hash=NUMBERS[np.array([i for _, i, *_ in events], int)],
        kind=np.array([k for _, _, k, _ in events], np.int16),
        channel=np.array([u % 3 - 1 for u, *_ in events], np.int16),
        occurred=time,
        recorded=time,
        price=np.array([hour + item for _, item, _, hour in events], np.float64),
        quantity=np.ones(len(events), np.int64),
        sequence=np.arange(1, len(events) + 1),
    )


def state_of(events: list[Event]) -> EventState:
    state = EventState(TYPES)
    state.channel_codes(["web", "store"])
    state.append(columns(events), {("user", str(u)): u for u in range(4)})
    return state


def rows_at(events: list[Event], at: int, user: User, rows: Sequence[int] = range(6)) -> np.ndarray:
    items, state = table(), state_of(events)
    past = columns([e for e in events if e[3] * HOUR < at and e[2] > 0])
    graph = GraphView(
        fit_item_graph(past.user, past.user * 100 + past.recorded // DAY, past.recorded, past.item_hash),
        items,
    )
    past = state.history(user.user_id, user.visitor_id, at, 200)
    query: UserQuery = make_query(state, items, user, past, at, np.array([2]))
    features = Features(RankingContext(items, graph, ["colour"], ["size"]))
    return features.matrix(query, np.array(rows), item_stats(state, items, at))


@given(EVENTS, st.integers(0, 3))
@settings(deadline=None)
def test_later_events_change_no_feature(events: list[Event], user: int) -> None:
    someone = User(str(user), session=((int(NUMBERS[0]), "purchase"),))
    earlier = [event for event in events if event[3] * HOUR < NOW]
    np.testing.assert_array_equal(rows_at(events, NOW, someone), rows_at(earlier, NOW, someone))


@given(EVENTS, st.integers(0, 3), st.lists(st.integers(0, 5), min_size=1, max_size=9))
@settings(deadline=None)
def test_a_candidate_has_its_features_however_often_it_comes(
    events: list[Event], user: int, rows: list[int]
) -> None:
    someone = User(str(user), session=((int(NUMBERS[0]), "purchase"),))
    every = rows_at(events, NOW, someone)
    np.testing.assert_allclose(rows_at(events, NOW, someone, rows), every[rows], rtol=1e-5, atol=1e-6)


@given(EVENTS)
@settings(deadline=None)
def test_item_stats_count_events_before_their_time(events: list[Event]) -> None:
    events = sorted(events, key=lambda e: e[3])
    items = table()
    stats = item_stats(state_of(events), items, NOW)
    weights = list(TYPES.values())
    for row in range(6):
        events_of_item = [
            (k, h * HOUR) for _, i, k, h in events if i == row and h * HOUR < NOW and weights[k] > 0
        ]
        for column, days in enumerate(WINDOWS):
            assert stats.popular[row, column] == sum(
                weights[k] for k, t in events_of_item if t >= NOW - days * DAY
            )
        assert stats.popular[row, -1] == sum(weights[k] for k, _ in events_of_item)
        times = [t for _, t in events_of_item]
        expected = (
            [(NOW - min(times)) / DAY, (NOW - max(times)) / DAY] if events_of_item else [np.nan, np.nan]
        )
        np.testing.assert_allclose([stats.age[row], stats.idle[row]], expected, rtol=1e-6)


@given(EVENTS, st.integers(0, 2000))
@settings(deadline=None)
def test_recent_columns_equal_a_count_by_hand(events: list[Event], extra: int) -> None:
    """Hours count from the tick, and neither the tick itself nor what is later belongs to them."""
    items, late = table(), [(u, i, k, 40 * 24 - extra % 30 + h % 30) for u, i, k, h in events]
    arrived = Item("i0", "Jade shirt", available_from=datetime.fromtimestamp((NOW - 5 * HOUR) / 1e6, UTC))
    items.apply([Change(int(NUMBERS[0]), 9, arrived, None, {})])
    stats = item_stats(state_of(late), items, NOW)
    values = dict(zip(RECENT_COLUMNS, recent_columns(np.arange(6), stats), strict=True))

    def count(item: int, hours: int, kinds: Mapping[int, float]) -> float:
        return sum(kinds.get(k, 0) for _, i, k, h in late if i == item and 40 * 24 - hours <= h < 40 * 24)

    engaged, shown = {1: 0.25, 2: 1.0}, {0: 1.0}
    for hours in (1, 6):
        expected = [count(i, hours, engaged) for i in range(6)]
        np.testing.assert_allclose(values[f"popular_{hours}h"], expected)
    for hours in (1, 6, 24):
        np.testing.assert_allclose(values[f"shown_{hours}h"], [count(i, hours, shown) for i in range(6)])
    for hours in (6, 24):
        pages = [count(i, hours, shown) for i in range(6)]
        total = sum(count(i, hours, engaged) for i in range(6) if pages[i])
        mean = total / max(sum(pages), 1)
        share = [
            (count(i, hours, engaged) + 10 * mean) / (pages[i] + 10) if pages[i] else np.nan for i in range(6)
        ]
        np.testing.assert_allclose(values[f"engaged_share_{hours}h"], share, rtol=1e-5)
    np.testing.assert_allclose(values["listed_hours"], [5, *[np.nan] * 5])


@given(EVENTS, st.integers(0, 3))
@settings(deadline=None)
def test_what_a_user_was_shown_equals_a_count_by_hand(events: list[Event], user: int) -> None:
    items, state = table(), state_of(events)
    past, shown = (read(str(user), "", NOW, 100) for read in (state.history, state.impressions))
    query = make_query(state, items, User(str(user)), past, NOW, np.array([], np.int64), shown)
    counts, hours = impression_columns(query.impressions, np.arange(6))
    for item in range(6):
        times = [h for u, i, k, h in events if (u, i, k) == (user, item, 0) and h * HOUR < NOW]
        assert counts[item] == len(times)
        np.testing.assert_allclose(hours[item], 40 * 24 - max(times) if times else np.nan)


@given(EVENTS, st.integers(0, 3), st.integers(1, 10))
@settings(deadline=None)
def test_a_history_is_newest_first_and_ends_before_the_query_time(
    events: list[Event], user: int, limit: int
) -> None:
    events = sorted(events, key=lambda e: e[3])
    history = state_of(events).history(str(user), "", NOW, limit)
    expected_rows = [
        (h * HOUR, at) for at, (u, _, k, h) in enumerate(events) if u == user and h * HOUR < NOW and k > 0
    ]
    newest = sorted(expected_rows, reverse=True)[:limit]
    assert history.sequence.tolist() == [at + 1 for _, at in newest]


def test_incremental_growth_equals_a_single_build() -> None:
    events = [(n % 4, n % 6, n % 3, n) for n in range(50)]
    stepwise = EventState(TYPES)
    every = columns(events)
    for start in range(0, 50, 7):
        stepwise.append(every.take(np.arange(start, min(start + 7, 50))), {("user", "1"): 1})
    one, other = stepwise.all(), state_of(events).all()
    np.testing.assert_array_equal(one.sequence, other.sequence)
    np.testing.assert_array_equal(
        stepwise.history("1", "", NOW, 9).sequence, state_of(events).history("1", "", NOW, 9).sequence
    )


def test_feature_values_match_their_names() -> None:
    hour = 39 * 24
    events = [(0, 0, 2, hour), (0, 1, 2, hour), (1, 0, 2, hour), (1, 2, 1, hour - 48)]
    user = User("1", session=((int(NUMBERS[1]), "purchase"),))
    items = table()
    graph = GraphView(
        fit_item_graph(np.zeros(2, int), np.zeros(2, int), np.zeros(2, int), NUMBERS[:2]), items
    )
    features = Features(RankingContext(items, graph, ["colour"], ["size"]))
    state = state_of(events)
    past = state.history("1", "", NOW, 200)
    query = make_query(state, items, user, past, NOW, np.array([2]))
    matrix = features.matrix(query, np.arange(6), item_stats(state, items, NOW))
    value = {name: matrix[:, at] for at, name in enumerate(features.names)}
    assert value["popular_1d"].tolist() == [2, 1, 0, 0, 0, 0]
    assert value["popular_7d"].tolist() == [2, 1, 0.25, 0, 0, 0]
    assert value["baskets_session"].tolist() == [1, 0, 0, 0, 0, 0]
    assert value["bought_before"].tolist() == [1, 0, 0, 0, 0, 0]
    assert value["family_in_session"].tolist() == [1, 1, 0, 0, 0, 0]
    assert value["colour_session"].tolist() == [0, 1, 0, 1, 0, 1]
    assert value["price"].tolist() == [936, 937, 890, 13, 14, 15]
    vectors = items.vectors("text")
    assert vectors is not None
    texts = vectors[0].astype(np.float32)
    np.testing.assert_allclose(value["text_session_most"], texts @ texts[1], rtol=1e-5)
    assert np.isnan(value["image_session"]).all()
    alike = value["words_session_most"]  # to "Perrie shirt": everything is a shirt, which says nothing
    assert [alike[0], alike[1], alike[3]] == [0, 1, 0]
    assert np.isnan(alike[5])
    step = value["size_session"]  # to the first of three sizes, of which the last two items have one between
    np.testing.assert_allclose(step, np.log1p([0, 0, 1, 1, np.nan, 2]), rtol=1e-6)
    np.testing.assert_allclose(value["size_above"], np.log1p([2, 2, 1, 1, np.nan, 0]), rtol=1e-6)


def test_a_free_item_has_no_price_ratio_and_raises_no_warning() -> None:
    items, state = table(), state_of([(0, 0, 2, 0), (1, 1, 2, 5)])  # the first at hour 0 costs nothing
    graph = GraphView(
        fit_item_graph(np.zeros(2, int), np.zeros(2, int), np.zeros(2, int), NUMBERS[:2]), items
    )
    features, past = Features(RankingContext(items, graph, ["colour"])), state.history("1", "", 9 * HOUR, 200)
    session = ((int(NUMBERS[0]), "purchase"),)
    query = make_query(state, items, User("1", session=session), past, 9 * HOUR, np.array([2]))
    now, rows = item_stats(state, items, 9 * HOUR), np.arange(6)
    with np.errstate(divide="raise", invalid="raise"):
        matrix = features.matrix(query, rows, now)
        blank = features.without_interactions(matrix, rows, now)
    column = {name: at for at, name in enumerate(features.names)}
    assert matrix[0, column["price"]] == 0
    assert np.isnan(matrix[0, column["markdown"]])
    assert not np.isinf(matrix).any()
    assert not np.isinf(blank).any()


def test_impressions_alone_are_no_interest() -> None:
    session_items = (
        (int(NUMBERS[2]), "impression"),
        (int(NUMBERS[1]), "purchase"),
        (int(NUMBERS[3]), "impression"),
    )
    with_impressions, purchase_only = (
        User("1", session=session) for session in (session_items, session_items[1:2])
    )
    np.testing.assert_array_equal(rows_at([], NOW, with_impressions), rows_at([], NOW, purchase_only))


def test_an_attribute_cannot_use_the_name_of_another_feature() -> None:
    items = table()
    graph = GraphView(
        fit_item_graph(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), NUMBERS[:0]), items
    )
    with pytest.raises(FailedPrecondition, match="words_session"):
        Features(RankingContext(items, graph, ["words"]))


def test_values_written_after_a_snapshot_belong_to_the_next_one() -> None:
    items, hour = table(), 39 * 24
    state = state_of([(0, 0, 2, hour), (1, 1, 2, hour)])
    graph = GraphView(
        fit_item_graph(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), NUMBERS[:0]), items
    )
    features, now = (
        Features(RankingContext(items, graph, ["colour"], ["size"])),
        item_stats(state, items, NOW),
    )
    query = make_query(
        state, items, User(session=((int(NUMBERS[0]), "purchase"),)), columns([]), NOW, np.array([2])
    )
    before = features.matrix(query, np.arange(6), now)
    for at in range(3):
        item = Item(IDS[at], f"new {at}", attributes=(Attribute("colour", (f"c{at}",)),), family_id=f"n{at}")
        items.apply([Change(int(NUMBERS[at]), 10 + at, item)])
    after = features.matrix(query, np.arange(6), now)
    plain = [at for at, name in enumerate(features.names) if not name.startswith("text_")]
    np.testing.assert_array_equal(before[:, plain], after[:, plain])


def test_a_source_returns_its_best_allowed_rows_in_order() -> None:
    items, hour = table(), 39 * 24
    state = state_of([(u, i, 2, hour) for u in range(4) for i in range(u + 1)])
    nothing = fit_item_graph(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), NUMBERS[:0])
    sources = CandidateSources(RankingContext(items, GraphView(nothing, items), ["colour", "nowhere"]))
    eligible = np.array([False, True, True, True, True, True])
    user = make_query(state, items, User(), columns([]), NOW, np.array([2]))
    rows, scores = sources.candidates("popular", user, item_stats(state, items, NOW), eligible, 2)
    assert rows.tolist() == [1, 2]
    assert scores[0] > scores[1]
    of_red = make_query(
        state, items, User(session=((int(NUMBERS[0]), "purchase"),)), columns([]), NOW, np.array([2])
    )
    rows, _ = sources.candidates("attribute_affinity", of_red, item_stats(state, items, NOW), eligible, 6)
    assert rows.tolist() == [2]  # of the red ones, 0 is not allowed and nobody bought 4
    rows, _ = sources.candidates("title_keywords", of_red, item_stats(state, items, NOW), eligible, 6)
    assert rows.tolist() == [2, 4]  # Jades, that which is bought first


@given(EVENTS, st.integers(0, 3), st.lists(st.integers(0, 5), max_size=3))
@settings(deadline=None)
def test_the_channel_follows_from_the_session_and_the_history(
    events: list[Event], user: int, session: list[int]
) -> None:
    someone = User(str(user), session=tuple((int(NUMBERS[i]), "purchase") for i in session))
    channel_fit = rows_at(events, NOW, someone)[:, CANDIDATE_COLUMNS.index("channel_fit")]
    weight = list(TYPES.values())
    counts = np.zeros((len(IDS), 2))
    for u, item, kind, hour in events:
        if u % 3 and NOW - 30 * DAY <= hour * HOUR < NOW:
            counts[item, u % 3 - 1] += weight[kind]
    if np.count_nonzero(counts.sum(0)) < 2:
        assert np.isnan(channel_fit).all()
        return
    share = counts.sum(0) / counts.sum()
    of_item = (counts + 5 * share) / (counts.sum(1, keepdims=True) + 5)
    past = sorted((e for e in events if e[0] == user and e[3] * HOUR < NOW and e[2] > 0), key=lambda e: -e[3])
    visits = np.zeros(2)
    for u, *_, hour in past[:30]:
        if u % 3:
            visits[u % 3 - 1] += 0.5 ** ((NOW - hour * HOUR) / DAY / 14)
    chance = (visits + 2 * share) / (visits.sum() + 2)
    for item in session:
        chance = chance * of_item[item] / share
    expected = [np.log(sum(chance / chance.sum() * of_item[i] / share)) for i in range(len(IDS))]
    np.testing.assert_allclose(channel_fit, expected, rtol=1e-4, atol=1e-5)
