"""JPEG files decoded on a GPU, by nvJPEG through torchvision; what is odd is left to a processor."""

import io
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import ExifTags, Image

from services.catalog import MAX_IMAGE_BYTES
from services.embedding.devices import is_gpu
from services.embedding.images import LONGEST

_MOST_PIXELS = 4_000_000
"""Larger ones are read at an eighth or a quarter by a processor."""
_PIXELS_AT_ONCE = 16_000_000
"""Resizing takes 12 bytes of a GPU's memory for each, and copies take 6."""
_MODES = ("RGB", "L")
_RGB = [82, 71, 66]
_END = b"\xff\xd9"
_PADDING = 64
_TURN = threading.Lock()
_streams: dict[str, torch.cuda.Stream] = {}
_log = logging.getLogger(__name__)

Fit = Callable[[torch.Tensor], torch.Tensor]
"""Pictures of one size, uint8 (B, 3, H, W), into what a model reads, uint8 (B, 3, S, S)."""


def decoded(files: Sequence[bytes], fit: Fit, device: str) -> list[torch.Tensor | None]:
    """What `fit` makes of each picture, uint8 (3, S, S) on `device`; None where a processor has to decode."""
    found: list[torch.Tensor | None] = [None] * len(files)
    batch, pixels = list[int](), 0
    for row, file in enumerate(files):
        if size := plain_size(file):
            if batch and pixels + size > _PIXELS_AT_ONCE:
                _decode(files, batch, fit, device, found)
                batch, pixels = [], 0
            batch.append(row)
            pixels += size
    if batch:
        _decode(files, batch, fit, device, found)
    return found


def plain_size(file: bytes) -> int:
    """How many pixels a JPEG has that is whole, upright, in grey or YCbCr, neither long nor large; else 0."""
    if len(file) > MAX_IMAGE_BYTES or _END not in file[-_PADDING:]:
        return 0
    try:
        picture = Image.open(io.BytesIO(file), formats=("JPEG",))
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        components = [component[0] for component in picture.layer]  # type: ignore[attr-defined]
    except Exception:  # whatever is wrong with it, a processor says
        return 0
    size = picture.width * picture.height
    plain = (
        picture.mode in _MODES
        and not turned
        and components != _RGB
        and picture.info.get("adobe_transform", 1) != 0
        and max(picture.size) <= LONGEST * min(picture.size)
        and size <= _MOST_PIXELS
    )
    return size if plain else 0


def _decode(
    files: Sequence[bytes], rows: Sequence[int], fit: Fit, device: str, found: list[torch.Tensor | None]
) -> None:
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]  # noqa: PLC0415

    raw = [torch.frombuffer(bytearray(files[row]), dtype=torch.uint8) for row in rows]
    try:
        with _apart(device) as keep:
            pictures = decode_jpeg(raw, mode=ImageReadMode.RGB, device=device)
            by_size: dict[torch.Size, list[tuple[int, torch.Tensor]]] = defaultdict(list)
            for row, picture in zip(rows, pictures, strict=True):
                by_size[picture.shape].append((row, picture))
            for same in by_size.values():
                fitted = keep(fit(torch.stack([picture for _, picture in same])).contiguous())
                for (row, _), seen in zip(same, fitted, strict=True):
                    found[row] = seen
    except RuntimeError as error:  # of memory too
        for row in rows:
            found[row] = None
        if len(rows) == 1:
            # Of plain files few are refused: many mean that nvJPEG is not there, or has no memory.
            _log.warning("a GPU leaves a JPEG file to a processor: %s", error)
            return
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            _decode(files, half, fit, device, found)


@contextmanager
def _apart(device: str) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A stream of its own, one thread at a time, that is done when this ends; gives what keeps a result.

    nvJPEG writes by a stream that torch's memory knows nothing of: it may have only what no kernel still
    reads, neither the models' nor that of the batch before.
    """
    if not is_gpu(device):
        yield lambda result: result
        return
    with _TURN:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = _streams[device]
        models = torch.cuda.default_stream(device)

        def keep(result: torch.Tensor) -> torch.Tensor:
            result.record_stream(models)  # it is theirs until they have read it
            return result

        stream.synchronize()
        with torch.cuda.stream(stream):
            yield keep
            stream.synchronize()
