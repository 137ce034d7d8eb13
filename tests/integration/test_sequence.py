"""The sequence model learns orders, follows new items and equals its training."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.ranking.models.sequence import SequenceNet, SequenceSettings, SequenceView, write_sequence
from services.ranking.state.user_query import MAX_SEQUENCE, UserQuery
from tests.support.histories import (
    DAYS,
    FIRST,
    WEIGHTS,
    datetime_of,
    make_items,
    make_shop,
    random_interactions,
    random_vectors,
    shop_config,
)
from training.data.config import SequenceTraining
from training.examples.queries import DAY
from training.retrieval.sequence import Engagements, collate, fit_sequence

WORLDS, PER_WORLD = 4, 8
COUNT = WORLDS * PER_WORLD
DEEDS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, COUNT - 1)), min_size=2, max_size=90
)


def vector(number: int) -> np.ndarray:
    """A unit vector near that of the other items of its world."""
    generator = np.random.default_rng(number)
    values = np.eye(8)[number % WORLDS] + 0.1 * generator.standard_normal(8)
    return np.asarray(values / np.linalg.norm(values), np.float16)


def change(number: int, like: int | None = None) -> Change:
    item_id = f"i{number}"
    like = number if like is None else like
    item = Item(item_id, attributes=(Attribute("world", (f"w{like % WORLDS}",)),))
    return Change(item_hash(item_id), number, item, None, {"text": vector(like)})


def table_of(count: int = COUNT) -> ItemTable:
    table = ItemTable()
    table.apply(change(number) for number in range(count))
    return table


def engagements_of(interactions: list[tuple[int, int, int]], table: ItemTable) -> Engagements:
    """Interactions (person, day, item); what somebody did on a day is a basket."""
    user, day, item = (np.array(column, np.int64) for column in zip(*interactions, strict=True))
    rows = table.rows(item_hash(f"i{n}") for n in item)
    users, place = np.unique(rows, return_inverse=True)
    order = np.argsort(table.item_hashes[users])
    at = np.empty(len(order), np.int64)
    at[order] = np.arange(len(order))
    weight = np.where(item % 3 == 0, 0.25, 1.0).astype(np.float32)
    return Engagements(user, user * 100 + day, at[place], day * DAY, weight, users[order])


def untrained_net(table: ItemTable, seed: int = 0, known_count: int = COUNT // 2) -> SequenceNet:
    torch.manual_seed(seed)
    values = [("world", f"w{n}") for n in range(WORLDS - 1)]
    numbers = np.sort(table.item_hashes[:known_count])
    net = SequenceNet(SequenceSettings(table.spaces, values, width=8), numbers)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for embedding in (net.values, net.delta):
        torch.nn.init.zeros_(embedding.weight[0])  # of what is not there
    return net.eval()


def query(session: list[int], history: list[int], ages: list[float]) -> UserQuery:
    """A person in rows of the table, newest first."""
    return UserQuery(
        session=np.array(session, np.int64),
        session_weights=np.where(np.array(session) % 3 == 0, 0.25, 1.0).astype(np.float32),
        history=np.array(history, np.int64),
        ages=np.array(ages, np.float32),
        weights=np.where(np.array(history) % 3 == 0, 0.25, 1.0).astype(np.float32),
        purchased=np.ones(len(history), bool),
        channels=np.zeros(len(history), np.int16),
    )


@given(DEEDS, st.integers(0, 5))
@settings(deadline=None)
def test_training_reads_histories_as_serving_does(
    interactions: list[tuple[int, int, int]], seed: int
) -> None:
    """Of each person, before each of their days: items, gaps and weights."""
    engagements = engagements_of(interactions, table_of())
    sequences = engagements.item_sequences(np.random.default_rng(seed))
    for user in range(len(sequences.end) - 1):
        span = slice(sequences.end[user], sequences.end[user + 1])
        if span.stop - span.start < 2:
            continue
        batch = collate(sequences, np.array([user]))
        rows, days = engagements.rows[sequences.item[span]], sequences.time[span] // DAY
        begin = max(0, len(rows) - MAX_SEQUENCE - 1)
        for at in range(begin + 1, len(rows)):
            now = days[at]
            earlier = np.flatnonzero(days[:at] < now)
            same = np.arange(len(earlier), at)
            newest = [n for n in earlier[::-1] if n >= begin]
            weight = sequences.weight[span]
            query = UserQuery(
                rows[same[::-1]],
                weight[same[::-1]],
                rows[newest],
                (now - days[newest]).astype(np.float32),
                weight[newest],
                np.ones(len(newest), bool),
                np.zeros(len(newest), np.int16),
            ).item_sequence()
            length = at - begin
            np.testing.assert_array_equal(query.rows, engagements.rows[batch.items[0, :length]])
            np.testing.assert_array_equal(query.gaps, batch.gaps[0, :length])
            np.testing.assert_array_equal(query.weights, batch.weights[0, :length])
            assert engagements.rows[batch.target[0, length - 1]] == rows[at]
            assert (batch.target_weight[0, length - 1] == 0) == (rows[at] in rows[same])


@given(st.lists(st.integers(0, COUNT - 1), min_size=2, max_size=12), st.integers(0, 99))
@settings(deadline=None)
def test_later_items_and_padding_change_nothing(items: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    net = untrained_net(table_of(), seed)
    vectors = torch.from_numpy(generator.standard_normal((1, len(items), 9)).astype(np.float32))
    gaps = torch.from_numpy(generator.integers(0, 5, (1, len(items))).astype(np.float32))
    weights = torch.ones(1, len(items))
    with torch.inference_mode():
        whole = net(vectors, gaps, weights)
        for length in range(1, len(items)):
            part = net(vectors[:, :length], gaps[:, :length], weights[:, :length])
            torch.testing.assert_close(part, whole[:, :length])


def test_engagements_are_weighted_events_of_known_items_before_a_time() -> None:
    shop = make_shop(make_items(30), random_interactions(30, seed=5), shop_config("hour"))
    vectors, present = random_vectors(30)
    table, before = (
        ItemTable.of(shop.items, vectors, present, [datetime_of(0)] * 30),
        (FIRST + DAYS - 2) * DAY,
    )
    engagements = Engagements.of(shop.events, WEIGHTS, table, before)
    kinds, hashes = list(WEIGHTS), {item_hash(item.id) for item in shop.items}
    events = shop.events
    expected = [
        (user, number, time, WEIGHTS[kinds[kind]])
        for user, number, time, kind in zip(
            events.user.tolist(),
            events.number.tolist(),
            events.time.tolist(),
            events.kind.tolist(),
            strict=True,
        )
        if WEIGHTS[kinds[kind]] > 0 and number in hashes and time < before
    ]
    numbers = table.item_hashes[engagements.rows]
    assert 0 < len(expected) < len(events)
    assert (np.diff(numbers) > 0).all()
    assert set(numbers.tolist()) == {number for _, number, _, _ in expected}
    columns = (engagements.user, numbers[engagements.item], engagements.time, engagements.weight)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    same_day = engagements.user * (1 << 20) + engagements.time // DAY
    pairs = set(zip(same_day.tolist(), engagements.basket.tolist(), strict=True))
    assert len(pairs) == len(set(same_day.tolist())) == len(set(engagements.basket.tolist()))


def test_a_view_follows_the_writes_to_its_table() -> None:
    table = table_of()
    net = untrained_net(table)
    view = SequenceView(net, table)
    user = view.user(query([1, 2], [3], [4.0]))
    assert user is not None
    view.scores(user, np.arange(COUNT))
    # An item changes, more come than there was room for, and one goes.
    table.apply(
        [change(5, like=6), *(change(n) for n in range(COUNT, 3000)), Change(item_hash("i7"), 1, None)]
    )
    fresh = SequenceView(net, table)
    rows = np.arange(table.length)
    for score, fresh_score in zip(view.scores(user, rows), fresh.scores(user, rows), strict=True):
        np.testing.assert_allclose(score, fresh_score, rtol=1e-5, atol=1e-5)
    assert view.vectors.shape == (3000, len(user))


def test_an_item_without_an_id_embedding_scores_like_similar_items() -> None:
    table = table_of()
    view = SequenceView(untrained_net(table), table)
    table.apply([change(COUNT, like=20)])
    user = view.user(query([1], [], []))
    assert user is not None
    whole, as_new = view.scores(user, np.arange(COUNT + 1))
    assert whole[COUNT] == as_new[COUNT]
    assert as_new[COUNT] == pytest.approx(as_new[20], rel=1e-5)
    known_rows = np.arange(COUNT // 2)
    assert not np.isclose(whole[known_rows], as_new[known_rows]).any()


def test_an_anonymous_user_has_no_sequence_prediction() -> None:
    view = SequenceView(untrained_net(table := table_of()), table)
    assert view.user(query([], [], [])) is None


def test_a_written_model_reads_back(tmp_path: Path) -> None:
    table = table_of()
    net = untrained_net(table)
    write_sequence(tmp_path / "sequence", net)
    rows = np.arange(COUNT)
    one, other = SequenceView(net, table), SequenceView.load(tmp_path / "sequence", table)
    user_query = query([1, 2], [3], [4.0])
    here, there = one.user(user_query), other.user(user_query)
    assert here is not None
    assert there is not None
    np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(one.scores(here, rows), other.scores(here, rows))


def successor(item: int) -> int:
    """The item that people take after one: the next of its world."""
    return item % WORLDS + (item // WORLDS + 1) % PER_WORLD * WORLDS


def chains(users: int) -> list[tuple[int, int, int]]:
    """Everybody sequences on within a world, an item a day, and returns after some days away."""
    generator = np.random.default_rng(0)
    rows = []
    for user in range(users):
        item, day = int(generator.integers(COUNT)), 0
        for _ in range(6):
            rows.append((user, day, item))
            item, day = successor(item), day + int(generator.integers(1, 4))
    return rows


def test_the_model_learns_an_order_that_co_occurrence_cannot() -> None:
    table = table_of()
    engagements = engagements_of(chains(300), table)
    training = SequenceTraining(
        epochs=40, batch=32, negatives=64, embedding_size=16, dropout=0, id_embedding_dropout=0
    )
    net = fit_sequence(engagements, table, training, ["world"])
    assert net is not None
    view, right = SequenceView(net, table), 0
    for item in range(COUNT):
        before = item % WORLDS + (item // WORLDS - 1) % PER_WORLD * WORLDS
        user = view.user(query([], [item, before], [1.0, 2.0]))
        assert user is not None
        right += int((view.vectors @ user).argmax()) == successor(item)
    assert right > 0.9 * COUNT


def test_a_new_item_is_recommended_to_users_of_similar_items() -> None:
    table = table_of()
    generator = np.random.default_rng(1)
    interactions = []
    for somebody in range(300):
        some = generator.permutation(PER_WORLD)[:5] * WORLDS + somebody % WORLDS
        interactions += [(somebody, day, int(item)) for day, item in enumerate(some)]
    training = SequenceTraining(epochs=15, batch=32, negatives=64, embedding_size=16)
    net = fit_sequence(engagements_of(interactions, table), table, training, ["world"])
    assert net is not None
    new = range(COUNT, COUNT + WORLDS)
    table.apply(change(number) for number in new)
    view = SequenceView(net, table)
    for world in range(WORLDS):
        user = view.user(query([world], [world + WORLDS], [1.0]))
        assert user is not None
        whole, _ = view.scores(user, np.array(new))
        assert int(whole.argmax()) == world


def test_items_change_during_queries() -> None:
    table = table_of()
    view = SequenceView(untrained_net(table), table)
    user, stop = view.user(query([1], [], [])), threading.Event()
    assert user is not None

    def write() -> None:
        for number in range(COUNT, COUNT + 1500):
            item = Item(f"i{number}", attributes=(Attribute("world", (f"new {number}",)),))
            table.apply([Change(item_hash(item.id), number, item, None, {"text": vector(number)})])
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        chances = view.vectors @ user
        assert len(chances) >= COUNT
        assert np.isfinite(chances).all()
    writer.join()
    fresh = SequenceView(untrained_net(table), table)
    np.testing.assert_allclose(view.vectors @ user, fresh.vectors @ user, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("epochs", [1, 5, 10, 20])
def test_training_runs_for_any_number_of_steps(epochs: int) -> None:
    engagements = engagements_of(chains(20), table := table_of())
    assert (
        fit_sequence(engagements, table, SequenceTraining(epochs=epochs, embedding_size=4), ["world"])
        is not None
    )


def test_users_with_one_interaction_teach_nothing() -> None:
    table = table_of()
    again = engagements_of([(0, 0, 1), (0, 0, 1), (1, 3, 2), (1, 3, 2)], table)
    assert fit_sequence(again, table, SequenceTraining(epochs=1), ["world"]) is None
    engagements = engagements_of([(user, 0, user) for user in range(5)], table)
    assert fit_sequence(engagements, table, SequenceTraining(epochs=1), ["world"]) is None
    two = engagements_of([(0, 0, 1), (0, 1, 2)], table)
    assert fit_sequence(two, table, SequenceTraining(epochs=0), ["world"]) is None
    assert fit_sequence(two, table, SequenceTraining(epochs=1), ["world"]) is not None


@given(st.lists(st.tuples(st.integers(0, COUNT - 1), st.floats(0, 400)), min_size=1, max_size=60))
@settings(deadline=None)
def test_the_vector_of_a_user_is_that_of_the_network(past: list[tuple[int, float]]) -> None:
    table = table_of()
    net = untrained_net(table)
    view = SequenceView(net, table)
    ages = sorted(age for _, age in past)
    user_query = query([past[0][0]], [item for item, _ in past], ages)
    user = view.user(user_query)
    assert user is not None
    sequence = user_query.item_sequence()
    arrays = view.vectors[sequence.rows], sequence.gaps, sequence.weights
    with torch.inference_mode():
        expected = net(*(torch.from_numpy(array).unsqueeze(0) for array in arrays))[0, -1].numpy()
    np.testing.assert_allclose(user, expected, rtol=1e-4, atol=1e-5)
