"""Rank takes the user that Retrieve has made, as long as events and items are the same."""

from datetime import timedelta
from pathlib import Path

from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.ranking.v1 import ranking_service_pb2 as pb

from services.catalog.items import item_hash
from services.ranking.state.query_builder import User
from services.serving.app import App
from services.serving.loaded_bundle import ALL, EMBEDDING, RANKING
from tests.support.catalogs import item
from tests.support.shop_server import NOW, Shop, purchase
from tests.support.shops import make_bundle


async def test_a_kept_user_follows_events_items_and_deletions(tmp_path: Path) -> None:
    app = App(Shop(make_bundle(tmp_path), tmp_path / "state", "one").settings(), ALL)
    await app.start()
    embedding, ranking = (app.current.servicers[name] for name in (EMBEDDING, RANKING))
    service, table, later = app.current.ranking, app.current.ranking.view.table, NOW + timedelta(hours=1)

    def history() -> list[int]:
        query, past = service.query(User("ann"), later, service.state.sequence)
        again, same = service.query(User("ann"), later, service.state.sequence)
        assert query is again
        assert past is same
        assert len(query.history) <= len(past.item_hash)
        return list(table.item_hashes[query.history].tolist())

    assert history() == []
    for event_id, item_id in (("one", "garden-03"), ("two", "later")):
        request = pb.WriteEventsRequest(events=[purchase(event_id, "ann", item_id)])
        await ranking.WriteEvents(request, None)  # type: ignore[attr-defined]
        assert history() == [item_hash("garden-03")]
    await embedding.upsert_chunk(  # type: ignore[attr-defined]
        embedding_pb.UpsertItemsRequest(items=[item("later", "tapir")])
    )
    assert history() == [item_hash("later"), item_hash("garden-03")]
    sequence = service.state.sequence
    deletion = await ranking.DeleteUser(pb.DeleteUserRequest(user_id="ann"), None)  # type: ignore[attr-defined]
    assert deletion.events == 2
    assert service.state.sequence == sequence
    assert history() == []
    for n in range(200):
        service.query(User(f"user {n}"), later, sequence)
    assert len(service._queries) == 64
    await app.stop()
