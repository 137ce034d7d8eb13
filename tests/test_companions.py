"""Bundles that are served beside the newest one, by arms of experiments that name them."""

import asyncio
import base64
import json
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.errors import FailedPrecondition
from services.generation import GATEWAY
from services.wiring import App
from tests.recommending import Shop, ids, purchase, session
from tests.shops import UNTIL, make_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The newest and one before, of other encoders."""
    root = tmp_path_factory.mktemp("bundles")
    before = make_bundle(root, seed=1, until=UNTIL - timedelta(days=7))
    return make_bundle(root), before


def scenarios(tmp_path: Path, bundle: str, kind: str = "SPLIT") -> Path:
    file = tmp_path / "scenarios.toml"
    file.write_text(
        f"""
        [experiments.models]
        scenario = "home"
        kind = "EXPERIMENT_KIND_{kind}"
        arms = [{{ name = "new" }}, {{ name = "old", bundle = "{bundle}" }}]
        """
    )
    return file


def bundle_of(token: str) -> Any:
    data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_")
    return json.loads(data[12:])["b"]


async def pages(stub: Any, many: int, user: str) -> list[Any]:
    async with asyncio.timeout(60):
        while len(found := (await stub.ExportUser(pb.ExportUserRequest(user_id=user))).pages) < many:
            await asyncio.sleep(0.05)
    return list(found)


def test_arms_answer_by_their_own_bundles_over_the_same_items_and_events(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, before = bundles
    shop = Shop(newest, tmp_path / "state", "one", clock=None)

    async def body(stub: Any) -> None:
        seen = Counter[tuple[str, str]]()
        people = {"new": "", "old": ""}
        for n in range(40):
            asked = pb.RecommendRequest(user_id=f"u{n}", page_size=5, session=session("garden-03"))
            page = await stub.Recommend(asked)
            seen[page.assignment.arm, page.versions.bundle] += 1
            people[page.assignment.arm] = f"u{n}"
            assert not page.degraded
            asked.page_token = page.next_page_token
            second = await stub.Recommend(asked)
            assert second.versions.bundle == page.versions.bundle
            assert not second.degraded
            assert bundle_of(page.attribution_token) == page.versions.bundle
            assert not set(ids(page)) & set(ids(second))
        assert set(seen) == {("new", newest.name), ("old", before.name)}
        # What is written now both find at once, and what somebody buys neither shows again.
        item = item_pb2.Item(id="own-1", title="garden thing 3", family_id="garden-family-1")
        for change in range(3):
            item.price = change
            written = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]))
            for user in people.values():
                asked = pb.RecommendRequest(user_id=user, page_size=50, session=session("garden-03"))
                asked.min_sequence = written.outcomes[0].sequence
                assert "own-1" in ids(await stub.Recommend(asked))
        for arm, user in people.items():
            await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase(arm, user, "own-1", "kitchen-05")]))
            assert not {"own-1", "kitchen-05"} & set(
                ids(await stub.Recommend(pb.RecommendRequest(user_id=user, page_size=50)))
            )
            await stub.DeleteUser(pb.DeleteUserRequest(user_id=user))
            assert "kitchen-05" in ids(await stub.Recommend(pb.RecommendRequest(user_id=user, page_size=50)))

    shop.run(body, beside=(before,), scenarios=scenarios(tmp_path, before.name))


def test_a_shadow_is_of_another_bundle_and_two_share_a_page(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, before = bundles

    async def shadowed(stub: Any) -> None:
        answer = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=6))
        shown, shadow = sorted(await pages(stub, 2, "ann"), key=lambda page: page.shadow)
        assert answer.versions.bundle == shown.bundle == newest.name
        assert (shadow.bundle, shadow.arm, len(shadow.item_ids)) == (before.name, "old", 6)

    async def shared(stub: Any) -> None:
        await stub.Recommend(pb.RecommendRequest(user_id="bob", page_size=8, session=session("garden-03")))
        [page] = await pages(stub, 1, "bob")
        assert Counter(page.item_arms) == {"new": 4, "old": 4}

    for kind, body in (("SHADOW", shadowed), ("INTERLEAVE", shared)):
        shop = Shop(newest, tmp_path / kind, "one")
        shop.run(body, beside=(before,), scenarios=scenarios(tmp_path, before.name, kind))


def test_a_bundle_that_is_not_served_is_stood_in_for_and_said(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, _ = bundles

    async def body(stub: Any) -> None:
        said = Counter[str]()
        for n in range(20):
            page = await stub.Recommend(pb.RecommendRequest(user_id=f"u{n}", page_size=5))
            assert (len(page.items), page.versions.bundle) == (5, newest.name)
            said[page.assignment.arm] += any(line.stage == "bundle" for line in page.degraded)
            assert all(line.stage == "bundle" for line in page.degraded)
        assert said["old"] > 0
        assert said["new"] == 0

    Shop(newest, tmp_path / "state", "one").run(body, scenarios=scenarios(tmp_path, "20200101T000000-0"))


def test_what_cannot_be_served_beside_is_refused_at_the_start(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, before = bundles
    shop = Shop(newest, tmp_path / "state", "one")
    other = make_bundle(tmp_path, seed=2, event_types={"purchase": 1.0})
    wrong = {
        "is served already": (newest,),
        "other types of events": (other,),
        "holds no bundle|is no bundle|manifest": (tmp_path / "nowhere",),
    }
    for message, beside in wrong.items():

        async def started(beside: tuple[Path, ...] = beside) -> None:
            app = App(shop.settings(beside=beside))
            try:
                await app.start()
            finally:
                await app.stop()

        with pytest.raises(FailedPrecondition, match=message):
            asyncio.run(started())
    with pytest.raises(FailedPrecondition, match="one process has all services"):
        App(shop.settings(beside=(before,), embedding="127.0.0.1:1", ranking="127.0.0.1:1"), (GATEWAY,))


def test_a_restart_with_another_beside_finds_everything(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    newest, before = bundles
    shop = Shop(newest, tmp_path / "state", "one")

    async def writes(stub: Any) -> None:
        items = [item_pb2.Item(id=f"own-{n}", title=f"garden thing {n}") for n in range(5)]
        await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))

    async def reads(stub: Any) -> None:
        bundles_seen = set()
        for n in range(20):
            page = await stub.Recommend(pb.RecommendRequest(user_id=f"u{n}", page_size=60))
            bundles_seen.add(page.versions.bundle)
            assert {f"own-{n}" for n in range(5)} <= set(ids(page))
        assert bundles_seen == {newest.name, before.name}

    shop.run(writes)
    shop.run(reads, beside=(before,), scenarios=scenarios(tmp_path, before.name))
