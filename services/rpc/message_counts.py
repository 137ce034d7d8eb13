"""Counts the messages in the bytes of a request before they are parsed.

An empty message takes two bytes on the wire and hundreds in memory: 16 MiB of empty pages would take 2 GB and
seconds. So a large request is parsed first into types of the same structure that leave inner messages as
bytes. That takes 16 bytes of memory per message, and little more time than a copy.
"""

import functools
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from services.core.errors import InvalidArgument
from services.rpc.request_limits import FILTER, MAX_ELEMENTS, MAX_TOTAL_ELEMENTS

_MAX_DEPTH = 32  # parsers allow a hundred levels
_Field = descriptor_pb2.FieldDescriptorProto


def check_counts(descriptor: Descriptor, data: bytes) -> None:
    """Check that the bytes of a message contain no more messages than its lists may have together.

    The limits of nested lists are multiplied, but the conditions of a filter have one limit on every level.
    Bytes that cannot be parsed pass.

    Raises:
        InvalidArgument: names the first list that is too long.
    """
    _check(descriptor, [(data, "")], max_messages=1, depth=1)


def _check(
    descriptor: Descriptor, messages: Sequence[tuple[bytes, str]], *, max_messages: int, depth: int
) -> None:
    """Check the lists of messages of one type; each message comes with its path."""
    fields = descriptor.fields_by_name
    counts = dict.fromkeys(_counted(descriptor), 0)
    inner_messages: dict[str, list[tuple[bytes, str]]] = {name: [] for name in counts}
    for data, path in messages:
        try:
            message = _skeleton(descriptor).FromString(data)
        except DecodeError:
            continue
        for name in counts:
            elements, field = getattr(message, name), fields[name]
            counts[name] += len(elements)
            if counts[name] > (total := MAX_TOTAL_ELEMENTS.get(field.full_name, counts[name])):
                raise InvalidArgument.of(f"{path}{name}", f"has, in all, more than the {total} allowed")
            if field.is_repeated and counts[name] > max_messages * MAX_ELEMENTS[field.full_name]:
                problem = f"has {len(elements)}, at most {MAX_ELEMENTS[field.full_name]} are allowed"
                raise InvalidArgument.of(f"{path}{name}", problem)
            if _counted(field.message_type):
                indices = (f"[{index}]" if field.is_repeated else "" for index in range(len(elements)))
                inner_messages[name] += [
                    (inner, f"{path}{name}{index}.") for inner, index in zip(elements, indices, strict=True)
                ]
    for name, inner in inner_messages.items():
        field, type_ = fields[name], fields[name].message_type
        if inner and type_ is not None and depth < _MAX_DEPTH:
            factor = 1 if type_.full_name == FILTER else MAX_ELEMENTS.get(field.full_name, 1)
            _check(type_, inner, max_messages=max_messages * factor, depth=depth + 1)


@functools.cache
def _counted(descriptor: Descriptor) -> Sequence[str]:
    """The fields of a type that contain messages in a list, at any depth."""
    return [
        field.name
        for field in descriptor.fields
        if (inner := field.message_type) is not None
        and (field.is_repeated or inner.full_name == FILTER or _counted(inner))
    ]


@functools.cache
def _skeleton(descriptor: Descriptor) -> Any:
    """A type of the same structure whose counted fields are lists of bytes.

    A field that is not repeated becomes a list too: if it is sent twice, a parser merges both.
    """
    name = descriptor.full_name.replace(".", "_")
    file = descriptor_pb2.FileDescriptorProto(name=f"counts/{name}.proto", package="vitrine.counts")
    message = file.message_type.add(name=name)
    for field in _counted(descriptor):
        number = descriptor.fields_by_name[field].number
        message.field.add(name=field, number=number, type=_Field.TYPE_BYTES, label=_Field.LABEL_REPEATED)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"vitrine.counts.{name}"))
