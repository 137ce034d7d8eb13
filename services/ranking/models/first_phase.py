"""The first phase of ranking: a linear model that chooses the candidates for the models of the second phase.

It reads the scores of the candidate sources and columns that cost one look-up per item, so it takes less than
a millisecond for thousands of candidates. Training and serving build its rows by the same function.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from services.catalog.candidate_sources import NAMES
from services.core.errors import FailedPrecondition
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.scaler import FeatureScaler
from services.ranking.state.item_stats import ITEM_COLUMNS, ItemStats, item_columns

FIRST_PHASE_FILE = "first_phase.json"
_BEHAVIOR = ("co_occurrence", "popular", "trending", "attribute_affinity")
"""The sources that propose no item without interactions."""
SourceColumn = tuple[str, np.ndarray, np.ndarray]
"""A source, the indices of its candidates, int64 (K,), and their scores, float32 (K,)."""
COLUMNS = (*NAMES, *(f"{name}_proposed" for name in NAMES), *ITEM_COLUMNS)


def first_phase_rows(source_scores: np.ndarray, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
    """The rows of the model, float32 (C, F), in the order of `COLUMNS`.

    `source_scores` float32 (C, S) are in the order of `NAMES`, NaN where a source does not propose the
    candidate; `rows` int64 (C,) are the table rows.
    """
    proposed = ~np.isnan(source_scores)
    scores = np.where(proposed, source_scores, 0)
    return np.concatenate(
        [scores, proposed, np.stack(item_columns(rows, stats), axis=1)], 1, dtype=np.float32
    )


def without_interactions(matrix: np.ndarray) -> np.ndarray:
    """The rows of the model, (C, F), as if no user had ever interacted with the candidate."""
    masked = matrix.copy()
    for name in _BEHAVIOR:
        masked[:, [COLUMNS.index(name), COLUMNS.index(f"{name}_proposed")]] = 0
    for name in ITEM_COLUMNS:
        masked[:, COLUMNS.index(name)] = 0 if name.startswith("popular") else np.nan
    masked[:, COLUMNS.index("rising")] = 1
    return masked


@dataclass(frozen=True)
class FirstPhase:
    """A choice model over some of `COLUMNS`; the best `depth` candidates go on to the second phase."""

    choice: ConditionalLogit
    depth: int

    def score(self, source_scores: np.ndarray, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """Scores float32 (C,), which order the candidates and have no unit; see `first_phase_rows`."""
        matrix = first_phase_rows(source_scores, rows, stats)[:, self._columns]
        return self.choice.scales.apply(matrix) @ np.asarray(self.choice.weight, np.float32)

    @cached_property
    def _columns(self) -> np.ndarray:
        """The columns that the model reads: a bundle may be older than a source."""
        return np.array([COLUMNS.index(name) for name in self.choice.columns], np.int64)


def write_first_phase(directory: Path, model: FirstPhase) -> None:
    """Write a model."""
    (directory / FIRST_PHASE_FILE).write_text(json.dumps(asdict(model), indent=1) + "\n")


def read_first_phase(directory: Path) -> FirstPhase | None:
    """The model of a directory; None if it has none.

    Raises:
        FailedPrecondition: the model reads a column that is not one of `COLUMNS`.
    """
    path = directory / FIRST_PHASE_FILE
    if not path.is_file():
        return None
    parameters = json.loads(path.read_text())
    choice = parameters["choice"]
    if missing := [name for name in choice["columns"] if name not in COLUMNS]:
        raise FailedPrecondition(f"the first phase reads {missing[0]!r}, which is not a column here")
    scales = FeatureScaler(**choice["scales"])
    return FirstPhase(ConditionalLogit(choice["columns"], scales, choice["weight"]), parameters["depth"])


def with_others(second: np.ndarray, selected: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Scores float32 (C,) of all candidates: `second` (K,) of those `selected`, int64 (K,), the others below.

    The others keep the order of the first phase, `first` (C,). Where the two scores agree on the selected
    ones, the others get the score that the line through these predicts.
    """
    scores = np.empty(len(first), np.float32)
    known = first[selected].astype(np.float64)
    variance = float(known.var())
    slope = float(((known - known.mean()) * (second - second.mean())).mean()) / variance if variance else 0.0
    line = second.mean() + max(slope, 1e-3) * (first - known.mean())
    others = np.ones(len(first), bool)
    others[selected] = False
    lowest = float(second.min())
    excess = max(float(line[others].max(initial=-np.inf)) - lowest, 0) if others.any() else 0.0
    scores[:] = line - excess - 1e-3
    scores[selected] = second
    return scores


def source_matrix(sources: Sequence[SourceColumn], count: int) -> np.ndarray:
    """Scores float32 (`count`, S) in the order of `NAMES` from indices int64 (K,) and scores by source."""
    matrix = np.full((count, len(NAMES)), np.nan, np.float32)
    for name, indices, scores in sources:
        if name in NAMES:
            matrix[indices, NAMES.index(name)] = scores
    return matrix
