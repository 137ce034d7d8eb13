"""What is known of a person can be read and deleted, and what is old goes: from SQL, memory and counts."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.ranking import behaviour as module
from services.ranking import erasure, ranking
from services.ranking.behaviour import BehaviourStore, Event, EventItem, Outcome
from services.ranking.state import BehaviourState
from tests.conftest import Clock
from tests.recommending import Shop, ids, knows, purchase, violations
from tests.shops import make_bundle

TYPES = {"view": 0.5, "purchase": 1.0}
EVENT = Event("e1", "view", (EventItem("a"), EventItem("b", 2, 3.5, 4)), user_id="ann")


@pytest.fixture
def behaviour(engine: sa.Engine, clock: Clock) -> Iterator[BehaviourStore]:
    behaviour = BehaviourStore(engine, TYPES, clock)
    yield behaviour
    behaviour.close()


def filled(behaviour: BehaviourStore) -> BehaviourState:
    state = BehaviourState(TYPES)
    state.extend(behaviour.rows(0, behaviour.sequence + 1), behaviour.identities())
    return state


def seen(state: BehaviourState, person: tuple[str, str]) -> list[tuple[int, int]]:
    found = state.history(*person, 2**62, 100)
    return sorted(zip(found.sequence.tolist(), found.number.tolist(), strict=True))


def test_a_person_is_read_back_as_written_and_deleted_with_every_id(
    behaviour: BehaviourStore, clock: Clock
) -> None:
    written = [
        replace(EVENT, user_id="", visitor_id="phone", session_id="s", channel="app", attribution_token="t"),
        replace(EVENT, event_id="e2", type="purchase", occurred=clock.now - timedelta(days=3)),
        replace(EVENT, event_id="e3", visitor_id="phone"),
        replace(EVENT, event_id="e4", user_id="bob", visitor_id="phone"),
    ]
    for event in written:
        behaviour.write(event).result()
    assert behaviour.known_ids("ann", "") == {"user": ["ann"], "visitor": ["phone"]}
    assert behaviour.known_ids("", "phone") == behaviour.known_ids("ann", "")
    stored = behaviour.exported("ann", "", 0, 100)
    kept = [replace(e, user_id="", visitor_id="", occurred=e.occurred or clock.now) for e in written[:3]]
    assert [s.event for s in stored] == kept
    assert [s.sequence for s in stored] == [1, 2, 3]
    assert behaviour.exported("ann", "", 1, 1) == stored[1:2]
    forgotten = behaviour.forget("", "phone").result()
    assert (forgotten.events, forgotten.ids) == (3, 2)
    assert behaviour.exported("ann", "phone", 0, 100) == []
    assert behaviour.known_ids("ann", "phone") == {"user": [], "visitor": []}
    assert behaviour.counts() == behaviour.recount()
    assert len(behaviour.exported("bob", "", 0, 100)) == 1
    # The keys are gone too: the same id is a new event.
    assert behaviour.write(written[0]).result().outcome is Outcome.RECORDED


def test_a_visitor_who_signs_in_brings_what_they_did_and_another_users_does_not(
    behaviour: BehaviourStore, clock: Clock
) -> None:
    for n, (user, visitor) in enumerate([("", "v"), ("ann", ""), ("ann", "v"), ("bob", ""), ("bob", "v")]):
        behaviour.write(replace(EVENT, event_id=f"e{n}", user_id=user, visitor_id=visitor)).result()
    clock.advance(seconds=1)
    assert [s.event.event_id for s in behaviour.exported("ann", "", 0, 9)] == ["e0", "e1", "e2"]
    assert [s.event.event_id for s in behaviour.exported("bob", "", 0, 9)] == ["e3", "e4"]
    assert {r.sequence for r in behaviour.history("ann", "", clock.now, 99)} == {1, 2, 3}


def test_a_second_user_of_one_device_is_told_apart_with_both_ids_too(behaviour: BehaviourStore) -> None:
    for n, user in enumerate(["ann", "bob"]):
        behaviour.write(replace(EVENT, event_id=f"e{n}", user_id=user, visitor_id="tablet")).result()
    assert behaviour.known_ids("bob", "tablet") == {"user": ["bob"], "visitor": []}
    assert behaviour.known_ids("nobody", "tablet") == {"user": [], "visitor": []}
    state = filled(behaviour)
    for person, event in ((("bob", "tablet"), "e1"), (("ann", "tablet"), "e0"), (("", "tablet"), "e0")):
        assert [s.event.event_id for s in behaviour.exported(person[0], person[1], 0, 9)] == [event]
        assert {sequence for sequence, _ in seen(state, person)} == {int(event[1]) + 1}
    assert behaviour.forget("bob", "tablet").result().events == 1
    assert len(behaviour.exported("ann", "", 0, 9)) == 1


def test_an_import_joins_people_as_writing_one_by_one_does(behaviour: BehaviourStore) -> None:
    people = [("ann", ""), ("", "v"), ("ann", "v"), ("", "v"), ("bob", "w"), ("", "w")]
    events = [
        replace(EVENT, event_id=f"e{n}", user_id=user, visitor_id=visitor)
        for n, (user, visitor) in enumerate(people)
    ]
    behaviour.load(events).result()
    assert [s.event.event_id for s in behaviour.exported("ann", "", 0, 9)] == ["e0", "e1", "e2", "e3"]
    assert [s.event.event_id for s in behaviour.exported("", "w", 0, 9)] == ["e4", "e5"]
    behaviour.forget("ann", "").result()
    behaviour.forget("bob", "").result()
    assert behaviour.recount() == {}


def test_who_signs_in_while_events_are_read_is_read_whole(
    behaviour: BehaviourStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour.write(EVENT).result()
    state = filled(behaviour)
    behaviour.write(replace(EVENT, event_id="e2", user_id="", visitor_id="v")).result()
    read = module._people

    def slowly(*arguments: Any) -> Any:
        behaviour.write(replace(EVENT, event_id="e3", visitor_id="v")).result()
        return read(*arguments)

    monkeypatch.setattr(module, "_people", slowly)
    state.extend(*behaviour.changes(state.sequence, 100))
    monkeypatch.undo()
    state.extend(*behaviour.changes(state.sequence, 100))
    assert {sequence for sequence, _ in seen(state, ("ann", ""))} == {1, 2, 3}


_events = st.builds(
    Event,
    event_id=st.sampled_from("abcdefgh"),
    type=st.sampled_from(sorted(TYPES)),
    items=st.lists(st.builds(EventItem, st.sampled_from("xyz")), min_size=1, max_size=3).map(tuple),
    user_id=st.sampled_from(["", "u", "w"]),
    visitor_id=st.sampled_from(["v", "x"]),
    occurred=st.integers(0, 9).map(lambda day: datetime(2026, 1, 1 + day, tzinfo=UTC)),
)
_people = st.tuples(st.sampled_from(["", "u", "w"]), st.sampled_from(["", "v", "x"]))
_steps = st.lists(st.lists(_events, max_size=4) | _people | st.integers(0, 9), max_size=7)


@given(steps=_steps)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_memory_and_counts_are_a_function_of_the_events_that_are_left(
    behaviour: BehaviourStore, steps: list[Any]
) -> None:
    state = filled(behaviour)
    for step in steps:
        if isinstance(step, list):
            for future in [behaviour.write(event) for event in step]:
                future.exception()
            state.extend(*behaviour.changes(state.sequence, 10_000))
        elif isinstance(step, tuple):
            state.forget(behaviour.forget(*step).result().user_keys)
            assert behaviour.exported(step[0], step[1], 0, 9) == []
        else:
            before = datetime(2026, 1, 1 + step, tzinfo=UTC)
            while (gone := behaviour.expire(before, 2).result()).sequences:
                assert len(gone.sequences) <= 2
                state.drop(gone.sequences, gone.user_keys)
            assert state._keys == filled(behaviour)._keys
        anew = filled(behaviour)
        for person in [("u", ""), ("w", ""), ("", "v"), ("", "x"), ("u", "v")]:
            assert seen(state, person) == seen(anew, person)
        for a, b in zip(moments(state), moments(anew), strict=True):
            np.testing.assert_array_equal(a, b)
        assert behaviour.counts() == behaviour.recount()


def moments(state: BehaviourState) -> tuple[np.ndarray, np.ndarray]:
    """What the shop's moment reads: the numbers and kinds of all that counts."""
    columns = state.all()
    counted = columns.take(np.flatnonzero(columns.kind >= 0))
    return counted.number, counted.kind


def test_deleted_over_grpc_no_answer_and_no_file_knows_the_person(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    state = tmp_path / "state"

    async def body(stub: Any) -> None:
        many = [purchase(f"secret-{n}", "ann-of-oz", f"garden-{n:02}") for n in range(5)]
        many += [purchase(f"open-{n}", "bob", f"kitchen-{n:02}") for n in range(5)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=many))
        page = pb.RecommendRequest(user_id="ann-of-oz", page_size=10)
        stranger = pb.RecommendRequest(user_id="nobody", page_size=10)
        assert ids(await stub.Recommend(page)) != ids(await stub.Recommend(stranger))
        exported: list[str] = []
        request = pb.ExportUserRequest(user_id="ann-of-oz", page_size=2)
        while True:
            some = await stub.ExportUser(request)
            exported += [stored.event.event_id for stored in some.events]
            assert list(some.user_ids) == ["ann-of-oz"]
            request.page_token = some.next_page_token
            if not some.next_page_token:
                break
        assert exported == [f"secret-{n}" for n in range(5)]
        assert knows(state, b"ann-of-oz")
        deleted = await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann-of-oz"))
        assert (deleted.events, deleted.ids) == (5, 1)
        assert not knows(state, b"ann-of-oz")  # while it is served
        assert ids(await stub.Recommend(page)) == ids(await stub.Recommend(stranger))
        assert not (await stub.ExportUser(pb.ExportUserRequest(user_id="ann-of-oz"))).events
        again = await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann-of-oz"))
        assert (again.events, again.ids) == (0, 0)
        assert len((await stub.ExportUser(pb.ExportUserRequest(user_id="bob"))).events) == 5
        for call in (stub.DeleteUser(pb.DeleteUserRequest()), stub.ExportUser(pb.ExportUserRequest())):
            assert await violations(call) == ["user_id"]
        bad = [({"user_id": "a b"}, "user_id"), ({"visitor_id": "a b"}, "visitor_id")]
        for fields, field in bad:
            assert await violations(stub.DeleteUser(pb.DeleteUserRequest(**fields))) == [field]
        for token in ("x", "0", "-1", str(2**70), "1" * 5000, "٣"):
            wrong = pb.ExportUserRequest(user_id="bob", page_token=token)
            assert await violations(stub.ExportUser(wrong)) == ["page_token"]

    Shop(bundle, state, "three", clock=None).run(body)
    assert not knows(state, b"ann-of-oz")
    assert not knows(state, b"secret-")
    assert knows(state, b"open-4")


def test_a_caller_who_goes_away_does_not_leave_half_of_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = erasure.forget

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return forget(*arguments)

    monkeypatch.setattr(erasure, "forget", slowly)

    async def body(stub: Any) -> None:
        await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("e1", "ann", "garden-01")]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann"), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(60):
            while True:
                found = await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))
                if found.profile.segment == "stranger":
                    break
                await asyncio.sleep(0.05)

    for layout in ("one", "three"):
        Shop(make_bundle(tmp_path / layout), tmp_path / layout / "state", layout, clock=None).run(body)


def test_what_is_older_than_the_retention_goes_and_a_start_finds_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_BATCH", 2)  # so that a start reads batches of which nothing is left
    bundle, state = make_bundle(tmp_path), tmp_path / "state"

    async def old_and_new(stub: Any) -> None:
        events = [purchase(f"old-{n}", "ann", f"garden-{n:02}") for n in range(3)]
        for event in events:
            event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(days=40))
        await stub.WriteEvents(pb.WriteEventsRequest(events=[*events, purchase("new", "ann", "kitchen-01")]))

    async def left(stub: Any) -> None:
        request = pb.ExportUserRequest(user_id="ann")
        async with asyncio.timeout(60):
            while [s.event.event_id for s in (await stub.ExportUser(request)).events] != ["new"]:
                await asyncio.sleep(0.1)
        page = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=10))
        assert all(i.startswith("kitchen-") for i in ids(page))

    Shop(bundle, state, "one", clock=None).run(old_and_new)
    for _ in range(2):  # the second start reads from a sequence on that is gone
        Shop(bundle, state, "one", clock=None).run(left, retention_days=30)
