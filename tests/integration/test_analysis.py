"""`vitrine analyze` evaluates experiments and exploration from the log of a served shop."""

import io
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from vitrine.catalog.v1 import event_pb2, item_pb2, served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from analytics.comparison import compare_arms
from analytics.outcomes import PageOutcome
from cli.main import main
from services.catalog.items import item_hash
from services.rpc.proto_conversions import time_to
from tests.support.shop_server import AB_EXPERIMENT, NOW, TWO_SCENARIOS, Shop, Stub, ids, logged_pages


def analyze(state: Path, *more: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["analyze", "--state", str(state), *more])
    return code, out.getvalue(), err.getvalue()


async def click(stub: Stub, page: Any, user: str, *item_ids: str, kind: str = "click") -> None:
    """A click, or something else, on items of a page, at a price of 4."""
    events = [
        event_pb2.Event(
            event_id=f"{page.request_id}-{item_id}-{kind}",
            type=kind,
            user_id=user,
            attribution_token=page.attribution_token,
            items=[event_pb2.EventItem(item_id=item_id, price=4.0)],
        )
        for item_id in item_ids
    ]
    if events:
        await stub.WriteEvents(pb.WriteEventsRequest(events=events))


@asynccontextmanager
async def serve(
    bundle: Path, tmp_path: Path, scenarios: str, clock: datetime | None = None
) -> AsyncIterator[Stub]:
    """A shop with these scenarios, whose state is the folder `state`."""
    file = tmp_path / "scenarios.toml"
    file.write_text(scenarios)
    async with Shop(bundle, tmp_path / "state", "one", clock=clock).serve(scenarios=file) as stub:
        yield stub


async def test_arms_are_compared_by_the_outcomes_of_their_users(bundle: Path, tmp_path: Path) -> None:
    users = {"a": 0, "b": 0}

    async with serve(bundle, tmp_path, AB_EXPERIMENT) as stub:
        for n in range(60):
            user = f"u{n}"
            page = await stub.Recommend(pb.RecommendRequest(user_id=user, page_size=5))
            arm = page.assignment.arm
            users[arm] += 1
            # Everybody of arm b clicks two items, every other one of arm a one.
            clicks = ids(page)[:2] if arm == "b" else ids(page)[: users[arm] % 2]
            await click(stub, page, user, *clicks)
            await click(stub, page, user, *clicks[:1], kind="purchase")
    state = tmp_path / "state"
    code, output, errors = analyze(state, "--experiment", "worlds", "--json")
    assert code == 0, errors
    report = json.loads(output)
    assert {arm: report["arms"][arm]["users"] for arm in "ab"} == users
    assert report["arms"]["b"]["events"] == 2 * users["b"]
    assert report["arms"]["b"]["revenue"] == 4.0 * users["b"]
    assert report["arms"]["a"]["events"] == (users["a"] + 1) // 2
    more = report["difference_to_first"]["b"]
    assert more["mean"] == pytest.approx(2 - report["arms"]["a"]["events"] / users["a"])
    assert 1 < more["low"] < more["mean"] < more["high"] < 2
    code, output, _ = analyze(state, "--experiment", "worlds", "--goal", "purchase")
    assert (code, "difference to first arm" in output) == (0, True)
    code, _, errors = analyze(state, "--experiment", "moons")
    assert (code, "moons" in errors) == (1, True)
    code, _, errors = analyze(state, "--off-policy")
    assert (code, "no explored slot" in errors) == (1, True)
    future = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert analyze(state, "--experiment", "worlds", "--since", future)[0] == 1
    by_arm = json.loads(analyze(state, "--by", "arm", "--impression-type", "click", "--json")[1])["groups"]
    assert set(by_arm) == {"worlds/a", "worlds/b"}


async def test_interleaved_arms_are_compared_by_their_clicked_items(bundle: Path, tmp_path: Path) -> None:
    async with serve(bundle, tmp_path, AB_EXPERIMENT + 'kind = "EXPERIMENT_KIND_INTERLEAVE"\n') as stub:
        for n in range(20):
            user = f"u{n}"
            page = await stub.Recommend(pb.RecommendRequest(user_id=user, page_size=6))
            kitchen = [i for i in ids(page) if i.startswith("kitchen")]
            garden = [i for i in ids(page) if i.startswith("garden")]
            if n < 12:
                await click(stub, page, user, *kitchen[:2], *garden[:1])
            elif n < 14:
                await click(stub, page, user, garden[0])
            elif n < 16:
                await click(stub, page, user, garden[0], kitchen[0])
    state = tmp_path / "state"
    code, output, errors = analyze(state, "--experiment", "worlds", "--json")
    assert code == 0, errors
    report = json.loads(output)
    assert (report["wins"], report["ties"]) == ({"a": 2, "b": 12}, 6)
    assert report["sign_test"] == pytest.approx(0.01294, abs=1e-4)  # twice the tail of 14 fair coins
    code, output, _ = analyze(state, "--experiment", "worlds")
    assert (code, "b wins 12 pages" in output) == (0, True)
    by_arm = json.loads(analyze(state, "--by", "arm", "--impression-type", "click", "--json")[1])["groups"]
    assert {name: group["impressions"] for name, group in by_arm.items()} == {"worlds/a": 16, "worlds/b": 26}


async def test_a_shadow_page_is_compared_by_overlap(bundle: Path, tmp_path: Path) -> None:
    arms = 'arms = [{ name = "z" }, { name = "b", scenario = "garden" }]\n'
    shared_count, item_count = 0, 0

    async with serve(bundle, tmp_path, TWO_SCENARIOS + 'kind = "EXPERIMENT_KIND_SHADOW"\n' + arms) as stub:
        for n in range(4):
            await stub.Recommend(pb.RecommendRequest(user_id=f"u{n}", page_size=4 + 5 * n))
            one, other = (set(page.item_ids) for page in await logged_pages(stub, 2, f"u{n}"))
            shared_count, item_count = shared_count + len(one & other), item_count + 4 + 5 * n
    state = tmp_path / "state"
    code, output, errors = analyze(state, "--experiment", "worlds", "--json")
    assert code == 0, errors
    report_arms = json.loads(output)["arms"]
    assert list(report_arms) == ["z", "b"]  # in the order of the experiment
    assert report_arms["b"]["overlap"] == pytest.approx(shared_count / item_count)
    assert 0 < shared_count < item_count
    assert (
        f"has {shared_count / item_count:.1%} of the served items"
        in analyze(state, "--experiment", "worlds")[1]
    )


async def test_off_policy_estimates_of_exploration_are_printed(bundle: Path, tmp_path: Path) -> None:
    text = '[home]\nsources = ["popular"]\nexploration = { share = 0.5 }\n'
    favorites = {f"new-{n}" for n in range(2)}

    async with serve(bundle, tmp_path, text, NOW) as stub:  # whose draws are the same each time
        since = time_to(NOW - timedelta(days=1))
        items = [item_pb2.Item(id=f"new-{n}", title=f"thing {n}", available_from=since) for n in range(8)]
        response = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
        sequence = max(outcome.sequence for outcome in response.outcomes)
        for n in range(120):
            request = pb.RecommendRequest(user_id=f"u{n}", page_size=4, min_sequence=sequence)
            page = await stub.Recommend(request)
            await click(stub, page, f"u{n}", *(i for i in ids(page) if i in favorites))
    state = tmp_path / "state"
    code, output, errors = analyze(state, "--off-policy", "--json")
    assert code == 0, errors
    report = json.loads(output)
    assert report["slots"] == 240
    uniform = report["policies"]["uniform"]
    for kind in ("ips", "snips", "dr"):
        # Two of eight, or of the seven that are left for the second slot; four standard errors.
        one = uniform[kind]
        assert abs(one["mean"] - 0.25) < one["high"] - one["low"]
        assert 0 < one["low"] < one["high"] < 1
    assert report["logged"]["low"] < report["logged"]["mean"] < report["logged"]["high"]
    assert report["policies"]["greedy"]["effective_draws"] <= uniform["effective_draws"] <= 240
    code, output, _ = analyze(state, "--off-policy")
    assert (code, "greedy" in output) == (0, True)


async def test_a_state_without_a_log_is_reported_and_one_draw_is_json(bundle: Path, tmp_path: Path) -> None:
    async with serve(bundle, tmp_path, '[home]\nsources = ["popular"]\n') as stub:
        since = time_to(datetime.now(UTC) - timedelta(days=1))
        items = [item_pb2.Item(id="new", title="thing", available_from=since)]
        response = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
        sequence = response.outcomes[0].sequence
        page = await stub.Recommend(pb.RecommendRequest(page_size=4, exploration=0.25, min_sequence=sequence))
        other = next(i for i in ids(page) if i != "new")
        await click(stub, page, "ann", other)
    state = tmp_path / "state"
    code, output, errors = analyze(state, "--off-policy", "--json")
    assert code == 0, errors
    assert json.loads(output)["logged"] == {"mean": 0.0, "low": None, "high": None}
    with sqlite3.connect(state / "ranking.sqlite") as connection:
        connection.execute("DROP TABLE served")
    for wrongly in (
        ["--off-policy", "--goal", "clic"],
        ["--impression-type", "seen"],
        ["--goal", "x", "--experiment", "y"],
    ):
        code, _, errors = analyze(state, *wrongly)
        assert (code, "the event types are click" in errors) == (1, True)
    code, _, errors = analyze(state, "--since", "2026-01-02", "--until", "2026-01-01")
    assert (code, "is not before until" in errors) == (1, True)
    for nonsense in (("--by", "arm", "--off-policy"), ("--since", "yesterday")):
        with pytest.raises(SystemExit):
            analyze(state, *nonsense)
    for arguments in (
        ("--by", "source", "--impression-type", "click"),
        ("--off-policy",),
        ("--experiment", "x"),
    ):
        code, _, errors = analyze(state, *arguments)
        assert (code, "no impression log" in errors) == (1, True)


async def test_an_outcome_counts_for_the_page_that_showed_the_item(bundle: Path, tmp_path: Path) -> None:
    text = (
        AB_EXPERIMENT + '[experiments.other]\nscenario = "basket"\narms = [{ name = "x" }, { name = "y" }]\n'
    )

    async with serve(bundle, tmp_path, text) as stub:
        for n in range(12):
            request = pb.RecommendRequest(user_id=f"u{n}", page_size=40, request_id=f"visit-{n}")
            page = await stub.Recommend(request)
            request.scenario = "basket"  # the same items under the same request id
            await stub.Recommend(request)
            await click(stub, page, f"u{n}", ids(page)[0])
    state = tmp_path / "state"
    event_counts = {}
    for name in ("worlds", "other"):
        arms = json.loads(analyze(state, "--experiment", name, "--json")[1])["arms"]
        event_counts[name] = sum(arm["events"] for arm in arms.values())
    assert event_counts == {"worlds": 12, "other": 0}


def test_a_comparison_needs_both_arms() -> None:
    def page(items: dict[str, str], clicks: set[str]) -> PageOutcome:
        served_page = served_pb2.ServedPage(
            experiment="x", item_ids=list(items), item_arms=list(items.values())
        )
        return PageOutcome("ann", served_page, {item_hash(i): frozenset({"click"}) for i in clicks}, {})

    contests = [
        page({"p": "a"}, set()),
        page({"p": "a"}, {"p"}),
        page({"p": "a", "q": "b"}, set()),
        page({"p": "a", "q": "b"}, {"p", "q"}),
        page({"p": "a", "q": "b"}, {"q"}),
    ]
    comparison = compare_arms(contests, "x", "click")
    assert (dict(comparison.wins), comparison.ties) == ({"b": 1}, 4)
