"""Responses reduced to the fields that the caller reads (AIP-157, google.aip.dev/157)."""

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from services.core.errors import InvalidArgument, quoted

_MAX_DEPTH = 20  # no response has as many levels
FieldTree = dict[str, "FieldTree"]


def parse_mask(paths: Iterable[str], descriptor: Descriptor, field: str = "read_mask") -> FieldTree:
    """The fields that paths name; an empty tree is a whole message. InvalidArgument quotes a wrong path."""
    mask: FieldTree = {}
    for path in paths:
        tree, is_whole = mask, False
        message_type: Descriptor | None = descriptor
        for name in path.split(".", _MAX_DEPTH):
            described = message_type.fields_by_name.get(name) if message_type is not None else None
            if described is None:
                raise InvalidArgument.of(field, f"{quoted(path)} is no field of {descriptor.name}")
            is_whole = is_whole or (name in tree and not tree[name])
            tree, message_type = tree.setdefault(name, {}), described.message_type
            if is_whole:
                tree = {}  # the mask has the whole field already
        tree.clear()
    return mask


def apply_mask(message: Message, tree: FieldTree) -> None:
    """Clear the fields that a tree does not name; an empty tree keeps all."""
    if not tree:
        return
    for described, value in message.ListFields():
        if described.name not in tree:
            message.ClearField(described.name)
        elif described.type == FieldDescriptor.TYPE_MESSAGE:
            elements: Any = value if described.is_repeated else [value]
            for element in elements:
                apply_mask(element, tree[described.name])
