"""The reranker: LightGBM trees over feature rows, as training left them. Knows columns, not items."""

import json
from collections.abc import Sequence
from pathlib import Path

import lightgbm
import numpy as np

from services.errors import FailedPrecondition

MODEL_FILE = "model.txt"
COLUMNS_FILE = "columns.json"


class Reranker:
    """A LambdaMART model (Burges, 2010) in LightGBM's text format, with the columns it reads.

    Raises:
        FailedPrecondition: the model reads a column that `names` does not hold.
    """

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        columns = json.loads((directory / COLUMNS_FILE).read_text())
        place = {name: at for at, name in enumerate(names)}
        if missing := [name for name in columns if name not in place]:
            raise FailedPrecondition(f"the reranker reads {missing[0]!r}, which is no feature here")
        self._at = np.array([place[name] for name in columns])
        self._model = lightgbm.Booster(model_file=str(directory / MODEL_FILE))

    def score(self, matrix: np.ndarray) -> np.ndarray:
        """Scores float32 (C,) of rows (C, F) in the order of `names`; an ordering, on no scale."""
        if not len(matrix):
            return np.empty(0, np.float32)
        # One thread: requests run side by side.
        scores = self._model.predict(matrix[:, self._at], num_threads=1)
        return np.asarray(scores, np.float32)


def write_reranker(directory: Path, model: lightgbm.Booster, columns: Sequence[str]) -> None:
    """Write a model and the names of the columns it was fitted on, in their order."""
    model.save_model(str(directory / MODEL_FILE))
    (directory / COLUMNS_FILE).write_text(json.dumps(list(columns), indent=1) + "\n")
