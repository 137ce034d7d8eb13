"""Arms of an experiment can use candidate bundles next to the newest bundle."""

import base64
import json
from collections import Counter
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import FailedPrecondition
from services.serving.app import App
from services.serving.loaded_bundle import GATEWAY
from tests.support.shop_server import Shop, Stub, ids, logged_pages, purchase, session
from tests.support.shops import UNTIL, make_bundle


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


async def test_arms_use_their_own_bundles_over_the_same_items_and_events(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, before = bundles
    shop = Shop(newest, tmp_path / "state", "one", clock=None)
    async with shop.serve(candidate_bundles=(before,), scenarios=scenarios(tmp_path, before.name)) as stub:
        page_counts = Counter[tuple[str, str]]()
        users = {"new": "", "old": ""}
        for n in range(40):
            request = pb.RecommendRequest(user_id=f"u{n}", page_size=5, session=session("garden-03"))
            page = await stub.Recommend(request)
            page_counts[page.assignment.arm, page.versions.bundle] += 1
            users[page.assignment.arm] = f"u{n}"
            assert not page.degraded
            request.page_token = page.next_page_token
            second = await stub.Recommend(request)
            assert second.versions.bundle == page.versions.bundle
            assert not second.degraded
            assert bundle_of(page.attribution_token) == page.versions.bundle
            assert not set(ids(page)) & set(ids(second))
        assert set(page_counts) == {("new", newest.name), ("old", before.name)}
        # What is written now both find at once, and what somebody buys neither shows again.
        item = item_pb2.Item(id="own-1", title="garden thing 3", family_id="garden-family-1")
        for change in range(3):
            item.price = change
            response = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=[item]))
            for user in users.values():
                request = pb.RecommendRequest(user_id=user, page_size=50, session=session("garden-03"))
                request.min_sequence = response.outcomes[0].sequence
                assert "own-1" in ids(await stub.Recommend(request))
        for arm, user in users.items():
            await stub.WriteEvents(pb.WriteEventsRequest(events=[purchase(arm, user, "own-1", "kitchen-05")]))
            assert not {"own-1", "kitchen-05"} & set(
                ids(await stub.Recommend(pb.RecommendRequest(user_id=user, page_size=50)))
            )
            await stub.DeleteUser(pb.DeleteUserRequest(user_id=user))
            assert "kitchen-05" in ids(await stub.Recommend(pb.RecommendRequest(user_id=user, page_size=50)))


async def test_candidate_bundles_serve_shadow_and_interleaved_pages(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, before = bundles

    def serve(kind: str) -> AbstractAsyncContextManager[Stub]:
        shop = Shop(newest, tmp_path / kind, "one")
        return shop.serve(candidate_bundles=(before,), scenarios=scenarios(tmp_path, before.name, kind))

    async with serve("SHADOW") as stub:
        answer = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=6))
        original, shadow = sorted(await logged_pages(stub, 2, "ann"), key=lambda page: page.shadow)
        assert answer.versions.bundle == original.bundle == newest.name
        assert (shadow.bundle, shadow.arm, len(shadow.item_ids)) == (before.name, "old", 6)
    async with serve("INTERLEAVE") as stub:
        await stub.Recommend(pb.RecommendRequest(user_id="bob", page_size=8, session=session("garden-03")))
        [page] = await logged_pages(stub, 1, "bob")
        assert Counter(page.item_arms) == {"new": 4, "old": 4}


async def test_an_unavailable_candidate_bundle_falls_back_and_is_reported(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, _ = bundles
    async with Shop(newest, tmp_path / "state", "one").serve(
        scenarios=scenarios(tmp_path, "20200101T000000-0")
    ) as stub:
        degraded_counts = Counter[str]()
        for n in range(20):
            page = await stub.Recommend(pb.RecommendRequest(user_id=f"u{n}", page_size=5))
            assert (len(page.items), page.versions.bundle) == (5, newest.name)
            degraded_counts[page.assignment.arm] += any(line.stage == "bundle" for line in page.degraded)
            assert all(line.stage == "bundle" for line in page.degraded)
        assert degraded_counts["old"] > 0
        assert degraded_counts["new"] == 0


async def test_an_incompatible_candidate_bundle_stops_the_start(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, before = bundles
    shop = Shop(newest, tmp_path / "state", "one")
    other = make_bundle(tmp_path, seed=2, event_types={"purchase": 1.0})
    wrong = {
        "is served already": (newest,),
        "other event types": (other,),
        "contains no bundle|is no bundle|manifest": (tmp_path / "nowhere",),
    }
    for message, beside in wrong.items():

        async def start(beside: tuple[Path, ...] = beside) -> None:
            app = App(shop.settings(candidate_bundles=beside))
            try:
                await app.start()
            finally:
                await app.stop()

        with pytest.raises(FailedPrecondition, match=message):
            await start()
    with pytest.raises(FailedPrecondition, match="needs one process"):
        App(
            shop.settings(candidate_bundles=(before,), embedding="127.0.0.1:1", ranking="127.0.0.1:1"),
            (GATEWAY,),
        )


async def test_a_restart_with_another_candidate_bundle_finds_all_items(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    newest, before = bundles
    shop = Shop(newest, tmp_path / "state", "one")
    async with shop.serve() as stub:
        items = [item_pb2.Item(id=f"own-{n}", title=f"garden thing {n}") for n in range(5)]
        await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
    async with shop.serve(candidate_bundles=(before,), scenarios=scenarios(tmp_path, before.name)) as stub:
        bundles_seen = set()
        for n in range(20):
            page = await stub.Recommend(pb.RecommendRequest(user_id=f"u{n}", page_size=60))
            bundles_seen.add(page.versions.bundle)
            assert {f"own-{n}" for n in range(5)} <= set(ids(page))
        assert bundles_seen == {newest.name, before.name}
