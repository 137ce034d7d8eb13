"""The data of a user can be exported and deleted, and old data expires."""

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

from services.ranking import service
from services.ranking.events import erasure
from services.ranking.events import event_store as module
from services.ranking.events.event_store import EventStore
from services.ranking.events.events import Event, EventItem, EventOutcome
from services.ranking.state.event_columns import EventState
from tests.conftest import Clock
from tests.support.shop_server import Shop, contains_text, ids, purchase, violations
from tests.support.shops import make_bundle

TYPES = {"view": 0.5, "purchase": 1.0}
EVENT = Event("e1", "view", (EventItem("a"), EventItem("b", 2, 3.5, 4)), user_id="ann")


@pytest.fixture
def event_store(engine: sa.Engine, clock: Clock) -> Iterator[EventStore]:
    event_store = EventStore(engine, TYPES, clock)
    yield event_store
    event_store.close()


def load_state(event_store: EventStore) -> EventState:
    state = EventState(TYPES)
    state.extend(event_store.rows(0, 10_000), event_store.identities())
    return state


def history_of(state: EventState, user: tuple[str, str]) -> list[tuple[int, int]]:
    history = state.history(*user, 2**62, 100)
    return sorted(zip(history.sequence.tolist(), history.item_hash.tolist(), strict=True))


def test_a_user_is_exported_as_written_and_deleted_with_every_id(
    event_store: EventStore, clock: Clock
) -> None:
    events = [
        replace(EVENT, user_id="", visitor_id="phone", session_id="s", channel="app", attribution_token="t"),
        replace(EVENT, event_id="e2", type="purchase", occurred=clock.now - timedelta(days=3)),
        replace(EVENT, event_id="e3", visitor_id="phone"),
        replace(EVENT, event_id="e4", user_id="bob", visitor_id="phone"),
    ]
    for event in events:
        event_store.write(event).result()
    assert event_store.user_ids("ann", "") == {"user": ["ann"], "visitor": ["phone"]}
    assert event_store.user_ids("", "phone") == event_store.user_ids("ann", "")
    export = event_store.export("ann", "", 0, 100)
    expected = [replace(e, user_id="", visitor_id="", occurred=e.occurred or clock.now) for e in events[:3]]
    assert [s.event for s in export] == expected
    assert [s.sequence for s in export] == [1, 2, 3]
    assert event_store.export("ann", "", 1, 1) == export[1:2]
    deletion = event_store.forget("", "phone").result()
    assert (deletion.events, deletion.ids) == (3, 2)
    assert event_store.export("ann", "phone", 0, 100) == []
    assert event_store.user_ids("ann", "phone") == {"user": [], "visitor": []}
    assert event_store.counts() == event_store.recount()
    assert len(event_store.export("bob", "", 0, 100)) == 1
    # The keys are gone too: the same id is a new event.
    assert event_store.write(events[0]).result().outcome is EventOutcome.RECORDED


def test_a_visitor_who_signs_in_brings_only_their_own_events(event_store: EventStore, clock: Clock) -> None:
    for n, (user, visitor) in enumerate([("", "v"), ("ann", ""), ("ann", "v"), ("bob", ""), ("bob", "v")]):
        event_store.write(replace(EVENT, event_id=f"e{n}", user_id=user, visitor_id=visitor)).result()
    clock.advance(seconds=1)
    assert [s.event.event_id for s in event_store.export("ann", "", 0, 9)] == ["e0", "e1", "e2"]
    assert [s.event.event_id for s in event_store.export("bob", "", 0, 9)] == ["e3", "e4"]
    assert {r.sequence for r in event_store.history("ann", "", clock.now, 99)} == {1, 2, 3}


def test_a_second_user_of_a_device_is_a_separate_user(event_store: EventStore) -> None:
    for n, user in enumerate(["ann", "bob"]):
        event_store.write(replace(EVENT, event_id=f"e{n}", user_id=user, visitor_id="tablet")).result()
    assert event_store.user_ids("bob", "tablet") == {"user": ["bob"], "visitor": []}
    assert event_store.user_ids("nobody", "tablet") == {"user": [], "visitor": []}
    state = load_state(event_store)
    for names, event in ((("bob", "tablet"), "e1"), (("ann", "tablet"), "e0"), (("", "tablet"), "e0")):
        assert [s.event.event_id for s in event_store.export(names[0], names[1], 0, 9)] == [event]
        assert {sequence for sequence, _ in history_of(state, names)} == {int(event[1]) + 1}
    assert event_store.forget("bob", "tablet").result().events == 1
    assert len(event_store.export("ann", "", 0, 9)) == 1


def test_an_import_links_ids_as_single_writes_do(event_store: EventStore) -> None:
    users = [("ann", ""), ("", "v"), ("ann", "v"), ("", "v"), ("bob", "w"), ("", "w")]
    events = [
        replace(EVENT, event_id=f"e{n}", user_id=user, visitor_id=visitor)
        for n, (user, visitor) in enumerate(users)
    ]
    event_store.load(events).result()
    assert [s.event.event_id for s in event_store.export("ann", "", 0, 9)] == ["e0", "e1", "e2", "e3"]
    assert [s.event.event_id for s in event_store.export("", "w", 0, 9)] == ["e4", "e5"]
    event_store.forget("ann", "").result()
    event_store.forget("bob", "").result()
    assert event_store.recount() == {}


def test_a_user_who_signs_in_during_a_read_is_read_completely(
    event_store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_store.write(EVENT).result()
    state = load_state(event_store)
    event_store.write(replace(EVENT, event_id="e2", user_id="", visitor_id="v")).result()
    read_identities = module._identities

    def slowly(*arguments: Any) -> Any:
        event_store.write(replace(EVENT, event_id="e3", visitor_id="v")).result()
        return read_identities(*arguments)

    monkeypatch.setattr(module, "_identities", slowly)
    state.extend(*event_store.changes(state.sequence, 100))
    monkeypatch.undo()
    state.extend(*event_store.changes(state.sequence, 100))
    assert {sequence for sequence, _ in history_of(state, ("ann", ""))} == {1, 2, 3}


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
def test_memory_and_counts_depend_only_on_the_remaining_events(
    event_store: EventStore, steps: list[Any]
) -> None:
    state = load_state(event_store)
    for step in steps:
        if isinstance(step, list):
            for future in [event_store.write(event) for event in step]:
                future.exception()
            state.extend(*event_store.changes(state.sequence, 10_000))
        elif isinstance(step, tuple):
            state.forget(event_store.forget(*step).result().user_keys)
            assert event_store.export(step[0], step[1], 0, 9) == []
        else:
            before = datetime(2026, 1, 1 + step, tzinfo=UTC)
            while (expiry := event_store.expire(before, 2).result()).sequences:
                assert len(expiry.sequences) <= 2
                state.drop(expiry.sequences, expiry.user_keys)
            assert state._keys == load_state(event_store)._keys
        fresh_state = load_state(event_store)
        for user in [("u", ""), ("w", ""), ("", "v"), ("", "x"), ("u", "v")]:
            assert history_of(state, user) == history_of(fresh_state, user)
        for a, b in zip(moments(state), moments(fresh_state), strict=True):
            np.testing.assert_array_equal(a, b)
        assert event_store.counts() == event_store.recount()


def moments(state: EventState) -> tuple[np.ndarray, np.ndarray]:
    """What the shop's moment reads: the numbers and kinds of all that counts."""
    columns = state.all()
    engagements = columns.take(np.flatnonzero(columns.kind >= 0))
    return engagements.item_hash, engagements.kind


async def test_after_a_deletion_no_response_and_no_file_contains_the_user(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    state = tmp_path / "state"
    async with Shop(bundle, state, "three", clock=None).serve() as stub:
        many = [purchase(f"secret-{n}", "ann-of-oz", f"garden-{n:02}") for n in range(5)]
        many += [purchase(f"open-{n}", "bob", f"kitchen-{n:02}") for n in range(5)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=many))
        page = pb.RecommendRequest(user_id="ann-of-oz", page_size=10)
        anonymous = pb.RecommendRequest(user_id="nobody", page_size=10)
        assert ids(await stub.Recommend(page)) != ids(await stub.Recommend(anonymous))
        event_ids: list[str] = []
        request = pb.ExportUserRequest(user_id="ann-of-oz", page_size=2)
        while True:
            some = await stub.ExportUser(request)
            event_ids += [record.event.event_id for record in some.events]
            assert list(some.user_ids) == ["ann-of-oz"]
            request.page_token = some.next_page_token
            if not some.next_page_token:
                break
        assert event_ids == [f"secret-{n}" for n in range(5)]
        assert contains_text(state, b"ann-of-oz")
        deletion = await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann-of-oz"))
        assert (deletion.events, deletion.ids) == (5, 1)
        assert not contains_text(state, b"ann-of-oz")  # while it is served
        assert ids(await stub.Recommend(page)) == ids(await stub.Recommend(anonymous))
        assert not (await stub.ExportUser(pb.ExportUserRequest(user_id="ann-of-oz"))).events
        again = await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann-of-oz"))
        assert (again.events, again.ids) == (0, 0)
        assert len((await stub.ExportUser(pb.ExportUserRequest(user_id="bob"))).events) == 5
        for call in (stub.DeleteUser(pb.DeleteUserRequest()), stub.ExportUser(pb.ExportUserRequest())):
            assert await violations(call) == ["user_id"]
        bad = [({"user_id": "a\tb"}, "user_id"), ({"visitor_id": " ab"}, "visitor_id")]
        for fields, field in bad:
            assert await violations(stub.DeleteUser(pb.DeleteUserRequest(**fields))) == [field]
        for token in ("x", "0", "-1", str(2**70), "1" * 5000, "٣"):
            wrong = pb.ExportUserRequest(user_id="bob", page_token=token)
            assert await violations(stub.ExportUser(wrong)) == ["page_token"]
    assert not contains_text(state, b"ann-of-oz")
    assert not contains_text(state, b"secret-")
    assert contains_text(state, b"open-4")


async def test_a_cancelled_deletion_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget = erasure.forget

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return forget(*arguments)

    monkeypatch.setattr(erasure, "forget", slowly)

    for layout in ("one", "three"):
        async with Shop(
            make_bundle(tmp_path / layout), tmp_path / layout / "state", layout, clock=None
        ).serve() as stub:
            await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase("e1", "ann", "garden-01")]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann"), timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            async with asyncio.timeout(60):
                while True:
                    response = await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))
                    if response.profile.segment == "unknown":
                        break
                    await asyncio.sleep(0.05)


async def test_expired_events_are_deleted_and_a_restart_finds_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_BATCH", 2)  # so that a start reads batches of which nothing is left
    bundle, state = make_bundle(tmp_path), tmp_path / "state"
    async with Shop(bundle, state, "one", clock=None).serve() as stub:
        events = [purchase(f"old-{n}", "ann", f"garden-{n:02}") for n in range(3)]
        for event in events:
            event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(days=40))
        await stub.WriteEvents(pb.WriteEventsRequest(events=[*events, purchase("new", "ann", "kitchen-01")]))
    for _ in range(2):  # the second start reads from a sequence on that is gone
        async with Shop(bundle, state, "one", clock=None).serve(event_retention_days=30) as stub:
            request = pb.ExportUserRequest(user_id="ann")
            async with asyncio.timeout(60):
                while [s.event.event_id for s in (await stub.ExportUser(request)).events] != ["new"]:
                    await asyncio.sleep(0.1)
            page = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=10))
            assert all(i.startswith("kitchen-") for i in ids(page))
