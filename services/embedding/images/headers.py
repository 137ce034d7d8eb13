"""Reads image headers and checks limits before decoding takes memory or time.

Limits depend on the format because decoders differ: libjpeg can decode a large file at an eighth of its size;
libwebp, libavif and libheif always decode the whole image.
"""

import io
import re
import struct
import warnings
from dataclasses import dataclass

from PIL import AvifImagePlugin, Image
from pillow_heif import register_heif_opener

from services.catalog.items import MAX_IMAGE_BYTES
from services.core.errors import InvalidArgument
from services.embedding.images import file_segments

MAX_MEGAPIXELS = {"JPEG": 100, "PNG": 100, "GIF": 100, "WEBP": 25, "AVIF": 25, "HEIF": 50}
FORMATS = tuple(MAX_MEGAPIXELS)
NAMES = "JPEG, PNG, GIF, WebP, AVIF or HEIC"
MAX_MEMORY = 512 << 20
"""Bytes that decoding one file may take."""

_PLAIN_MEMORY = 64 << 20
_PLAIN_WORK = 150_000_000  # pixel visits; a third of a second
# Bytes per pixel, measured as the growth of a process's peak memory, including the decoder's buffers.
_WHOLE_BYTES = {"WEBP": 16, "AVIF": 12, "HEIF": 10}
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}
_PIXEL_BYTES = 4
_COEFFICIENT_BYTES = 2
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_OTHERS = {
    b"BM": "a BMP file",
    b"II*\0": "a TIFF file",
    b"MM\0*": "a TIFF file",
    b"%PDF": "a PDF file",
    b"\xff\x0a": "a JPEG XL file",
    b"\0\0\0\x0cJXL ": "a JPEG XL file",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 file",
    b"8BPS": "a Photoshop file",
}

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the default uses all cores for one image
register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


@dataclass(frozen=True)
class ImageHeader:
    """An image file before its pixels are decoded.

    `memory` is the bytes that decoding takes, `work` the number of pixel visits. `image` is the opened file
    if opening allocates nothing.
    """

    format: str
    memory: int
    work: int
    image: Image.Image | None = None

    @property
    def is_costly(self) -> bool:
        """Whether to decode in a process that can be killed: slow, large, or a complex decoder."""
        return self.format in ("AVIF", "HEIF") or self.memory > _PLAIN_MEMORY or self.work > _PLAIN_WORK


def read_header(data: bytes, target: int, field: str) -> ImageHeader:
    """Read the header of a file that will be resized to a side of `target` pixels.

    Raises:
        InvalidArgument: `field` is empty, over a limit, of another format, or damaged.
    """
    if not data:
        raise InvalidArgument.of(field, "is empty")
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidArgument.of(field, f"has {len(data)} bytes, at most {MAX_IMAGE_BYTES} are allowed")
    form = format_of(data)
    if form is None:
        raise InvalidArgument.of(field, f"is not a readable {NAMES} file{_describe_other(data)}")
    if form in _WHOLE_BYTES:
        width, height = _webp_size(data) if form == "WEBP" else _largest_extent(data)
        check_size(width, height, form, field)
        header = ImageHeader(form, width * height * _WHOLE_BYTES[form], width * height)
    else:
        header = _open(data, form, target, field)
    if header.memory > MAX_MEMORY:
        problem = (
            f"needs {header.memory >> 20} MiB of memory to decode, at most {MAX_MEMORY >> 20} are allowed"
        )
        raise InvalidArgument.of(field, problem)
    return header


def format_of(data: bytes) -> str | None:
    """The format of a file by its first bytes, one of FORMATS; None for any other."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if any(brand in brands for brand in _HEIF_BRANDS):
            return "HEIF"
    return None


def check_size(width: int, height: int, form: str, field: str) -> None:
    """Raise InvalidArgument if an image has more pixels than allowed for its format."""
    if width * height > MAX_MEGAPIXELS[form] * 1_000_000:
        problem = f"has {width} x {height} pixels, at most {MAX_MEGAPIXELS[form]} megapixels"
        raise InvalidArgument.of(field, f"{problem} are allowed of a {form} file")


def open_image(data: bytes, form: str, field: str) -> Image.Image:
    """Open a file by Pillow; a WebP allocates its canvas here.

    Raises:
        InvalidArgument: `field` has more pixels than allowed for its format.
        Exception: nearly any type, for a damaged file.
    """
    with warnings.catch_warnings():
        # Our own limits replace Pillow's.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=(form,))
    check_size(*image.size, form, field)
    return image


def damage_error(field: str, error: Exception) -> InvalidArgument:
    """Convert a decoder's exception for a damaged file."""
    if isinstance(error, Image.DecompressionBombError):
        return InvalidArgument.of(field, f"has more pixels than allowed: {error}")
    return InvalidArgument.of(field, f"is damaged: {error}")


def _open(data: bytes, form: str, target: int, field: str) -> ImageHeader:
    if problem := file_segments.problem(data, form):
        raise InvalidArgument.of(field, problem)
    scans = max(file_segments.scan_bound(data), 1) if form == "JPEG" else 1
    try:
        image = open_image(data, form, field)
        pixels = image.width * image.height
        memory = _coefficients(image) if scans > 1 else 0
        image.draft("RGB", (2 * target, 2 * target))
    except InvalidArgument:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise damage_error(field, error) from None
    memory += image.width * image.height * _MODE_BYTES.get(image.mode, _PIXEL_BYTES)
    return ImageHeader(form, memory, pixels * scans, image)


def _coefficients(image: Image.Image) -> int:
    """Bytes of the coefficients that libjpeg stores for a file with several scans, at any output size."""
    layers = image.layer  # type: ignore[attr-defined]  # (id, horizontal, vertical, table) of each component
    across, down = max(layer[1] for layer in layers), max(layer[2] for layer in layers)
    share = sum(layer[1] * layer[2] for layer in layers) / (across * down)
    return int(image.width * image.height * share * _COEFFICIENT_BYTES)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP file (RFC 9649), 0 if truncated; Pillow allocates the canvas on open."""
    kind, body = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", body[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _largest_extent(data: bytes) -> tuple[int, int]:
    """The largest width and height in the `ispe` boxes of AVIF and HEIC files (ISO/IEC 23008-12), or 0."""
    extents = [struct.unpack(">II", match[1]) for match in re.finditer(rb"ispe\0{4}(.{8})", data, re.DOTALL)]
    width, height = max(extents, key=lambda extent: extent[0] * extent[1], default=(0, 0))
    return width, height


def _describe_other(data: bytes) -> str:
    """A description of a file of another type, for the error message."""
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return ": it is an HTML page, such as a server sends in place of an image"
    if start.startswith((b"<svg", b"<?xml")):
        return ": it is an SVG or another XML file"
    kind = next((kind for magic, kind in _OTHERS.items() if data.startswith(magic)), "")
    return f": it is {kind}" if kind else ""
