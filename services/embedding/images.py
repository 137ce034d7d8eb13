"""Image files into RGB pictures. Knows nothing of models, and fetches nothing."""

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from services.catalog import MAX_IMAGE_BYTES
from services.errors import InvalidArgument

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 100_000_000


def load(data: bytes, target: int, field: str = "image.data") -> Image.Image:
    """The picture in an image file: RGB, upright, transparency on white, of a GIF the first frame.

    `target` is the side the model wants; a JPEG may come back smaller than it was, though
    never with a side below twice that (libjpeg's scaled decoding).

    Raises:
        InvalidArgument: `field` is empty, too large, of another format, or damaged.
    """
    if not data:
        raise InvalidArgument.of(field, "is empty")
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidArgument.of(field, f"has {len(data)} bytes, at most {MAX_IMAGE_BYTES} are allowed")
    try:
        with warnings.catch_warnings():
            # Our own limit below is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(picture, field)
        picture.draft("RGB", (2 * target, 2 * target))
        return _on_white(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise InvalidArgument.of(field, f"is not a readable {', '.join(FORMATS)} file") from None
    except Image.DecompressionBombError:
        raise InvalidArgument.of(field, f"has more than {MAX_PIXELS} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises on damaged files
        raise InvalidArgument.of(field, f"is damaged: {error}") from None


def _check_size(picture: Image.Image, field: str) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise InvalidArgument.of(field, f"has more than {MAX_PIXELS} pixels")


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.new("RGBA", layer.size, "white")
        picture.alpha_composite(layer)
    return picture.convert("RGB")
