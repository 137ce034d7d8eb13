"""Answers cut down to the fields that somebody wants to read (AIP-157, google.aip.dev/157)."""

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from services.errors import InvalidArgument

Tree = dict[str, "Tree"]


def tree_of(paths: Iterable[str], descriptor: Descriptor, field: str = "read_mask") -> Tree:
    """The fields named by paths, an empty tree for a whole one; InvalidArgument names a path that is none."""
    wanted: Tree = {}
    for path in paths:
        tree, whole = wanted, False
        of: Descriptor | None = descriptor
        for name in path.split("."):
            found = of.fields_by_name.get(name) if of is not None else None
            if found is None:
                raise InvalidArgument.of(field, f"{path!r} is no field of {descriptor.name}")
            whole = whole or (name in tree and not tree[name])
            tree, of = tree.setdefault(name, {}), found.message_type
            if whole:
                tree = {}  # what is within it counts already
        tree.clear()
    return wanted


def keep(message: Message, tree: Tree) -> None:
    """Clear what a tree does not name; an empty one names all."""
    if not tree:
        return
    for described, value in message.ListFields():
        if described.name not in tree:
            message.ClearField(described.name)
        elif described.type == FieldDescriptor.TYPE_MESSAGE:
            each: Any = value if described.is_repeated else [value]
            for one in each:
                keep(one, tree[described.name])
