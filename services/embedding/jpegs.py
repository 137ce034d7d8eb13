"""JPEG files decoded on a GPU, by nvJPEG through torchvision; what is odd is left to a processor."""

import io
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from PIL import ExifTags, Image
from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]

from services.catalog import MAX_IMAGE_BYTES

_MOST_PIXELS = 4_000_000
"""Larger ones are read at an eighth or a quarter by a processor, and of these a batch fits a GPU's memory."""
_MODES = ("RGB", "L")
_END = b"\xff\xd9"
_PADDING = 64


def decoded(
    files: Sequence[bytes], fit: Callable[[torch.Tensor], torch.Tensor], device: str
) -> list[torch.Tensor | None]:
    """What `fit` makes of each picture, uint8 (3, S, S) on `device`; None where a processor has to decode.

    `fit` is given pictures of one size, uint8 (B, 3, H, W).
    """
    found: list[torch.Tensor | None] = [None] * len(files)
    rows = [row for row, file in enumerate(files) if is_plain(file)]
    if not rows:
        return found
    raw = [torch.frombuffer(bytearray(files[row]), dtype=torch.uint8) for row in rows]
    try:
        pictures = decode_jpeg(raw, mode=ImageReadMode.RGB, device=device)
    except RuntimeError:  # one is damaged: a processor says which, and how
        return found
    by_size: dict[torch.Size, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for row, picture in zip(rows, pictures, strict=True):
        by_size[picture.shape].append((row, picture))
    for same in by_size.values():
        fitted = fit(torch.stack([picture for _, picture in same]))
        for (row, _), seen in zip(same, fitted, strict=True):
            found[row] = seen
    return found


def is_plain(file: bytes) -> bool:
    """Whether it is a whole, upright JPEG in grey or YCbCr, and none of the largest."""
    if len(file) > MAX_IMAGE_BYTES or _END not in file[-_PADDING:]:
        return False
    try:
        picture = Image.open(io.BytesIO(file), formats=("JPEG",))
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # whatever is wrong with it, a processor says
        return False
    return (
        picture.mode in _MODES
        and not turned
        and picture.info.get("adobe_transform", 1) != 0
        and picture.width * picture.height <= _MOST_PIXELS
    )
