"""JPEG files decoded on a GPU, by nvJPEG through torchvision; unusual files are left to the CPU."""

import io
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import ExifTags, Image

from services.catalog.items import MAX_IMAGE_BYTES
from services.embedding.images import file_segments
from services.embedding.images.decoder import MAX_ASPECT_RATIO
from services.embedding.runtime.devices import is_gpu

_MAX_PIXELS = 4_000_000
"""The CPU decodes larger files, at a quarter or an eighth of their size."""
_MAX_SCANS = 20
"""The CPU decodes a progressive file with more scans as fast, and can be interrupted."""
_BATCH_PIXELS = 16_000_000
"""Resizing takes 12 bytes of GPU memory per pixel, copies take 6."""
_MODES = ("RGB", "L")
_RGB = [82, 71, 66]
_END = b"\xff\xd9"
_PADDING = 64
_LOCK = threading.Lock()
_streams: dict[str, torch.cuda.Stream] = {}
_log = logging.getLogger(__name__)

Fit = Callable[[torch.Tensor], torch.Tensor]
"""Resizes images of one size, uint8 (B, 3, H, W), to a model's input, uint8 (B, 3, S, S)."""


def decode_jpegs(files: Sequence[bytes], fit: Fit, device: str) -> list[torch.Tensor | None]:
    """Decode files and apply `fit`: uint8 (3, S, S) on `device`; None where the CPU has to decode."""
    results: list[torch.Tensor | None] = [None] * len(files)
    batch, pixels = list[int](), 0
    for row, file in enumerate(files):
        if size := plain_size(file):
            if batch and pixels + size > _BATCH_PIXELS:
                _decode(files, batch, fit, device, results)
                batch, pixels = [], 0
            batch.append(row)
            pixels += size
    if batch:
        _decode(files, batch, fit, device, results)
    return results


def plain_size(file: bytes) -> int:
    """The number of pixels of a complete, upright, gray or YCbCr JPEG of moderate size and aspect; else 0."""
    if len(file) > MAX_IMAGE_BYTES or _END not in file[-_PADDING:] or file_segments.problem(file, "JPEG"):
        return 0
    try:
        image = Image.open(io.BytesIO(file), formats=("JPEG",))
        is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        components = [component[0] for component in image.layer]  # type: ignore[attr-defined]
    except Exception:  # the CPU decoder reports the error
        return 0
    size = image.width * image.height
    is_plain = (
        image.mode in _MODES
        and not is_rotated
        and components != _RGB
        and image.info.get("adobe_transform", 1) != 0
        and max(image.size) <= MAX_ASPECT_RATIO * min(image.size)
        and size <= _MAX_PIXELS
        and file_segments.scan_bound(file) <= _MAX_SCANS
    )
    return size if is_plain else 0


def _decode(
    files: Sequence[bytes], rows: Sequence[int], fit: Fit, device: str, results: list[torch.Tensor | None]
) -> None:
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]  # noqa: PLC0415

    raw = [torch.frombuffer(bytearray(files[row]), dtype=torch.uint8) for row in rows]
    try:
        with _own_stream(device) as keep:
            images = decode_jpeg(raw, mode=ImageReadMode.RGB, device=device)
            by_size: dict[torch.Size, list[tuple[int, torch.Tensor]]] = defaultdict(list)
            for row, image in zip(rows, images, strict=True):
                by_size[image.shape].append((row, image))
            for same in by_size.values():
                fitted = keep(fit(torch.stack([image for _, image in same])).contiguous())
                for (row, _), pixels in zip(same, fitted, strict=True):
                    results[row] = pixels
    except RuntimeError as error:  # out of memory too
        for row in rows:
            results[row] = None
        if len(rows) == 1:
            # nvJPEG refuses few plain files; many warnings mean that it is missing or out of memory.
            _log.warning("the GPU leaves a JPEG file to the CPU: %s", error)
            return
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            _decode(files, half, fit, device, results)


@contextmanager
def _own_stream(device: str) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A separate stream for one thread at a time, synchronized at the end.

    Yields a function that keeps the memory of a result.

    nvJPEG writes on a stream that torch's allocator does not track, so its memory must not be read by a
    running kernel, neither of the models nor of the previous batch.
    """
    if not is_gpu(device):
        yield lambda result: result
        return
    with _LOCK:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = _streams[device]
        models = torch.cuda.default_stream(device)

        def keep(result: torch.Tensor) -> torch.Tensor:
            result.record_stream(models)  # the memory is reserved until the models have read it
            return result

        stream.synchronize()
        with torch.cuda.stream(stream):
            yield keep
            stream.synchronize()
