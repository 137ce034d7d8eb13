"""What pages led to, counted from served pages, by the command an operator runs beside the service."""

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

from services.analysis.traffic import interval
from tests.recommending import Shop, ids
from tests.shops import make_bundle


@given(st.integers(0, 400), st.integers(1, 400))
def test_intervals_are_wilsons(done: int, shown: int) -> None:
    done = min(done, shown)
    exact = stats.binomtest(done, shown).proportion_ci(0.95, "wilson")
    assert interval(done, shown) == pytest.approx((exact.low, exact.high), abs=1e-6)


async def analyze(state: Path, *more: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "services.cli", "analyze", "--state", str(state), *more]
    run = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, wrong = await run.communicate()
    return run.returncode or 0, said.decode(), wrong.decode()


def test_what_pages_led_to_is_counted_once_and_by_what_is_asked(tmp_path: Path) -> None:
    bundle, state = make_bundle(tmp_path), tmp_path / "state"
    number = 0

    def event(
        kind: str, token: str, *items: tuple[str, int], price: float | None = None, days: int = 0
    ) -> Any:
        nonlocal number
        number += 1
        made = event_pb2.Event(event_id=f"e{number}", type=kind, user_id="ann", attribution_token=token)
        for item_id, position in items:
            made.items.add(item_id=item_id, position=position or None, price=price, quantity=2)
        made.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(days=days))
        made.channel = "app" if days else "web"
        return made

    async def body(stub: Any) -> None:
        home = await stub.Recommend(pb.RecommendRequest(page_size=10))
        basket = await stub.Recommend(pb.RecommendRequest(page_size=4, scenario="basket"))
        token, other = home.attribution_token, basket.attribution_token
        shown = list(zip(ids(home), range(1, 11), strict=True))
        events = [
            event("impression", token, *shown),
            event("impression", token, shown[0]),  # sent twice
            event("click", token, shown[0]),
            event("click", token, shown[0]),
            event("click", token, shown[1]),
            event("purchase", token, shown[0], price=5.0),
            event("impression", other, *((i, 0) for i in ids(basket)), days=3),
            event("click", other, ("garden-00" if "garden-00" not in ids(basket) else "kitchen-00", 0)),
            event("click", token[:-2] + "xx", shown[2]),
            event("click", "", shown[3]),
        ]
        outcomes = (await stub.WriteEvents(pb.WriteEventsRequest(events=events))).outcomes
        assert {outcome.code for outcome in outcomes} == {event_pb2.EVENT_OUTCOME_CODE_RECORDED}

        async def told(*more: str) -> Any:
            code, said, wrong = await analyze(state, "--json", *more)
            assert code == 0, wrong
            return json.loads(said)

        whole = await told()
        assert list(whole["groups"]) == ["basket", "home"]
        assert whole["groups"]["home"]["shown"] == 10
        assert whole["groups"]["home"]["revenue"] == 10.0
        done = whole["groups"]["home"]["done"]
        assert {kind: what["items"] for kind, what in done.items()} == {"click": 2, "purchase": 1}
        assert done["click"]["share"] == 0.2
        assert (whole["groups"]["basket"]["shown"], whole["groups"]["basket"]["done"]) == (4, {})
        assert (whole["unreadable_tokens"], whole["without_an_impression"]) == (1, 1)
        positions = (await told("--by", "position"))["groups"]
        assert list(positions) == ["unknown", *map(str, range(1, 11))]
        assert [positions[str(n)]["done"].get("click", {"items": 0})["items"] for n in (1, 2, 3)] == [1, 1, 0]
        assert {name: g["shown"] for name, g in (await told("--by", "channel"))["groups"].items()} == {
            "app": 4,
            "web": 10,
        }
        assert sum(g["shown"] for g in (await told("--by", "band"))["groups"].values()) == 14
        assert len((await told("--by", "day"))["groups"]) == 2
        assert list((await told("--by", "bundle"))["groups"]) == [home.versions.bundle]
        assert list((await told("--by", "arm"))["groups"]) == ["none"]
        recent = (datetime.now(UTC) - timedelta(days=1)).isoformat()
        assert list((await told("--since", recent))["groups"]) == ["home"]
        assert list((await told("--until", recent))["groups"]) == ["basket"]
        code, said, _ = await analyze(state)
        assert code == 0
        assert "20.00%" in said
        assert "1 items of events have a token that is not of this secret" in said
        code, _, wrong = await analyze(state, "--by", "moon")
        assert (code, "by: is 'moon'" in wrong) == (1, True)
        code, _, wrong = await analyze(tmp_path / "nowhere")
        assert (code, "is not there" in wrong) == (1, True)

    Shop(bundle, state, "one", clock=None).run(body)


def test_an_item_counts_for_each_of_its_sources(tmp_path: Path) -> None:
    bundle, state = make_bundle(tmp_path), tmp_path / "state"

    async def body(stub: Any) -> None:
        page = await stub.Recommend(pb.RecommendRequest(page_size=10))
        seen = event_pb2.Event(event_id="e", type="impression", user_id="ann")
        seen.attribution_token = page.attribution_token
        for item_id in ids(page):
            seen.items.add(item_id=item_id)
        await stub.WriteEvents(pb.WriteEventsRequest(events=[seen]))
        groups: dict[str, Any] = {"unknown": {}}
        while "unknown" in groups:  # until the page is logged
            groups = json.loads((await analyze(state, "--json", "--by", "source"))[1])["groups"]
        expected = Counter(source.source for item in page.items for source in item.sources)
        assert {name: group["shown"] for name, group in groups.items()} == expected

    Shop(bundle, state, "one", clock=None).run(body)
