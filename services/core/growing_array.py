"""Arrays that grow at their end while others read them."""

import numpy as np


def appended(values: np.ndarray, length: int, new: np.ndarray) -> np.ndarray:
    """An array whose first `length` rows are those of `values` and whose next rows are `new`.

    It is `values` itself if it has room, else a copy with room to spare. Readers ignore rows past their
    length, so writing these needs no copy. One thread appends.
    """
    end = length + len(new)
    if end > len(values):
        grown = np.empty((max(end, 2 * len(values)), *values.shape[1:]), values.dtype)
        grown[:length] = values[:length]
        values = grown
    values[length:end] = new
    return values


def with_length(values: np.ndarray, length: int) -> np.ndarray:
    """The same array if it has `length` rows, else a copy of at least twice its length, with zeros."""
    if length <= len(values):
        return values
    grown = np.zeros((max(length, 2 * len(values)), *values.shape[1:]), values.dtype)
    grown[: len(values)] = values
    return grown
