"""A feature row sees the past and nothing else; moments and histories against counting by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog import Attribute, Item, item_number
from services.errors import FailedPrecondition
from services.item_table import Change, ItemTable
from services.ranking.basis import Basis
from services.ranking.features import CANDIDATE_COLUMNS, Features
from services.ranking.graph import GraphView
from services.ranking.moment import DAY, HOUR, WINDOWS, moment
from services.ranking.query import Query
from services.ranking.ranking import Person, make_query
from services.ranking.sources import Sources
from services.ranking.state import BehaviourState, Columns
from training.item_graph import fit_item_graph

NOW = 40 * DAY
TYPES = {"impression": 0.0, "click": 0.25, "purchase": 1.0}
IDS = [f"i{n}" for n in range(6)]
NAMED = ("Jade", "Perrie", "Jade", "Mika", "jade!", "")
NUMBERS = np.array([item_number(i) for i in IDS], np.int64)

Event = tuple[int, int, int, int]
EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 2), st.integers(0, 45 * 24)), max_size=40
)


def table() -> ItemTable:
    made = ItemTable()
    generator = np.random.default_rng(0)
    for at, item_id in enumerate(IDS):
        vector = generator.standard_normal(4)
        attributes: tuple[Attribute, ...] = (Attribute("colour", (("red", "blue")[at % 2],)),)
        if at != 4:
            attributes += (Attribute("size", numbers=(1.5 ** (at // 2),)),)
        title = f"{NAMED[at]} shirt"
        item = Item(item_id, title, attributes=attributes, family_id=f"f{at // 2}", price=10.0 + at)
        vectors = {"text": vector / np.linalg.norm(vector)}
        made.apply([Change(item_number(item_id), at + 1, item, None, vectors)])
    return made


def columns(events: list[Event]) -> Columns:
    time = np.array([hour * HOUR for *_, hour in events], np.int64)
    return Columns(
        user=np.array([u for u, *_ in events], np.int64),
        number=NUMBERS[np.array([i for _, i, *_ in events], int)],
        kind=np.array([k for _, _, k, _ in events], np.int16),
        channel=np.array([u % 3 - 1 for u, *_ in events], np.int16),
        occurred=time,
        recorded=time,
        price=np.array([hour + item for _, item, _, hour in events], np.float64),
        quantity=np.ones(len(events), np.int64),
        sequence=np.arange(1, len(events) + 1),
    )


def state_of(events: list[Event]) -> BehaviourState:
    state = BehaviourState(TYPES)
    state.channel_codes(["web", "store"])
    state.append(columns(events), {("user", str(u)): u for u in range(4)})
    return state


def rows_at(events: list[Event], at: int, person: Person) -> np.ndarray:
    items, state = table(), state_of(events)
    past = columns([e for e in events if e[3] * HOUR < at and e[2] > 0])
    graph = GraphView(
        fit_item_graph(past.user, past.user * 100 + past.recorded // DAY, past.recorded, past.number), items
    )
    past = state.history(person.user_id, person.visitor_id, at, 200)
    query: Query = make_query(state, items, person, past, at, np.array([2]))
    features = Features(Basis(items, graph, ["colour"], ["size"]))
    return features.matrix(query, np.arange(6), moment(state, items, at))


@given(EVENTS, st.integers(0, 3))
@settings(deadline=None)
def test_what_happens_later_moves_no_feature(events: list[Event], user: int) -> None:
    person = Person(str(user), session=((int(NUMBERS[0]), "purchase"),))
    earlier = [event for event in events if event[3] * HOUR < NOW]
    np.testing.assert_array_equal(rows_at(events, NOW, person), rows_at(earlier, NOW, person))


@given(EVENTS)
@settings(deadline=None)
def test_a_moment_counts_what_was_recorded_before_it(events: list[Event]) -> None:
    events = sorted(events, key=lambda e: e[3])
    items = table()
    got = moment(state_of(events), items, NOW)
    weights = list(TYPES.values())
    for row in range(6):
        mine = [(k, h * HOUR) for _, i, k, h in events if i == row and h * HOUR < NOW and weights[k] > 0]
        for column, days in enumerate(WINDOWS):
            assert got.popular[row, column] == sum(weights[k] for k, t in mine if t >= NOW - days * DAY)
        assert got.popular[row, -1] == sum(weights[k] for k, _ in mine)
        times = [t for _, t in mine]
        expected = [(NOW - min(times)) / DAY, (NOW - max(times)) / DAY] if mine else [np.nan, np.nan]
        np.testing.assert_allclose([got.age[row], got.idle[row]], expected, rtol=1e-6)


@given(EVENTS, st.integers(0, 3), st.integers(1, 10))
@settings(deadline=None)
def test_a_history_is_newest_first_and_ends_before_the_moment(
    events: list[Event], user: int, limit: int
) -> None:
    events = sorted(events, key=lambda e: e[3])
    got = state_of(events).history(str(user), "", NOW, limit)
    mine = [
        (h * HOUR, at) for at, (u, _, k, h) in enumerate(events) if u == user and h * HOUR < NOW and k > 0
    ]
    newest = sorted(mine, reverse=True)[:limit]
    assert got.sequence.tolist() == [at + 1 for _, at in newest]


def test_growing_in_steps_equals_growing_at_once() -> None:
    events = [(n % 4, n % 6, n % 3, n) for n in range(50)]
    stepwise = BehaviourState(TYPES)
    every = columns(events)
    for start in range(0, 50, 7):
        stepwise.append(every.take(np.arange(start, min(start + 7, 50))), {("user", "1"): 1})
    one, other = stepwise.all(), state_of(events).all()
    np.testing.assert_array_equal(one.sequence, other.sequence)
    np.testing.assert_array_equal(
        stepwise.history("1", "", NOW, 9).sequence, state_of(events).history("1", "", NOW, 9).sequence
    )


def test_features_say_what_their_names_say() -> None:
    hour = 39 * 24
    events = [(0, 0, 2, hour), (0, 1, 2, hour), (1, 0, 2, hour), (1, 2, 1, hour - 48)]
    person = Person("1", session=((int(NUMBERS[1]), "purchase"),))
    items = table()
    graph = GraphView(
        fit_item_graph(np.zeros(2, int), np.zeros(2, int), np.zeros(2, int), NUMBERS[:2]), items
    )
    features = Features(Basis(items, graph, ["colour"], ["size"]))
    state = state_of(events)
    past = state.history("1", "", NOW, 200)
    query = make_query(state, items, person, past, NOW, np.array([2]))
    matrix = features.matrix(query, np.arange(6), moment(state, items, NOW))
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


def test_what_was_only_shown_is_no_interest() -> None:
    seen = ((int(NUMBERS[2]), "impression"), (int(NUMBERS[1]), "purchase"), (int(NUMBERS[3]), "impression"))
    shown, bought = (Person("1", session=session) for session in (seen, seen[1:2]))
    np.testing.assert_array_equal(rows_at([], NOW, shown), rows_at([], NOW, bought))


def test_an_attribute_may_not_take_the_name_of_another_feature() -> None:
    items = table()
    graph = GraphView(
        fit_item_graph(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), NUMBERS[:0]), items
    )
    with pytest.raises(FailedPrecondition, match="words_session"):
        Features(Basis(items, graph, ["words"]))


def test_values_written_after_the_moment_was_taken_are_of_the_next() -> None:
    items, hour = table(), 39 * 24
    state = state_of([(0, 0, 2, hour), (1, 1, 2, hour)])
    graph = GraphView(
        fit_item_graph(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), NUMBERS[:0]), items
    )
    features, now = Features(Basis(items, graph, ["colour"], ["size"])), moment(state, items, NOW)
    query = make_query(
        state, items, Person(session=((int(NUMBERS[0]), "purchase"),)), columns([]), NOW, np.array([2])
    )
    before = features.matrix(query, np.arange(6), now)
    for at in range(3):
        item = Item(IDS[at], f"new {at}", attributes=(Attribute("colour", (f"c{at}",)),), family_id=f"n{at}")
        items.apply([Change(int(NUMBERS[at]), 10 + at, item)])
    after = features.matrix(query, np.arange(6), now)
    plain = [at for at, name in enumerate(features.names) if not name.startswith("text_")]
    np.testing.assert_array_equal(before[:, plain], after[:, plain])


def test_a_source_gives_its_best_allowed_rows_in_order() -> None:
    items, hour = table(), 39 * 24
    state = state_of([(u, i, 2, hour) for u in range(4) for i in range(u + 1)])
    nothing = fit_item_graph(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), NUMBERS[:0])
    sources = Sources(Basis(items, GraphView(nothing, items), ["colour", "nowhere"]))
    allowed = np.array([False, True, True, True, True, True])
    person = make_query(state, items, Person(), columns([]), NOW, np.array([2]))
    rows, scores = sources.candidates("popular", person, moment(state, items, NOW), allowed, 2)
    assert rows.tolist() == [1, 2]
    assert scores[0] > scores[1]
    of_red = make_query(
        state, items, Person(session=((int(NUMBERS[0]), "purchase"),)), columns([]), NOW, np.array([2])
    )
    rows, _ = sources.candidates("affinity", of_red, moment(state, items, NOW), allowed, 6)
    assert rows.tolist() == [2]  # of the red ones, 0 is not allowed and nobody bought 4
    rows, _ = sources.candidates("words", of_red, moment(state, items, NOW), allowed, 6)
    assert rows.tolist() == [2, 4]  # Jades, that which is bought first


@given(EVENTS, st.integers(0, 3), st.lists(st.integers(0, 5), max_size=3))
@settings(deadline=None)
def test_where_somebody_is_follows_from_the_session_and_from_habit(
    events: list[Event], user: int, session: list[int]
) -> None:
    person = Person(str(user), session=tuple((int(NUMBERS[i]), "purchase") for i in session))
    found = rows_at(events, NOW, person)[:, CANDIDATE_COLUMNS.index("channel_fit")]
    weight = list(TYPES.values())
    counts = np.zeros((len(IDS), 2))
    for u, item, kind, hour in events:
        if u % 3 and NOW - 30 * DAY <= hour * HOUR < NOW:
            counts[item, u % 3 - 1] += weight[kind]
    if np.count_nonzero(counts.sum(0)) < 2:
        assert np.isnan(found).all()
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
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
