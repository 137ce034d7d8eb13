"""The files of a projection: the matrix alone, and the encoder that applies it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from services.embedding.encoders.encoders import write_head
from training.encoders.contrastive import fit_head
from training.examples.positive_pairs import PositivePairs

HEAD = "head.npy"


def write_projection(directory: Path, /, vectors: np.ndarray, pairs: PositivePairs, **settings: Any) -> None:
    """Fit a projection of `vectors` and write it; `fit_head` describes the arguments."""
    np.save(directory / HEAD, fit_head(vectors, pairs, **settings))


def write_projected_encoder(directory: Path, body: Path, projection: Path) -> None:
    """Write the encoder `body` with the matrix that `write_projection` wrote."""
    shutil.copytree(body, directory, dirs_exist_ok=True)
    write_head(directory, np.load(projection / HEAD))
