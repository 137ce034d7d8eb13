"""Converts messages of `vitrine.catalog.v1` to domain objects and back, for servicers and clients."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from vitrine.catalog.v1 import event_pb2, filter_pb2, item_pb2

from services.catalog import filters, items
from services.core.errors import InvalidArgument, quoted
from services.rpc.request_limits import check

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = -62135596800, 253402300799  # the years 1 to 9999
_NANOS = 1_000_000_000
_ITEM_FIELDS = {
    "title": "title",
    "description": "description",
    "attributes": "attributes",
    "family_id": "family_id",
    "price": "price",
    "image": "image",
    "available_from": "available_from",
    "available_until": "available_until",
    "source_version": "source_version",
}


def time_from(message: Timestamp, field: str) -> datetime:
    """An aware time in UTC; InvalidArgument on `field` if it is outside the years 1 to 9999."""
    if not (_FIRST <= message.seconds <= _LAST and 0 <= message.nanos < _NANOS):
        raise InvalidArgument.of(field, "is not a time between the years 1 and 9999")
    return _EPOCH + timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


def time_to(time: datetime) -> Timestamp:
    """The message of an aware time."""
    seconds, rest = divmod(time - _EPOCH, timedelta(seconds=1))
    return Timestamp(seconds=seconds, nanos=rest // timedelta(microseconds=1) * 1000)


def item_from(message: item_pb2.Item) -> items.Item:
    """The item, not validated; InvalidArgument for a list that is too long and for an invalid time."""
    check(message)
    window = {
        name: time_from(getattr(message, name), name)
        for name in ("available_from", "available_until")
        if message.HasField(name)
    }
    return items.Item(
        id=message.id,
        title=message.title,
        description=message.description,
        attributes=tuple(
            items.Attribute(a.name, tuple(a.texts), tuple(a.numbers)) for a in message.attributes
        ),
        family_id=message.family_id,
        price=message.price if message.HasField("price") else None,
        image=message.image.data,
        image_uri=message.image.uri,
        source_version=message.source_version if message.HasField("source_version") else None,
        available_from=window.get("available_from"),
        available_until=window.get("available_until"),
    )


def item_to(item: items.Item) -> item_pb2.Item:
    """The message of an item, without its image bytes."""
    message = item_pb2.Item(
        id=item.id, title=item.title, description=item.description, family_id=item.family_id
    )
    for attribute in item.attributes:
        message.attributes.add(name=attribute.name, texts=attribute.texts, numbers=attribute.numbers)
    if item.price is not None:
        message.price = item.price
    if item.image_uri:
        message.image.uri = item.image_uri
    if item.available_from:
        message.available_from.CopyFrom(time_to(item.available_from))
    if item.available_until:
        message.available_until.CopyFrom(time_to(item.available_until))
    if item.source_version is not None:
        message.source_version = item.source_version
    return message


def item_with_image(item: items.Item) -> item_pb2.Item:
    """The message of an item with its image bytes, as a client sends it."""
    message = item_to(item)
    if item.image:
        message.image.data = item.image
    return message


def mask_from(paths: Iterable[str]) -> frozenset[str]:
    """The item fields in an update mask; InvalidArgument for an unknown one."""
    names = list(paths)
    for path in names:
        if path not in _ITEM_FIELDS:
            allowed = ", ".join(_ITEM_FIELDS)
            raise InvalidArgument.of("update_mask", f"{quoted(path)} is none of {allowed}")
    return frozenset(names)


def filter_from(message: filter_pb2.Filter, field: str = "filter") -> filters.Filter:
    """The condition; InvalidArgument names the path of a part that is empty or too large."""
    check(message, f"{field}.")
    return _condition(message, field)


def filter_to(condition: filters.Filter) -> filter_pb2.Filter:
    """The message of a condition."""
    message = filter_pb2.Filter()
    match condition:
        case filters.AllOf(parts):
            message.all_of.SetInParent()
            message.all_of.filters.extend(filter_to(part) for part in parts)
        case filters.AnyOf(parts):
            message.any_of.SetInParent()
            message.any_of.filters.extend(filter_to(part) for part in parts)
        case filters.NoneOf(part):
            message.none_of.CopyFrom(filter_to(part))
        case filters.Equals(attribute, str() as text):
            message.equals.attribute, message.equals.text = attribute, text
        case filters.Equals(attribute, number):
            message.equals.attribute, message.equals.number = attribute, float(number)
        case filters.In(attribute, texts):
            in_message = getattr(message, "in")
            in_message.attribute = attribute
            in_message.texts.extend(sorted(texts))
        case filters.Range(attribute, low, high):
            message.range.attribute = attribute
            if low is not None:
                message.range.min = low
            if high is not None:
                message.range.max = high
    return message


def _condition(message: filter_pb2.Filter, path: str) -> filters.Filter:
    match message.WhichOneof("condition"):
        case "all_of":
            return filters.AllOf(_conditions(message.all_of.filters, f"{path}.all_of"))
        case "any_of":
            return filters.AnyOf(_conditions(message.any_of.filters, f"{path}.any_of"))
        case "none_of":
            return filters.NoneOf(_condition(message.none_of, f"{path}.none_of"))
        case "equals":
            return _equals(message.equals, f"{path}.equals")
        case "in":
            return _in(getattr(message, "in"), f"{path}.in")
        case "range":
            return _range(message.range, f"{path}.range")
        case _:
            raise InvalidArgument.of(path, "has no condition")


def _conditions(messages: Iterable[filter_pb2.Filter], path: str) -> tuple[filters.Filter, ...]:
    return tuple(_condition(m, f"{path}.filters[{index}]") for index, m in enumerate(messages))


def _attribute(name: str, path: str) -> str:
    if not name:
        raise InvalidArgument.of(f"{path}.attribute", "is required")
    return name


def _equals(message: filter_pb2.Equals, path: str) -> filters.Equals:
    kind = message.WhichOneof("value")
    if kind is None:
        raise InvalidArgument.of(f"{path}.value", "is required")
    return filters.Equals(_attribute(message.attribute, path), getattr(message, kind))


def _in(message: filter_pb2.In, path: str) -> filters.In:
    return filters.In(_attribute(message.attribute, path), frozenset(message.texts))


def _range(message: filter_pb2.Range, path: str) -> filters.Range:
    low = message.min if message.HasField("min") else None
    high = message.max if message.HasField("max") else None
    if low is None and high is None:
        raise InvalidArgument.of(path, "needs min or max")
    if any(bound is not None and math.isnan(bound) for bound in (low, high)):
        raise InvalidArgument.of(path, "contains a bound that is not a number")
    return filters.Range(_attribute(message.attribute, path), low, high)


def session_from(
    messages: Iterable[event_pb2.SessionItem], event_types: Mapping[str, int], default: str
) -> list[tuple[int, str]]:
    """(item hash, event type) of a session; InvalidArgument names an invalid id or an unknown type."""
    session = []
    for index, message in enumerate(messages):
        if problem := items.identifier_problem(message.item_id):
            raise InvalidArgument.of(f"session[{index}].item_id", problem)
        kind = message.type or default
        if kind not in event_types:
            raise InvalidArgument.of(f"session[{index}].type", f"is none of {', '.join(event_types)}")
        session.append((items.item_hash(message.item_id), kind))
    return session


def check_limit(value: int, maximum: int, field: str, default: int = 0) -> int:
    """A page size or limit from 1 to `maximum`; 0 means `default` if there is one."""
    limit = value or default
    if not 1 <= limit <= maximum:
        raise InvalidArgument.of(field, f"is {value}, 1 to {maximum} are allowed")
    return limit


def rows_of(values: Sequence[float], dimension: int, field: str) -> np.ndarray:
    """A block of floats as float32 (N, D); InvalidArgument if it does not divide or is not finite."""
    flat = np.array(values, np.float32)
    if dimension < 1 or len(flat) % dimension:
        raise InvalidArgument.of(field, f"{len(flat)} values do not divide by dimension {dimension}")
    if not np.isfinite(flat).all():
        raise InvalidArgument.of(field, "contains a value that is not finite")
    return flat.reshape(-1, dimension)
