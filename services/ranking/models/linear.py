"""The choice model: a weighted sum of features that orders a list. Knows columns, not items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.ranking.models.scaler import FeatureScaler


@dataclass(frozen=True)
class ConditionalLogit:
    """A choice model (McFadden, 1974): a weighted sum of features that orders a list.

    `columns` names the F features; `weight` has the weight of each, as scaled by `scales`; an unknown value
    counts as the mean.
    """

    columns: Sequence[str]
    scales: FeatureScaler
    weight: Sequence[float]

    def take(self, columns: slice) -> "ConditionalLogit":
        """The model of some of the columns."""
        scales = self.scales
        return ConditionalLogit(
            self.columns[columns],
            FeatureScaler(scales.unit[columns], scales.mean[columns], scales.scale[columns]),
            self.weight[columns],
        )

    def terms(self, matrix: np.ndarray) -> np.ndarray:
        """The contribution of each column to the score of rows (C, F): float32 (C, F)."""
        return self.scales.apply(matrix) * np.asarray(self.weight, np.float32)
