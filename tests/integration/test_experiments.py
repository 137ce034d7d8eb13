"""Experiments assign users to arms, interleave two arms and log shadow pages."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import InvalidArgument
from services.gateway.candidates import CandidateSet
from services.gateway.experiments.assignment import Arm, Experiment, assign, interleave, unit
from services.gateway.experiments.scenarios import Scenarios
from services.gateway.query import RankedPage
from tests.support.shop_server import (
    AB_EXPERIMENT,
    TWO_SCENARIOS,
    Shop,
    ids,
    logged_pages,
    session,
    violations,
)


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scenarios.toml"
    path.write_text(text)
    return path


def test_users_are_split_by_weight_and_experiments_are_independent() -> None:
    arms = (Arm("a", "home"), Arm("b", "home", 2.0), Arm("c", "home"))
    first, second = (Experiment(name, "home", arms, share=0.5) for name in ("first", "second"))
    users = [f"person-{n}" for n in range(20_000)]

    def arm(experiment: Experiment, user: str) -> str:
        assignment = assign(experiment, "home", user).arm
        return assignment.name if assignment else "none"

    both = Counter((arm(first, user), arm(second, user)) for user in users)
    part = {"none": 0.5, "a": 0.125, "b": 0.25, "c": 0.125}
    expected = {(x, y): len(users) * part[x] * part[y] for x in part for y in part}
    chi = sum((both[pair] - many) ** 2 / many for pair, many in expected.items())
    assert chi < 45  # of 15 degrees of freedom: less than once in ten thousand
    assert [arm(first, p) for p in users[:50]] == [arm(first, p) for p in users[:50]]
    assert assign(None, "home", "x").experiment == ""
    assert 0 <= unit("", "") < 1


orders = st.lists(st.integers(0, 15), unique=True, max_size=12)


def ranked_page(numbers: list[int], source: str) -> RankedPage:
    candidates = CandidateSet.of([(source, numbers, [1.0] * len(numbers))])
    scores = {"ctr": {n: float(n) for n in numbers}}
    return RankedPage(numbers, [1.0] * len(numbers), scores, {}, candidates, [], 0)


@given(orders, orders, st.integers(0, 20), st.integers(0, 1000))
@settings(max_examples=300)
def test_interleaving_is_fair_to_both_arms(left: list[int], right: list[int], depth: int, seed: int) -> None:
    both = ranked_page(left, "co_occurrence"), ranked_page(right, "text")
    page = interleave(both, ("a", "b"), depth, seed)
    longer = interleave(both, ("a", "b"), depth + 5, seed)
    assert longer.item_hashes[: len(page.item_hashes)] == page.item_hashes
    assert len(set(page.item_hashes)) == len(page.item_hashes) == min(depth, len({*left, *right}))
    items_by_arm = {"a": left, "b": right}
    for at, (number, arm) in enumerate(zip(page.item_hashes, page.arms, strict=True)):
        # An arm's item is its best of those that were not on the page.
        assert number == next(n for n in items_by_arm[arm] if n not in page.item_hashes[:at])
        counts = Counter(page.arms[: at + 1])
        used_up = any(set(items) <= set(page.item_hashes[:at]) for items in items_by_arm.values())
        assert abs(counts["a"] - counts["b"]) <= 1 or used_up
    assert set(page.components["ctr"]) == {*left, *right}


def test_the_coin_is_fair() -> None:
    both = ranked_page([1, 2], "co_occurrence"), ranked_page([3, 4], "co_occurrence")
    first = Counter(interleave(both, ("a", "b"), 1, seed).arms[0] for seed in range(2000))
    assert 850 < first["a"] < 1150  # six standard deviations


async def test_every_user_has_one_logged_arm(shop: Shop, tmp_path: Path) -> None:
    async with shop.serve(scenarios=file(tmp_path, AB_EXPERIMENT)) as stub:
        arms = {}
        for n in range(30):
            page_request = pb.RecommendRequest(user_id=f"u{n}", page_size=5)
            page, again = await stub.Recommend(page_request), await stub.Recommend(page_request)
            assert page.assignment == again.assignment
            assert page.assignment.experiment == "worlds"
            arms[n] = page.assignment.arm
            assert {i.split("-")[0] for i in ids(page)} == {{"a": "garden", "b": "kitchen"}[arms[n]]}
        assert set(arms.values()) == {"a", "b"}
        [impression, _] = await logged_pages(stub, 2, "u7")
        assert (impression.scenario, impression.experiment, impression.arm) == ("home", "worlds", arms[7])
        # A scenario that has none is not touched, nor is an item explained by the other arm.
        assert not (await stub.Recommend(pb.RecommendRequest(scenario="popular"))).HasField("assignment")
        other = {"a": "kitchen-03", "b": "garden-03"}[arms[0]]
        request = pb.RecommendRequest(user_id="u0", page_size=5)
        why = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=other))
        assert why.item_status == pb.ITEM_STATUS_FILTERED


async def test_an_anonymous_user_stays_in_one_arm_and_a_changed_experiment_is_reported(
    all_in_one: Shop, tmp_path: Path
) -> None:
    path = file(tmp_path, AB_EXPERIMENT)
    async with all_in_one.serve(scenarios=path) as stub:
        request, worlds = pb.RecommendRequest(page_size=4), Counter[str]()
        for _ in range(20):
            request.page_token = ""
            arms = set()
            for _ in range(3):
                page = await stub.Recommend(request)
                arms |= {i.split("-")[0] for i in ids(page)}
                request.page_token = page.next_page_token
            assert len(arms) == 1
            worlds.update(arms)
        assert set(worlds) == {"garden", "kitchen"}
        path.write_text(TWO_SCENARIOS.partition("[experiments")[0])
        async with asyncio.timeout(60):
            while (await stub.Recommend(pb.RecommendRequest())).HasField("assignment"):
                await asyncio.sleep(0.1)
        assert await violations(stub.Recommend(request)) == ["page_token"]


async def test_an_interleaved_page_logs_the_arm_of_each_item(shop: Shop, tmp_path: Path) -> None:
    text = AB_EXPERIMENT + 'kind = "EXPERIMENT_KIND_INTERLEAVE"\n'
    async with shop.serve(scenarios=file(tmp_path, text)) as stub:
        request = pb.RecommendRequest(user_id="ann", page_size=8, session=session("garden-01"))
        first = await stub.Recommend(request)
        request.page_token = first.next_page_token
        second = await stub.Recommend(request)
        assert first.assignment == pb.Assignment(experiment="worlds")
        assert not set(ids(first)) & set(ids(second))
        for answer, page in zip((first, second), await logged_pages(stub, 2, "ann"), strict=True):
            assert list(page.item_ids) == ids(answer)
            whose = {"garden": "a", "kitchen": "b"}
            assert list(page.item_arms) == [whose[i.split("-")[0]] for i in ids(answer)]
            assert Counter(page.item_arms) == {"a": 4, "b": 4}
            scores = [item.score for item in answer.items]
            assert scores == sorted(scores, reverse=True)


async def test_requests_with_page_rules_are_not_interleaved(all_in_one: Shop, tmp_path: Path) -> None:
    text = AB_EXPERIMENT + 'kind = "EXPERIMENT_KIND_INTERLEAVE"\n'
    async with all_in_one.serve(scenarios=file(tmp_path, text)) as stub:
        plain = pb.RecommendRequest(user_id="ann", page_size=8, session=session("garden-01"))
        page = await stub.Recommend(plain)
        assert page.HasField("assignment")
        own_requests = [
            pb.RecommendRequest(user_id="ann", exploration=0.2),
            pb.RecommendRequest(
                user_id="ann", rules=pb.Rules(caps=[pb.Cap(attribute="colour", max_count=1)])
            ),
            pb.RecommendRequest(
                user_id="ann", rules=pb.Rules(quotas=[pb.Quota(source="new_arrivals", share=0.1)])
            ),
        ]
        for request in own_requests:
            assert not (await stub.Recommend(request)).HasField("assignment")
        for place, item_id in enumerate(ids(page), 1):
            why = await stub.ExplainItem(pb.ExplainItemRequest(request=plain, item_id=item_id))
            assert (why.item_status, why.position) == (pb.ITEM_STATUS_SHOWN, place)
        last = ids(await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=40)))[-1]
        why = await stub.ExplainItem(pb.ExplainItemRequest(request=plain, item_id=last))
        assert (why.item_status, why.position) == (pb.ITEM_STATUS_RANKED_LOWER, 0)
        both = ["garden-05", "kitchen-05", "nothing"]
        rerank = await stub.Recommend(pb.RecommendRequest(user_id="ann", item_ids=both))
        assert set(ids(rerank)) == set(both[:2])
        assert list(rerank.excluded_item_ids) == ["nothing"]


async def test_a_shadow_page_is_logged_but_not_shown(shop: Shop, tmp_path: Path) -> None:
    text = AB_EXPERIMENT + 'kind = "EXPERIMENT_KIND_SHADOW"\n'
    async with shop.serve(scenarios=file(tmp_path, text)) as stub:
        page = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=6))
        assert page.assignment == pb.Assignment(experiment="worlds", arm="a")
        assert {i.split("-")[0] for i in ids(page)} == {"garden"}
        original, shadow = sorted(
            await logged_pages(stub, 2, "ann"), key=lambda impression: impression.shadow
        )
        assert (list(original.item_ids), original.arm, original.shadow) == (ids(page), "a", False)
        assert (shadow.arm, shadow.shadow, shadow.request_id) == ("b", True, page.request_id)
        assert {i.split("-")[0] for i in shadow.item_ids} == {"kitchen"}
        assert len(shadow.item_ids) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('scenario = "home"', "experiments.x.arms"),
        ('arms = [{ name = "a" }, { name = "b" }]', "experiments.x.scenario"),
        ('scenario = "hom"\narms = [{ name = "a" }, { name = "b" }]', "experiments.x.scenario"),
        ('scenario = "home"\narms = [{ name = "a" }, { name = "b" }]\n[experiments.""]', "name"),
        ('scenario = "home"\narms = [{ name = "a" }, { name = "a" }]', "experiments.x.arms"),
        ('scenario = "home"\narms = [{ name = "a b" }, { name = "b" }]', "experiments.x.arms[0].name"),
        (
            'scenario = "home"\narms = [{ name = "a" }, { name = "b", weight = 0 }]',
            "experiments.x.arms[1].weight",
        ),
        ('scenario = "home"\narms = [{ name = "a" }, { name = "b", scenario = "no" }]', "arms[1].scenario"),
        ('scenario = "home"\nshare = 2\narms = [{ name = "a" }, { name = "b" }]', "experiments.x.share"),
        ('scenario = "home"\narms = [{ name = "a" }]', "experiments.x.arms"),
        ('scenario = "home"\nkind = "DUEL"', "experiments.x"),
        (
            'scenario = "home"\nkind = "EXPERIMENT_KIND_INTERLEAVE"\n'
            'arms = [{ name = "a" }, { name = "b", scenario = "basket" }]',
            "experiments.x.arms[1].scenario",
        ),
        (
            'scenario = "home"\narms = [{ name = "a" }, { name = "b" }]\n'
            '[experiments.y]\nscenario = "home"\narms = [{ name = "a" }, { name = "b" }]',
            "experiments.y.scenario",
        ),
    ],
)
def test_an_invalid_experiment_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message.replace("[", r"\[").replace("]", r"\]")):
        Scenarios(file(tmp_path, f"[experiments.x]\n{content}\n"))
    with pytest.raises(InvalidArgument, match="experiments"):
        Scenarios(file(tmp_path, "experiments = 3\n"))
