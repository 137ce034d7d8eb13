"""Error statuses fit into HTTP headers."""

from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services.core import errors
from services.rpc import status
from tests.support.shop_server import Stub

_SOFT_LIMIT = 8 << 10  # grpc.max_metadata_size
_texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(["x" * 9000, "茶" * 9000, "%" * 9000]),
)


@given(st.lists(st.tuples(_texts, _texts), min_size=1, max_size=80))
def test_violations_of_any_size_fit_and_the_omitted_are_counted(
    parts: list[tuple[str, str]],
) -> None:
    violations = [errors.FieldViolation(field, description) for field, description in parts]
    message = status.to_status(errors.InvalidArgument(violations))
    assert message.ByteSize() * 4 // 3 + len(message.message) < _SOFT_LIMIT
    bad = error_details_pb2.BadRequest()
    [bad_request] = [bad for detail in message.details if detail.Unpack(bad)]
    listed_count = len(bad_request.field_violations)
    if listed_count < len(violations) or bad_request.field_violations[-1].field == "request":
        omitted_count = len(violations) - (listed_count - 1)
        assert (
            bad_request.field_violations[-1].description
            == f"{omitted_count} more are wrong; they are not listed"
        )
        listed_count -= 1
    for field_violation, violation in zip(
        bad_request.field_violations[:listed_count], violations, strict=False
    ):
        assert violation.field.startswith(field_violation.field.partition("... (")[0])


@given(_texts)
def test_a_name_of_any_size_fits(name: str) -> None:
    message = status.to_status(errors.NotFound("item", name))
    assert message.ByteSize() * 4 // 3 + len(message.message) < _SOFT_LIMIT


async def test_a_status_fits_into_headers_whatever_the_request(all_in_one_stub: Stub) -> None:
    long = "長い" * 100_000
    wrong: list[Awaitable[Any]] = [
        all_in_one_stub.Recommend(pb.RecommendRequest(scenario=long)),
        all_in_one_stub.Recommend(pb.RecommendRequest(read_mask=FieldMask(paths=[long]))),
        all_in_one_stub.Recommend(pb.RecommendRequest(rules=pb.Rules(relax=[long]))),
        all_in_one_stub.Recommend(
            pb.RecommendRequest(rules=pb.Rules(quotas=[pb.Quota(share=1, source=long)]))
        ),
        all_in_one_stub.Recommend(
            pb.RecommendRequest(rules=pb.Rules(quotas=[pb.Quota(share=1)]), language=long)
        ),
        all_in_one_stub.BatchUpsertItems(
            pb.BatchUpsertItemsRequest(items=[item_pb2.Item()], update_mask=FieldMask(paths=[long]))
        ),
        all_in_one_stub.Converse(pb.ConverseRequest(message=long, liked_item_ids=[long[:9000]] * 50)),
        all_in_one_stub.RecommendOffers(
            pb.RecommendOffersRequest(offers=[pb.Offer(segments=[long[:300]] * 8)] * 200)
        ),
    ]
    for call in wrong:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    async with grpc.aio.insecure_channel(all_in_one_stub.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ranking_grpc.RankingServiceStub(channel).Rank(ranking_pb.RankRequest(bundle=long))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
