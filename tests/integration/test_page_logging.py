"""The gateway logs each page without delaying requests."""

import asyncio
import base64
import json
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from vitrine.catalog.v1 import served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services.core import deadline
from services.core.errors import InvalidArgument, Unavailable
from services.gateway.recommend import impression_log as module
from services.gateway.recommend.impression_log import ImpressionLog
from services.rpc.proto_conversions import time_to
from services.serving.app import App
from tests.support.shop_server import NOW, Shop, Stub, ids, logged_pages, session, violations


def request_of(token: str) -> Any:
    data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_")
    return json.loads(data[12:])


async def test_a_page_is_stored_as_it_was_returned(stub: Stub) -> None:
    request = pb.RecommendRequest(
        user_id="ann", session_id="s1", session=session("garden-03"), page_size=8, scenario="basket"
    )
    first = await stub.Recommend(request)
    request.page_token = first.next_page_token
    second = await stub.Recommend(request)
    for at, (answer, record) in enumerate(
        zip((first, second), await logged_pages(stub, 2, "ann"), strict=True)
    ):
        assert record.request_id == answer.request_id == request_of(answer.attribution_token)["r"]
        assert list(record.item_ids) == ids(answer)
        assert list(record.scores) == [item.score for item in answer.items]
        assert (record.scenario, record.session_id, record.start) == ("basket", "s1", 8 * at)
        assert record.bundle == answer.versions.bundle
        assert not (record.user_id or record.shadow or record.experiment or record.HasField("exploring"))
        for bits, item in zip(record.item_sources, answer.items, strict=True):
            names = [name for n, name in enumerate(record.sources) if bits >> n & 1]
            explanation = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=item.item_id))
            assert names == [source.source for source in explanation.item.sources]
            assert set(names) >= {source.source for source in item.sources}


async def test_a_stop_loses_no_page_and_the_log_can_be_off(all_in_one: Shop) -> None:
    async def recommend(stub: Stub) -> None:
        for _ in range(3):
            await stub.Recommend(pb.RecommendRequest(user_id="ann"))

    async def wait_until_empty(stub: Stub) -> None:
        async with asyncio.timeout(60):
            while (await stub.ExportUser(pb.ExportUserRequest(user_id="ann"))).pages:
                await asyncio.sleep(0.05)

    async with all_in_one.serve() as stub:
        await recommend(stub)
    async with all_in_one.serve() as stub:
        assert len(await logged_pages(stub, 3, "ann")) == 3
    async with all_in_one.serve(impression_log_days=0) as stub:  # which deletes the stored pages
        await wait_until_empty(stub)
    async with all_in_one.serve(impression_log_days=0) as stub:
        await recommend(stub)
    async with all_in_one.serve() as stub:
        await wait_until_empty(stub)


async def test_pages_wait_for_an_unavailable_ranking_service_and_overflow_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MAX_QUEUED", 3)
    request_ids: list[str] = []
    away = True

    async def send(request: ranking_pb.LogPagesRequest) -> None:
        if away:
            raise Unavailable("for lunch")
        request_ids.extend(page.request_id for page in request.pages)

    log = ImpressionLog(send)
    for n in range(5):
        log.add(served_pb2.ServedPage(request_id=str(n)))
    await log.flush()
    assert (request_ids, dict(log.counts)) == ([], {"kept": 0, "lost": 2})
    away = False
    await log.close()  # hands on what is left
    assert (request_ids, dict(log.counts)) == (["0", "1", "2"], {"kept": 3, "lost": 2})
    away = True
    log.add(served_pb2.ServedPage(request_id="5"))
    await log.close(0.2)
    assert log.counts["lost"] == 3


async def test_refused_pages_do_not_block_later_ones(caplog: pytest.LogCaptureFixture) -> None:
    request_ids: list[str] = []
    away = True

    async def send(request: ranking_pb.LogPagesRequest) -> None:
        if away:
            raise Unavailable("for lunch")
        if any(page.request_id == "bad" for page in request.pages):
            raise InvalidArgument.of("pages[0].user_id", "is wrong")
        request_ids.extend(page.request_id for page in request.pages)

    log = ImpressionLog(send)
    log.add(served_pb2.ServedPage(request_id="bad"))
    for _ in range(5):
        await log.flush()
    away = False
    await log.flush()
    log.add(served_pb2.ServedPage(request_id="good"))
    await log.close()
    assert (request_ids, dict(log.counts)) == (["good"], {"kept": 1, "lost": 1})
    assert caplog.text.count("logged later") == 1
    assert "the impression log refuses" in caplog.text


async def test_one_request_id_can_belong_to_several_pages(all_in_one_stub: Stub) -> None:
    for user in ("ann", "bob"):
        for scenario in ("home", "basket", "home"):
            request = pb.RecommendRequest(user_id=user, scenario=scenario, request_id="visit-7", page_size=3)
            await all_in_one_stub.Recommend(request)
    for user in ("ann", "bob"):
        pages = await logged_pages(all_in_one_stub, 2, user)
        assert [page.scenario for page in pages] == ["home", "basket"]


async def test_a_page_that_is_still_made_has_its_own_time_and_may_fail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    request_ids: list[str] = []

    async def send(request: ranking_pb.LogPagesRequest) -> None:
        request_ids.extend(page.request_id for page in request.pages)

    async def make_page(name: str) -> served_pb2.ServedPage:
        await asyncio.sleep(0.1)
        if name == "bad":
            raise RuntimeError("cannot be made")
        return served_pb2.ServedPage(request_id=name)

    log = ImpressionLog(send)
    with deadline.within(0.01):  # of the call that it is made beside
        log.add_shadow(make_page("good"))
        log.add_shadow(make_page("bad"))
    await log.close()
    assert (request_ids, dict(log.counts)) == (["good"], {"kept": 1, "lost": 1})
    assert "cannot be made" in caplog.text


async def test_exploration_is_counted_without_a_log() -> None:
    pages: list[served_pb2.ServedPage] = []

    async def send(request: ranking_pb.LogPagesRequest) -> None:
        pages.extend(request.pages)

    log = ImpressionLog(send, keep=False)
    exploring = served_pb2.Exploring(draws=[served_pb2.Draw(item_index=0)], item_hashes=[5])
    log.add(served_pb2.ServedPage(request_id="r", user_id="ann", item_ids=["a"]))
    log.add(served_pb2.ServedPage(request_id="r", user_id="ann", item_ids=["a"], exploring=exploring))
    await log.close()
    [page] = pages
    assert page.exploring.item_hashes == [5]
    assert not (page.user_id or page.item_ids)
    assert page.request_id not in ("", "r")


def at(**span: float) -> Timestamp:
    """A time so far from the shop's clock."""
    return time_to(NOW + timedelta(**span))


async def test_invalid_pages_are_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    make_page = partial(served_pb2.ServedPage, served_at=time_to(NOW))
    exploring = served_pb2.Exploring(draws=[served_pb2.Draw(item_index=2)], item_hashes=[5])
    unknown = served_pb2.Exploring(item_hashes=[2**63])
    wrong = [
        ("pages", []),
        ("pages[1].user_id", [make_page(request_id="r"), make_page(user_id="a\tb")]),
        ("pages[0].request_id", [make_page()]),
        ("pages[0].served_at", [make_page(request_id="r", served_at=Timestamp(nanos=-1))]),
        ("pages[0].served_at", [served_pb2.ServedPage(request_id="r")]),
        (
            "pages[1].served_at",
            [make_page(request_id="r"), make_page(served_at=at(minutes=6), request_id="s")],
        ),
        ("pages[0].served_at", [make_page(request_id="r", served_at=at(days=365))]),
        ("pages[0].served_at", [make_page(request_id="r", served_at=at(days=-31))]),
        ("pages[0].exploring.draws[0].item_index", [make_page(request_id="r", exploring=exploring)]),
        ("pages[0].exploring.item_hashes[0]", [make_page(request_id="r", exploring=unknown)]),
    ]
    app = App(Shop(bundle, tmp_path / "state", "one").settings())
    await app.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        stub = ranking_grpc.RankingServiceStub(channel)
        for field, pages in wrong:
            request = ranking_pb.LogPagesRequest(pages=pages)
            assert await violations(stub.LogPages(request)) == [field]
        for late in ({"minutes": 4}, {"days": -29}):
            good = make_page(request_id=str(late), served_at=at(**late), visitor_id="v")
            await stub.LogPages(ranking_pb.LogPagesRequest(pages=[good]))
    await app.stop()
