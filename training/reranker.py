"""The reranker's fit: LambdaMART by LightGBM over rows of past questions."""

from collections.abc import Sequence

import lightgbm
import numpy as np

from training.rows import Rows

_PARAMETERS = {
    "objective": "lambdarank",
    "learning_rate": 0.08,
    "num_leaves": 63,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.6,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "lambdarank_truncation_level": 40,
    "max_bin": 127,
    "verbosity": -1,
    "deterministic": True,
    "force_row_wise": True,
}


def fit_reranker(
    rows: Rows, matrix: np.ndarray, names: Sequence[str], trees: int, seed: int = 0
) -> lightgbm.Booster:
    """Trees over a matrix (N, K) of the columns `names`; groups are questions, labels the answers."""
    data = lightgbm.Dataset(
        matrix,
        rows.label,
        weight=rows.weight,
        group=rows.size,
        feature_name=[f"f{at}" for at in range(len(names))],  # LightGBM takes no spaces and no commas
    )
    parameters = _PARAMETERS | {"seed": seed, "num_threads": 0}
    return lightgbm.train(parameters, data, num_boost_round=trees)
