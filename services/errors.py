"""The errors of the domain, free of any transport.

    VitrineError
    ├── InvalidArgument      a field of the request is wrong, each named
    ├── NotFound             something named does not exist
    ├── AlreadyExists        an id is taken by something else
    ├── FailedPrecondition   the state does not allow it; retrying as is will not help
    ├── OutOfRange           a resume position is older than what is kept
    ├── ResourceExhausted    a bounded queue is full; retry later
    ├── Unavailable          not ready, or shutting down; retry later
    └── DeadlineExceeded     the caller's time is over

`services.status` turns them into gRPC statuses. Any other exception is a bug.
"""

from collections.abc import Iterable
from dataclasses import dataclass


class VitrineError(Exception):
    """Base of every error a caller can cause or should know of; `str()` is the message."""


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field: its path in the request, such as `items[3].price`, and what is wrong."""

    field: str
    description: str

    def under(self, prefix: str) -> "FieldViolation":
        """The same violation seen from the message that holds this one at `prefix`."""
        return FieldViolation(f"{prefix}.{self.field}" if self.field else prefix, self.description)


class InvalidArgument(VitrineError):
    """Fields of the request are wrong."""

    def __init__(self, violations: Iterable[FieldViolation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))

    @classmethod
    def of(cls, field: str, description: str) -> "InvalidArgument":
        """The error for one wrong field."""
        return cls([FieldViolation(field, description)])

    def under(self, prefix: str) -> "InvalidArgument":
        """The same error with every field path below `prefix`."""
        return InvalidArgument(v.under(prefix) for v in self.violations)

    def without(self, prefix: str) -> "InvalidArgument":
        """The same error with the field paths as they are to who does not know of `prefix`."""
        return InvalidArgument(
            FieldViolation(v.field.removeprefix(f"{prefix}."), v.description) for v in self.violations
        )


class _NamedResource(VitrineError):
    def __init__(self, kind: str, name: str, message: str) -> None:
        self.kind, self.name = kind, name
        super().__init__(message)


class NotFound(_NamedResource):
    """Something named does not exist."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(kind, name, f"{kind} {name!r} does not exist")


class AlreadyExists(_NamedResource):
    """An id is taken by something with other content."""


class FailedPrecondition(VitrineError):
    """The state of the system does not allow it."""


class OutOfRange(VitrineError):
    """A position is outside what is kept."""


class ResourceExhausted(VitrineError):
    """A bounded queue is full."""


class Unavailable(VitrineError):
    """The service is not ready or is going away."""


class DeadlineExceeded(VitrineError):
    """The caller's deadline passed before the work was done."""
