"""Experiments: who is served by which arm, pages that two arms share, and pages that nobody is shown."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.errors import InvalidArgument
from services.gateway.experiments import Arm, Experiment, assigned, interleaved, unit
from services.gateway.scenarios import Scenarios
from services.gateway.wish import Candidates, Ordered
from tests.recommending import HALVES, SPLIT, Shop, ids, session, violations


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scenarios.toml"
    path.write_text(text)
    return path


def test_people_are_spread_evenly_by_weight_and_one_experiment_says_nothing_of_another() -> None:
    arms = (Arm("a", "home"), Arm("b", "home", 2.0), Arm("c", "home"))
    first, second = (Experiment(name, "home", arms, share=0.5) for name in ("first", "second"))
    people = [f"person-{n}" for n in range(20_000)]

    def arm(experiment: Experiment, person: str) -> str:
        found = assigned(experiment, "home", person).arm
        return found.name if found else "none"

    both = Counter((arm(first, person), arm(second, person)) for person in people)
    part = {"none": 0.5, "a": 0.125, "b": 0.25, "c": 0.125}
    expected = {(x, y): len(people) * part[x] * part[y] for x in part for y in part}
    chi = sum((both[pair] - many) ** 2 / many for pair, many in expected.items())
    assert chi < 45  # of 15 degrees of freedom: less than once in ten thousand
    assert [arm(first, p) for p in people[:50]] == [arm(first, p) for p in people[:50]]
    assert assigned(None, "home", "x").experiment == ""
    assert 0 <= unit("", "") < 1


orders = st.lists(st.integers(0, 15), unique=True, max_size=12)


def ordered(numbers: list[int], source: str) -> Ordered:
    candidates = Candidates({n: {source: 1.0} for n in numbers})
    scores = {"ctr": {n: float(n) for n in numbers}}
    return Ordered(numbers, [1.0] * len(numbers), scores, {}, candidates, [], 0)


@given(orders, orders, st.integers(0, 20), st.integers(0, 1000))
@settings(max_examples=300)
def test_two_arms_share_a_page_fairly(left: list[int], right: list[int], depth: int, seed: int) -> None:
    both = ordered(left, "graph"), ordered(right, "text")
    page = interleaved(both, ("a", "b"), depth, seed)
    longer = interleaved(both, ("a", "b"), depth + 5, seed)
    assert longer.numbers[: len(page.numbers)] == page.numbers
    assert len(set(page.numbers)) == len(page.numbers) == min(depth, len({*left, *right}))
    own = {"a": left, "b": right}
    for at, (number, arm) in enumerate(zip(page.numbers, page.arms, strict=True)):
        # An arm's item is its best of those that were not on the page.
        assert number == next(n for n in own[arm] if n not in page.numbers[:at])
        counts = Counter(page.arms[: at + 1])
        used_up = any(set(mine) <= set(page.numbers[:at]) for mine in own.values())
        assert abs(counts["a"] - counts["b"]) <= 1 or used_up
    assert set(page.components["ctr"]) == {*left, *right}


def test_the_coin_is_fair() -> None:
    both = ordered([1, 2], "graph"), ordered([3, 4], "graph")
    first = Counter(interleaved(both, ("a", "b"), 1, seed).arms[0] for seed in range(2000))
    assert 850 < first["a"] < 1150  # six standard deviations


async def logged(stub: Any, many: int, user: str) -> list[served_pb2.ServedPage]:
    async with asyncio.timeout(60):
        while True:
            pages = (await stub.ExportUser(pb.ExportUserRequest(user_id=user))).pages
            if len(pages) >= many:
                return list(pages)
            await asyncio.sleep(0.05)


def test_everybody_has_one_arm_and_it_is_told_and_kept(shop: Shop, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        arms = {}
        for n in range(30):
            asked = pb.RecommendRequest(user_id=f"u{n}", page_size=5)
            page, again = await stub.Recommend(asked), await stub.Recommend(asked)
            assert page.assignment == again.assignment
            assert page.assignment.experiment == "worlds"
            arms[n] = page.assignment.arm
            assert {i.split("-")[0] for i in ids(page)} == {{"a": "garden", "b": "kitchen"}[arms[n]]}
        assert set(arms.values()) == {"a", "b"}
        [page, _] = await logged(stub, 2, "u7")
        assert (page.scenario, page.experiment, page.arm) == ("home", "worlds", arms[7])
        # A scenario that has none is not touched, nor is an item explained by the other arm.
        assert not (await stub.Recommend(pb.RecommendRequest(scenario="popular"))).HasField("assignment")
        other = {"a": "kitchen-03", "b": "garden-03"}[arms[0]]
        request = pb.RecommendRequest(user_id="u0", page_size=5)
        why = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=other))
        assert why.standing == pb.STANDING_FILTERED

    shop.run(body, scenarios=file(tmp_path, SPLIT))


def test_a_strangers_pages_are_of_one_arm_and_a_changed_experiment_is_said(one: Shop, tmp_path: Path) -> None:
    path = file(tmp_path, SPLIT)

    async def body(stub: Any) -> None:
        asked, worlds = pb.RecommendRequest(page_size=4), Counter[str]()
        for _ in range(20):
            asked.page_token = ""
            seen = set()
            for _ in range(3):
                page = await stub.Recommend(asked)
                seen |= {i.split("-")[0] for i in ids(page)}
                asked.page_token = page.next_page_token
            assert len(seen) == 1
            worlds.update(seen)
        assert set(worlds) == {"garden", "kitchen"}
        path.write_text(HALVES.partition("[experiments")[0])
        async with asyncio.timeout(60):
            while (await stub.Recommend(pb.RecommendRequest())).HasField("assignment"):
                await asyncio.sleep(0.1)
        assert await violations(stub.Recommend(asked)) == ["page_token"]

    one.run(body, scenarios=path)


def test_an_interleaved_page_has_items_of_both_and_the_log_says_whose(shop: Shop, tmp_path: Path) -> None:
    text = SPLIT + 'kind = "EXPERIMENT_KIND_INTERLEAVE"\n'

    async def body(stub: Any) -> None:
        asked = pb.RecommendRequest(user_id="ann", page_size=8, session=session("garden-01"))
        first = await stub.Recommend(asked)
        asked.page_token = first.next_page_token
        second = await stub.Recommend(asked)
        assert first.assignment == pb.Assignment(experiment="worlds")
        assert not set(ids(first)) & set(ids(second))
        for answer, page in zip((first, second), await logged(stub, 2, "ann"), strict=True):
            assert list(page.item_ids) == ids(answer)
            whose = {"garden": "a", "kitchen": "b"}
            assert list(page.item_arms) == [whose[i.split("-")[0]] for i in ids(answer)]
            assert Counter(page.item_arms) == {"a": 4, "b": 4}
            scores = [item.score for item in answer.items]
            assert scores == sorted(scores, reverse=True)

    shop.run(body, scenarios=file(tmp_path, text))


def test_rules_of_a_page_are_not_for_two_arms_and_both_explain(one: Shop, tmp_path: Path) -> None:
    text = SPLIT + 'kind = "EXPERIMENT_KIND_INTERLEAVE"\n'

    async def body(stub: Any) -> None:
        plain = pb.RecommendRequest(user_id="ann", page_size=8, session=session("garden-01"))
        page = await stub.Recommend(plain)
        assert page.HasField("assignment")
        own = [
            pb.RecommendRequest(user_id="ann", exploration=0.2),
            pb.RecommendRequest(user_id="ann", rules=pb.Rules(caps=[pb.Cap(attribute="colour", most=1)])),
            pb.RecommendRequest(user_id="ann", rules=pb.Rules(quotas=[pb.Quota(source="new", share=0.1)])),
        ]
        for request in own:
            assert not (await stub.Recommend(request)).HasField("assignment")
        for place, item_id in enumerate(ids(page), 1):
            why = await stub.ExplainItem(pb.ExplainItemRequest(request=plain, item_id=item_id))
            assert (why.standing, why.place) == (pb.STANDING_SHOWN, place)
        last = ids(await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=40)))[-1]
        why = await stub.ExplainItem(pb.ExplainItemRequest(request=plain, item_id=last))
        assert (why.standing, why.place) == (pb.STANDING_RANKED_LOWER, 0)
        both = ["garden-05", "kitchen-05", "nothing"]
        listed = await stub.Recommend(pb.RecommendRequest(user_id="ann", item_ids=both))
        assert set(ids(listed)) == set(both[:2])
        assert list(listed.left_out_item_ids) == ["nothing"]

    one.run(body, scenarios=file(tmp_path, text))


def test_a_shadow_is_kept_and_not_shown(shop: Shop, tmp_path: Path) -> None:
    text = SPLIT + 'kind = "EXPERIMENT_KIND_SHADOW"\n'

    async def body(stub: Any) -> None:
        page = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=6))
        assert page.assignment == pb.Assignment(experiment="worlds", arm="a")
        assert {i.split("-")[0] for i in ids(page)} == {"garden"}
        shown, shadow = sorted(await logged(stub, 2, "ann"), key=lambda kept: kept.shadow)
        assert (list(shown.item_ids), shown.arm, shown.shadow) == (ids(page), "a", False)
        assert (shadow.arm, shadow.shadow, shadow.request_id) == ("b", True, page.request_id)
        assert {i.split("-")[0] for i in shadow.item_ids} == {"kitchen"}
        assert len(shadow.item_ids) == 6

    shop.run(body, scenarios=file(tmp_path, text))


@pytest.mark.parametrize(
    ("stated", "named"),
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
def test_a_wrong_experiment_is_named(tmp_path: Path, stated: str, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named.replace("[", r"\[").replace("]", r"\]")):
        Scenarios(file(tmp_path, f"[experiments.x]\n{stated}\n"))
    with pytest.raises(InvalidArgument, match="experiments"):
        Scenarios(file(tmp_path, "experiments = 3\n"))
