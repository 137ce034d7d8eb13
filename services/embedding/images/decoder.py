"""Decodes image files to RGB images."""

from PIL import ExifTags, Image

from services.core.errors import InvalidArgument
from services.embedding.images.headers import ImageHeader, damage_error, open_image, read_header

MAX_ASPECT_RATIO = 4
"""A longer image is cropped to its middle with this aspect ratio."""
_STRIP = 1 << 20
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HIGH_BYTE = [value >> 8 for value in range(1 << 16)]

Box = tuple[int, int, int, int]
"""Left, top, right and bottom."""


def load(data: bytes, target: int, field: str = "image.data") -> Image.Image:
    """Decode an image file to RGB: upright, transparency on white, the first frame of an animation.

    `target` is the side of the model's input. The result may be smaller than the file's image, but no side is
    below twice the target.

    Raises:
        InvalidArgument: `field` is empty, over a limit, of another format, or damaged.
        MemoryError: memory is insufficient.
    """
    return decode(data, read_header(data, target, field), target, field)


def decode(data: bytes, header: ImageHeader, target: int, field: str) -> Image.Image:
    """Decode a file whose header has been read; see `load`."""
    try:
        image = header.image or open_image(data, header.format, field)
        image.load()
        transpose = _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        image = _reduce(image, _middle(image), target)
        return image if transpose is None else image.transpose(transpose)
    except (InvalidArgument, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise damage_error(field, error) from None


def _middle(image: Image.Image) -> Box:
    """The middle of a long image: the model sees a square, and resizing a line would need much memory."""
    width, height = (min(side, MAX_ASPECT_RATIO * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return left, top, left + width, top + height


def _reduce(image: Image.Image, box: Box, target: int) -> Image.Image:
    """The `box` of an image in RGB, reduced by an integer factor; libjpeg has already reduced a JPEG.

    Works strip by strip, because converting the whole image would double the memory.
    """
    left, top, right, bottom = box
    factor = max(min(right - left, bottom - top) // (2 * target), 1)
    if factor == 1:
        return _on_white(image if box == (0, 0, *image.size) else image.crop(box))
    small = Image.new("RGB", (-(-(right - left) // factor), -(-(bottom - top) // factor)))
    rows = max(_STRIP // (factor * (right - left)), 1) * factor
    for start in range(top, bottom, rows):
        strip = image.crop((left, start, right, min(start + rows, bottom)))
        small.paste(_on_white(strip).reduce(factor), (0, (start - top) // factor))
    return small


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion clips at 255
        return image.convert("I").point(_HIGH_BYTE, "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image if image.mode == "RGB" else image.convert("RGB")
