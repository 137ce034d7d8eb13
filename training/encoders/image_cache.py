"""Decoded images at a model's input size: decoded once, in threads, and augmented during training.

Depends on no text or model. An image that cannot be decoded is reported and never ends a run.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms import Compose, Normalize, ToTensor  # type: ignore[import-untyped]

from services.core.errors import InvalidArgument
from services.embedding.images.loader import ImageLoader
from training.data.images import ShopImages

Fit = Callable[[Image.Image], Image.Image]
_THREADS = 2
_BATCH = 512
_CHECK_SIDE = 64
_MIN_AREA = 0.7
_STRETCH = 1.15


def fit_of(preprocess: Compose) -> Fit:
    """The resizing and cropping steps of an evaluation preprocessing, without the conversion to a tensor."""
    fit: Fit = Compose([step for step in preprocess.transforms if not isinstance(step, ToTensor | Normalize)])
    return fit


def decoded_images(
    images: ShopImages, ids: Sequence[str], fit: Fit, side: int, batch: int = _BATCH
) -> Iterator[list[Image.Image | InvalidArgument | None]]:
    """The fitted images of `ids`, `batch` at a time: an error if unreadable, None if an item has no image.

    The next batch is decoded while the caller uses the last one, so at most two are in memory. Decoding and
    its limits are those of the services.
    """

    def read(item_id: str) -> Image.Image | InvalidArgument | None:
        if item_id not in images:
            return None
        try:
            return fit(loader.load(images.read(item_id), side, images.name(item_id)))
        except InvalidArgument as error:
            return error

    with closing(ImageLoader()) as loader, ThreadPoolExecutor(_THREADS) as pool:
        pending: list[Future[Image.Image | InvalidArgument | None]] = []
        for start in range(0, len(ids), batch):
            finished, pending = (
                pending,
                [pool.submit(read, item_id) for item_id in ids[start : start + batch]],
            )
            if finished:
                yield [future.result() for future in finished]
        if pending:
            yield [future.result() for future in pending]


def unreadable_files(images: ShopImages, ids: Sequence[str]) -> list[str]:
    """The image files of `ids` that cannot be decoded, with reasons."""
    batches = decoded_images(images, ids, lambda image: image, _CHECK_SIDE)
    return [str(image) for batch in batches for image in batch if isinstance(image, InvalidArgument)]


def write_image_cache(
    path: Path, images: ShopImages, ids: Sequence[str], fit: Fit, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Decode into a new .npy file: its map uint8 (N, H, W, 3) for a `size` (H, W), and presence bool (N,).

    The operating system can drop the pages of the map, so they do not add to the process's own memory.
    """
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (len(ids), *size, 3))
    present = np.zeros(len(ids), bool)
    row = 0
    for batch in decoded_images(images, ids, fit, min(size)):
        for image in batch:
            if isinstance(image, Image.Image):
                pixels[row], present[row] = np.asarray(image), True
            row += 1
    return pixels, present


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random crop of each image, float (B, 3, H, W), stretched to full size; half of them are mirrored.

    The crop has 0.7 to 1 of the area and nearly the image's proportions (after Szegedy et al., 2015; milder,
    because texts describe color, shape and pattern).
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pixels), generator=generator)

    area = uniform(_MIN_AREA, 1)
    stretch = uniform(1 / _STRETCH, _STRETCH).sqrt()
    width, height = ((area.sqrt() * s).clamp(max=1) for s in (stretch, 1 / stretch))
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = width * uniform(-1, 1).sign()
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
    theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid.to(pixels.dtype), padding_mode="border", align_corners=False)
