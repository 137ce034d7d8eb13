"""gRPC server reflection: clients read the contracts from a running server.

The server answers `grpc.reflection.v1` and `grpc.reflection.v1alpha`; the two are equal on the wire.
grpcio-reflection has v1alpha alone, and its descriptor pool finds neither methods nor oneofs. This module
derives the descriptors of v1 from those of v1alpha, and looks every name up in a `SymbolPool`.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor, ServiceDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

V1ALPHA: str = reflection.SERVICE_NAME
V1 = V1ALPHA.replace("v1alpha", "v1")
NAMES = (V1, V1ALPHA)
"""The names of the services that `add_reflection` adds."""
_METHOD = "ServerReflectionInfo"
_T = TypeVar("_T")
_Pool = descriptor_pool.DescriptorPool


class SymbolPool:
    """Several descriptor pools as one; finds the file of every symbol in them.

    It has the methods of a descriptor pool that reflection calls. Each raises KeyError for an unknown name.
    """

    def __init__(self, *pools: _Pool) -> None:
        self._pools = pools

    def FindFileByName(self, name: str) -> FileDescriptor:
        """The file with a path."""
        return self._first(name, lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """The file of a service, method, message, field, oneof, enum or enum value, by its full name."""
        finders: tuple[Callable[[_Pool], FileDescriptor], ...] = (
            lambda pool: pool.FindFileContainingSymbol(symbol),
            lambda pool: pool.FindMethodByName(symbol).containing_service.file,
            lambda pool: pool.FindOneofByName(symbol).containing_type.file,
        )
        return self._first(symbol, *finders)

    def FindMessageTypeByName(self, name: str) -> Descriptor:
        """The message with a full name."""
        return self._first(name, lambda pool: pool.FindMessageTypeByName(name))

    def FindServiceByName(self, name: str) -> ServiceDescriptor:
        """The service with a full name."""
        return self._first(name, lambda pool: pool.FindServiceByName(name))

    def FindExtensionByNumber(self, message: Descriptor, number: int) -> FieldDescriptor:
        """The extension of a message with a field number."""
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Descriptor) -> list[FieldDescriptor]:
        """The extensions of a message."""
        return message.file.pool.FindAllExtensions(message)

    def _first(self, name: str, *finders: Callable[[_Pool], _T]) -> _T:
        for pool in self._pools:
            for find in finders:
                try:
                    return find(pool)
                except KeyError:
                    pass
        raise KeyError(name)


def _v1() -> _Pool:
    """A pool with the descriptors of v1: those of v1alpha in another package."""
    v1alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1alpha)
    text = json_format.MessageToJson(v1alpha).replace("v1alpha", "v1")
    v1 = json_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    v1.name = "grpc/reflection/v1/reflection.proto"
    v1.options.ClearField("deprecated")
    pool = _Pool()
    pool.AddSerializedFile(v1.SerializeToString())
    return pool


POOL = SymbolPool(descriptor_pool.Default(), _v1())
"""The contracts of this process."""


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Add both versions of reflection to a server; it lists `services` and itself."""
    servicer = reflection.aio.ReflectionServicer((*services, *NAMES), pool=POOL)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(V1, {_METHOD: handler})])
