"""How many candidates the first phase passes on, and when there is none."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from services.ranking.models.first_phase import COLUMNS
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.scaler import FeatureScaler
from training.examples.point_in_time import PointInTime
from training.examples.queries import EvalQuery
from training.ranking import first_phase
from training.ranking.first_phase import DEPTHS, choose_depth
from training.ranking.fit_models import FittedModels

QUERIES, CANDIDATES = 40, 2000


def depth_of(monkeypatch: pytest.MonkeyPatch, second: np.ndarray, matrix: np.ndarray) -> int | None:
    """The depth where the second phase ranks by `second`, (Q * C,), and finds its best twenty right."""
    rows = SimpleNamespace(
        first_phase=matrix,
        size=np.full(QUERIES, CANDIDATES),
        items=np.tile(np.arange(CANDIDATES), QUERIES),
    )
    monkeypatch.setattr(first_phase, "evaluation_rows", lambda *_: rows)
    weight = [float(name == "popular") for name in COLUMNS]
    first = ConditionalLogit(COLUMNS, FeatureScaler.plain(len(COLUMNS)), weight)
    best = np.argsort(-second.reshape(QUERIES, CANDIDATES), axis=1)[:, :20]
    queries = [EvalQuery("u", 0, (), targets) for targets in best]
    table = SimpleNamespace(rows=lambda hashes: hashes)
    past = cast(PointInTime, SimpleNamespace(table=table))
    models = cast(FittedModels, SimpleNamespace(score=lambda *_: second))
    vectors: dict[str, Any] = {}
    return choose_depth(past, queries, np.ones(CANDIDATES, bool), first, models, vectors)


@pytest.mark.parametrize(("sign", "depth"), [(1, DEPTHS[0]), (-1, None)])
def test_a_first_phase_that_loses_the_best_is_left_out(
    monkeypatch: pytest.MonkeyPatch, sign: int, depth: int | None
) -> None:
    matrix = np.zeros((QUERIES * CANDIDATES, len(COLUMNS)), np.float32)
    popular = np.random.default_rng(0).random(len(matrix)).astype(np.float32)
    matrix[:, COLUMNS.index("popular")] = popular
    assert depth_of(monkeypatch, sign * popular, matrix) == depth


def test_a_first_phase_that_knows_little_passes_on_more(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.zeros((QUERIES * CANDIDATES, len(COLUMNS)), np.float32)
    generator = np.random.default_rng(0)
    popular = generator.random(len(matrix)).astype(np.float32)
    matrix[:, COLUMNS.index("popular")] = popular
    second = popular + 1.0 * generator.random(len(matrix))
    depth = depth_of(monkeypatch, second, matrix)
    assert depth is not None
    assert depth > DEPTHS[0]
