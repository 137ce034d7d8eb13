"""`vitrine analyze` counts the outcomes of logged pages."""

import asyncio
import json
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from vitrine.catalog.v1 import event_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from analytics.traffic import wilson_interval
from tests.support.shop_server import Shop, ids
from tests.support.shops import make_bundle


@given(st.integers(0, 400), st.integers(1, 400))
def test_intervals_are_wilson_intervals(successes: int, trials: int) -> None:
    successes = min(successes, trials)
    exact = stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert wilson_interval(successes, trials) == pytest.approx((exact.low, exact.high), abs=1e-6)


async def analyze(state: Path, *more: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "cli.main", "analyze", "--state", str(state), *more]
    run = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await run.communicate()
    return run.returncode or 0, output.decode(), errors.decode()


async def test_outcomes_are_counted_once_and_by_the_chosen_group(tmp_path: Path) -> None:
    bundle, state = make_bundle(tmp_path), tmp_path / "state"
    number = 0

    def event(
        kind: str, token: str, *items: tuple[str, int], price: float | None = None, days: int = 0
    ) -> Any:
        nonlocal number
        number += 1
        message = event_pb2.Event(event_id=f"e{number}", type=kind, user_id="ann", attribution_token=token)
        for item_id, position in items:
            message.items.add(item_id=item_id, position=position or None, price=price, quantity=2)
        message.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(days=days))
        message.channel = "app" if days else "web"
        return message

    async with Shop(bundle, state, "one", clock=None).serve() as stub:
        home = await stub.Recommend(pb.RecommendRequest(page_size=10))
        basket = await stub.Recommend(pb.RecommendRequest(page_size=4, scenario="basket"))
        token, other = home.attribution_token, basket.attribution_token
        impressions = list(zip(ids(home), range(1, 11), strict=True))
        events = [
            event("impression", token, *impressions),
            event("impression", token, impressions[0]),  # sent twice
            event("click", token, impressions[0]),
            event("click", token, impressions[0]),
            event("click", token, impressions[1]),
            event("purchase", token, impressions[0], price=5.0),
            event("impression", other, *((i, 0) for i in ids(basket)), days=3),
            event("click", other, ("garden-00" if "garden-00" not in ids(basket) else "kitchen-00", 0)),
            event("click", token[:-2] + "xx", impressions[2]),
            event("click", "", impressions[3]),
        ]
        outcomes = (await stub.WriteEvents(pb.WriteEventsRequest(events=events))).outcomes
        assert {outcome.code for outcome in outcomes} == {event_pb2.EVENT_OUTCOME_CODE_RECORDED}

        async def report(*more: str) -> Any:
            code, output, errors = await analyze(state, "--json", *more)
            assert code == 0, errors
            return json.loads(output)

        whole = await report()
        assert list(whole["groups"]) == ["basket", "home"]
        assert whole["groups"]["home"]["impressions"] == 10
        assert whole["groups"]["home"]["revenue"] == 10.0
        event_counts = whole["groups"]["home"]["events"]
        assert {kind: what["items"] for kind, what in event_counts.items()} == {"click": 2, "purchase": 1}
        assert event_counts["click"]["share"] == 0.2
        assert (whole["groups"]["basket"]["impressions"], whole["groups"]["basket"]["events"]) == (4, {})
        assert (whole["unreadable_tokens"], whole["without_impression"]) == (1, 1)
        positions = (await report("--by", "position"))["groups"]
        assert list(positions) == ["unknown", *map(str, range(1, 11))]
        clicks = [positions[str(n)]["events"].get("click", {"items": 0})["items"] for n in (1, 2, 3)]
        assert clicks == [1, 1, 0]
        assert {
            name: g["impressions"] for name, g in (await report("--by", "channel"))["groups"].items()
        } == {
            "app": 4,
            "web": 10,
        }
        assert sum(g["impressions"] for g in (await report("--by", "band"))["groups"].values()) == 14
        assert len((await report("--by", "day"))["groups"]) == 2
        assert list((await report("--by", "bundle"))["groups"]) == [home.versions.bundle]
        assert list((await report("--by", "arm"))["groups"]) == ["none"]
        recent = (datetime.now(UTC) - timedelta(days=1)).isoformat()
        assert list((await report("--since", recent))["groups"]) == ["home"]
        assert list((await report("--until", recent))["groups"]) == ["basket"]
        code, output, _ = await analyze(state)
        assert code == 0
        assert "20.00%" in output
        assert "1 event items have a token that another secret signed" in output
        code, _, errors = await analyze(state, "--by", "moon")
        assert (code, "by: is 'moon'" in errors) == (1, True)
        code, _, errors = await analyze(tmp_path / "nowhere")
        assert (code, "does not exist" in errors) == (1, True)


async def test_an_item_counts_for_each_of_its_sources(tmp_path: Path) -> None:
    bundle, state = make_bundle(tmp_path), tmp_path / "state"
    async with Shop(bundle, state, "one", clock=None).serve() as stub:
        request = pb.RecommendRequest(page_size=10)
        page = await stub.Recommend(request)
        impression = event_pb2.Event(event_id="e", type="impression", user_id="ann")
        impression.attribution_token = page.attribution_token
        expected = Counter[str]()
        for item_id in ids(page):
            impression.items.add(item_id=item_id)
            explanation = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=item_id))
            expected.update(source.source for source in explanation.item.sources)
        await stub.WriteEvents(pb.WriteEventsRequest(events=[impression]))
        groups: dict[str, Any] = {"unknown": {}}
        while "unknown" in groups:  # until the page is logged
            groups = json.loads((await analyze(state, "--json", "--by", "source"))[1])["groups"]
        assert {name: group["impressions"] for name, group in groups.items()} == expected
