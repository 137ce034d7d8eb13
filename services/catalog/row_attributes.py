"""Tracks which attributes each row of a table has, to find the attributes that no row uses."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

Names = tuple[tuple[str, ...], tuple[str, ...]]
"""The names of text attributes and of number attributes."""

NO_NAMES: Names = (), ()


class RowAttributes:
    """The attribute names of rows 0, 1, …; rows with the same names share one tuple."""

    def __init__(self) -> None:
        self._rows: list[Names] = []
        self._shared: dict[Names, tuple[Names, int]] = {}  # the tuple and how many rows have it
        self._uses: tuple[Counter[str], Counter[str]] = Counter(), Counter()  # by shared tuples

    @classmethod
    def of(
        cls, length: int, texts: Mapping[str, np.ndarray], numbers: Mapping[str, np.ndarray]
    ) -> "RowAttributes":
        """The names of `length` rows: by text attribute and by number attribute, the rows that have it."""
        has = np.zeros((length, len(texts) + len(numbers)), bool)
        for column, rows in enumerate((*texts.values(), *numbers.values())):
            has[rows, column] = True
        packed = np.packbits(has, axis=1)
        groups = packed.view(np.dtype((np.void, packed.shape[1]))).ravel() if has.size else np.zeros(length)
        _, first, group_of, counts = np.unique(
            groups, return_index=True, return_inverse=True, return_counts=True
        )
        attributes, text_names, number_names = cls(), list(texts), list(numbers)
        shared = list[Names]()
        for row, count in zip(first.tolist(), counts.tolist(), strict=True):
            columns = np.flatnonzero(has[row]).tolist()
            names: Names = (
                tuple(text_names[column] for column in columns if column < len(text_names)),
                tuple(number_names[column - len(text_names)] for column in columns if column >= len(texts)),
            )
            if names == NO_NAMES:
                shared.append(NO_NAMES)
                continue
            shared.append(attributes._acquire(names))
            attributes._shared[names] = names, count
        attributes._rows = [shared[group] for group in group_of.tolist()]
        return attributes

    def replace(self, row: int, names: Names) -> tuple[Names, Names]:
        """Replace the names of a row; `row` may be one after the last.

        Returns:
            The names that the row lost and other rows still have, and those that no row has now.
        """
        if row == len(self._rows):
            self._rows.append(NO_NAMES)
        old = self._rows[row]
        if names == old:
            return NO_NAMES, NO_NAMES
        self._rows[row] = self._acquire(names)
        if old == NO_NAMES:
            return NO_NAMES, NO_NAMES
        self._release(old)
        lost = [set(before).difference(after) for before, after in zip(old, names, strict=True)]
        (texts, unused_texts), (numbers, unused_numbers) = (
            (tuple(lost_names.intersection(uses)), tuple(lost_names.difference(uses)))
            for lost_names, uses in zip(lost, self._uses, strict=True)
        )
        return (texts, numbers), (unused_texts, unused_numbers)

    def _acquire(self, names: Names) -> Names:
        if (entry := self._shared.get(names)) is None:
            entry = names, 0
            for uses, kind_names in zip(self._uses, names, strict=True):
                uses.update(kind_names)
        shared, rows = entry
        self._shared[shared] = shared, rows + 1
        return shared

    def _release(self, names: Names) -> None:
        shared, rows = self._shared[names]
        if rows > 1:
            self._shared[shared] = shared, rows - 1
            return
        del self._shared[shared]
        for uses, kind_names in zip(self._uses, names, strict=True):
            uses.subtract(kind_names)
            for name in kind_names:
                if not uses[name]:
                    del uses[name]
