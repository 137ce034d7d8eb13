"""A shop whose items are squares of one color each, and how well texts find their images."""

from pathlib import Path

import numpy as np
from PIL import Image

from services.embedding.encoders.encoders import ImageEncoder
from training.data.images import ShopImages
from training.encoders.image_encoder import encode_images

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 50, 220),
    "yellow": (230, 220, 40),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
    "pink": (250, 150, 190),
    "brown": (110, 70, 30),
}
CHANCE = 1 / len(COLORS)


def _draw(directory: Path, item_id: str, color: str, choice: np.random.Generator) -> None:
    shade = np.clip(np.array(COLORS[color]) + choice.integers(-10, 11, 3), 0, 255)
    picture = Image.new("RGB", (48, 48), (128, 128, 128))
    left, top = choice.integers(0, 12, 2).tolist()
    picture.paste(tuple(shade.tolist()), (left, top, left + 36, top + 36))
    directory.mkdir(parents=True, exist_ok=True)
    picture.save(directory / f"{item_id}.png")


def write_squares(directory: Path, each: int, seed: int) -> list[tuple[str, str]]:
    """Write images and return the items, pairs of an id, which begins with the color, and a text."""
    choice = np.random.default_rng(seed)
    items = [(f"{color}-{n}", color) for n in range(each) for color in COLORS]
    for item_id, color in items:
        _draw(directory, item_id, color, choice)
    return [(item_id, f"{color} thing. A thing. thing, {color}") for item_id, color in items]


def hit_rate(encoder: ImageEncoder, images: ShopImages, ids: list[str]) -> float:
    """Of the images that are nearest to the name of a color, the share that have it."""
    vectors, present, _ = encode_images(encoder, images, ids, batch=7)
    assert present.all()
    similarity = encoder.encode_texts([f"{color} thing" for color in COLORS]) @ vectors.T.astype(np.float32)
    nearest = np.argsort(-similarity, axis=1)[:, : len(ids) // len(COLORS)]
    return float(np.mean([ids[n].startswith(c) for c, row in zip(COLORS, nearest, strict=True) for n in row]))
