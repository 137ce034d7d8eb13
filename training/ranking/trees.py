"""What the trees of every reranker share: LightGBM's settings, and how their number is found."""

import numpy as np

PATIENCE = 50
"""Early stopping waits for so many trees that do not help."""
SETTINGS = {
    "learning_rate": 0.05,
    "feature_fraction": 0.6,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "max_bin": 127,
    "verbosity": -1,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 0,
    "num_threads": 0,
}
_COUNTS = 40


def tree_counts(limit: int) -> np.ndarray:
    """At most forty numbers of trees up to a limit, rising int64 (K,)."""
    return np.unique(np.linspace(1, limit, _COUNTS).astype(int))
