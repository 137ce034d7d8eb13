"""The reranker's fit: LambdaMART by LightGBM over rows of past questions."""

import lightgbm
import numpy as np

from training.rows import Rows

_HELD = 0.2
_PATIENCE = 20
_LEAST_TREES = 10
_PARAMETERS = {
    "metric": "ndcg",
    "eval_at": [20],
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


def fit_reranker(rows: Rows, matrix: np.ndarray, trees: int, seed: int = 0) -> lightgbm.Booster:
    """Trees over a matrix (N, K); groups are questions, grades what is gained.

    A fifth of the questions, the last ones, tells after how many of at most `trees` trees more
    of them do not help; then all are learned from.
    """
    grades, label = np.unique(rows.label, return_inverse=True)
    gain = (grades / max(float(grades.max()), 1e-9)).tolist()
    parameters = _PARAMETERS | {"seed": seed, "num_threads": 0, "label_gain": gain}
    start = int(len(rows.size) * (1 - _HELD))
    cut = int(rows.size[:start].sum())
    if start and start < len(rows.size):
        early = _dataset(matrix[:cut], label[:cut], rows.weight[:cut], rows.size[:start])
        late = _dataset(matrix[cut:], label[cut:], rows.weight[cut:], rows.size[start:], early)
        stop = lightgbm.early_stopping(_PATIENCE, verbose=False)
        tried = lightgbm.train(parameters, early, trees, valid_sets=[late], callbacks=[stop])
        trees = min(trees, max(tried.best_iteration, _LEAST_TREES))
    return lightgbm.train(parameters, _dataset(matrix, label, rows.weight, rows.size), trees)


def _dataset(
    matrix: np.ndarray,
    label: np.ndarray,
    weight: np.ndarray,
    size: np.ndarray,
    like: lightgbm.Dataset | None = None,
) -> lightgbm.Dataset:
    return lightgbm.Dataset(matrix, label, weight=weight, group=size, reference=like)
