"""Filters: the one definition that all services evaluate, over columns.

A condition is evaluated over every row at once. `matches` in the tests is the reference for one item.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.core.errors import InvalidArgument

MAX_DEPTH = 8
MAX_CONDITIONS = 256
MAX_IN_TEXTS = 200_000
_MAX_KEPT_TEXTS = 1000


@dataclass(frozen=True)
class AllOf:
    """Every condition holds; an empty list holds for every item."""

    filters: "tuple[Filter, ...]"


@dataclass(frozen=True)
class AnyOf:
    """At least one condition holds; an empty list holds for no item."""

    filters: "tuple[Filter, ...]"


@dataclass(frozen=True)
class NoneOf:
    """The condition does not hold."""

    filter: "Filter"


@dataclass(frozen=True)
class Equals:
    """A value of the attribute equals `value`, a text or a number."""

    attribute: str
    value: str | float


@dataclass(frozen=True)
class In:
    """A text of the attribute is one of `texts`."""

    attribute: str
    texts: frozenset[str]


@dataclass(frozen=True)
class Range:
    """A number of the attribute lies within [min, max]; None means no bound."""

    attribute: str
    min: float | None = None
    max: float | None = None


Filter = AllOf | AnyOf | NoneOf | Equals | In | Range


class FilterColumns(Protocol):
    """The columns that a condition is evaluated over; a writer may add rows meanwhile."""

    @property
    def length(self) -> int:
        """The number of rows."""

    def rows_with_text(self, attribute: str, texts: frozenset[str], length: int) -> np.ndarray:
        """Which of the first `length` rows have one of `texts`: bool (length,)."""

    def rows_with_number(self, attribute: str, low: float, high: float, length: int) -> np.ndarray:
        """Which of the first `length` rows have a number from `low` to `high`: bool (length,)."""

    def rows_of_ids(self, ids: frozenset[str]) -> np.ndarray:
        """The rows, int64, of these item ids."""

    def mask(self, key: Hashable, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The mask of rows, bool (N,), read-only, that `compute` gives for a key."""


def evaluate(condition: Filter, columns: FilterColumns) -> np.ndarray:
    """Which of the current rows qualify: bool (N,), read-only.

    The table keeps the mask until it changes, unless the filter itself takes much memory.
    """
    if _text_count(condition) > _MAX_KEPT_TEXTS:
        return _evaluate(condition, columns, columns.length)
    return columns.mask(condition, lambda: _evaluate(condition, columns, columns.length))


def _text_count(condition: Filter) -> int:
    match condition:
        case AllOf(parts) | AnyOf(parts):
            return sum(map(_text_count, parts))
        case NoneOf(part):
            return _text_count(part)
        case In(_, texts):
            return len(texts)
        case _:
            return 1


def both(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The rows of both masks, bool (N,): a row that one of them does not have yet is left out."""
    length = min(len(first), len(second))
    return np.asarray(first[:length] & second[:length])


def _evaluate(condition: Filter, columns: FilterColumns, length: int) -> np.ndarray:
    match condition:
        case AllOf(filters):
            mask = np.ones(length, bool)
            for part in filters:
                mask &= _evaluate(part, columns, length)
            return mask
        case AnyOf(filters):
            mask = np.zeros(length, bool)
            for part in filters:
                mask |= _evaluate(part, columns, length)
            return mask
        case NoneOf(part):
            return ~_evaluate(part, columns, length)
        case Equals("id", str() as text):
            return _ids(columns, frozenset([text]), length)
        case In("id", texts):
            return _ids(columns, texts, length)
        case Equals(attribute, str() as text):
            return columns.rows_with_text(attribute, frozenset([text]), length)
        case In(attribute, texts):
            return columns.rows_with_text(attribute, texts, length)
        case Equals(attribute, number):
            return columns.rows_with_number(attribute, float(number), float(number), length)
        case Range(attribute, low, high):
            bounds = -np.inf if low is None else low, np.inf if high is None else high
            return columns.rows_with_number(attribute, *bounds, length)


def _ids(columns: FilterColumns, ids: frozenset[str], length: int) -> np.ndarray:
    mask, rows = np.zeros(length, bool), columns.rows_of_ids(ids)
    mask[rows[rows < length]] = True
    return mask


def check_size(condition: Filter) -> None:
    """Raise InvalidArgument on `filter` if the filter is too deep or too large."""

    def measure(part: Filter, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise InvalidArgument.of("filter", f"is more than {MAX_DEPTH} levels deep")
        match part:
            case AllOf(parts) | AnyOf(parts):
                return 1 + sum(measure(p, depth + 1) for p in parts)
            case NoneOf(inner):
                return 1 + measure(inner, depth + 1)
            case _:
                return 1

    if measure(condition, 1) > MAX_CONDITIONS:
        raise InvalidArgument.of("filter", f"has more than {MAX_CONDITIONS} conditions")
