"""The files of a projection: the matrix alone, and the encoder that applies it."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from services.embedding.encoders.encoders import write_head
from training.encoders.contrastive import fit_head
from training.examples.positive_pairs import PositivePairs

HEAD = "head.npy"
_MIN_PAIRS, _ERRORS = 100, 2  # fewer pairs do not decide; by chance one gain in forty is as large
_log = logging.getLogger(__name__)


def write_projection(directory: Path, /, vectors: np.ndarray, pairs: PositivePairs, **settings: Any) -> None:
    """Fit a projection of `vectors` and write it; `fit_head` describes the arguments."""
    np.save(directory / HEAD, fit_head(vectors, pairs, **settings))


def write_projected_encoder(directory: Path, body: Path, projection: Path) -> None:
    """Write the encoder `body` with the matrix that `write_projection` wrote."""
    shutil.copytree(body, directory, dirs_exist_ok=True)
    write_head(directory, np.load(projection / HEAD))


def improves(space: str, found: Mapping[str, np.ndarray]) -> bool:
    """Whether the projection finds more partners of later baskets, by more than two standard errors.

    `found` has bool (P,) whether each partner is found, by the "body" alone and "tuned" by the projection; it
    is empty if there are no later baskets. Too few partners do not decide: then a projection is not used.
    """
    gain = found["tuned"].astype(np.float64) - found["body"] if found else np.empty(0)
    if len(gain) < _MIN_PAIRS:
        _log.warning(
            "%s: %d later baskets are too few to tell whether a projection helps: none is used",
            space,
            len(gain),
        )
        return False
    mean, error = float(gain.mean()), float(gain.std(ddof=1)) / len(gain) ** 0.5
    is_better = bool(mean > _ERRORS * error)
    decision = "it is used" if is_better else "it is not used"
    _log.info(
        "%s: of %d partners the projection finds %+.3f, ± %.3f: %s", space, len(gain), mean, error, decision
    )
    return is_better
