"""A start that reads stored events in large batches answers like one that reads them in small ones."""

from pathlib import Path
from typing import Any

import pytest
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.ranking import service
from tests.support.shop_server import EVENT, Shop, ids, purchase

USERS = ("ann", "bob", "cid")


def _events() -> list[Any]:
    events: list[Any] = []
    for number in range(60):
        user, first = USERS[number % 3], number % 20
        events.append(purchase(f"e{number}", user, f"garden-{first:02}", f"kitchen-{(first + 3) % 20:02}"))
    visit = EVENT(event_id="visit", visitor_id="cookie", type="click")
    visit.items.add(item_id="kitchen-07")
    signed_in = EVENT(event_id="signed-in", visitor_id="cookie", user_id="ann", type="click")
    signed_in.items.add(item_id="kitchen-08")
    return [visit, *events, signed_in]


async def _answers(shop: Shop) -> tuple[list[list[str]], list[pb.GetUserProfileResponse]]:
    """The items of a page of each user and of the visitor, and the users' profiles."""
    async with shop.serve() as stub:
        requests = [pb.RecommendRequest(user_id=user, page_size=10) for user in USERS]
        requests.append(pb.RecommendRequest(visitor_id="cookie", page_size=10))
        pages = [ids(await stub.Recommend(request)) for request in requests]
        profiles = [await stub.GetUserProfile(pb.GetUserProfileRequest(user_id=user)) for user in USERS]
    assert all(len(page) == 10 for page in pages)
    return pages, profiles


@pytest.mark.parametrize(
    "batch", [1, 7, 61]
)  # of 62 events: all but the rest, or all but one, in large batches
async def test_large_batches_give_the_same_answers(
    bundle: Path, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop(bundle, tmp_path / "state", "one")
    async with shop.serve() as stub:
        response = await stub.WriteEvents(pb.WriteEventsRequest(events=_events()))
        assert [outcome.sequence for outcome in response.outcomes] == list(range(1, 63)), response
    expected = await _answers(shop)
    read = []
    rows = service.RankingService._read_many

    def recorded(self: service.RankingService, last: int) -> None:
        rows(self, last)
        read.append(self.state.sequence)

    monkeypatch.setattr(service, "_LARGE_BATCH", batch)
    monkeypatch.setattr(service.RankingService, "_read_many", recorded)
    assert await _answers(shop) == expected
    assert read
    assert read[0] >= 61
