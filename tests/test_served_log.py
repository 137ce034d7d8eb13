"""Pages that were answered are kept, read back and deleted with the person, and never hold a request up."""

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services import deadline
from services.errors import InvalidArgument, Unavailable
from services.gateway import served_log as module
from services.gateway.served_log import ServedLog
from services.ranking import showings, tables
from services.ranking.behaviour import BehaviourStore, Event, EventItem
from services.ranking.served import Person, Served
from services.wire import time_to
from services.wiring import App
from tests.conftest import Clock
from tests.recommending import NOW, Shop, ids, knows, purchase, session, violations

TYPES = {"view": 0.5, "purchase": 1.0}
DAY = 86_400_000_000


@pytest.fixture
def behaviour(engine: sa.Engine, clock: Clock) -> Iterator[BehaviourStore]:
    behaviour = BehaviourStore(engine, TYPES, clock)
    yield behaviour
    behaviour.close()


def page(content: bytes, at: int, user: str = "", visitor: str = "", *explored: int) -> Served:
    return Served(f"{content!r} {at}", user, visitor, "home", at, content, explored)


def pages(behaviour: BehaviourStore, user: str = "", visitor: str = "") -> list[bytes]:
    return [bytes(kept.content) for kept in behaviour.exported_pages(user, visitor, 0, 100)]


def test_pages_follow_a_person_through_every_id_and_go_with_them(behaviour: BehaviourStore) -> None:
    log = behaviour.served
    log.write(
        [page(b"1", 5, "", "phone"), page(b"2", 6, "ann", "phone"), page(b"3", 7, "bob", "phone")]
    ).result()
    assert pages(behaviour, "", "phone") == [b"1"]  # of whom no event tells yet
    behaviour.write(Event("e", "view", (EventItem("a"),), user_id="ann", visitor_id="phone")).result()
    assert pages(behaviour, "ann") == pages(behaviour, "", "phone") == [b"1", b"2"]
    assert [k.content for k in behaviour.exported_pages("ann", "", 1, 1)] == [b"2"]
    # A device's second user is not its first.
    forgotten = behaviour.forget("bob", "phone").result()
    assert (forgotten.pages, pages(behaviour, "bob")) == (1, [])
    assert pages(behaviour, "ann") == [b"1", b"2"]
    assert behaviour.forget("ann", "").result().pages == 2
    assert not pages(behaviour, "ann") + pages(behaviour, "", "phone")


def test_what_was_on_its_way_when_somebody_was_forgotten_is_not_kept(
    behaviour: BehaviourStore, clock: Clock
) -> None:
    at = int(clock.now.timestamp() * 1e6)
    behaviour.forget("ann", "phone").result()
    late = [page(b"1", at - 1, "ann"), page(b"2", at - 1, "", "phone"), page(b"3", at - 1, "bob")]
    assert behaviour.served.write(late).result() == 1
    clock.now += timedelta(minutes=1)
    assert behaviour.served.write([page(b"4", at + 1, "ann")]).result() == 1
    assert (pages(behaviour, "ann"), pages(behaviour, "", "phone"), pages(behaviour, "bob")) == (
        [b"4"],
        [],
        [b"3"],
    )


def test_old_pages_go_the_oldest_first(behaviour: BehaviourStore, clock: Clock) -> None:
    now = int(clock.now.timestamp() * 1e6)
    behaviour.served.write([page(b"%d" % n, now - n * DAY, "ann") for n in range(6)]).result()
    month = clock.now - timedelta(days=2)
    assert [behaviour.expire_pages(month, 2).result() for _ in range(3)] == [2, 1, 0]
    assert pages(behaviour, "ann") == [b"0", b"1", b"2"]


def test_a_page_that_is_sent_twice_is_kept_once(behaviour: BehaviourStore) -> None:
    sent = [page(b"1", 5, "ann", "", 7), page(b"2", 6, "ann", "", 7)]
    assert behaviour.served.write(sent[:1]).result() == 1
    assert behaviour.served.write([*sent, *sent]).result() == 1
    assert pages(behaviour, "ann") == [b"1", b"2"]
    assert [row.number for row in behaviour.served.explored(0)] == [7, 7]


def test_a_page_that_waits_while_its_person_is_forgotten_is_not_kept(
    behaviour: BehaviourStore, clock: Clock
) -> None:
    at = int(clock.now.timestamp() * 1e6)
    held = threading.Event()
    behaviour._writer.submit(lambda connection: held.wait(30))
    forgotten = behaviour.forget("ann", "phone")
    late = behaviour.served.write([page(b"1", at, "ann"), page(b"2", at, "bob", "phone")])
    held.set()
    assert forgotten.result().pages == 0
    assert late.result() == 1
    assert pages(behaviour, "ann") == []
    with behaviour._engine.connect() as connection:
        [row] = connection.execute(tables.served.select()).all()
    assert (row.user_id, row.visitor_id) == ("bob", "")  # the device was ann's before


def test_what_was_explored_is_counted_as_of_a_place_in_the_log_and_by_day(
    engine: sa.Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(showings, "_FOLLOW_EVERY", 0.0)
    first, second = (BehaviourStore(engine, TYPES, clock) for _ in range(2))  # as two replicas
    counts = [showings.Showings(store.served) for store in (first, second)]
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
    fresh = showings.Showings(first.served)
    assert fresh.of(numbers, fresh.follow()).tolist() == [1, 2, 0]
    for store in (first, second):
        store.close()


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_counts_as_of_a_place_are_those_of_the_rows_up_to_it(
    logged: list[list[int]], data: st.DataObject
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
    counted: Any = showings.Showings(log)  # type: ignore[arg-type]
    for sequence, numbers in enumerate(logged, 1):
        log.rows = [*log.rows, *(Row(sequence, n, "home", n * DAY) for n in sorted(set(numbers)))]
        counted.follow(sequence)
    upto, wanted = data.draw(st.integers(0, len(logged) + 1)), np.arange(7)
    rows = [row for row in log.rows if row.sequence <= upto]
    assert counted.of(wanted, upto).tolist() == [sum(row.number == n for row in rows) for n in wanted]
    for day in range(6):
        assert counted.slots("home", day, upto) == sum(row.number == day for row in rows)


def request_of(token: str) -> Any:
    data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_")
    return json.loads(data[12:])


async def kept(stub: Any, many: int, **whom: Any) -> list[served_pb2.ServedPage]:
    """The pages of a person, once there are so many."""
    async with asyncio.timeout(60):
        while True:
            found = (await stub.ExportUser(pb.ExportUserRequest(**whom))).pages
            if len(found) >= many:
                return list(found)
            await asyncio.sleep(0.05)


def test_a_page_is_kept_as_it_was_answered(shop: Shop) -> None:
    async def body(stub: Any) -> None:
        asked = pb.RecommendRequest(
            user_id="ann", session_id="s1", session=session("garden-03"), page_size=8, scenario="basket"
        )
        first = await stub.Recommend(asked)
        asked.page_token = first.next_page_token
        second = await stub.Recommend(asked)
        for at, (answer, logged) in enumerate(
            zip((first, second), await kept(stub, 2, user_id="ann"), strict=True)
        ):
            assert logged.request_id == answer.request_id == request_of(answer.attribution_token)["r"]
            assert list(logged.item_ids) == ids(answer)
            assert list(logged.scores) == [item.score for item in answer.items]
            assert (logged.scenario, logged.session_id, logged.start) == ("basket", "s1", 8 * at)
            assert logged.bundle == answer.versions.bundle
            assert not (logged.user_id or logged.shadow or logged.experiment or logged.HasField("exploring"))
            for bits, item in zip(logged.item_sources, answer.items, strict=True):
                named = [name for n, name in enumerate(logged.sources) if bits >> n & 1]
                assert named == [source.source for source in item.sources]

    shop.run(body)


def test_a_person_reads_their_pages_page_by_page_and_nothing_is_left_of_them(
    shop: Shop, tmp_path: Path
) -> None:
    async def body(stub: Any) -> None:
        events = [purchase(f"e{n}", "ann-4711", f"garden-0{n}") for n in range(3)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=events))
        for _ in range(4):
            await stub.Recommend(pb.RecommendRequest(user_id="ann-4711", page_size=3))
        await kept(stub, 4, user_id="ann-4711")
        read, asked = [], pb.ExportUserRequest(user_id="ann-4711", page_size=2)
        while True:
            answer = await stub.ExportUser(asked)
            assert len(answer.events) + len(answer.pages) <= 2
            read.append((len(answer.events), len(answer.pages)))
            if not answer.next_page_token:
                break
            asked.page_token = answer.next_page_token
        assert read == [(2, 0), (1, 1), (0, 2), (0, 1)]
        await stub.Recommend(pb.RecommendRequest(user_id="ann-4711", page_size=3))
        deleted = await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann-4711"))
        assert (deleted.events, deleted.ids, deleted.pages) == (3, 1, 5)
        await asyncio.sleep(0.6)
        assert not (await stub.ExportUser(pb.ExportUserRequest(user_id="ann-4711"))).pages
        assert not knows(tmp_path / "state", b"ann-4711")
        events = [purchase(f"b{n}", "bob", "garden-01") for n in range(3)]
        await stub.WriteEvents(pb.WriteEventsRequest(events=events))
        token = (await stub.ExportUser(pb.ExportUserRequest(user_id="bob", page_size=1))).next_page_token
        assert token
        for wrong in ("p", "px", "p-1", "q3", "p" + "9" * 25, "1", token, f"p{token}"):
            asked.page_token = wrong
            assert await violations(stub.ExportUser(asked)) == ["page_token"]

    shop.run(body)


def test_a_stop_loses_nothing_and_an_operator_may_want_no_log(one: Shop) -> None:
    async def asks(stub: Any) -> None:
        for _ in range(3):
            await stub.Recommend(pb.RecommendRequest(user_id="ann"))

    async def three(stub: Any) -> None:
        assert len(await kept(stub, 3, user_id="ann")) == 3

    async def none(stub: Any) -> None:
        async with asyncio.timeout(60):
            while (await stub.ExportUser(pb.ExportUserRequest(user_id="ann"))).pages:
                await asyncio.sleep(0.05)

    one.run(asks)
    one.run(three)
    one.run(none, served_days=0)  # those that were kept go
    one.run(asks, served_days=0)
    one.run(none)


def test_pages_wait_for_a_ranking_service_that_is_away_and_what_is_too_much_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    arrived: list[str] = []
    away = True

    async def send(request: ranking_pb.LogPagesRequest) -> None:
        if away:
            raise Unavailable("for lunch")
        arrived.extend(page.request_id for page in request.pages)

    async def body() -> None:
        nonlocal away
        log = ServedLog(send)
        for n in range(5):
            log.add(served_pb2.ServedPage(request_id=str(n)))
        await log.flush()
        assert (arrived, dict(log.counts)) == ([], {"kept": 0, "lost": 2})
        away = False
        await log.close()  # hands on what is left
        assert (arrived, dict(log.counts)) == (["0", "1", "2"], {"kept": 3, "lost": 2})
        away = True
        log.add(served_pb2.ServedPage(request_id="5"))
        await log.close(0.2)
        assert log.counts["lost"] == 3

    asyncio.run(body())


def test_pages_that_are_refused_do_not_hold_up_those_after_them(caplog: pytest.LogCaptureFixture) -> None:
    arrived: list[str] = []
    away = True

    async def send(request: ranking_pb.LogPagesRequest) -> None:
        if away:
            raise Unavailable("for lunch")
        if any(page.request_id == "bad" for page in request.pages):
            raise InvalidArgument.of("pages[0].user_id", "is wrong")
        arrived.extend(page.request_id for page in request.pages)

    async def body() -> None:
        nonlocal away
        log = ServedLog(send)
        log.add(served_pb2.ServedPage(request_id="bad"))
        for _ in range(5):
            await log.flush()
        away = False
        await log.flush()
        log.add(served_pb2.ServedPage(request_id="good"))
        await log.close()
        assert (arrived, dict(log.counts)) == (["good"], {"kept": 1, "lost": 1})

    asyncio.run(body())
    assert caplog.text.count("logged later") == 1
    assert "refused by the log" in caplog.text


def test_one_request_id_may_stand_for_several_answers(one: Shop) -> None:
    async def body(stub: Any) -> None:
        for user in ("ann", "bob"):
            for scenario in ("home", "basket", "home"):
                asked = pb.RecommendRequest(
                    user_id=user, scenario=scenario, request_id="visit-7", page_size=3
                )
                await stub.Recommend(asked)
        for user in ("ann", "bob"):
            found = await kept(stub, 2, user_id=user)
            assert [page.scenario for page in found] == ["home", "basket"]

    one.run(body)


def test_a_page_that_is_still_made_has_its_own_time_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    arrived: list[str] = []

    async def send(request: ranking_pb.LogPagesRequest) -> None:
        arrived.extend(page.request_id for page in request.pages)

    async def made(name: str) -> served_pb2.ServedPage:
        await asyncio.sleep(0.1)
        if name == "bad":
            raise RuntimeError("cannot be made")
        return served_pb2.ServedPage(request_id=name)

    async def body() -> None:
        log = ServedLog(send)
        with deadline.within(0.01):  # of the call that it is made beside
            log.beside(made("good"))
            log.beside(made("bad"))
        await log.close()
        assert (arrived, dict(log.counts)) == (["good"], {"kept": 1, "lost": 1})

    asyncio.run(body())
    assert "cannot be made" in caplog.text


def test_without_a_log_what_was_explored_is_counted_all_the_same() -> None:
    arrived: list[served_pb2.ServedPage] = []

    async def send(request: ranking_pb.LogPagesRequest) -> None:
        arrived.extend(request.pages)

    async def body() -> None:
        log = ServedLog(send, keep=False)
        drawn = served_pb2.Exploring(draws=[served_pb2.Draw(drawn=0)], item_numbers=[5])
        log.add(served_pb2.ServedPage(request_id="r", user_id="ann", item_ids=["a"]))
        log.add(served_pb2.ServedPage(request_id="r", user_id="ann", item_ids=["a"], exploring=drawn))
        await log.close()

    asyncio.run(body())
    [page] = arrived
    assert page.exploring.item_numbers == [5]
    assert not (page.user_id or page.item_ids)
    assert page.request_id not in ("", "r")


def test_wrong_pages_are_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    made = served_pb2.ServedPage
    drawn = served_pb2.Exploring(draws=[served_pb2.Draw(drawn=2)], item_numbers=[5])
    wrong = {
        "pages": ranking_pb.LogPagesRequest(),
        "pages[1].user_id": ranking_pb.LogPagesRequest(pages=[made(request_id="r"), made(user_id="a b")]),
        "pages[0].request_id": ranking_pb.LogPagesRequest(pages=[made()]),
        "pages[0].served_at": ranking_pb.LogPagesRequest(
            pages=[made(request_id="r", served_at=Timestamp(nanos=-1))]
        ),
        "pages[0].exploring.draws": ranking_pb.LogPagesRequest(pages=[made(request_id="r", exploring=drawn)]),
        "item_numbers": ranking_pb.LogPagesRequest(
            pages=[made(request_id="r", exploring=served_pb2.Exploring(item_numbers=[2**63]))]
        ),
    }

    async def body() -> None:
        app = App(Shop(bundle, tmp_path / "state", "one").settings())
        await app.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            stub = ranking_grpc.RankingServiceStub(channel)
            for field, request in wrong.items():
                assert await violations(stub.LogPages(request)) == [field]
            good = made(request_id="r", served_at=time_to(NOW), visitor_id="v")
            await stub.LogPages(ranking_pb.LogPagesRequest(pages=[good]))
        await app.stop()

    asyncio.run(body())


def test_ids_of_the_forgotten_are_remembered_for_a_while_only(
    behaviour: BehaviourStore, clock: Clock
) -> None:
    for n in range(50):
        behaviour.forget(f"u{n}", "").result()
        clock.now += timedelta(minutes=1)
    assert len(behaviour.served._forgotten) <= 5
    assert Person(frozenset({"u49"}), frozenset()) in behaviour.served._forgotten
