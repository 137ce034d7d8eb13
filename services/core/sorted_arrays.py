"""Lookup in sorted arrays."""

import numpy as np


def find(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The index of each value in an ascending array, -1 if it is missing: int64, in the shape of `values`."""
    if not len(sorted_values):
        return np.full(len(values), -1, np.int64)
    indices = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return np.where(sorted_values[indices] == values, indices, -1).astype(np.int64)
