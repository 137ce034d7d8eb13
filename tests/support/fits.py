"""Records what models are fitted on."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import lightgbm
import numpy as np
import pytest

from services.ranking.models.linear import ConditionalLogit
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import fit_choice


class Fits:
    """The groups that choice models of a module are fitted on, and the rows and first scores of trees.

    `tree_rows` has an entry for each call of LightGBM: (matrix, scores) of its training data, and of its
    validation data if it has any.
    """

    def __init__(self, patch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.groups: list[RankingGroups] = []
        self.tree_rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self._train = lightgbm.train
        patch.setattr(module, "fit_choice", self._fit_choice)
        patch.setattr(lightgbm, "train", self._train_trees)

    def _fit_choice(self, groups: RankingGroups, columns: Sequence[str], *penalty: Any) -> ConditionalLogit:
        self.groups.append(groups)
        return fit_choice(groups, columns, *penalty)

    def _train_trees(
        self, parameters: dict[str, object], rows: lightgbm.Dataset, *rest: Any, **more: Any
    ) -> Any:
        every = [rows, *more.get("valid_sets", [])]  # LightGBM frees them afterwards
        self.tree_rows.append([(np.array(data.data), np.array(data.init_score)) for data in every])
        return self._train(parameters, rows, *rest, **more)
