"""Vectors of a shop's images, and of its texts in the same space."""

import json
from pathlib import Path

import numpy as np
import torch

from services.embedding.encoders.encoders import ImageEncoder
from training.core.progress import track
from training.data.images import ShopImages
from training.encoders.image_encoder import encode_images

UNREADABLE, CAPTIONS = "unreadable.json", "captions.npy"
_ENCODE_BATCH = 2048


def write_image_vectors(
    directory: Path, encoder: Path, images: ShopImages, ids: list[str], texts: list[str] | None
) -> None:
    """Write the vectors of the images of `ids` and of `texts`, and the files that cannot be decoded."""
    model = _load(encoder)
    vectors, present, unreadable = encode_images(model, images, ids)
    np.save(directory / "vectors.npy", vectors)
    np.save(directory / "present.npy", present)
    (directory / UNREADABLE).write_text(json.dumps(unreadable))
    if texts is not None:
        np.save(directory / CAPTIONS, _encode_captions(model, texts))


def write_image_vectors_only(directory: Path, encoder: Path, images: ShopImages, ids: list[str]) -> None:
    """Write only the vectors of the images of `ids`."""
    np.save(directory / "vectors.npy", encode_images(_load(encoder), images, ids)[0])


def _load(encoder: Path) -> ImageEncoder:
    return ImageEncoder(encoder, "cuda" if torch.cuda.is_available() else "cpu")


def _encode_captions(model: ImageEncoder, texts: list[str]) -> np.ndarray:
    """The texts of items in the image space, float16 (M, D)."""
    starts = range(0, len(texts), _ENCODE_BATCH)
    vectors = [model.encode_texts(texts[s : s + _ENCODE_BATCH]) for s in track(starts, "captions encoded")]
    return np.concatenate(vectors).astype(np.float16)
