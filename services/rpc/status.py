"""Converts domain errors to gRPC statuses and back.

Every status has google.rpc details: BadRequest names fields, ResourceInfo names the resource that is missing
or exists already, RetryInfo gives the delay of a retry. An unexpected exception becomes INTERNAL with a fixed
text; its traceback is only in the log.

A status travels in headers. gRPC accepts 8 KiB of them by default and never more than 16: a larger status
arrives as RESOURCE_EXHAUSTED. So texts are cut, and of many violations only the first are listed.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.core import errors

_CODES: dict[type[errors.VitrineError], int] = {
    errors.InvalidArgument: code_pb2.INVALID_ARGUMENT,
    errors.NotFound: code_pb2.NOT_FOUND,
    errors.AlreadyExists: code_pb2.ALREADY_EXISTS,
    errors.FailedPrecondition: code_pb2.FAILED_PRECONDITION,
    errors.OutOfRange: code_pb2.OUT_OF_RANGE,
    errors.ResourceExhausted: code_pb2.RESOURCE_EXHAUSTED,
    errors.StorageFull: code_pb2.RESOURCE_EXHAUSTED,
    errors.Unavailable: code_pb2.UNAVAILABLE,
    errors.DeadlineExceeded: code_pb2.DEADLINE_EXCEEDED,
}
_DOMAIN = "vitrine"
_TRANSPORT = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "did not answer in time",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "is overloaded, or the message is too large",
    grpc.StatusCode.UNIMPLEMENTED: "has another version, without this method",
}
"""The messages of statuses that gRPC itself set."""
_RETRY_SECONDS = 1
_RETRY_SECONDS_STORAGE = 10  # somebody has to free space first
_MAX_BYTES = 6000
_MAX_TEXT = 400
_MAX_VIOLATIONS = 50
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_log = logging.getLogger(__name__)


def to_status(error: Exception) -> status_pb2.Status:
    """The google.rpc.Status of an error; an unexpected one is logged and becomes INTERNAL."""
    if not isinstance(error, errors.VitrineError):
        _log.error("unexpected error", exc_info=error)
        return status_pb2.Status(
            code=code_pb2.INTERNAL, message="internal error; the server's log has the trace"
        )
    if isinstance(error, errors.InvalidArgument):
        return _of_violations(error)
    return _status(error, _cut(str(error), 2 * _MAX_TEXT))


def _of_violations(error: errors.InvalidArgument) -> status_pb2.Status:
    """The status of the first violations, as many as fit."""
    violations = [
        errors.FieldViolation(_cut(v.field), _cut(v.description)) for v in error.violations[:_MAX_VIOLATIONS]
    ]
    while True:
        if omitted := len(error.violations) - len(violations):
            rest = errors.FieldViolation("request", f"{omitted} more are wrong; they are not listed")
            status = _of_all([*violations, rest])
        else:
            status = _of_all(violations)
        if _header_bytes(status) <= _MAX_BYTES:
            return status
        violations = violations[: len(violations) * 3 // 4]


def _of_all(violations: Sequence[errors.FieldViolation]) -> status_pb2.Status:
    error = errors.InvalidArgument(violations)
    return _status(error, str(error))


def _status(error: errors.VitrineError, message: str) -> status_pb2.Status:
    status = status_pb2.Status(code=_CODES[type(error)], message=message)
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)
    for detail in (info, *_details(error)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _cut(text: str, max_bytes: int = _MAX_TEXT) -> str:
    """The text, or its start if it takes more than `max_bytes` in a header."""
    if len(_header_text(text[:max_bytes])) <= max_bytes and len(text) <= max_bytes:
        return text
    start = text[:max_bytes]
    while len(_header_text(start)) > max_bytes:
        start = start[: len(start) * 3 // 4]
    return f"{start}... ({len(text)} characters)"


def _header_text(text: str) -> str:
    """The text in a header: characters other than printable ASCII are percent-encoded."""
    return quote(text, safe=_PLAIN)


def _header_bytes(status: status_pb2.Status) -> int:
    """The size of a status in headers: its message percent-encoded, and the whole status in base64."""
    size: int = status.ByteSize()
    return len(_header_text(status.message)) + size * 4 // 3


def _details(error: errors.VitrineError) -> list[Message]:
    match error:
        case errors.InvalidArgument():
            request = error_details_pb2.BadRequest()
            for violation in error.violations:
                request.field_violations.add(field=violation.field, description=violation.description)
            return [request]
        case errors.NotFound() | errors.AlreadyExists():
            return [
                error_details_pb2.ResourceInfo(
                    resource_type=error.kind, resource_name=_cut(error.name), description=_cut(str(error))
                )
            ]
        case errors.Unavailable() | errors.ResourceExhausted():
            storage_full = isinstance(error, errors.StorageFull)
            delay = duration_pb2.Duration(seconds=_RETRY_SECONDS_STORAGE if storage_full else _RETRY_SECONDS)
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
        case _:
            return []


def from_call(error: grpc.aio.AioRpcError | grpc.Call, service: str) -> errors.VitrineError:
    """The domain error for the status of a call to another service of Vitrine; Unavailable by default.

    gRPC's own texts of failed calls contain addresses: they go to the log, and the error names the `service`.
    """
    if (status := rpc_status.from_call(error)) is not None:
        return from_status(status)
    _log.warning("a call to the %s service failed: %s: %s", service, error.code().name, error.details())
    problem = _TRANSPORT.get(error.code(), "is unavailable")
    return from_status(
        status_pb2.Status(code=error.code().value[0], message=f"the {service} service {problem}")
    )


def from_status(status: status_pb2.Status) -> errors.VitrineError:
    """The domain error for the status of a call or of one outcome."""
    by_reason = {(kind.__name__, code): kind for kind, code in _CODES.items()}
    by_code = {code: kind for kind, code in reversed(_CODES.items())}  # the parent, listed first, wins
    kind = by_reason.get((_reason(status), status.code)) or by_code.get(status.code, errors.Unavailable)
    message = status.message
    if kind is errors.InvalidArgument:
        return errors.InvalidArgument(_violations(status) or [errors.FieldViolation("", message)])
    if issubclass(kind, errors.NotFound | errors.AlreadyExists):
        return errors.FailedPrecondition(message)
    return kind(message)


def _reason(status: status_pb2.Status) -> str:
    """The name of the error's class, which Vitrine's servers put into a status; empty for other servers."""
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "")


def _violations(status: status_pb2.Status) -> list[errors.FieldViolation]:
    bad = error_details_pb2.BadRequest()
    violations = []
    for detail in status.details:
        if detail.Unpack(bad):
            violations += [errors.FieldViolation(v.field, v.description) for v in bad.field_violations]
    return violations


def name_of(error: BaseException) -> str:
    """The name of the status code that an error becomes."""
    code = code_pb2.INTERNAL
    if isinstance(error, errors.VitrineError):
        code = _CODES[type(error)]
    elif not isinstance(error, Exception):  # the caller left
        code = code_pb2.CANCELLED
    name: str = code_pb2.Code.Name(code)
    return name


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> NoReturn:
    """End the call with the status of `error`, unless its caller has left."""
    status = rpc_status.to_status(to_status(error))
    try:
        await context.abort(status.code, status.details, status.trailing_metadata)
    except grpc.aio.InternalError:  # the call was over before its status could be sent
        raise asyncio.CancelledError from None
    raise AssertionError("abort always raises")
