"""The first phase of ranking: a linear model that chooses the candidates for the models of the second phase.

It reads the scores of the candidate sources and columns that cost one look-up per item, so it takes less than
a millisecond for thousands of candidates. Training scores its rows, `FirstPhaseScorer` the lists of sources.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from services.catalog.candidate_sources import NAMES
from services.core.errors import FailedPrecondition
from services.core.growing_array import appended
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.scaler import FeatureScaler, standardize
from services.ranking.state.item_stats import ITEM_COLUMNS, ItemStats, item_columns
from services.ranking.state.tick_cache import TickCache

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


class FirstPhaseScorer:
    """The scores of a first phase, from the lists of the sources.

    A source adds its terms to the candidates that it proposes. The terms of the other columns are summed up
    for every item once per tick, so that a request looks up one number for each candidate.
    """

    def __init__(self, model: FirstPhase) -> None:
        self.depth, choice = model.depth, model.choice
        self._sources = {name: _SourceTerm.of(choice, name) for name in NAMES}
        self._absent = sum(term.absent for term in self._sources.values())
        self._items = _part(choice, ITEM_COLUMNS)
        self._item_index = np.array([ITEM_COLUMNS.index(name) for name in self._items.columns], np.int64)
        self._of_items = TickCache(
            lambda stats: _ItemTerms(self._terms(np.arange(stats.length), stats)),
            lambda terms, stats: terms.append(self._terms(np.arange(terms.count, stats.length), stats)),
        )

    def score(self, sources: Sequence[SourceColumn], rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """Scores float32 (C,) of table rows, int64 (C,), which order the candidates and have no unit."""
        lists = [(self._sources[name], indices, scores) for name, indices, scores in sources if name in NAMES]
        total = self._of_items.get(stats).values[rows] + self._absent
        if lists:
            terms = np.array([term for term, *_ in lists]).T
            unit, mean, scale, weight, proposed, absent = np.repeat(
                terms, [len(i) for _, i, _ in lists], axis=1
            )
            scores = np.concatenate([scores for *_, scores in lists])
            more = weight * standardize(scores, unit, mean, scale) + proposed - absent
            total += np.bincount(np.concatenate([indices for _, indices, _ in lists]), more, len(rows))
        return np.asarray(total, np.float32)

    def _terms(self, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """The sum of the terms of an item's own columns, float64 (R,)."""
        columns = np.stack(item_columns(rows, stats), axis=1)[:, self._item_index]
        return np.asarray(self._items.terms(columns).sum(1, dtype=np.float64))


class _ItemTerms:
    """A number for each row, float64 (N,)."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self.count = values, len(values)

    @property
    def values(self) -> np.ndarray:
        """See the class."""
        return self._values[: self.count]

    def append(self, values: np.ndarray) -> bool:
        """Add rows."""
        self._values = appended(self._values, self.count, values)
        self.count += len(values)  # last: a reader sees complete rows
        return True


class _SourceTerm(NamedTuple):
    """What a source adds to a candidate: `weight` times its score as scaled, and `proposed`.

    `absent` is what a candidate gets that the source does not propose.
    """

    unit: float
    mean: float
    scale: float
    weight: float
    proposed: float
    absent: float

    @classmethod
    def of(cls, choice: ConditionalLogit, name: str) -> "_SourceTerm":
        """The terms of a source in a model, which may be older than the source."""
        score, proposed = _part(choice, [name]), _part(choice, [f"{name}_proposed"])

        def at(value: float, of: ConditionalLogit) -> float:
            return float(of.terms(np.full((1, len(of.columns)), value, np.float32)).sum())

        absent = at(0, score) + at(0, proposed)
        if not score.columns:
            return cls(1.0, 0.0, 1.0, 0.0, at(1, proposed), absent)
        scales = score.scales
        return cls(scales.unit[0], scales.mean[0], scales.scale[0], score.weight[0], at(1, proposed), absent)


def _part(choice: ConditionalLogit, names: Sequence[str]) -> ConditionalLogit:
    """The terms of those of `names` that a model reads."""
    at = [position for position, name in enumerate(choice.columns) if name in names]
    scales = choice.scales
    unit, mean, scale = ([values[i] for i in at] for values in (scales.unit, scales.mean, scales.scale))
    weight, columns = [choice.weight[i] for i in at], [choice.columns[i] for i in at]
    return ConditionalLogit(columns, FeatureScaler(unit, mean, scale), weight)


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
