"""Conditions on items: the one definition all services evaluate. Knows columns, not items.

A condition is evaluated over every row at once; `matches` in the tests is its plain,
one-item oracle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.errors import InvalidArgument

MAX_DEPTH = 8
MAX_CONDITIONS = 256
MAX_IN_TEXTS = 200_000


@dataclass(frozen=True)
class AllOf:
    """Every condition holds; none at all holds everywhere."""

    filters: "tuple[Filter, ...]"


@dataclass(frozen=True)
class AnyOf:
    """One condition holds at least; none at all holds nowhere."""

    filters: "tuple[Filter, ...]"


@dataclass(frozen=True)
class NoneOf:
    """The condition does not hold."""

    filter: "Filter"


@dataclass(frozen=True)
class Equals:
    """Any value of the attribute is `value`, a text or a number."""

    attribute: str
    value: str | float


@dataclass(frozen=True)
class In:
    """Any text of the attribute is one of `texts`."""

    attribute: str
    texts: frozenset[str]


@dataclass(frozen=True)
class Range:
    """Any number of the attribute lies within [min, max]; None is no bound."""

    attribute: str
    min: float | None = None
    max: float | None = None


Filter = AllOf | AnyOf | NoneOf | Equals | In | Range


class Columns(Protocol):
    """What a condition is evaluated over: columns of `length` rows.

    `texts(name)` gives codes int32 (N, W), -1 for none, and the vocabulary from text to
    code; `numbers(name)` gives float64 (N, W), NaN for none; None when no item has any.
    """

    @property
    def length(self) -> int:
        """The number of rows."""

    def texts(self, attribute: str) -> tuple[np.ndarray, Mapping[str, int]] | None:
        """The text column."""

    def numbers(self, attribute: str) -> np.ndarray | None:
        """The number column."""

    def rows_of_ids(self, ids: frozenset[str]) -> np.ndarray:
        """The rows, int64, of these item ids."""


def evaluate(condition: Filter, columns: Columns) -> np.ndarray:
    """Which rows qualify: bool (N,)."""
    match condition:
        case AllOf(filters):
            mask = np.ones(columns.length, bool)
            for part in filters:
                mask &= evaluate(part, columns)
            return mask
        case AnyOf(filters):
            mask = np.zeros(columns.length, bool)
            for part in filters:
                mask |= evaluate(part, columns)
            return mask
        case NoneOf(part):
            return ~evaluate(part, columns)
        case Equals(attribute, str() as text):
            return _texts(columns, attribute, frozenset([text]))
        case Equals(attribute, number):
            return _numbers(columns, attribute, float(number), float(number))
        case In(attribute, texts):
            return _texts(columns, attribute, texts)
        case Range(attribute, low, high):
            return _numbers(
                columns, attribute, -np.inf if low is None else low, np.inf if high is None else high
            )


def _texts(columns: Columns, attribute: str, texts: frozenset[str]) -> np.ndarray:
    mask = np.zeros(columns.length, bool)
    if attribute == "id":
        mask[columns.rows_of_ids(texts)] = True
        return mask
    if (column := columns.texts(attribute)) is None:
        return mask
    codes, vocabulary = column
    wanted = [vocabulary[text] for text in texts if text in vocabulary]
    if len(wanted) == 1:
        return np.asarray((codes == wanted[0]).any(1))
    return np.asarray(np.isin(codes, wanted).any(1))


def _numbers(columns: Columns, attribute: str, low: float, high: float) -> np.ndarray:
    if (column := columns.numbers(attribute)) is None:
        return np.zeros(columns.length, bool)
    return np.asarray(((column >= low) & (column <= high)).any(1))


def check_size(condition: Filter) -> None:
    """Refuse a filter that is too deep or too large; InvalidArgument names `filter`."""

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
