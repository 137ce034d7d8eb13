"""Methods and request fields of the contracts, read from their descriptors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from vitrine.embedding.v1 import embedding_service_pb2
from vitrine.gateway.v1 import recommendation_service_pb2
from vitrine.ranking.v1 import ranking_service_pb2

SERVICES = (
    recommendation_service_pb2.DESCRIPTOR.services_by_name["RecommendationService"],
    embedding_service_pb2.DESCRIPTOR.services_by_name["EmbeddingService"],
    ranking_service_pb2.DESCRIPTOR.services_by_name["RankingService"],
)
METHODS: Sequence[MethodDescriptor] = [method for service in SERVICES for method in service.methods]
_VARINT, _FIXED64, _BYTES = 0, 1, 2
_SIZES = {
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
}


@dataclass(frozen=True)
class FieldPath:
    """A field of a request or of a message inside it: the chain of fields from the request to it."""

    fields: tuple[FieldDescriptor, ...]

    @property
    def leaf(self) -> FieldDescriptor:
        return self.fields[-1]

    @property
    def path(self) -> str:
        """The path as errors write it, with index 0 for each list in the chain."""
        names = [f"{f.name}[0]" if f.is_repeated else f.name for f in self.fields[:-1]]
        return ".".join([*names, self.leaf.name])

    def message(self, content: bytes) -> bytes:
        """The bytes of a request that contains nothing but this field, encoded as `content`."""
        for field in reversed(self.fields[:-1]):
            content = length_delimited(field, content)
        return content


def method_name(method: MethodDescriptor) -> str:
    return f"{method.containing_service.full_name}/{method.name}"


def message_class(descriptor: Descriptor) -> Any:
    return message_factory.GetMessageClass(descriptor)


def field_paths(descriptor: Descriptor, before: tuple[FieldDescriptor, ...] = ()) -> Iterator[FieldPath]:
    """Every field of a message and of the messages in it; recursive types are entered once."""
    for field in descriptor.fields:
        yield FieldPath((*before, field))
        ancestors = {f.message_type.full_name for f in before if f.message_type is not None}
        inner = field.message_type
        if inner is not None and inner.full_name not in ancestors:
            yield from field_paths(inner, (*before, field))


def varint(number: int) -> bytes:
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def length_delimited(field: FieldDescriptor, content: bytes) -> bytes:
    """The encoding of a length-delimited field."""
    return varint(field.number << 3 | _BYTES) + varint(len(content)) + content


def repeated_field(field: FieldDescriptor, count: int) -> bytes:
    """The shortest encoding of a list of `count` elements."""
    if field.is_packed:
        return length_delimited(field, bytes(count * _SIZES.get(field.type, 1)))
    return length_delimited(field, b"") * count


def scalar_field(field: FieldDescriptor, value: int) -> bytes:
    """The encoding of a fixed64 or varint field."""
    if field.type == FieldDescriptor.TYPE_FIXED64:
        return varint(field.number << 3 | _FIXED64) + value.to_bytes(8, "little")
    return varint(field.number << 3 | _VARINT) + varint(value)
