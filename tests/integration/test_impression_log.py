"""The impression log stores pages, counts what they explored, and deletes them with their users."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import Unavailable
from services.ranking.events import exploration_counts, tables
from services.ranking.events.event_store import EventStore
from services.ranking.events.events import Event, EventItem
from services.ranking.events.impression_log import LoggedPage, UserIds
from tests.conftest import Clock
from tests.support.shop_server import Stub, contains_text, logged_pages, purchase, violations

TYPES = {"view": 0.5, "purchase": 1.0}
DAY = 86_400_000_000


@pytest.fixture
def event_store(engine: sa.Engine, clock: Clock) -> Iterator[EventStore]:
    event_store = EventStore(engine, TYPES, clock)
    yield event_store
    event_store.close()


def page(content: bytes, at: int, user: str = "", visitor: str = "", *item_hashes: int) -> LoggedPage:
    return LoggedPage(f"{content!r} {at}", user, visitor, "home", at, content, item_hashes)


def pages(event_store: EventStore, user: str = "", visitor: str = "") -> list[bytes]:
    return [bytes(page.content) for page in event_store.export_pages(user, visitor, 0, 100)]


def test_pages_are_found_by_every_id_of_a_user_and_deleted_with_them(event_store: EventStore) -> None:
    log = event_store.served
    log.write(
        [page(b"1", 5, "", "phone"), page(b"2", 6, "ann", "phone"), page(b"3", 7, "bob", "phone")]
    ).result()
    assert pages(event_store, "", "phone") == [b"1"]  # of whom no event tells yet
    event_store.write(Event("e", "view", (EventItem("a"),), user_id="ann", visitor_id="phone")).result()
    assert pages(event_store, "ann") == pages(event_store, "", "phone") == [b"1", b"2"]
    assert [k.content for k in event_store.export_pages("ann", "", 1, 1)] == [b"2"]
    # A device's second user is not its first.
    deletion = event_store.forget("bob", "phone").result()
    assert (deletion.pages, pages(event_store, "bob")) == (1, [])
    assert pages(event_store, "ann") == [b"1", b"2"]
    assert event_store.forget("ann", "").result().pages == 2
    assert not pages(event_store, "ann") + pages(event_store, "", "phone")


async def test_pages_of_a_user_are_exported_and_deleted_completely(stub: Stub, tmp_path: Path) -> None:
    events = [purchase(f"e{n}", "ann-4711", f"garden-0{n}") for n in range(3)]
    await stub.WriteEvents(pb.WriteEventsRequest(events=events))
    for _ in range(4):
        await stub.Recommend(pb.RecommendRequest(user_id="ann-4711", page_size=3))
    await logged_pages(stub, 4, "ann-4711")
    sizes, request = [], pb.ExportUserRequest(user_id="ann-4711", page_size=2)
    while True:
        answer = await stub.ExportUser(request)
        assert len(answer.events) + len(answer.pages) <= 2
        sizes.append((len(answer.events), len(answer.pages)))
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert sizes == [(2, 0), (1, 1), (0, 2), (0, 1)]
    await stub.Recommend(pb.RecommendRequest(user_id="ann-4711", page_size=3))
    deletion = await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann-4711"))
    assert (deletion.events, deletion.ids, deletion.pages) == (3, 1, 5)
    await asyncio.sleep(0.6)
    assert not (await stub.ExportUser(pb.ExportUserRequest(user_id="ann-4711"))).pages
    assert not contains_text(tmp_path / "state", b"ann-4711")
    events = [purchase(f"b{n}", "bob", "garden-01") for n in range(3)]
    await stub.WriteEvents(pb.WriteEventsRequest(events=events))
    token = (await stub.ExportUser(pb.ExportUserRequest(user_id="bob", page_size=1))).next_page_token
    assert token
    for wrong in ("p", "px", "p-1", "q3", "p" + "9" * 25, "1", token, f"p{token}"):
        request.page_token = wrong
        assert await violations(stub.ExportUser(request)) == ["page_token"]


def test_a_page_in_flight_during_a_deletion_is_not_stored(event_store: EventStore, clock: Clock) -> None:
    at = int(clock.now.timestamp() * 1e6)
    event_store.forget("ann", "phone").result()
    late = [page(b"1", at - 1, "ann"), page(b"2", at - 1, "", "phone"), page(b"3", at - 1, "bob")]
    assert event_store.served.write(late).result() == 1
    clock.now += timedelta(minutes=1)
    assert event_store.served.write([page(b"4", at + 1, "ann")]).result() == 1
    assert (pages(event_store, "ann"), pages(event_store, "", "phone"), pages(event_store, "bob")) == (
        [b"4"],
        [],
        [b"3"],
    )


def test_the_oldest_pages_are_deleted_first(event_store: EventStore, clock: Clock) -> None:
    now = int(clock.now.timestamp() * 1e6)
    event_store.served.write([page(b"%d" % n, now - n * DAY, "ann") for n in range(6)]).result()
    month = clock.now - timedelta(days=2)
    assert [event_store.expire_pages(month, 2).result() for _ in range(3)] == [2, 1, 0]
    assert pages(event_store, "ann") == [b"0", b"1", b"2"]


def test_a_page_that_is_sent_twice_is_stored_once(event_store: EventStore) -> None:
    batch = [page(b"1", 5, "ann", "", 7), page(b"2", 6, "ann", "", 7)]
    assert event_store.served.write(batch[:1]).result() == 1
    assert event_store.served.write([*batch, *batch]).result() == 1
    assert pages(event_store, "ann") == [b"1", b"2"]
    assert [row.number for row in event_store.served.explored(0)] == [7, 7]


def test_a_queued_page_of_a_deleted_user_is_not_stored(event_store: EventStore, clock: Clock) -> None:
    at = int(clock.now.timestamp() * 1e6)
    release = threading.Event()
    event_store._writer.submit(lambda connection: release.wait(30))
    deletion = event_store.forget("ann", "phone")
    late = event_store.served.write([page(b"1", at, "ann"), page(b"2", at, "bob", "phone")])
    release.set()
    assert deletion.result().pages == 0
    assert late.result() == 1
    assert pages(event_store, "ann") == []
    with event_store._engine.connect() as connection:
        [row] = connection.execute(tables.served.select()).all()
    assert (row.user_id, row.visitor_id) == ("bob", "")  # the device was ann's before


def test_pages_after_a_failed_deletion_are_stored(
    event_store: EventStore, engine: sa.Engine, clock: Clock
) -> None:
    at = int(clock.now.timestamp() * 1e6)

    def fail(connection: sa.Connection) -> None:
        raise Unavailable("the database does not answer")

    sa.event.listen(engine, "commit", fail)
    with pytest.raises(Unavailable):
        event_store.forget("ann", "phone").result()
    sa.event.remove(engine, "commit", fail)
    assert (
        event_store.served.write([page(b"1", at - 1, "ann"), page(b"2", at - 1, "bob", "phone")]).result()
        == 2
    )
    assert pages(event_store, "ann") == [b"1"]
    assert event_store.forget("ann", "phone").result().pages == 1
    assert event_store.served.write([page(b"3", at - 1, "ann")]).result() == 0


def test_exploration_is_counted_by_log_position_and_by_day(
    engine: sa.Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exploration_counts, "_FOLLOW_INTERVAL", 0.0)
    first, second = (EventStore(engine, TYPES, clock) for _ in range(2))  # as two replicas
    counts = [exploration_counts.ExplorationCounts(store.served) for store in (first, second)]
    today = int(clock.now.timestamp() * 1e6) // DAY
    numbers = np.array([7, 8, 9])
    first.served.write(
        [page(b"a", (today - 1) * DAY, "", "", 7), page(b"b", today * DAY, "", "", 7, 8)]
    ).result()
    upto = [count.follow() for count in counts]
    assert upto[0] == upto[1]
    second.served.write([page(b"c", today * DAY + 5, "", "", 8)]).result()
    for count in counts:
        later = count.follow()
        assert count.of(numbers, later).tolist() == [2, 2, 0]
        assert count.of(numbers, upto[0]).tolist() == [2, 1, 0]
        assert count.of(numbers, 0).tolist() == [0, 0, 0]
        assert [count.slots("home", today - n, later) for n in range(3)] == [3, 1, 0]
        assert count.slots("home", today, upto[0]) == 2
        assert count.slots("other", today, later) == 0
    assert first.expire_explored(clock.now - timedelta(days=0.5), 100).result() == 1
    fresh = exploration_counts.ExplorationCounts(first.served)
    assert fresh.of(numbers, fresh.follow()).tolist() == [1, 2, 0]
    for store in (first, second):
        store.close()


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_counts_at_a_log_position_equal_those_of_the_rows_up_to_it(
    log_numbers: list[list[int]], data: st.DataObject
) -> None:
    @dataclass
    class Row:
        sequence: int
        number: int
        scenario: str
        at: int

    class Log:
        def __init__(self) -> None:
            self.rows: list[Row] = []

        def explored(self, after: int) -> list[Row]:
            return [row for row in self.rows if row.sequence > after]

    log = Log()
    counts: Any = exploration_counts.ExplorationCounts(log)  # type: ignore[arg-type]
    for sequence, numbers in enumerate(log_numbers, 1):
        log.rows = [*log.rows, *(Row(sequence, n, "home", n * DAY) for n in sorted(set(numbers)))]
        counts.follow(sequence)
    upto, item_numbers = data.draw(st.integers(0, len(log_numbers) + 1)), np.arange(7)
    rows = [row for row in log.rows if row.sequence <= upto]
    assert counts.of(item_numbers, upto).tolist() == [
        sum(row.number == n for row in rows) for n in item_numbers
    ]
    for day in range(6):
        assert counts.slots("home", day, upto) == sum(row.number == day for row in rows)


def test_ids_of_deleted_users_are_remembered_for_a_limited_time(
    event_store: EventStore, clock: Clock
) -> None:
    for n in range(50):
        event_store.forget(f"u{n}", "").result()
        clock.now += timedelta(minutes=1)
    assert len(event_store.served._blocked) <= 5
    assert UserIds(frozenset({"u49"}), frozenset()) in dict(event_store.served._blocked.values())
