"""Checks the lengths of the lists in a request before they are converted.

`MAX_ELEMENTS` has a limit for every repeated field of every request, by the field's full name. A message type
is analyzed once; then a check takes a few microseconds for each field that is set, whatever its size. Item
hashes and sequences have 63 bits, which is checked too.

Items, events, pages and users of a batch have an outcome each (`SEPARATE_OUTCOMES`). `check` skips them: the
function that converts an element checks it, so an invalid element does not fail the others.
"""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from vitrine.catalog.v1 import filter_pb2

from services.catalog import filters, items
from services.core.errors import InvalidArgument

_C, _G = "vitrine.catalog.v1", "vitrine.gateway.v1"
_E, _R = "vitrine.embedding.v1", "vitrine.ranking.v1"
FILTER = filter_pb2.Filter.DESCRIPTOR.full_name
_BITS = 63
_Servicer = TypeVar("_Servicer", bound=type)

MAX_ELEMENTS: Mapping[str, int] = {
    "google.protobuf.FieldMask.paths": 100,
    f"{_C}.AllOf.filters": filters.MAX_CONDITIONS,
    f"{_C}.AnyOf.filters": filters.MAX_CONDITIONS,
    f"{_C}.In.texts": filters.MAX_IN_TEXTS,
    f"{_C}.Item.attributes": items.MAX_ATTRIBUTES,
    f"{_C}.Attribute.texts": items.MAX_ATTRIBUTE_VALUES,
    f"{_C}.Attribute.numbers": items.MAX_ATTRIBUTE_VALUES,
    f"{_C}.Event.items": 5000,
    f"{_C}.ServedPage.item_ids": 500,
    f"{_C}.ServedPage.scores": 500,
    f"{_C}.ServedPage.propensities": 500,
    f"{_C}.ServedPage.sources": 32,
    f"{_C}.ServedPage.item_sources": 500,
    f"{_C}.ServedPage.item_arms": 500,
    f"{_C}.Exploring.item_hashes": 500,
    f"{_C}.Exploring.relevances": 500,
    f"{_C}.Exploring.draws": 500,
    f"{_C}.Draw.excluded_indices": 500,
    f"{_G}.Rules.caps": 16,
    f"{_G}.Rules.boosts": 32,
    f"{_G}.Rules.quotas": 8,
    f"{_G}.Rules.relax": 3,
    f"{_G}.RecommendRequest.session": 200,
    f"{_G}.RecommendRequest.exclude_item_ids": 10_000,
    f"{_G}.RecommendRequest.item_ids": 2000,
    f"{_G}.RecommendRequest.context_item_ids": 50,
    f"{_G}.SimilarItemsRequest.exclude_item_ids": 10_000,
    f"{_G}.ConverseRequest.liked_item_ids": 50,
    f"{_G}.ConverseRequest.disliked_item_ids": 50,
    f"{_G}.WriteEventsRequest.events": 1000,
    f"{_G}.BatchUpsertItemsRequest.items": 1000,
    f"{_G}.DeleteItemsRequest.item_ids": 1000,
    f"{_G}.PredictEventsRequest.session": 200,
    f"{_G}.PredictEventsRequest.item_ids": 2000,
    f"{_G}.PredictEventsRequest.users": 100,
    f"{_G}.UserRef.session": 200,
    f"{_G}.RecommendOffersRequest.session": 200,
    f"{_G}.RecommendOffersRequest.offers": 200,
    f"{_G}.Offer.segments": 8,
    f"{_E}.EmbedTextsRequest.texts": 4096,
    f"{_E}.EmbedImagesRequest.images": 256,
    f"{_E}.UpsertItemsRequest.items": 1000,
    f"{_E}.DeleteItemsRequest.item_ids": 1000,
    f"{_E}.GetItemsRequest.item_ids": 1000,
    f"{_E}.SearchRequest.groups": 32,
    f"{_E}.SearchRequest.spaces": 2,
    f"{_E}.SearchRequest.exclude_item_hashes": 100_000,
    f"{_E}.QueryGroup.item_hashes": 1000,
    f"{_E}.QueryGroup.item_ids": 1000,
    f"{_E}.QueryGroup.weights": 1000,
    f"{_E}.Vectors.values": 256 * 4096,
    f"{_R}.WriteEventsRequest.events": 1000,
    f"{_R}.User.session": 200,
    f"{_R}.RetrieveRequest.exclude_item_hashes": 100_000,
    f"{_R}.RetrieveRequest.sources": 16,
    f"{_R}.LogPagesRequest.pages": 1000,
    f"{_R}.RankRequest.item_hashes": 10_000,
    f"{_R}.RankRequest.item_ids": 10_000,
    f"{_R}.RankRequest.sources": 16,
    f"{_R}.SourceScores.indices": 10_000,
    f"{_R}.SourceScores.scores": 10_000,
    f"{_R}.ExplainRequest.item_hashes": 500,
    f"{_R}.PredictRequest.users": 100,
    f"{_R}.PredictRequest.item_hashes": 10_000,
}
"""The maximum length of each repeated field, by its full name; the field's comment states it too."""
MAX_TOTAL_ELEMENTS: Mapping[str, int] = {f"{_C}.Event.items": 250_000}
"""The maximum length of a list in one request, summed over all messages with that list."""

SEPARATE_OUTCOMES = frozenset(
    {
        f"{_G}.WriteEventsRequest.events",
        f"{_G}.BatchUpsertItemsRequest.items",
        f"{_G}.PredictEventsRequest.users",
        f"{_E}.UpsertItemsRequest.items",
        f"{_R}.WriteEventsRequest.events",
        f"{_R}.LogPagesRequest.pages",
        f"{_R}.PredictRequest.users",
    }
)
"""Lists whose elements are checked one by one when they are converted."""


@dataclass(frozen=True)
class _FieldCheck:
    """The checks of a field: its length, the size of its integers, and its messages."""

    name: str
    repeated: bool
    max_length: int
    integer: bool
    message: bool


def check(message: Message, path: str = "") -> None:
    """Check a message for lists that are too long, filters that are too large, and integers over 63 bits.

    `path` is the path of the message with a dot at its end.

    Raises:
        InvalidArgument: names the first invalid field, in the order of field numbers.
    """
    if message.DESCRIPTOR.full_name == FILTER:
        _check_filter(message, path.removesuffix("."))
        return
    field_checks = _field_checks(message.DESCRIPTOR)
    for field, value in message.ListFields():
        field_check = field_checks.get(field.number)
        if field_check is None:
            continue
        field_path = path + field_check.name
        if field_check.repeated and len(value) > field_check.max_length:
            problem = f"has {len(value)}, at most {field_check.max_length} are allowed"
            raise InvalidArgument.of(field_path, problem)
        if field_check.integer and field_check.repeated:
            _check_integers(value, field_path)
        elif field_check.integer:
            _check_integer(value, field_path)
        elif field_check.message and field_check.repeated:
            for index, element in enumerate(value):
                check(element, f"{field_path}[{index}].")
        elif field_check.message:
            check(value, f"{field_path}.")


def checked(service: ServiceDescriptor) -> Callable[[_Servicer], _Servicer]:
    """A class decorator: the servicer checks each request, whoever calls its methods.

    The servicer itself checks the messages of a request stream as they arrive.
    """

    def decorate(servicer: _Servicer) -> _Servicer:
        for method in service.methods:
            if not method.client_streaming:
                setattr(servicer, method.name, _with_check(getattr(servicer, method.name)))
        return servicer

    return decorate


def _with_check(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def stream(servicer: Any, request: Message, context: Any) -> AsyncIterator[Any]:
            check(request)
            async for response in method(servicer, request, context):
                yield response

        return stream

    @functools.wraps(method)
    async def call(servicer: Any, request: Message, context: Any) -> Any:
        check(request)
        return await method(servicer, request, context)

    return call


@functools.cache
def _field_checks(descriptor: Descriptor) -> Mapping[int, _FieldCheck]:
    """The checks of messages of a type, by field number."""
    checks = {}
    for field in descriptor.fields:
        repeated, type_ = field.is_repeated, field.message_type
        integer = _is_checked_integer(field)
        inner = type_ is not None and field.full_name not in SEPARATE_OUTCOMES and _has_checks(type_)
        if repeated or integer or inner:
            max_length = MAX_ELEMENTS[field.full_name] if repeated else 1
            checks[field.number] = _FieldCheck(field.name, repeated, max_length, integer, inner)
    return checks


def _has_checks(descriptor: Descriptor) -> bool:
    return descriptor.full_name == FILTER or bool(_field_checks(descriptor))


def _is_checked_integer(field: FieldDescriptor) -> bool:
    """Whether a field contains item hashes or sequences, which are int64 in the domain."""
    is_hash = field.type == FieldDescriptor.TYPE_FIXED64 and field.name.endswith("item_hashes")
    return is_hash or field.type == FieldDescriptor.TYPE_UINT64


def _check_integers(values: Sequence[int], path: str) -> None:
    # numpy reads the list's buffer: a loop over 100,000 Python integers takes a hundred times as long.
    array = np.asarray(values, np.uint64)
    if array.size and int(array.max()) >> _BITS:
        index = int(np.argmax(array >> np.uint64(_BITS)))
        _check_integer(values[index], f"{path}[{index}]")


def _check_integer(value: int, path: str) -> None:
    if value >> _BITS:
        raise InvalidArgument.of(path, f"is {value}, at most {2**_BITS - 1} is allowed")


def _check_filter(message: Any, path: str) -> None:
    """Count conditions and texts, and stop at the limits."""
    conditions, texts = 1, 0

    def descend(part: Any, part_path: str, depth: int) -> None:
        nonlocal conditions, texts
        if depth > filters.MAX_DEPTH:
            raise InvalidArgument.of(path, f"is more than {filters.MAX_DEPTH} levels deep")
        match part.WhichOneof("condition"):
            case "all_of" | "any_of" as kind:
                inner = getattr(part, kind).filters
                conditions += len(inner)
                if conditions > filters.MAX_CONDITIONS:
                    raise InvalidArgument.of(path, f"has more than {filters.MAX_CONDITIONS} conditions")
                for index, condition in enumerate(inner):
                    descend(condition, f"{part_path}.{kind}.filters[{index}]", depth + 1)
            case "none_of":
                conditions += 1
                descend(part.none_of, f"{part_path}.none_of", depth + 1)
            case "in":
                texts += len(getattr(part, "in").texts)
                if texts > filters.MAX_IN_TEXTS:
                    raise InvalidArgument.of(
                        f"{part_path}.in.texts", f"give the filter more than {filters.MAX_IN_TEXTS} texts"
                    )

    descend(message, path, 1)
