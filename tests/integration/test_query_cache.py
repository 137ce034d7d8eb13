"""Rank takes the user that Retrieve has made, as long as events and items are the same."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as gateway_pb
from vitrine.ranking.v1 import ranking_service_pb2 as pb

from services.catalog.items import item_hash
from services.ranking.state import query_cache
from services.ranking.state.query_builder import User, make_query
from services.serving.app import App
from services.serving.loaded_bundle import ALL, EMBEDDING, RANKING
from tests.support.catalogs import item
from tests.support.shop_server import NOW, Shop, purchase
from tests.support.shops import make_bundle

LATER = NOW + timedelta(hours=1)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    app = App(Shop(make_bundle(tmp_path), tmp_path / "state", "one").settings(), ALL)
    await app.start()
    yield app
    await app.stop()


async def test_a_page_makes_its_user_once(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    users = list[User]()

    def counted(state: Any, table: Any, user: User, *more: Any) -> Any:
        users.append(user)
        return make_query(state, table, user, *more)

    monkeypatch.setattr(query_cache, "make_query", counted)
    assert app.gateway is not None
    for user_id in ("ann", "bob"):
        request = gateway_pb.WriteEventsRequest(events=[purchase(user_id, user_id, "garden-03")])
        await app.gateway.WriteEvents(request, None)
        page = gateway_pb.RecommendRequest(user_id=user_id, page_size=5, include_reasons=True)
        response = await app.gateway.Recommend(page, None)
        assert not response.degraded
        assert len(response.items) == 5
    assert [user.user_id for user in users] == ["ann", "bob"]


async def test_a_kept_user_follows_events_items_and_deletions(app: App) -> None:
    servicers: dict[str, Any] = dict(app.current.servicers)
    embedding, ranking, service = servicers[EMBEDDING], servicers[RANKING], app.current.ranking
    table = service.view.table

    def history() -> list[int]:
        query, past = service.query(User("ann"), LATER, service.state.sequence)
        again, same = service.query(User("ann"), LATER, service.state.sequence)
        assert query is again
        assert past is same
        return list(table.item_hashes[query.history].tolist())

    assert history() == []
    assert service.query(User("ann"), LATER, 1)[0].history.tolist() == []  # before that event is there
    for event_id, item_id in (("one", "garden-03"), ("two", "later")):
        await ranking.WriteEvents(pb.WriteEventsRequest(events=[purchase(event_id, "ann", item_id)]), None)
        assert history() == [item_hash("garden-03")]
    await embedding.upsert_chunk(embedding_pb.UpsertItemsRequest(items=[item("later", "tapir")]))
    assert history() == [item_hash("later"), item_hash("garden-03")]
    assert len(service.query(User("ann"), LATER, 1)[0].history) == 1
    sequence = service.state.sequence
    deletion = await ranking.DeleteUser(pb.DeleteUserRequest(user_id="ann"), None)
    assert deletion.events == 2
    assert service.state.sequence == sequence
    assert history() == []
    for n in range(200):
        service.query(User(f"user {n}"), LATER, sequence)
    assert len(service._queries._entries) == 64
