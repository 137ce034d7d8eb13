"""Events: idempotency within a batch, across batches and restarts; counters against a recount."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.errors import AlreadyExists, InvalidArgument
from services.ranking.behaviour import BehaviourStore, Event, EventItem, Outcome
from tests.conftest import Clock

TYPES = ("view", "purchase")
EVENT = Event("e1", "view", (EventItem("a"), EventItem("b", price=3.5, position=2)), user_id="u1")


@pytest.fixture
def behaviour(engine: sa.Engine, clock: Clock) -> Iterator[BehaviourStore]:
    behaviour = BehaviourStore(engine, TYPES, clock)
    yield behaviour
    behaviour.close()


def test_a_duplicate_counts_once_even_in_one_batch_and_after_a_restart(
    behaviour: BehaviourStore, engine: sa.Engine, clock: Clock
) -> None:
    futures = [behaviour.write(EVENT) for _ in range(3)]
    assert [f.result().outcome for f in futures] == [Outcome.RECORDED, Outcome.DUPLICATE, Outcome.DUPLICATE]
    behaviour.close()
    again = BehaviourStore(engine, TYPES, clock)
    assert again.write(EVENT).result().outcome is Outcome.DUPLICATE
    assert sorted(again.counts().values()) == [1, 1]
    again.close()


def test_the_same_id_with_other_content_fails_alone(behaviour: BehaviourStore) -> None:
    first, other, next_event = (
        behaviour.write(e) for e in (EVENT, replace(EVENT, type="purchase"), replace(EVENT, event_id="e2"))
    )
    assert first.result().outcome is Outcome.RECORDED
    with pytest.raises(AlreadyExists, match="e1"):
        other.result()
    assert next_event.result().sequence == 2
    assert behaviour.counts() == behaviour.recount()


def test_history_sees_only_what_was_recorded_strictly_before(behaviour: BehaviourStore, clock: Clock) -> None:
    behaviour.write(EVENT).result()
    assert behaviour.history("u1", "", clock.now, 10) == []
    rows = behaviour.history("u1", "", clock.now + timedelta(microseconds=1), 10)
    assert [r.item_id for r in rows] == ["a", "b"]
    assert rows[1].price == 3.5
    assert behaviour.history("", "", clock.now + timedelta(days=1), 10) == []


def test_an_event_with_both_ids_joins_a_visitor_to_a_user(behaviour: BehaviourStore, clock: Clock) -> None:
    behaviour.write(replace(EVENT, user_id="", visitor_id="v")).result()
    behaviour.write(replace(EVENT, event_id="e2", visitor_id="v")).result()
    clock.advance(seconds=1)
    assert len(behaviour.history("u1", "", clock.now, 10)) == 4
    assert len(behaviour.history("", "v", clock.now, 10)) == 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"event_id": ""}, "event_id"),
        ({"event_id": "x" * 129}, "event_id"),
        ({"event_id": "a b"}, "event_id"),
        ({"type": "sneeze"}, "type"),
        ({"user_id": ""}, "user_id"),
        ({"items": ()}, "items"),
        ({"items": (EventItem("a"),) * 501}, "items"),
        ({"items": (EventItem("a"), EventItem(""))}, "items[1].item_id"),
        ({"items": (EventItem("a", quantity=0),)}, "items[0].quantity"),
        ({"items": (EventItem("a", price=float("nan")),)}, "items[0].price"),
        ({"items": (EventItem("a", price=-1.0),)}, "items[0].price"),
        ({"items": (EventItem("a", position=0),)}, "items[0].position"),
    ],
)
def test_a_wrong_field_is_named(behaviour: BehaviourStore, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        behaviour.write(replace(EVENT, **change))
    assert [v.field for v in caught.value.violations] == [field]
    assert behaviour.sequence == 0


def test_an_event_far_in_the_future_is_refused(behaviour: BehaviourStore, clock: Clock) -> None:
    with pytest.raises(InvalidArgument, match="occurred_at"):
        behaviour.write(replace(EVENT, occurred=clock.now + timedelta(days=2)))


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
def test_counters_are_a_function_of_the_events(behaviour: BehaviourStore, batches: list[list[Event]]) -> None:
    for batch in batches:
        futures = [behaviour.write(event) for event in batch]
        for future in futures:
            assert future.exception() is None or isinstance(future.exception(), AlreadyExists)
    assert behaviour.counts() == behaviour.recount()
