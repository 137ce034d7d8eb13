"""The sequence model: what it reads, what it keeps up with, and what it can learn."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog import Attribute, Item, item_number
from services.item_table import Change, ItemTable
from services.ranking.query import LONGEST_WALK, Query
from services.ranking.sequence import SequenceNet, SequenceSettings, SequenceView, write_sequence
from tests.pasts import DAYS, FIRST, WEIGHTS, deeds_of, items_of, moment_of, settings_of, shop_of, vectors_of
from training.queries import DAY
from training.sequence import Engagements, _batch, fit_sequence
from training.shop_settings import SequenceTraining

WORLDS, PER_WORLD = 4, 8
COUNT = WORLDS * PER_WORLD
DEEDS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, COUNT - 1)), min_size=2, max_size=90
)


def vector(number: int) -> np.ndarray:
    """A unit vector near that of the other items of its world."""
    generator = np.random.default_rng(number)
    made = np.eye(8)[number % WORLDS] + 0.1 * generator.standard_normal(8)
    return np.asarray(made / np.linalg.norm(made), np.float16)


def change(number: int, like: int | None = None) -> Change:
    item_id = f"i{number}"
    like = number if like is None else like
    item = Item(item_id, attributes=(Attribute("world", (f"w{like % WORLDS}",)),))
    return Change(item_number(item_id), number, item, None, {"text": vector(like)})


def table_of(count: int = COUNT) -> ItemTable:
    table = ItemTable()
    table.apply(change(number) for number in range(count))
    return table


def engaged_of(deeds: list[tuple[int, int, int]], table: ItemTable) -> Engagements:
    """Deeds (person, day, item); what somebody did on a day is a basket."""
    user, day, item = (np.array(column, np.int64) for column in zip(*deeds, strict=True))
    rows = table.rows(item_number(f"i{n}") for n in item)
    known, place = np.unique(rows, return_inverse=True)
    order = np.argsort(table.item_numbers[known])
    at = np.empty(len(order), np.int64)
    at[order] = np.arange(len(order))
    weight = np.where(item % 3 == 0, 0.25, 1.0).astype(np.float32)
    return Engagements(user, user * 100 + day, at[place], day * DAY, weight, known[order])


def untrained(table: ItemTable, seed: int = 0, known: int = COUNT // 2) -> SequenceNet:
    torch.manual_seed(seed)
    values = [("world", f"w{n}") for n in range(WORLDS - 1)]
    numbers = np.sort(table.item_numbers[:known])
    net = SequenceNet(SequenceSettings(table.spaces, values, width=8), numbers)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for embedding in (net.values, net.delta):
        torch.nn.init.zeros_(embedding.weight[0])  # of what is not there
    return net.eval()


def query(session: list[int], history: list[int], ages: list[float]) -> Query:
    """A person in rows of the table, newest first."""
    return Query(
        session=np.array(session, np.int64),
        session_weights=np.where(np.array(session) % 3 == 0, 0.25, 1.0).astype(np.float32),
        history=np.array(history, np.int64),
        ages=np.array(ages, np.float32),
        weights=np.where(np.array(history) % 3 == 0, 0.25, 1.0).astype(np.float32),
        bought=np.ones(len(history), bool),
        channels=np.zeros(len(history), np.int16),
    )


@given(DEEDS, st.integers(0, 5))
@settings(deadline=None)
def test_training_reads_people_as_serving_does(deeds: list[tuple[int, int, int]], seed: int) -> None:
    """Of each person, before each of their days: items, gaps and weights."""
    engaged = engaged_of(deeds, table_of())
    walks = engaged.walks(np.random.default_rng(seed))
    for person in range(len(walks.end) - 1):
        mine = slice(walks.end[person], walks.end[person + 1])
        if mine.stop - mine.start < 2:
            continue
        batch = _batch(walks, np.array([person]))
        rows, days = engaged.rows[walks.item[mine]], walks.time[mine] // DAY
        begin = max(0, len(rows) - LONGEST_WALK - 1)
        for at in range(begin + 1, len(rows)):
            now = days[at]
            earlier = np.flatnonzero(days[:at] < now)
            same = np.arange(len(earlier), at)
            newest = [n for n in earlier[::-1] if n >= begin]
            weight = walks.weight[mine]
            asked = Query(
                rows[same[::-1]],
                weight[same[::-1]],
                rows[newest],
                (now - days[newest]).astype(np.float32),
                weight[newest],
                np.ones(len(newest), bool),
                np.zeros(len(newest), np.int16),
            ).walk()
            length = at - begin
            np.testing.assert_array_equal(asked.rows, engaged.rows[batch.items[0, :length]])
            np.testing.assert_array_equal(asked.gaps, batch.gaps[0, :length])
            np.testing.assert_array_equal(asked.weights, batch.weights[0, :length])
            assert engaged.rows[batch.target[0, length - 1]] == rows[at]
            assert (batch.worth[0, length - 1] == 0) == (rows[at] in rows[same])


@given(st.lists(st.integers(0, COUNT - 1), min_size=2, max_size=12), st.integers(0, 99))
@settings(deadline=None)
def test_what_comes_later_and_padding_change_nothing(items: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    net = untrained(table_of(), seed)
    vectors = torch.from_numpy(generator.standard_normal((1, len(items), 9)).astype(np.float32))
    gaps = torch.from_numpy(generator.integers(0, 5, (1, len(items))).astype(np.float32))
    weights = torch.ones(1, len(items))
    with torch.inference_mode():
        whole = net(vectors, gaps, weights)
        for length in range(1, len(items)):
            part = net(vectors[:, :length], gaps[:, :length], weights[:, :length])
            torch.testing.assert_close(part, whole[:, :length])


def test_engagements_are_what_weighs_something_of_known_items_before_a_moment() -> None:
    shop = shop_of(items_of(30), deeds_of(30, seed=5), settings_of("hour"))
    vectors, present = vectors_of(30)
    table, before = ItemTable.of(shop.items, vectors, present, [moment_of(0)] * 30), (FIRST + DAYS - 2) * DAY
    found = Engagements.of(shop.events, WEIGHTS, table, before)
    kinds, known = list(WEIGHTS), {item_number(item.id) for item in shop.items}
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
        if WEIGHTS[kinds[kind]] > 0 and number in known and time < before
    ]
    numbers = table.item_numbers[found.rows]
    assert 0 < len(expected) < len(events)
    assert (np.diff(numbers) > 0).all()
    assert set(numbers.tolist()) == {number for _, number, _, _ in expected}
    columns = (found.user, numbers[found.item], found.time, found.weight)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    same_day = found.user * (1 << 20) + found.time // DAY
    pairs = set(zip(same_day.tolist(), found.basket.tolist(), strict=True))
    assert len(pairs) == len(set(same_day.tolist())) == len(set(found.basket.tolist()))


def test_a_view_follows_what_is_written_to_its_table() -> None:
    table = table_of()
    net = untrained(table)
    view = SequenceView(net, table)
    person = view.person(query([1, 2], [3], [4.0]))
    assert person is not None
    view.scores(person, np.arange(COUNT))
    # An item changes, more come than there was room for, and one goes.
    table.apply(
        [change(5, like=6), *(change(n) for n in range(COUNT, 3000)), Change(item_number("i7"), 1, None)]
    )
    fresh = SequenceView(net, table)
    rows = np.arange(table.length)
    for kept, anew in zip(view.scores(person, rows), fresh.scores(person, rows), strict=True):
        np.testing.assert_allclose(kept, anew, rtol=1e-5, atol=1e-5)
    assert view.chances(person).shape == (3000,)
    assert view.chances(person).sum() == pytest.approx(1, abs=1e-4)


def test_an_item_without_a_delta_is_scored_as_new_and_as_its_like() -> None:
    table = table_of()
    view = SequenceView(untrained(table), table)
    table.apply([change(COUNT, like=20)])
    person = view.person(query([1], [], []))
    assert person is not None
    whole, as_new = view.scores(person, np.arange(COUNT + 1))
    assert whole[COUNT] == as_new[COUNT]
    assert as_new[COUNT] == pytest.approx(as_new[20], rel=1e-5)
    known = np.arange(COUNT // 2)
    assert not np.isclose(whole[known], as_new[known]).any()


def test_of_a_stranger_nothing_is_foretold() -> None:
    view = SequenceView(untrained(table := table_of()), table)
    assert view.person(query([], [], [])) is None


def test_a_written_model_reads_back(tmp_path: Path) -> None:
    table = table_of()
    net = untrained(table)
    write_sequence(tmp_path / "sequence", net)
    rows = np.arange(COUNT)
    one, other = SequenceView(net, table), SequenceView.load(tmp_path / "sequence", table)
    asked = query([1, 2], [3], [4.0])
    here, there = one.person(asked), other.person(asked)
    assert here is not None
    assert there is not None
    np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(one.scores(here, rows), other.scores(here, rows))


def successor(item: int) -> int:
    """The item that people take after one: the next of its world."""
    return item % WORLDS + (item // WORLDS + 1) % PER_WORLD * WORLDS


def chains(people: int) -> list[tuple[int, int, int]]:
    """Everybody walks on within a world, an item a day, and returns after some days away."""
    generator = np.random.default_rng(0)
    made = []
    for person in range(people):
        item, day = int(generator.integers(COUNT)), 0
        for _ in range(6):
            made.append((person, day, item))
            item, day = successor(item), day + int(generator.integers(1, 4))
    return made


def test_it_learns_an_order_that_counts_together_cannot_tell() -> None:
    table = table_of()
    engaged = engaged_of(chains(300), table)
    training = SequenceTraining(epochs=40, batch=32, negatives=64, width=16, dropout=0, delta_dropout=0)
    net = fit_sequence(engaged, table, training, ["world"])
    assert net is not None
    view, right = SequenceView(net, table), 0
    for item in range(COUNT):
        before = item % WORLDS + (item // WORLDS - 1) % PER_WORLD * WORLDS
        person = view.person(query([], [item, before], [1.0, 2.0]))
        assert person is not None
        right += int(view.chances(person).argmax()) == successor(item)
    assert right > 0.9 * COUNT


def test_a_new_item_goes_to_those_who_like_its_kind() -> None:
    table = table_of()
    generator = np.random.default_rng(1)
    deeds = []
    for somebody in range(300):
        some = generator.permutation(PER_WORLD)[:5] * WORLDS + somebody % WORLDS
        deeds += [(somebody, day, int(item)) for day, item in enumerate(some)]
    training = SequenceTraining(epochs=15, batch=32, negatives=64, width=16)
    net = fit_sequence(engaged_of(deeds, table), table, training, ["world"])
    assert net is not None
    new = range(COUNT, COUNT + WORLDS)
    table.apply(change(number) for number in new)
    view = SequenceView(net, table)
    for world in range(WORLDS):
        person = view.person(query([world], [world + WORLDS], [1.0]))
        assert person is not None
        whole, _ = view.scores(person, np.array(new))
        assert int(whole.argmax()) == world


def test_items_come_with_new_values_while_people_are_answered() -> None:
    table = table_of()
    view = SequenceView(untrained(table), table)
    person, done = view.person(query([1], [], [])), threading.Event()
    assert person is not None

    def write() -> None:
        for number in range(COUNT, COUNT + 1500):
            item = Item(f"i{number}", attributes=(Attribute("world", (f"new {number}",)),))
            table.apply([Change(item_number(item.id), number, item, None, {"text": vector(number)})])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        chances = view.chances(person)
        assert len(chances) >= COUNT
        assert np.isfinite(chances).all()
    writer.join()
    fresh = SequenceView(untrained(table), table)
    np.testing.assert_allclose(view.chances(person), fresh.chances(person), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("epochs", [1, 5, 10, 20])
def test_any_number_of_steps_can_be_taken(epochs: int) -> None:
    engaged = engaged_of(chains(20), table := table_of())
    assert fit_sequence(engaged, table, SequenceTraining(epochs=epochs, width=4), ["world"]) is not None


def test_there_is_nothing_to_learn_from_people_who_did_one_thing() -> None:
    table = table_of()
    again = engaged_of([(0, 0, 1), (0, 0, 1), (1, 3, 2), (1, 3, 2)], table)
    assert fit_sequence(again, table, SequenceTraining(epochs=1), ["world"]) is None
    engaged = engaged_of([(person, 0, person) for person in range(5)], table)
    assert fit_sequence(engaged, table, SequenceTraining(epochs=1), ["world"]) is None
    two = engaged_of([(0, 0, 1), (0, 1, 2)], table)
    assert fit_sequence(two, table, SequenceTraining(epochs=0), ["world"]) is None
    assert fit_sequence(two, table, SequenceTraining(epochs=1), ["world"]) is not None
