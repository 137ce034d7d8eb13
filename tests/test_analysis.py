"""`vitrine analyze` of experiments and of exploring, over what a served shop wrote."""

import asyncio
import io
import json
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from vitrine.catalog.v1 import event_pb2, item_pb2, served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.analysis.comparison import compared
from services.analysis.outcomes import Shown
from services.catalog import item_number
from services.cli import main
from services.wire import time_to
from tests.recommending import HALVES, NOW, SPLIT, Shop, ids


def analyzed(state: Path, *more: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["analyze", "--state", str(state), *more])
    return code, out.getvalue(), err.getvalue()


async def clicked(stub: Any, page: Any, user: str, *item_ids: str, kind: str = "click") -> None:
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


def serve(
    bundle: Path,
    tmp_path: Path,
    text: str,
    body: Callable[[Any], Awaitable[None]],
    clock: datetime | None = None,
) -> Path:
    file = tmp_path / "scenarios.toml"
    file.write_text(text)
    Shop(bundle, tmp_path / "state", "one", clock=clock).run(body, scenarios=file)
    return tmp_path / "state"


def test_arms_are_judged_by_what_their_people_did(bundle: Path, tmp_path: Path) -> None:
    people = {"a": 0, "b": 0}

    async def body(stub: Any) -> None:
        for n in range(60):
            user = f"u{n}"
            page = await stub.Recommend(pb.RecommendRequest(user_id=user, page_size=5))
            arm = page.assignment.arm
            people[arm] += 1
            # Everybody of arm b clicks two items, every other one of arm a one.
            mine = ids(page)[:2] if arm == "b" else ids(page)[: people[arm] % 2]
            await clicked(stub, page, user, *mine)
            await clicked(stub, page, user, *mine[:1], kind="purchase")

    state = serve(bundle, tmp_path, SPLIT, body)
    code, said, wrong = analyzed(state, "--experiment", "worlds", "--json")
    assert code == 0, wrong
    told = json.loads(said)
    assert {arm: told["arms"][arm]["people"] for arm in "ab"} == people
    assert told["arms"]["b"]["done"] == 2 * people["b"]
    assert told["arms"]["b"]["revenue"] == 4.0 * people["b"]
    assert told["arms"]["a"]["done"] == (people["a"] + 1) // 2
    more = told["more_than_the_first"]["b"]
    assert more["mean"] == pytest.approx(2 - told["arms"]["a"]["done"] / people["a"])
    assert 1 < more["low"] < more["mean"] < more["high"] < 2
    code, said, _ = analyzed(state, "--experiment", "worlds", "--on", "purchase")
    assert (code, "more than the first" in said) == (0, True)
    code, _, wrong = analyzed(state, "--experiment", "moons")
    assert (code, "moons" in wrong) == (1, True)
    code, _, wrong = analyzed(state, "--policies")
    assert (code, "no slot that was explored" in wrong) == (1, True)
    future = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert analyzed(state, "--experiment", "worlds", "--since", future)[0] == 1
    by_arm = json.loads(analyzed(state, "--by", "arm", "--shown-as", "click", "--json")[1])["groups"]
    assert set(by_arm) == {"worlds/a", "worlds/b"}


def test_two_arms_of_a_page_are_judged_by_whose_items_were_clicked(bundle: Path, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        for n in range(20):
            user = f"u{n}"
            page = await stub.Recommend(pb.RecommendRequest(user_id=user, page_size=6))
            kitchen = [i for i in ids(page) if i.startswith("kitchen")]
            garden = [i for i in ids(page) if i.startswith("garden")]
            if n < 12:
                await clicked(stub, page, user, *kitchen[:2], *garden[:1])
            elif n < 14:
                await clicked(stub, page, user, garden[0])
            elif n < 16:
                await clicked(stub, page, user, garden[0], kitchen[0])

    state = serve(bundle, tmp_path, SPLIT + 'kind = "EXPERIMENT_KIND_INTERLEAVE"\n', body)
    code, said, wrong = analyzed(state, "--experiment", "worlds", "--json")
    assert code == 0, wrong
    told = json.loads(said)
    assert (told["wins"], told["ties"]) == ({"a": 2, "b": 12}, 6)
    assert told["sign_test"] == pytest.approx(0.01294, abs=1e-4)  # twice the tail of 14 fair coins
    code, said, _ = analyzed(state, "--experiment", "worlds")
    assert (code, "b has the better of 12 pages" in said) == (0, True)
    by_arm = json.loads(analyzed(state, "--by", "arm", "--shown-as", "click", "--json")[1])["groups"]
    assert {name: group["shown"] for name, group in by_arm.items()} == {"worlds/a": 16, "worlds/b": 26}


def test_a_shadow_is_told_by_what_it_has_in_common(bundle: Path, tmp_path: Path) -> None:
    arms = 'arms = [{ name = "z" }, { name = "b", scenario = "garden" }]\n'
    alike, shown = 0, 0

    async def body(stub: Any) -> None:
        nonlocal alike, shown
        for n in range(4):
            await stub.Recommend(pb.RecommendRequest(user_id=f"u{n}", page_size=4 + 5 * n))
            pages: list[Any] = []
            async with asyncio.timeout(60):
                while len(pages) < 2:
                    pages = list((await stub.ExportUser(pb.ExportUserRequest(user_id=f"u{n}"))).pages)
                    await asyncio.sleep(0.05)
            one, other = (set(page.item_ids) for page in pages)
            alike, shown = alike + len(one & other), shown + 4 + 5 * n

    state = serve(bundle, tmp_path, HALVES + 'kind = "EXPERIMENT_KIND_SHADOW"\n' + arms, body)
    code, said, wrong = analyzed(state, "--experiment", "worlds", "--json")
    assert code == 0, wrong
    told = json.loads(said)["arms"]
    assert list(told) == ["z", "b"]  # in the order of the experiment
    assert told["b"]["alike"] == pytest.approx(alike / shown)
    assert 0 < alike < shown
    assert f"has {alike / shown:.1%} of the items shown" in analyzed(state, "--experiment", "worlds")[1]


def test_what_exploring_another_way_would_have_led_to(bundle: Path, tmp_path: Path) -> None:
    text = '[home]\nsources = ["popular"]\nexploration = { share = 0.5 }\n'
    liked = {f"new-{n}" for n in range(2)}

    async def body(stub: Any) -> None:
        since = time_to(NOW - timedelta(days=1))
        items = [item_pb2.Item(id=f"new-{n}", title=f"thing {n}", available_from=since) for n in range(8)]
        written = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
        wanted = max(outcome.sequence for outcome in written.outcomes)
        for n in range(120):
            asked = pb.RecommendRequest(user_id=f"u{n}", page_size=4, min_sequence=wanted)
            page = await stub.Recommend(asked)
            await clicked(stub, page, f"u{n}", *(i for i in ids(page) if i in liked))

    state = serve(bundle, tmp_path, text, body, NOW)  # whose draws are the same each time
    code, said, wrong = analyzed(state, "--policies", "--json")
    assert code == 0, wrong
    told = json.loads(said)
    assert told["slots"] == 240
    uniform = told["policies"]["alike"]
    for kind in ("ips", "snips", "dr"):
        # Two of eight, or of the seven that are left for the second slot; four standard errors.
        one = uniform[kind]
        assert abs(one["mean"] - 0.25) < one["high"] - one["low"]
        assert 0 < one["low"] < one["high"] < 1
    assert told["as_served"]["low"] < told["as_served"]["mean"] < told["as_served"]["high"]
    assert told["policies"]["the most relevant"]["worth"] <= uniform["worth"] <= 240
    code, said, _ = analyzed(state, "--policies")
    assert (code, "the most relevant" in said) == (0, True)


def test_a_state_without_a_log_is_said_and_one_draw_is_json(bundle: Path, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        since = time_to(datetime.now(UTC) - timedelta(days=1))
        items = [item_pb2.Item(id="new", title="thing", available_from=since)]
        written = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
        wanted = written.outcomes[0].sequence
        page = await stub.Recommend(pb.RecommendRequest(page_size=4, exploration=0.25, min_sequence=wanted))
        other = next(i for i in ids(page) if i != "new")
        await clicked(stub, page, "ann", other)

    state = serve(bundle, tmp_path, '[home]\nsources = ["popular"]\n', body)
    code, said, wrong = analyzed(state, "--policies", "--json")
    assert code == 0, wrong
    assert json.loads(said)["as_served"] == {"mean": 0.0, "low": None, "high": None}
    with sqlite3.connect(state / "ranking.sqlite") as connection:
        connection.execute("DROP TABLE served")
    for wrongly in (
        ["--policies", "--on", "clic"],
        ["--shown-as", "seen"],
        ["--on", "x", "--experiment", "y"],
    ):
        code, _, wrong = analyzed(state, *wrongly)
        assert (code, "there are events of click" in wrong) == (1, True)
    code, _, wrong = analyzed(state, "--since", "2026-01-02", "--until", "2026-01-01")
    assert (code, "is not before until" in wrong) == (1, True)
    for nonsense in (("--by", "arm", "--policies"), ("--since", "yesterday")):
        with pytest.raises(SystemExit):
            analyzed(state, *nonsense)
    for asked in (("--by", "source", "--shown-as", "click"), ("--policies",), ("--experiment", "x")):
        code, _, wrong = analyzed(state, *asked)
        assert (code, "no served log" in wrong) == (1, True)


def test_what_was_done_counts_for_the_answer_that_showed_it(bundle: Path, tmp_path: Path) -> None:
    text = SPLIT + '[experiments.other]\nscenario = "basket"\narms = [{ name = "x" }, { name = "y" }]\n'

    async def body(stub: Any) -> None:
        for n in range(12):
            asked = pb.RecommendRequest(user_id=f"u{n}", page_size=40, request_id=f"visit-{n}")
            page = await stub.Recommend(asked)
            asked.scenario = "basket"  # the same items under the same request id
            await stub.Recommend(asked)
            await clicked(stub, page, f"u{n}", ids(page)[0])

    state = serve(bundle, tmp_path, text, body)
    done = {}
    for name in ("worlds", "other"):
        arms = json.loads(analyzed(state, "--experiment", name, "--json")[1])["arms"]
        done[name] = sum(arm["done"] for arm in arms.values())
    assert done == {"worlds": 12, "other": 0}


def test_a_contest_needs_both_arms() -> None:
    def page(items: dict[str, str], clicked: set[str]) -> Shown:
        made = served_pb2.ServedPage(experiment="x", item_ids=list(items), item_arms=list(items.values()))
        return Shown("ann", made, {item_number(i): frozenset({"click"}) for i in clicked}, {})

    contests = [
        page({"p": "a"}, set()),
        page({"p": "a"}, {"p"}),
        page({"p": "a", "q": "b"}, set()),
        page({"p": "a", "q": "b"}, {"p", "q"}),
        page({"p": "a", "q": "b"}, {"q"}),
    ]
    found = compared(contests, "x", "click")
    assert (dict(found.wins), found.ties) == ({"b": 1}, 4)
