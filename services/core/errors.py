"""The errors of the domain, independent of the transport.

    VitrineError
    ├── InvalidArgument      fields of the request are invalid; lists each field
    ├── NotFound             the resource does not exist
    ├── AlreadyExists        the id belongs to another resource
    ├── FailedPrecondition   the state does not allow it; an unchanged retry does not help
    ├── OutOfRange           a resume position is older than the oldest available change
    ├── ResourceExhausted    a bounded queue is full; retry later
    │   └── StorageFull      the disk is full; reads still work
    ├── Unavailable          not ready, or shutting down; retry later
    └── DeadlineExceeded     the caller's deadline has passed

`services.rpc.status` converts them to gRPC statuses. Any other exception is a bug.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MAX_QUOTED = 128


def quoted(text: str) -> str:
    """A caller's text for an error message: quoted, and cut if it is long."""
    if len(text) <= _MAX_QUOTED:
        return repr(text)
    return f"{text[:_MAX_QUOTED]!r}... ({len(text)} characters)"


class VitrineError(Exception):
    """Base of all errors that callers can cause or have to handle; `str()` is the message."""


@dataclass(frozen=True)
class FieldViolation:
    """One invalid field: its path in the request, such as `items[3].price`, and the problem."""

    field: str
    description: str

    def under(self, prefix: str) -> "FieldViolation":
        """The same violation relative to the message that contains this one at `prefix`."""
        return FieldViolation(f"{prefix}.{self.field}" if self.field else prefix, self.description)


class InvalidArgument(VitrineError):
    """Fields of the request are invalid."""

    def __init__(self, violations: Iterable[FieldViolation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))

    @classmethod
    def of(cls, field: str, description: str) -> "InvalidArgument":
        """The error for one invalid field."""
        return cls([FieldViolation(field, description)])

    def under(self, prefix: str) -> "InvalidArgument":
        """The same error with every field path below `prefix`."""
        return InvalidArgument(v.under(prefix) for v in self.violations)

    def without(self, prefix: str) -> "InvalidArgument":
        """The same error with `prefix` removed from the field paths."""
        return InvalidArgument(
            FieldViolation(v.field.removeprefix(f"{prefix}."), v.description) for v in self.violations
        )


class _NamedResource(VitrineError):
    def __init__(self, kind: str, name: str, message: str) -> None:
        self.kind, self.name = kind, name
        super().__init__(message)


class NotFound(_NamedResource):
    """The resource does not exist."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(kind, name, f"{kind} {quoted(name)} does not exist")


class AlreadyExists(_NamedResource):
    """The id belongs to a resource with other content."""


class FailedPrecondition(VitrineError):
    """The state of the system does not allow it."""


class OutOfRange(VitrineError):
    """A position is outside the available range."""


class ResourceExhausted(VitrineError):
    """A bounded queue is full."""


class StorageFull(ResourceExhausted):
    """The disk is full; acknowledged writes are safe, and reads still work."""


class Unavailable(VitrineError):
    """The service is not ready or is shutting down."""


class DeadlineExceeded(VitrineError):
    """The caller's deadline passed before the work was done."""


def storage_refusal(outcomes: Sequence[object]) -> VitrineError | None:
    """The error of a whole call if storage refused every outcome, else None.

    A caller's retry policy depends on the status of the call, not on its outcomes.
    """
    refusals = [outcome for outcome in outcomes if isinstance(outcome, StorageFull | Unavailable)]
    return refusals[0] if refusals and len(refusals) == len(outcomes) else None
