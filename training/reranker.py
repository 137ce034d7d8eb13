"""The reranker's fit: LambdaMART by LightGBM over rows of past questions, and of pages that were shown."""

from collections.abc import Sequence
from dataclasses import dataclass

import lightgbm
import numpy as np

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


@dataclass(frozen=True)
class Lists:
    """Q lists to put in order, one after the other, the oldest first.

    `matrix` float32 (N, K); `grade` float32 (N,), what is gained by a row; `weight` float32 (N,);
    `size` int64 (Q,) rows of each list, `when` int64 (Q,) its moment, microseconds since 1970.
    """

    matrix: np.ndarray
    grade: np.ndarray
    weight: np.ndarray
    size: np.ndarray
    when: np.ndarray

    def take(self, chosen: np.ndarray) -> "Lists":
        """Some of the lists, `chosen` bool (Q,)."""
        rows = np.repeat(chosen, self.size)
        return Lists(
            self.matrix[rows], self.grade[rows], self.weight[rows], self.size[chosen], self.when[chosen]
        )


def fit_reranker(asked: Lists, trees: int, *, shown: Lists | None = None) -> lightgbm.Booster:
    """Trees that put the lists of past questions in order, and those of pages that people were `shown`.

    A grade's gain is its share of the highest. The last fifth of the questions, which are in the order
    of time, tells after how many of at most `trees` trees more of them do not help, but never
    fewer than ten; then all are learned from.
    """
    parts = [asked] if shown is None else [asked, shown]
    grades = np.unique(np.concatenate([part.grade for part in parts]))
    gain = (grades / max(float(grades.max()), 1e-9)).tolist()
    parameters = _PARAMETERS | {"seed": 0, "num_threads": 0, "label_gain": gain}
    place = np.arange(len(asked.size))
    start = int(len(place) * (1 - _HELD))
    if 0 < start < len(place):
        early = [asked.take(place < start)]
        if shown is not None:
            early.append(shown.take(shown.when < asked.when[start]))
        learned = _dataset(early, grades)
        held = _dataset([asked.take(place >= start)], grades, learned)
        stop = lightgbm.early_stopping(_PATIENCE, verbose=False)
        tried = lightgbm.train(parameters, learned, trees, valid_sets=[held], callbacks=[stop])
        trees = min(trees, max(tried.best_iteration, _LEAST_TREES))
    return lightgbm.train(parameters, _dataset(parts, grades), trees)


def _dataset(
    parts: Sequence[Lists], grades: np.ndarray, like: lightgbm.Dataset | None = None
) -> lightgbm.Dataset:
    size = np.concatenate([part.size for part in parts])
    # LightGBM breaks ties by place: answers that come first would look well ranked before anything is
    # learned, and no tree would seem to help.
    drawn = np.random.default_rng(0).random(int(size.sum()))
    order = np.lexsort((drawn, np.repeat(np.arange(len(size)), size)))
    return lightgbm.Dataset(
        np.concatenate([part.matrix for part in parts])[order],
        np.searchsorted(grades, np.concatenate([part.grade for part in parts])[order]),
        weight=np.concatenate([part.weight for part in parts])[order],
        group=size,
        reference=like,
    )
