"""Columns: the values of one attribute by row, in memory proportional to the number of values.

A column has one of two forms. If at least half of its rows have one value each, it is dense: an array with
one slot per row. Otherwise it is sparse: the values of all rows in row order, and the row of each. So an
attribute of few rows takes little memory, and a row with many values does not widen the others.

One thread writes; any thread reads. A reader takes the form once and sees each row before or after a write,
never half of it. This module does not know items.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from services.core.ranges import concatenated

_MIN_RECENT = 256
_RECENT_SHARE = 16  # a sparse column merges its recent rows when they hold 1/16 of its values
_MIN_VOCABULARY = 1024


@dataclass(frozen=True)
class _Dense:
    """One slot per row: `values` (capacity,), the column's empty value where a row has none."""

    values: np.ndarray


@dataclass(frozen=True)
class _Sparse:
    """`values` (E,) in the order of `rows`, int32 (E,); the values of a row in `recent` replace these."""

    rows: np.ndarray
    values: np.ndarray
    recent: dict[int, tuple[Any, ...]]


class Column:
    """Values of a numpy dtype, any number per row; `empty` marks a missing value in dense arrays."""

    def __init__(self, dtype: type[np.generic], empty: float) -> None:
        self._empty, self._dtype = empty, dtype
        self._form: _Dense | _Sparse = _Sparse(np.empty(0, np.int32), np.empty(0, dtype), {})
        self._recent_values = 0

    @classmethod
    def of(cls, rows: np.ndarray, values: np.ndarray, empty: float) -> "Column":
        """A column of values (E,) in the order of their rows, int32 (E,)."""
        column = cls(values.dtype.type, empty)
        column._choose_form(rows, values)
        return column

    def put(self, row: int, values: Sequence[Any]) -> None:
        """Replace the values of a row."""
        form = self._form
        if isinstance(form, _Dense):
            if len(values) <= 1 and (row < len(form.values) or self._grow(form, row)):
                self._form.values[row] = values[0] if len(values) else self._empty
                return
            form = self._form = _Sparse(*self.entries(len(form.values)), {})
        self._recent_values += len(values) + 1
        form.recent[row] = tuple(values)
        if self._recent_values > max(_MIN_RECENT, len(form.values) // _RECENT_SHARE):
            self._choose_form(*self.entries(1 + max([*form.recent, *form.rows[-1:].tolist()])))

    def _grow(self, form: _Dense, row: int) -> bool:
        """Grow the array to include a row; False if the column would be mostly empty then."""
        rows = np.flatnonzero(self._filled(form.values))
        if 2 * (len(rows) + 1) < row + 1:
            return False
        values = np.full(max(2 * len(form.values), row + 1), self._empty, self._dtype)
        values[: len(form.values)] = form.values
        self._form = _Dense(values)
        return True

    def _choose_form(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Choose the form for values (E,) in the order of their rows (E,)."""
        self._recent_values = 0
        size = int(rows[-1]) + 1 if len(rows) else 0
        if len(rows) > 1 and 2 * len(rows) >= size and (rows[1:] > rows[:-1]).all():
            dense = np.full(size, self._empty, self._dtype)
            dense[rows] = values
            self._form = _Dense(dense)
        else:
            self._form = _Sparse(rows, values, {})

    def _filled(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(~np.isnan(values) if np.isnan(self._empty) else values != self._empty)

    def entries(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The values (E,) of the first `length` rows, in row order, and the row of each, int32 (E,)."""
        form = self._form
        if isinstance(form, _Dense):
            values = form.values[:length]
            rows = np.flatnonzero(self._filled(values)).astype(np.int32)
            return rows, values[rows]
        rows, values = form.rows, form.values
        if recent := form.recent.copy():  # in one step: a writer may be adding to it
            recent_rows, recent_values = self._flat(recent)
            unchanged = ~np.isin(rows, np.fromiter(recent, np.int32, len(recent)))
            rows = np.concatenate([rows[unchanged], recent_rows])
            order = np.argsort(rows, kind="stable")
            rows, values = rows[order], np.concatenate([values[unchanged], recent_values])[order]
        end = np.searchsorted(rows, length)
        return rows[:end], values[:end]

    def _flat(self, recent: Mapping[int, Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
        counts, values = self._flat_of(recent.values())
        return np.repeat(np.fromiter(recent, np.int32, len(recent)), counts), values

    def _flat_of(self, values: Collection[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
        """The number of values of each row, int64, and all values."""
        counts = np.fromiter(map(len, values), np.int64, len(values))
        return counts, np.fromiter(chain.from_iterable(values), self._dtype, int(counts.sum()))

    def matches(self, length: int, test: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Which of the first `length` rows have a value that `test` accepts, bool (length,).

        `test` maps values (E,) to bool (E,) and is false for the empty value.
        """
        form, mask = self._form, np.zeros(length, bool)
        if isinstance(form, _Dense):
            size = min(length, len(form.values))
            mask[:size] = test(form.values[:size])
            return mask
        recent = form.recent.copy()  # in one step: a writer may be adding to it
        hits = form.rows[test(form.values)]
        mask[hits[: np.searchsorted(hits, length)]] = True
        if recent:
            recent_rows = np.fromiter(recent, np.int32, len(recent))
            mask[recent_rows[recent_rows < length]] = False
            rows, values = self._flat(recent)
            hits = rows[test(values)]
            mask[hits[hits < length]] = True
        return mask

    def matrix(self, length: int) -> np.ndarray:
        """The first `length` rows as (length, W), W as wide as the widest and at least 1."""
        form = self._form
        if isinstance(form, _Dense) and length <= len(form.values):
            return form.values[:length, None]
        return _matrix(*self.entries(length), length, self._empty)

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The values of rows, int64 (R,), as (R, W); a row outside the column has none."""
        form = self._form
        if isinstance(form, _Dense):
            present = (rows >= 0) & (rows < len(form.values))
            values = np.full(len(rows), self._empty, self._dtype)
            values[present] = form.values[rows[present]]
            return values[:, None]
        recent = form.recent.copy()
        starts, ends = (np.searchsorted(form.rows, rows, side) for side in ("left", "right"))
        counts = ends - starts
        later = np.flatnonzero(np.isin(rows, np.fromiter(recent, np.int64, len(recent))))
        counts[later] = 0
        indices = np.repeat(np.arange(len(rows)), counts)
        values = form.values[concatenated(starts, counts)]
        if len(later):
            later_counts, later_values = self._flat_of([recent[row] for row in rows[later].tolist()])
            indices = np.concatenate([indices, np.repeat(later, later_counts)])
            order = np.argsort(indices, kind="stable")
            indices, values = indices[order], np.concatenate([values, later_values])[order]
        return _matrix(indices, values, len(rows), self._empty)


def _matrix(rows: np.ndarray, values: np.ndarray, length: int, empty: float) -> np.ndarray:
    counts = np.bincount(rows, minlength=length)
    matrix = np.full((length, max(int(counts.max(initial=0)), 1)), empty, values.dtype)
    first = np.cumsum(counts) - counts
    matrix[rows, np.arange(len(rows)) - first[rows]] = values
    return matrix


@dataclass(frozen=True)
class DictionaryTexts:
    """Texts as codes, int32, into `texts`; `vocabulary` maps a text to its code. -1 means no text."""

    codes: Column
    vocabulary: dict[str, int]
    texts: list[str]


class TextColumn:
    """Texts, any number per row. `current` is replaced as a whole when unused texts are dropped."""

    def __init__(self) -> None:
        self.current = DictionaryTexts(Column(np.int32, -1), {}, [])
        self._length, self._release_at = 0, _MIN_VOCABULARY

    @classmethod
    def of(cls, rows: np.ndarray, codes: np.ndarray, texts: list[str]) -> "TextColumn":
        """A column of codes (E,) into `texts`, int32, in the order of their rows, int32 (E,)."""
        column = cls()
        vocabulary = {text: code for code, text in enumerate(texts)}
        column.current = DictionaryTexts(Column.of(rows, codes, -1), vocabulary, texts)
        column._length = int(rows[-1]) + 1 if len(rows) else 0
        column._release_at = max(2 * len(texts), _MIN_VOCABULARY)
        return column

    def put(self, row: int, texts: Iterable[str]) -> None:
        """Replace the texts of a row."""
        dictionary = self.current
        dictionary.codes.put(row, [_code(text, dictionary) for text in texts])
        self._length = max(self._length, row + 1)
        if len(dictionary.texts) >= self._release_at:
            self._release(dictionary)

    def _release(self, dictionary: DictionaryTexts) -> None:
        """Drop the texts that no row has, if they are the majority; codes change then."""
        rows, codes = dictionary.codes.entries(self._length)
        used, new_codes = np.unique(codes, return_inverse=True)
        if 2 * len(used) <= len(dictionary.texts):
            texts = [dictionary.texts[code] for code in used.tolist()]
            vocabulary = {text: code for code, text in enumerate(texts)}
            column = Column.of(rows, new_codes.astype(np.int32), -1)
            self.current = dictionary = DictionaryTexts(column, vocabulary, texts)
        self._release_at = max(2 * len(dictionary.texts), _MIN_VOCABULARY)


def _code(text: str, dictionary: DictionaryTexts) -> int:
    code = dictionary.vocabulary.get(text)
    if code is None:
        code = len(dictionary.texts)
        dictionary.texts.append(text)  # first, so that a reader with the code finds its text
        dictionary.vocabulary[text] = code
    return code
