"""LambdaMART by LightGBM over lists, boosted from the scores of a choice model."""

from collections.abc import Sequence

import lightgbm
import numpy as np

from services.ranking.models.reranker import RerankerModel
from training.examples.ranking_groups import RankingGroups
from training.ranking.coordinate_ascent import DEPTH
from training.ranking.trees import SETTINGS

_LEAVES = (7, 63)
_ROWS_PER_LEAF = 1000
_PARAMETERS = SETTINGS | {
    "metric": "ndcg",
    "eval_at": [DEPTH],
    "objective": "lambdarank",
    "min_data_in_leaf": 50,
    "lambdarank_truncation_level": 40,
}


def grow(model: RerankerModel, groups: RankingGroups, count: int) -> lightgbm.Booster:
    """So many trees on the groups, boosted from the choice model's scores."""
    data, gain = dataset(model, groups)
    return lightgbm.train(parameters(groups, gain), data, count)


def parameters(groups: RankingGroups, gain: Sequence[float]) -> dict[str, object]:
    """LightGBM's settings; with few rows, trees are small."""
    leaves = int(np.clip(len(groups.grade) // _ROWS_PER_LEAF, *_LEAVES))
    return _PARAMETERS | {"num_leaves": leaves, "label_gain": list(gain)}


def dataset(
    model: RerankerModel,
    groups: RankingGroups,
    grades: np.ndarray | None = None,
    reference: lightgbm.Dataset | None = None,
) -> tuple[lightgbm.Dataset, list[float]]:
    """The rows as a LightGBM dataset, and the gain of each grade as a share of the highest."""
    grades = np.unique(groups.grade) if grades is None else grades
    # LightGBM breaks ties by position. Targets come first, so they would look well ranked before training
    # and no tree would seem to help.
    tie_breaker = np.random.default_rng(0).random(len(groups.grade))
    order = np.lexsort((tie_breaker, groups.group()))
    matrix = groups.matrix[order]
    data = lightgbm.Dataset(
        matrix,
        np.searchsorted(grades, groups.grade[order]),
        weight=groups.weight[order],
        group=groups.size,
        init_score=model.linear_score(matrix),
        reference=reference,
    )
    return data, (grades / max(float(grades.max()), 1e-9)).tolist()
