"""The reranker: a weighted sum of features, corrected by LightGBM trees. Knows columns, not items."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from services.core import native_threads
from services.core.errors import FailedPrecondition
from services.ranking.models.baseline_scorer import HAND_SET, baseline_scores
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.scaler import FeatureScaler

# LightGBM loads these for interfaces that nothing here uses; docs/capacity.md has what they cost.
with native_threads.hidden("sklearn", "pandas", "pyarrow", "dask"):
    import lightgbm

MODEL_FILE = "model.txt"
CHOICE_FILE = "choice.json"


@dataclass(frozen=True)
class RerankerModel:
    """A choice model, and trees boosted from its scores if they improve on it.

    The last column of the choice model may be `HAND_SET`, which follows from the others.
    """

    choice: ConditionalLogit
    trees: lightgbm.Booster | None

    @cached_property
    def features(self) -> tuple[str, ...]:
        """The columns of the rows that the model reads."""
        columns = tuple(self.choice.columns)
        return columns[:-1] if columns[-1:] == (HAND_SET,) else columns

    @property
    def tree_count(self) -> int:
        """The number of trees."""
        return self.trees.num_trees() if self.trees is not None else 0

    def score(self, matrix: np.ndarray, threads: int = 0) -> np.ndarray:
        """Scores float64 (C,) of rows (C, F); `threads` 0 uses every core."""
        score = self.linear_score(matrix)
        if self.trees is not None:
            # Raw: of a binary objective, the default would be a probability.
            score += self.trees.predict(matrix, raw_score=True, num_threads=threads)
        return np.asarray(score)

    def linear_score(self, matrix: np.ndarray) -> np.ndarray:
        """Scores float64 (C,) of rows (C, F) by the choice model alone."""
        own, by_hand = self._parts
        score = np.asarray(own.terms(matrix).sum(1, dtype=np.float64))
        if by_hand is not None:
            score += by_hand.terms(baseline_scores(self.features, matrix)[:, None])[:, 0]
        return score

    def contributions(self, matrix: np.ndarray) -> np.ndarray:
        """The contribution of each column of the choice model, up to a constant; of the trees by TreeSHAP.

        float64 (C, K), in the order of `choice.columns`.
        """
        own, by_hand = self._parts
        terms = own.terms(matrix).astype(np.float64)
        if by_hand is not None:
            of_hand_set = by_hand.terms(baseline_scores(self.features, matrix)[:, None])
            terms = np.column_stack([terms, of_hand_set])
        if self.trees is not None:
            of_trees = np.asarray(self.trees.predict(matrix, pred_contrib=True))[:, :-1]
            terms[:, : of_trees.shape[1]] += of_trees
        return terms

    @cached_property
    def _parts(self) -> tuple[ConditionalLogit, ConditionalLogit | None]:
        """The choice model of the rows and that of hand-set scores, apart: joining them copies the rows."""
        count = len(self.features)
        if count == len(self.choice.columns):
            return self.choice, None
        return self.choice.take(slice(count)), self.choice.take(slice(count, None))


class Reranker:
    """A model on disk over feature rows whose columns are `names`.

    Raises:
        FailedPrecondition: the model reads a column that `names` lacks.
    """

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        parameters = json.loads((directory / CHOICE_FILE).read_text())
        choice = ConditionalLogit(**parameters | {"scales": FeatureScaler(**parameters["scales"])})
        index = {name: position for position, name in enumerate(names)}
        trees = directory / MODEL_FILE
        self._model = RerankerModel(
            choice, lightgbm.Booster(model_file=str(trees)) if trees.is_file() else None
        )
        self.columns_read = self._model.features
        if missing := [name for name in self.columns_read if name not in index]:
            raise FailedPrecondition(f"the reranker reads {missing[0]!r}, which is not a feature here")
        self._columns = np.array([index[name] for name in self.columns_read])

    def score(self, matrix: np.ndarray) -> np.ndarray:
        """Scores float32 (C,) of rows (C, F) in the order of `names`; they order items and have no unit."""
        # One thread: requests run in parallel.
        return np.asarray(self._model.score(matrix[:, self._columns], threads=1), np.float32)


def write_reranker(directory: Path, model: RerankerModel) -> None:
    """Write a model: the trees, if any, in LightGBM's text format, the choice model as JSON."""
    if model.trees is not None:
        model.trees.save_model(str(directory / MODEL_FILE))
    (directory / CHOICE_FILE).write_text(json.dumps(asdict(model.choice), indent=1) + "\n")
