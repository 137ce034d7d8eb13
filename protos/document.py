"""Writes the contracts' reference, Markdown, from the comments of a descriptor set with source info.

python protos/document.py gen/vitrine.binpb api.md
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

_HEAD = """# The contracts

Generated from the comments in `protos/vitrine` (`make protos`). What other teams call is
`vitrine.gateway.v1.RecommendationService`; the services behind it have contracts of their own. A field that
is not sent has its type's empty value; one marked *optional* knows the difference. Errors carry google.rpc
details that name the field.
"""
_ORDER = ("vitrine.gateway.v1", "vitrine.catalog.v1", "vitrine.embedding.v1", "vitrine.ranking.v1")
_SERVICE, _MESSAGE, _ENUM, _MEMBER = 6, 4, 5, 2
Path_ = tuple[int, ...]


def main(descriptors: str, out: str) -> None:
    """Write the reference of every package."""
    files = FileDescriptorSet.FromString(Path(descriptors).read_bytes()).file
    lines = [_HEAD]
    for package in _ORDER:
        lines += _package(package, [file for file in files if file.package == package])
    Path(out).write_text("\n".join(lines).rstrip() + "\n")


def _package(package: str, files: Sequence[FileDescriptorProto]) -> Iterator[str]:
    yield f"\n## {package}\n"
    for file in files:
        said = _said(file)
        for n, service in enumerate(file.service):
            yield from _service(service, (_SERVICE, n), said)
    for file in files:
        said = _said(file)
        for n, message in enumerate(file.message_type):
            yield f'<a id="{package}.{message.name}"></a>\n'
            yield from _message(message, (_MESSAGE, n), said)
        for n, enum in enumerate(file.enum_type):
            yield f'<a id="{package}.{enum.name}"></a>\n'
            yield from _enum(enum, (_ENUM, n), said)


def _said(file: FileDescriptorProto) -> dict[Path_, str]:
    """The comment at each place of a file."""
    return {tuple(at.path): _text(at.leading_comments) for at in file.source_code_info.location}


def _service(service: ServiceDescriptorProto, path: Path_, said: dict[Path_, str]) -> Iterator[str]:
    yield f"### {service.name}\n\n{said.get(path, '')}\n\n| call | what it does |\n|---|---|"
    for n, method in enumerate(service.method):
        takes, gives = (_link(name) for name in (method.input_type, method.output_type))
        takes = f"stream of {takes}" if method.client_streaming else takes
        gives = f"stream of {gives}" if method.server_streaming else gives
        yield f"| **{method.name}** ({takes}) → {gives} | {said.get((*path, _MEMBER, n), '')} |"
    yield ""


def _message(message: DescriptorProto, path: Path_, said: dict[Path_, str]) -> Iterator[str]:
    yield f"### {message.name}\n\n{said.get(path, '')}\n"
    if not message.field:
        return
    yield "| field | type | |\n|---|---|---|"
    for n, field in enumerate(message.field):
        kind = _type(field)
        if field.HasField("oneof_index") and not field.proto3_optional:
            kind += f", one of *{message.oneof_decl[field.oneof_index].name}*"
        yield f"| `{field.name}` | {kind} | {said.get((*path, _MEMBER, n), '')} |"
    yield ""


def _enum(enum: EnumDescriptorProto, path: Path_, said: dict[Path_, str]) -> Iterator[str]:
    yield f"### {enum.name}\n\n{said.get(path, '')}\n\n| value | |\n|---|---|"
    for n, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {said.get((*path, _MEMBER, n), '')} |"
    yield ""


def _type(field: FieldDescriptorProto) -> str:
    plain = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = _link(field.type_name) if field.type_name else plain
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {name}"
    return f"*optional* {name}" if field.proto3_optional else name


def _link(name: str) -> str:
    name = name.lstrip(".")
    return f"[{name.rpartition('.')[2]}](#{name})" if name.startswith("vitrine.") else name


def _text(comment: str) -> str:
    return " ".join(comment.split()).replace("|", "\\|")


if __name__ == "__main__":
    main(*sys.argv[1:])
