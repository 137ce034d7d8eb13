"""A page arrives within the deadline of the caller and lists skipped stages in `degraded`."""

import asyncio
import threading
from typing import Any

import pytest
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.embedding.servicer import EmbeddingServicer
from services.gateway.recommend.slate_builder import SlateBuilder
from services.ranking.servicer import RankingServicer
from tests.support.shop_server import Shop, ids, session

RULES = pb.Rules(
    caps=[pb.Cap(attribute="colour", max_count=1, window=10)],
    min_relevance=0.9,
    relax=["caps", "min_relevance"],
)


async def never(*_: Any) -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    "slow",
    [
        {"search"},
        {"search", "rank"},
        {"retrieve", "search"},
        {"retrieve", "search", "rank", "explain", "titles"},
        {"explain", "titles"},
    ],
    ids="-".join,
)
async def test_a_page_with_relaxed_rules_meets_the_deadline(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, slow: set[str]
) -> None:
    methods: dict[str, tuple[Any, str]] = {
        "search": (EmbeddingServicer, "Search"),
        "titles": (EmbeddingServicer, "GetItems"),
        "rank": (RankingServicer, "Rank"),
        "retrieve": (RankingServicer, "Retrieve"),
        "explain": (RankingServicer, "Explain"),
    }
    for stage in slow:
        monkeypatch.setattr(*methods[stage], never)

    async with shop.serve() as stub:
        request = pb.RecommendRequest(
            session=session("garden-03"), page_size=20, rules=RULES, include_reasons=True
        )
        page = await stub.Recommend(request, timeout=8)  # a twentieth of it is for the response
        assert len(ids(page)) == 20
        late = {line.stage for line in page.degraded if line.code == pb.DEGRADATION_CODE_TIMEOUT}
        stages = slow - {"titles"} - ({"rank"} if "retrieve" in slow else set())  # one of no retrieval
        assert late == stages


async def test_rules_without_time_left_are_named_and_the_ranking_is_kept(
    all_in_one: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    arrange = SlateBuilder.arrange

    def slowly(*arguments: Any) -> Any:
        release.wait(60)
        return arrange(*arguments)

    monkeypatch.setattr(SlateBuilder, "arrange", slowly)
    async with all_in_one.serve() as stub:
        request = pb.RecommendRequest(session=session("garden-03"), page_size=20, rules=RULES)
        page = await stub.Recommend(request, timeout=6)
        release.set()
        assert ids(page)
        [line] = [line for line in page.degraded if line.stage == "rules"]
        assert line.code == pb.DEGRADATION_CODE_TIMEOUT
