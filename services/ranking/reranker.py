"""The reranker: a weighted sum of features and LightGBM trees that correct it. Knows columns, not items."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightgbm
import numpy as np

from services.errors import FailedPrecondition
from services.ranking.scales import Scales

MODEL_FILE = "model.txt"
CHOICE_FILE = "choice.json"


@dataclass(frozen=True)
class ConditionalLogit:
    """A choice model (McFadden, 1974): a weighted sum by which a list is put in order.

    `columns` names the F features; `weight` counts what `scales` make of them, where what is unknown
    counts as average.
    """

    columns: Sequence[str]
    scales: Scales
    weight: Sequence[float]

    def terms(self, matrix: np.ndarray) -> np.ndarray:
        """What each column adds to the score of rows (C, F): float32 (C, F)."""
        return self.scales.apply(matrix) * np.asarray(self.weight, np.float32)


@dataclass(frozen=True)
class RerankerModel:
    """What orders the rows of a list: the choice model, and trees boosted from its scores where they help."""

    choice: ConditionalLogit
    trees: lightgbm.Booster | None

    def score(self, matrix: np.ndarray, threads: int = 0) -> np.ndarray:
        """Scores float64 (C,) of rows (C, F); `threads` 0 takes every core."""
        score = self.choice.terms(matrix).sum(1, dtype=np.float64)
        if self.trees is not None:
            score += self.trees.predict(matrix, num_threads=threads)
        return np.asarray(score)

    def contributions(self, matrix: np.ndarray) -> np.ndarray:
        """What each column adds to the score, up to a constant: float64 (C, F), of trees by TreeSHAP."""
        terms = self.choice.terms(matrix).astype(np.float64)
        if self.trees is not None:
            terms += np.asarray(self.trees.predict(matrix, pred_contrib=True))[:, :-1]
        return terms


class Reranker:
    """A written model over feature rows whose columns are `names`.

    Raises:
        FailedPrecondition: the model reads a column that `names` does not hold.
    """

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        written = json.loads((directory / CHOICE_FILE).read_text())
        choice = ConditionalLogit(**written | {"scales": Scales(**written["scales"])})
        place = {name: at for at, name in enumerate(names)}
        if missing := [name for name in choice.columns if name not in place]:
            raise FailedPrecondition(f"the reranker reads {missing[0]!r}, which is no feature here")
        self._at = np.array([place[name] for name in choice.columns])
        trees = directory / MODEL_FILE
        self._model = RerankerModel(
            choice, lightgbm.Booster(model_file=str(trees)) if trees.is_file() else None
        )

    def score(self, matrix: np.ndarray) -> np.ndarray:
        """Scores float32 (C,) of rows (C, F) in the order of `names`; an ordering, on no scale."""
        # One thread: requests run side by side.
        return np.asarray(self._model.score(matrix[:, self._at], threads=1), np.float32)


def write_reranker(directory: Path, model: RerankerModel) -> None:
    """Write a model: trees, if there are any, in LightGBM's text format, the choice model as JSON."""
    if model.trees is not None:
        model.trees.save_model(str(directory / MODEL_FILE))
    (directory / CHOICE_FILE).write_text(json.dumps(asdict(model.choice), indent=1) + "\n")
