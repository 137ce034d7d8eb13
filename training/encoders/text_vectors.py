"""Text vectors of an encoder."""

from pathlib import Path

import numpy as np
import torch

from services.embedding.encoders import encoders
from services.embedding.encoders.encoders import TextEncoder
from training.core.progress import track

_ENCODE_BATCH = 2048


def encode_texts(encoder: Path, texts: list[str]) -> np.ndarray:
    """Vectors float16 (N, D) of texts, by the encoder in a directory."""
    on_gpu = torch.cuda.is_available() and not encoders.is_int8(encoder)
    model = TextEncoder(encoder, "cuda" if on_gpu else "cpu")
    starts = range(0, len(texts), _ENCODE_BATCH)
    vectors = [model.encode(texts[s : s + _ENCODE_BATCH]).vectors for s in track(starts, "texts encoded")]
    return np.concatenate(vectors).astype(np.float16)


def write_text_vectors(directory: Path, encoder: Path, texts: list[str]) -> None:
    """Write the vectors, and bool (N,) that each text has one."""
    np.save(directory / "vectors.npy", encode_texts(encoder, texts))
    np.save(directory / "present.npy", np.ones(len(texts), bool))
