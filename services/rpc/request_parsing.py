"""Parses requests, with a size limit for each method.

gRPC has one size limit for a whole server, and reports bytes that it cannot parse as UNKNOWN, with a
traceback in the log. So the handlers here take bytes, and report such bytes as the caller's error.

A message is parsed on the event loop: the parser keeps the interpreter lock, so a thread would not help. The
densest message that the limits allow takes up to 25 ms per MiB.
"""

import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError

from services.core.errors import InvalidArgument
from services.rpc import status
from services.rpc.message_counts import check_counts

_MIB = 1 << 20
_LARGE_BYTES = 1 << 16
DEFAULT_MAX_BYTES = 4 * _MIB
MAX_BYTES: Mapping[str, int] = {
    # A filter may have 200,000 texts.
    "vitrine.gateway.v1.RecommendationService/Recommend": 8 * _MIB,
    "vitrine.gateway.v1.RecommendationService/ExplainItem": 8 * _MIB,
    "vitrine.gateway.v1.RecommendationService/SimilarItems": 8 * _MIB,
    "vitrine.gateway.v1.RecommendationService/Converse": 8 * _MIB,
    # An image of 16 MiB, a text of 2 MiB, a filter.
    "vitrine.gateway.v1.RecommendationService/SearchItems": 28 * _MIB,
    "vitrine.gateway.v1.RecommendationService/WriteEvents": 16 * _MIB,
    # Items of 32 MiB in all.
    "vitrine.gateway.v1.RecommendationService/BatchUpsertItems": 33 * _MIB,
    "vitrine.embedding.v1.EmbeddingService/UpsertItems": 33 * _MIB,
    "vitrine.embedding.v1.EmbeddingService/EmbedImages": 64 * _MIB,
    "vitrine.embedding.v1.EmbeddingService/EmbedTexts": 16 * _MIB,
    # The same as SearchItems, with vectors and both the request's and the scenario's filter.
    "vitrine.embedding.v1.EmbeddingService/Search": 48 * _MIB,
    "vitrine.ranking.v1.RankingService/Retrieve": 18 * _MIB,
    "vitrine.ranking.v1.RankingService/WriteEvents": 16 * _MIB,
    "vitrine.ranking.v1.RankingService/LogPages": 16 * _MIB,
}
"""The maximum message size of the methods that take more than `DEFAULT_MAX_BYTES`."""


def max_bytes(method: str) -> int:
    """The maximum message size of a method, "package.Service/Method"."""
    if method.startswith("grpc."):  # a request of health or reflection is a name
        return _LARGE_BYTES
    return MAX_BYTES.get(method, DEFAULT_MAX_BYTES)


def with_parsing(handler: Any, method: str) -> Any:
    """The same `grpc.RpcMethodHandler`, which takes the bytes of its requests and parses them itself.

    It raises InvalidArgument for a message that is too large or cannot be parsed, in a stream when it
    reaches that message.
    """
    parse = _Parser(method, handler.request_deserializer)
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(
            _of_one(handler.unary_unary, parse), response_serializer=handler.response_serializer
        )
    if handler.unary_stream:
        inner = handler.unary_stream
        # The method of the health service is not a generator: it writes to the context.
        wrap = _stream_of_one if inspect.isasyncgenfunction(inner) else _of_one
        return grpc.unary_stream_rpc_method_handler(
            wrap(inner, parse), response_serializer=handler.response_serializer
        )
    return grpc.stream_stream_rpc_method_handler(
        _stream_of_many(handler.stream_stream, parse), response_serializer=handler.response_serializer
    )


class _Parser:
    """Parses the requests of a method."""

    def __init__(self, method: str, deserializer: Callable[[bytes], Any] | None) -> None:
        self._method, self._max_bytes = method, max_bytes(method)
        self._deserializer = deserializer or bytes  # gRPC's own reading of None

    async def __call__(self, data: bytes, context: Any) -> Any:
        """The message. Invalid bytes raise InvalidArgument, or abort the call for gRPC's own services."""
        try:
            return self._parse(data)
        except InvalidArgument as error:
            if self._method.startswith("grpc."):  # they do not convert the domain's errors to statuses
                await status.abort(context, error)
            raise

    def _parse(self, data: bytes) -> Any:
        if len(data) > self._max_bytes:
            problem = f"has {len(data)} bytes, at most {self._max_bytes} are allowed for {self._method}"
            raise InvalidArgument.of("request", problem)
        if len(data) > _LARGE_BYTES:
            service, _, name = self._method.rpartition("/")
            descriptor = descriptor_pool.Default().FindServiceByName(service)
            check_counts(descriptor.methods_by_name[name].input_type, data)
        try:
            return self._deserializer(data)
        except DecodeError:
            problem = f"cannot be parsed as a request of {self._method}: send the message of the contract"
            raise InvalidArgument.of("request", problem) from None


def _of_one(method: Callable[[Any, Any], Any], parse: _Parser) -> Callable[[bytes, Any], Any]:
    async def call(data: bytes, context: Any) -> Any:
        return await method(await parse(data, context), context)

    return call


def _stream_of_one(
    method: Callable[[Any, Any], AsyncIterator[Any]], parse: _Parser
) -> Callable[[bytes, Any], AsyncIterator[Any]]:
    async def stream(data: bytes, context: Any) -> AsyncIterator[Any]:
        async for response in method(await parse(data, context), context):
            yield response

    return stream


def _stream_of_many(
    method: Callable[[Any, Any], AsyncIterator[Any]], parse: _Parser
) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[Any]]:
    async def stream(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        async def requests() -> AsyncIterator[Any]:
            async for data in messages:
                yield await parse(data, context)

        async for response in method(requests(), context):
            yield response

    return stream
