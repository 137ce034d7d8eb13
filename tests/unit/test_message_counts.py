"""Counting list elements in the bytes of a request equals counting after parsing."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from vitrine.catalog.v1 import event_pb2, filter_pb2, served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.core.errors import InvalidArgument
from services.rpc.message_counts import check_counts
from services.rpc.request_limits import check
from tests.fuzz.messages import Fuzzer
from tests.support.contracts import METHODS, length_delimited, message_class, method_name


@given(st.integers(0, 1 << 40))
def test_a_valid_message_passes_the_count_of_its_bytes(number: int) -> None:
    method = METHODS[number % len(METHODS)]
    for data in Fuzzer(0, {}).request(method, number):
        try:
            check(message_class(method.input_type).FromString(data))
        except (DecodeError, InvalidArgument):
            continue
        check_counts(method.input_type, data)


@given(st.binary())
def test_invalid_bytes_are_left_to_the_parser(data: bytes) -> None:
    for method in METHODS:
        try:
            check_counts(method.input_type, data)
        except InvalidArgument as error:
            raise AssertionError(method_name(method)) from error


def test_a_repeated_message_field_merges_as_in_a_parser() -> None:
    user = ranking_pb.RetrieveRequest(
        user=ranking_pb.User(session=[event_pb2.SessionItem()] * 150)
    ).SerializeToString()
    check_counts(ranking_pb.RetrieveRequest.DESCRIPTOR, user)
    with pytest.raises(InvalidArgument, match=r"user.session: has 150, at most 200"):
        check_counts(ranking_pb.RetrieveRequest.DESCRIPTOR, user * 2)


def test_nested_lists_can_all_be_full_but_not_longer() -> None:
    page = _page(500)
    full = ranking_pb.LogPagesRequest(pages=[page] * 1000).SerializeToString()
    check_counts(ranking_pb.LogPagesRequest.DESCRIPTOR, full)
    pages = ranking_pb.LogPagesRequest(pages=[*[page] * 999, _page(501)])
    with pytest.raises(InvalidArgument, match=r"pages\[999\].exploring.draws: has 501, at most 500"):
        check_counts(ranking_pb.LogPagesRequest.DESCRIPTOR, pages.SerializeToString())


def test_a_list_with_a_total_limit_is_counted_over_all_its_messages() -> None:
    order = event_pb2.Event(items=[event_pb2.EventItem()] * 5000)
    full = pb.WriteEventsRequest(events=[order] * 50)
    check_counts(pb.WriteEventsRequest.DESCRIPTOR, full.SerializeToString())
    full.events.add().items.add()
    with pytest.raises(InvalidArgument, match=r"events\[50\].items: has, in all, more than the 250000"):
        check_counts(pb.WriteEventsRequest.DESCRIPTOR, full.SerializeToString())


def _page(draws: int) -> served_pb2.ServedPage:
    return served_pb2.ServedPage(exploring=served_pb2.Exploring(draws=[served_pb2.Draw()] * draws))


def test_a_very_deep_filter_does_not_break_the_count() -> None:
    none_of = filter_pb2.Filter.DESCRIPTOR.fields_by_name["none_of"]
    of_request = pb.RecommendRequest.DESCRIPTOR.fields_by_name["filter"]
    data = b""
    for _ in range(20_000):
        data = length_delimited(none_of, data)
    check_counts(pb.RecommendRequest.DESCRIPTOR, length_delimited(of_request, data))
