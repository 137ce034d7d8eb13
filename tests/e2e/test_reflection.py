"""Server reflection returns the file of every symbol to grpcurl, ghz and other clients."""

import asyncio
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest as Request
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionResponse as Response
from hypothesis import example, given
from hypothesis import strategies as st

from services.rpc.reflection import NAMES, POOL, V1, V1ALPHA
from tests.conftest import skip_without
from tests.support.contracts import METHODS, SERVICES, method_name
from tests.support.shop_server import Stub

_GATEWAY = SERVICES[0].full_name
_NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]


def _closure(files: Iterable[FileDescriptor]) -> dict[str, FileDescriptor]:
    """Files and everything that they import, by path."""
    closure: dict[str, FileDescriptor] = {}
    queue = list(files)
    while queue:
        file = queue.pop()
        if file.name not in closure:
            closure[file.name] = file
            queue += file.dependencies
    return closure


def _of_message(message: Descriptor) -> Iterator[str]:
    yield message.full_name
    yield from (field.full_name for field in message.fields)
    yield from (oneof.full_name for oneof in message.oneofs)
    for enum in message.enum_types:
        yield from _of_enum(enum, message.full_name)
    for nested in message.nested_types:
        yield from _of_message(nested)


def _of_enum(enum: EnumDescriptor, scope: str) -> Iterator[str]:
    """An enum and its values, which are symbols of the scope around the enum."""
    yield enum.full_name
    yield from (f"{scope}.{value.name}" for value in enum.values)


def _symbols(file: FileDescriptor) -> Iterator[str]:
    for message in file.message_types_by_name.values():
        yield from _of_message(message)
    for enum in file.enum_types_by_name.values():
        yield from _of_enum(enum, file.package)
    for service in file.services_by_name.values():
        yield service.full_name
        yield from (f"{service.full_name}.{method.name}" for method in service.methods)


FILES = _closure(
    [
        *(service.file for service in SERVICES),
        health_pb2.DESCRIPTOR,
        *(POOL.FindServiceByName(name).file for name in NAMES),
    ]
)
FILE_OF = {symbol: name for name, file in FILES.items() for symbol in _symbols(file)}
"""The path of its file for every symbol."""


async def _answers(target: str, service: str, requests: Iterable[Request]) -> list[Response]:
    """What one stream of a version of reflection answers, each request after the answer to the one before."""
    async with grpc.aio.insecure_channel(target) as untyped:
        channel: Any = untyped
        call = channel.stream_stream(
            f"/{service}/ServerReflectionInfo",
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )()
        answers = []
        for request in requests:
            await call.write(request)
            answers.append(await call.read())
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
        return answers


def test_every_symbol_of_the_contracts_has_its_file() -> None:
    assert len([symbol for symbol in FILE_OF if symbol.startswith("vitrine.")]) > 500
    for symbol, file in FILE_OF.items():
        assert POOL.FindFileContainingSymbol(symbol).name == file, symbol


@given(st.sampled_from(sorted(FILE_OF)), st.text("./aZ_0\0é", max_size=3), st.integers(0, 99))
@example(f"{_GATEWAY}.Recommend", "/", len(_GATEWAY))
def test_an_unknown_name_has_no_file(symbol: str, text: str, at: int) -> None:
    name = symbol[:at] + text + symbol[at + 1 :]
    if name in FILE_OF:
        assert POOL.FindFileContainingSymbol(name).name == FILE_OF[name]
    else:
        with pytest.raises(KeyError):
            POOL.FindFileContainingSymbol(name)


@pytest.mark.parametrize("version", NAMES)
async def test_a_stream_resolves_services_methods_messages_and_enums_with_their_imports(
    all_in_one_stub: Stub, version: str
) -> None:
    [services] = await _answers(all_in_one_stub.target, version, [Request(list_services="")])
    names = [service.name for service in services.list_services_response.service]
    assert sorted(names) == sorted(
        [*(service.full_name for service in SERVICES), "grpc.health.v1.Health", V1, V1ALPHA]
    )
    assert {f"{m.containing_service.full_name}.{m.name}" for m in METHODS} <= FILE_OF.keys()
    answers = await _answers(
        all_in_one_stub.target, version, (Request(file_containing_symbol=symbol) for symbol in FILE_OF)
    )
    descriptors: dict[bytes, FileDescriptorProto] = {}
    for (symbol, file), answer in zip(FILE_OF.items(), answers, strict=True):
        assert answer.original_request.file_containing_symbol == symbol
        data = answer.file_descriptor_response.file_descriptor_proto
        descriptors.update(
            (part, FileDescriptorProto.FromString(part)) for part in data if part not in descriptors
        )
        files = [descriptors[part] for part in data]
        assert files, f"{symbol}: {answer.error_response}"
        assert files[0].name == file, symbol
        assert {f.name for f in files} == _closure([FILES[file]]).keys()


@pytest.mark.parametrize("version", NAMES)
async def test_an_unknown_symbol_is_not_found_and_the_stream_continues(
    all_in_one_stub: Stub, version: str
) -> None:
    message = f"{SERVICES[0].methods[0].input_type.full_name}"
    extension = Request().file_containing_extension
    requests = [
        *(
            Request(file_containing_symbol=name)
            for name in ("", ".", "vitrine", "nobody.Knows", method_name(METHODS[0]), "é\0", "a" * 60_000)
        ),
        Request(file_by_filename="nobody/knows.proto"),
        *(
            Request(file_containing_extension=type(extension)(containing_type=name, extension_number=number))
            for name, number in (("nobody.Knows", 1), (message, -1), (message, 1), (message, 2**31 - 1))
        ),
        Request(all_extension_numbers_of_type="nobody.Knows"),
        Request(all_extension_numbers_of_type=_GATEWAY),
    ]
    last = [Request(), Request(all_extension_numbers_of_type=message), Request(list_services="*")]
    answers = await _answers(all_in_one_stub.target, version, [*requests, *last])
    for request, answer in zip(requests, answers, strict=False):
        assert answer.error_response.error_code == _NOT_FOUND, request
        assert answer.original_request == request
    nothing, extensions, services = answers[len(requests) :]
    assert nothing.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert extensions.all_extension_numbers_response.base_type_name == message
    assert not extensions.all_extension_numbers_response.extension_number
    assert services.list_services_response.service


def _tool(name: str) -> str:
    """The path of a Go program; the test is skipped without it."""
    path = shutil.which(name) or shutil.which(name, path=str(Path.home() / "go/bin"))
    if path is None:
        skip_without(name, f"{name} is not installed")
    return str(path)


async def _output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=os.environ
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_grpcurl_describes_every_service_and_method(all_in_one_stub: Stub) -> None:
    grpcurl = _tool("grpcurl")
    names = (await _output(grpcurl, "-plaintext", all_in_one_stub.target, "list")).split()
    assert {_GATEWAY, V1, V1ALPHA} <= set(names)
    methods = (await _output(grpcurl, "-plaintext", all_in_one_stub.target, "list", _GATEWAY)).split()
    assert f"{_GATEWAY}.Recommend" in methods
    # Without a symbol grpcurl describes every service that is listed.
    everything = await _output(grpcurl, "-plaintext", all_in_one_stub.target, "describe")
    assert [name for name in names if f"{name} is a service" not in everything] == []
    description = await _output(
        grpcurl, "-plaintext", all_in_one_stub.target, "describe", f"{_GATEWAY}.Recommend"
    )
    assert f"{_GATEWAY}.Recommend is a method" in description


async def test_ghz_calls_a_method_by_reflection(all_in_one_stub: Stub) -> None:
    ghz = _tool("ghz")
    request = json.dumps({"user_id": "ann", "page_size": 5})
    count = 7
    for method in (f"{_GATEWAY}.Recommend", f"{_GATEWAY}/Recommend"):
        options = f"--insecure --total {count} --concurrency 1 --timeout 60s --format json".split()
        report = json.loads(
            await _output(ghz, *options, "--call", method, "--data", request, all_in_one_stub.target)
        )
        assert report["count"] == count
        assert report["statusCodeDistribution"] == {"OK": count}
        assert not report.get("errorDistribution")
