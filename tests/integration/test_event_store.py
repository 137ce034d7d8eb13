"""Event writes are idempotent across batches and restarts, and counters equal a recount."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.core.errors import AlreadyExists, InvalidArgument, VitrineError
from services.ranking.events.event_store import BATCH_ROWS, EventStore, in_batches
from services.ranking.events.events import Event, EventItem, EventOutcome, RecordResult
from services.storage.store import open_engine
from tests.conftest import Clock

TYPES = ("view", "purchase")
EVENT = Event("e1", "view", (EventItem("a"), EventItem("b", price=3.5, position=2)), user_id="u1")


@pytest.fixture
def one_by_one(tmp_path: Path, clock: Clock) -> Iterator[EventStore]:
    engine = open_engine(f"sqlite:///{tmp_path / 'one_by_one.sqlite'}")
    event_store = EventStore(engine, TYPES, clock)
    yield event_store
    event_store.close()
    engine.dispose()


@pytest.fixture
def event_store(engine: sa.Engine, clock: Clock) -> Iterator[EventStore]:
    event_store = EventStore(engine, TYPES, clock)
    yield event_store
    event_store.close()


def test_a_duplicate_counts_once_even_in_one_batch_and_after_a_restart(
    event_store: EventStore, engine: sa.Engine, clock: Clock
) -> None:
    futures = [event_store.write(EVENT) for _ in range(3)]
    assert [f.result().outcome for f in futures] == [
        EventOutcome.RECORDED,
        EventOutcome.DUPLICATE,
        EventOutcome.DUPLICATE,
    ]
    event_store.close()
    again = EventStore(engine, TYPES, clock)
    assert again.write(EVENT).result().outcome is EventOutcome.DUPLICATE
    assert sorted(again.counts().values()) == [1, 1]
    again.close()


def test_an_id_with_other_content_fails_alone(event_store: EventStore) -> None:
    first, other, next_event = (
        event_store.write(e) for e in (EVENT, replace(EVENT, type="purchase"), replace(EVENT, event_id="e2"))
    )
    assert first.result().outcome is EventOutcome.RECORDED
    with pytest.raises(AlreadyExists, match="e1"):
        other.result()
    assert next_event.result().sequence == 2
    assert event_store.counts() == event_store.recount()


def test_history_contains_only_earlier_records(event_store: EventStore, clock: Clock) -> None:
    event_store.write(EVENT).result()
    assert event_store.history("u1", "", clock.now, 10) == []
    rows = event_store.history("u1", "", clock.now + timedelta(microseconds=1), 10)
    assert [r.item_id for r in rows] == ["a", "b"]
    assert rows[1].price == 3.5
    assert event_store.history("", "", clock.now + timedelta(days=1), 10) == []


def test_an_event_with_both_ids_links_a_visitor_to_a_user(event_store: EventStore, clock: Clock) -> None:
    event_store.write(replace(EVENT, user_id="", visitor_id="v")).result()
    event_store.write(replace(EVENT, event_id="e2", visitor_id="v")).result()
    clock.advance(seconds=1)
    assert len(event_store.history("u1", "", clock.now, 10)) == 4
    assert len(event_store.history("", "v", clock.now, 10)) == 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"event_id": ""}, "event_id"),
        ({"event_id": "x" * 129}, "event_id"),
        ({"event_id": "a\tb"}, "event_id"),
        ({"type": "sneeze"}, "type"),
        ({"user_id": ""}, "user_id"),
        ({"items": ()}, "items"),
        ({"items": (EventItem("a"),) * 5001}, "items"),
        ({"items": (EventItem("a"), EventItem(""))}, "items[1].item_id"),
        ({"items": (EventItem("a", quantity=0),)}, "items[0].quantity"),
        ({"items": (EventItem("a", price=float("nan")),)}, "items[0].price"),
        ({"items": (EventItem("a", price=-1.0),)}, "items[0].price"),
        ({"items": (EventItem("a", position=0),)}, "items[0].position"),
    ],
)
def test_an_invalid_field_is_named(event_store: EventStore, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        event_store.write(replace(EVENT, **change))
    assert [v.field for v in caught.value.violations] == [field]
    assert event_store.sequence == 0


def test_an_event_far_in_the_future_is_refused(event_store: EventStore, clock: Clock) -> None:
    with pytest.raises(InvalidArgument, match="occurred_at"):
        event_store.write(replace(EVENT, occurred=clock.now + timedelta(days=2)))


_events = st.builds(
    Event,
    event_id=st.sampled_from("abcdef"),
    type=st.sampled_from(TYPES),
    items=st.lists(st.builds(EventItem, st.sampled_from("xyz")), min_size=1, max_size=3).map(tuple),
    user_id=st.sampled_from(["u", "w"]),
    visitor_id=st.sampled_from(["", "v"]),
)


@given(batches=st.lists(st.lists(_events, max_size=6), max_size=5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counters_are_a_function_of_the_events(event_store: EventStore, batches: list[list[Event]]) -> None:
    for batch in batches:
        futures = [event_store.write(event) for event in batch]
        for future in futures:
            assert future.exception() is None or isinstance(future.exception(), AlreadyExists)
    assert event_store.counts() == event_store.recount()


_people = st.sampled_from([("u", ""), ("w", ""), ("", "v"), ("", "x"), ("u", "v"), ("w", "v"), ("w", "x")])
_joining = st.builds(
    lambda event, user: replace(event, user_id=user[0], visitor_id=user[1]), _events, _people
)
_FAR = datetime(2100, 1, 1, tzinfo=UTC)


@given(batches=st.lists(st.lists(_joining, max_size=12), max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_batch_write_equals_single_writes(
    event_store: EventStore, one_by_one: EventStore, batches: list[list[Event]]
) -> None:
    for batch in batches:
        together = event_store.write_batch(batch, "caller").result()
        for event, outcome in zip(batch, together, strict=True):
            try:
                expected: Any = one_by_one.write(event).result()
            except AlreadyExists as error:
                assert str(outcome) == str(error)
            else:
                assert outcome == expected
    assert event_store.identities() == one_by_one.identities()
    for user, visitor in [("u", ""), ("w", ""), ("", "v"), ("", "x"), ("w", "v")]:
        pages = [store.export(user, visitor, 0, 100) for store in (event_store, one_by_one)]
        assert pages[0] == pages[1]
    assert event_store.counts() == event_store.recount() == one_by_one.counts()
    for store in (event_store, one_by_one):  # the next example begins anew, but for the sequence
        while store.expire(_FAR, 1000).result().sequences:
            pass


def test_an_invalid_event_of_a_batch_fails_alone(event_store: EventStore) -> None:
    error = InvalidArgument.of("occurred_at", "is none")
    batch: list[Event | VitrineError] = [
        EVENT,
        replace(EVENT, event_id="e2", type="sneeze"),
        error,
        replace(EVENT, event_id="e3"),
    ]
    first, wrong, same, last = event_store.write_batch(batch, "caller").result()
    assert (first, last) == (RecordResult(EventOutcome.RECORDED, 1), RecordResult(EventOutcome.RECORDED, 2))
    assert isinstance(wrong, InvalidArgument)
    assert wrong.violations[0].field == "type"
    assert same is error


@given(sizes=st.lists(st.integers(1, 5000), max_size=30))
@settings(max_examples=20, deadline=None)
def test_batches_contain_all_events_in_order_and_few_rows(sizes: list[int]) -> None:
    events = [Event(f"e{n}", "view", (EventItem("a"),) * size, "u") for n, size in enumerate(sizes)]
    batches = list(in_batches(events))
    assert [event for batch in batches for event in batch] == events
    for batch in batches:
        rows = sum(1 + len(event.items) for event in batch if isinstance(event, Event))
        assert len(batch) == 1 or rows <= BATCH_ROWS


def test_counts_are_exact_under_concurrent_writes_and_deletions(event_store: EventStore) -> None:
    def items(seed: int, count: int) -> tuple[EventItem, ...]:
        return tuple(EventItem(f"i{(seed * 31 + n) % 97}") for n in range(count))

    def large(caller: int) -> None:
        events = [Event(f"l{caller}-{n}", "view", items(n, 400), f"u{n % 5}") for n in range(20)]
        for future in [event_store.write_batch(batch, caller) for batch in in_batches(events)]:
            future.result()

    def small(caller: int) -> None:
        for n in range(20):
            event_store.write(Event(f"s{caller}-{n}", "purchase", items(n, 2), f"u{n % 5}")).result()

    def delete(caller: int) -> None:
        for n in range(10):
            event_store.forget(f"u{(n + caller) % 5}", "").result()

    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(work, n) for n in range(2) for work in (large, small, delete)]
        for call in calls:
            call.result()
    assert event_store.counts() == event_store.recount()


def test_reading_in_small_steps_returns_every_event_complete(event_store: EventStore) -> None:
    for n, size in enumerate([1, 7, 3, 1, 5]):
        event_store.write(
            Event(f"e{n}", "view", tuple(EventItem(f"i{k}") for k in range(size)), "u")
        ).result()
    after, sizes = 0, []
    while len(sequences := event_store.rows(after, 2).sequence):
        numbers, counts = np.unique(sequences, return_counts=True)
        assert len(sequences) >= 2 or numbers[-1] == 5
        sizes += counts.tolist()
        after = int(numbers[-1])
    assert sizes == [1, 7, 3, 1, 5]


def test_a_small_call_is_committed_before_the_rest_of_a_large_one(event_store: EventStore) -> None:
    items = tuple(EventItem(f"i{n}") for n in range(500))
    large = [Event(f"l{n}", "view", items, "u1") for n in range(60)]
    futures = [event_store.write_batch(batch, "large") for batch in in_batches(large)]
    [small] = event_store.write_batch([replace(EVENT, event_id="small")], "small").result()
    outcomes = [outcome for future in futures for outcome in future.result()]
    sequences = [o.sequence for o in (small, *outcomes) if isinstance(o, RecordResult)]
    assert len(sequences) == 61
    assert sequences[0] < 30
    assert sequences[1:] == sorted(sequences[1:])
