"""A response contains exactly the fields of its field mask."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import InvalidArgument
from services.gateway.recommend.field_mask import apply_mask, parse_mask
from tests.support.shop_server import Shop, session, violations
from tests.support.shops import make_bundle

ANSWER = pb.RecommendResponse
FULL = ANSWER(
    items=[
        pb.Recommendation(
            item_id="a", score=1.0, sources=[pb.SourceScore(source="co_occurrence", score=2.0)]
        ),
        pb.Recommendation(item_id="b", score=0.5, rules=["boost"]),
    ],
    attribution_token="t",
    versions=pb.Versions(bundle="v", catalog_sequence=3),
)
PATHS = ["items", "items.item_id", "items.sources.source", "attribution_token", "versions.bundle", "versions"]


def mask_page(*paths: str) -> pb.RecommendResponse:
    answer = ANSWER()
    answer.CopyFrom(FULL)
    apply_mask(answer, parse_mask(paths, ANSWER.DESCRIPTOR))
    return answer


def test_an_empty_mask_returns_every_field() -> None:
    assert mask_page() == FULL


def test_a_mask_can_select_nested_fields() -> None:
    assert mask_page("items.item_id") == ANSWER(items=[pb.Recommendation(item_id=i) for i in "ab"])
    assert mask_page("items.sources.source", "versions.bundle") == ANSWER(
        items=[pb.Recommendation(sources=[pb.SourceScore(source="co_occurrence")]), pb.Recommendation()],
        versions=pb.Versions(bundle="v"),
    )
    assert (
        mask_page("items.item_id", "items") == mask_page("items", "items.item_id") == ANSWER(items=FULL.items)
    )


@given(st.lists(st.sampled_from(PATHS), min_size=1), st.randoms())
def test_order_and_repetition_do_not_matter(paths: list[str], random: Any) -> None:
    shuffled = [*paths, *paths]
    random.shuffle(shuffled)
    assert mask_page(*paths) == mask_page(*shuffled)


@pytest.mark.parametrize(
    "path", ["nothing", "items.nothing", "attribution_token.x", ".", "items.", "items..score"]
)
def test_an_unknown_path_is_named(path: str) -> None:
    with pytest.raises(InvalidArgument, match="read_mask"):
        parse_mask([path], ANSWER.DESCRIPTOR)


async def test_a_field_mask_applies_over_grpc(tmp_path: Path) -> None:
    async with Shop(make_bundle(tmp_path), tmp_path / "state", "one").serve() as stub:
        request = pb.RecommendRequest(session=session("garden-03"), page_size=3)
        request.read_mask.paths.extend(["items.item_id", "next_page_token"])
        page = await stub.Recommend(request)
        assert [field.name for field, _ in page.ListFields()] == ["items", "next_page_token"]
        assert all([f.name for f, _ in item.ListFields()] == ["item_id"] for item in page.items)
        request.page_token = page.next_page_token
        assert len((await stub.Recommend(request)).items) == 3
        request.read_mask.paths.append("price")
        assert await violations(stub.Recommend(request)) == ["read_mask"]
