"""Photographs as pixels: decoded once, in threads, at the size a model reads; varied while it learns.

Knows nothing of texts or models. What cannot be decoded is reported, and never ends a run.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms import Compose, Normalize, ToTensor  # type: ignore[import-untyped]

from services.embedding import images
from services.errors import InvalidArgument
from training.photographs import Photographs

Fit = Callable[[Image.Image], Image.Image]
_THREADS = 2
_AHEAD = 512
_LEAST_AREA = 0.7
_STRETCH = 1.15
_log = logging.getLogger(__name__)


def fit_of(preprocess: Compose) -> Fit:
    """What an evaluation preprocessing does to a picture before that becomes a tensor: resizing, cropping."""
    fit: Fit = Compose([step for step in preprocess.transforms if not isinstance(step, ToTensor | Normalize)])
    return fit


def pictures(
    photographs: Photographs, ids: Sequence[str], fit: Fit, side: int, batch: int = _AHEAD
) -> Iterator[list[Image.Image | None]]:
    """Fitted photographs of `ids`, `batch` at a time; None for one that is missing or unreadable.

    The next batch is decoded while the caller works on the last: two are in memory at most.
    """

    def read(item_id: str) -> Image.Image | None:
        if item_id not in photographs:
            return None
        try:
            return fit(images.load(photographs.read(item_id), side, item_id))
        except InvalidArgument as error:
            _log.debug("a photograph is skipped: %s", error)
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        ahead: list[Future[Image.Image | None]] = []
        for start in range(0, len(ids), batch):
            ready, ahead = ahead, [pool.submit(read, item_id) for item_id in ids[start : start + batch]]
            if ready:
                yield [future.result() for future in ready]
        if ahead:
            yield [future.result() for future in ahead]


def write_pixels(
    path: Path, photographs: Photographs, ids: Sequence[str], fit: Fit, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Decode into a new .npy: its map uint8 (N, H, W, 3) for a `size` (H, W), and bool (N,) what is there.

    Pages of the map are the operating system's to drop: they do not add to the process's own memory.
    """
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (len(ids), *size, 3))
    present = np.zeros(len(ids), bool)
    row = 0
    for batch in pictures(photographs, ids, fit, min(size)):
        for picture in batch:
            if picture is not None:
                pixels[row], present[row] = np.asarray(picture), True
            row += 1
    if not present.all():
        _log.warning("%d of %d photographs are missing or unreadable: skipped", (~present).sum(), len(ids))
    return pixels, present


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of each picture, float (B, 3, H, W), a random part stretched to the whole, half of them mirrored.

    The part has .7 to 1 of the area and nearly the picture's own proportions (after
    Szegedy et al., 2015; milder, because colour, shape and pattern are what a text says).
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pixels), generator=generator)

    area = uniform(_LEAST_AREA, 1)
    stretch = uniform(1 / _STRETCH, _STRETCH).sqrt()
    width, height = ((area.sqrt() * s).clamp(max=1) for s in (stretch, 1 / stretch))
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = width * uniform(-1, 1).sign()
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
    theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid.to(pixels.dtype), padding_mode="border", align_corners=False)
