"""Indices of many ranges at once."""

import numpy as np


def concatenated(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The indices of ranges one after the other, int64 (sum of `sizes`,); both are int (R,)."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.arange(total) + np.repeat(starts - (ends - sizes), sizes))
