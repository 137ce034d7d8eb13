"""Domain errors as gRPC statuses: the one place that knows both.

Every status carries google.rpc details: BadRequest names fields, ResourceInfo names
what is missing or taken, RetryInfo says when to come again. An unexpected exception
is INTERNAL with a fixed text; its trace goes to the log alone.
"""

import logging
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services import errors

_CODES: dict[type[errors.VitrineError], int] = {
    errors.InvalidArgument: code_pb2.INVALID_ARGUMENT,
    errors.NotFound: code_pb2.NOT_FOUND,
    errors.AlreadyExists: code_pb2.ALREADY_EXISTS,
    errors.FailedPrecondition: code_pb2.FAILED_PRECONDITION,
    errors.OutOfRange: code_pb2.OUT_OF_RANGE,
    errors.ResourceExhausted: code_pb2.RESOURCE_EXHAUSTED,
    errors.Unavailable: code_pb2.UNAVAILABLE,
    errors.DeadlineExceeded: code_pb2.DEADLINE_EXCEEDED,
}
_DOMAIN = "vitrine"
_RETRY_SECONDS = 1
_log = logging.getLogger(__name__)


def to_status(error: Exception) -> status_pb2.Status:
    """The google.rpc.Status of an error; an unexpected one is logged and becomes INTERNAL."""
    if not isinstance(error, errors.VitrineError):
        _log.error("unexpected error", exc_info=error)
        return status_pb2.Status(
            code=code_pb2.INTERNAL, message="internal error; the server's log has the trace"
        )
    reason = type(error).__name__
    status = status_pb2.Status(code=_CODES[type(error)], message=str(error))
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN), *_details(error)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


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
                    resource_type=error.kind, resource_name=error.name, description=str(error)
                )
            ]
        case errors.Unavailable() | errors.ResourceExhausted():
            delay = duration_pb2.Duration(seconds=_RETRY_SECONDS)
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
        case _:
            return []


def from_call(error: grpc.aio.AioRpcError) -> errors.VitrineError:
    """The domain error that a neighbour's status stands for; Unavailable for one that is none."""
    status = rpc_status.from_call(error)
    message = error.details() or error.code().name
    return from_status(status or status_pb2.Status(code=error.code().value[0], message=message))


def from_status(status: status_pb2.Status) -> errors.VitrineError:
    """The domain error that a status stands for, of a call or of one outcome of many."""
    by_code = {code: kind for kind, code in _CODES.items()}
    kind, message = by_code.get(status.code, errors.Unavailable), status.message
    if kind is errors.InvalidArgument:
        return errors.InvalidArgument(_violations(status) or [errors.FieldViolation("", message)])
    if issubclass(kind, errors.NotFound | errors.AlreadyExists):
        return errors.FailedPrecondition(message)
    return kind(message)


def _violations(status: status_pb2.Status) -> list[errors.FieldViolation]:
    bad = error_details_pb2.BadRequest()
    found = []
    for detail in status.details:
        if detail.Unpack(bad):
            found += [errors.FieldViolation(v.field, v.description) for v in bad.field_violations]
    return found


def name_of(error: BaseException) -> str:
    """The name of the status code that an error becomes."""
    code = code_pb2.INTERNAL
    if isinstance(error, errors.VitrineError):
        code = _CODES[type(error)]
    elif not isinstance(error, Exception):  # the caller is gone
        code = code_pb2.CANCELLED
    name: str = code_pb2.Code.Name(code)
    return name


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> NoReturn:
    """End the call with the status of `error`."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort always raises")
