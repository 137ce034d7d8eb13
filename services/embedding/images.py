"""Image files into RGB pictures. Knows nothing of models, and fetches nothing."""

import io
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ExifTags, Image, UnidentifiedImageError

from services.catalog import MAX_IMAGE_BYTES
from services.errors import InvalidArgument

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 100_000_000
LONGEST = 4
"""Of a picture longer than so many times its shorter side, only the middle is looked at."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PixelBudget:
    """How many pixels may be decoded at once, whoever asks: memory is theirs, not the file's.

    First come, first served; what is larger than the budget waits until nothing else is decoded.
    """

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self._all = self._left = pixels
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def taking(self, pixels: int) -> Iterator[None]:
        """Wait for so many pixels and hold them."""
        held, ticket = min(pixels, self._all), object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket and self._left >= held)
            self._waiting.popleft()
            self._left -= held
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._left += held
                self._changed.notify_all()


def load(
    data: bytes, target: int, field: str = "image.data", budget: PixelBudget | None = None
) -> Image.Image:
    """The picture in an image file: RGB, upright, transparency on white, of a GIF the first frame.

    `target` is the side the model wants; the picture may come back smaller than it was, though
    never with a side below twice that. Its pixels are taken from `budget` meanwhile.

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
        with (budget or PixelBudget()).taking(picture.width * picture.height):
            return _reduced(_on_white(_middle(_upright(picture))), target)
    except UnidentifiedImageError:
        raise InvalidArgument.of(field, f"is not a readable {', '.join(FORMATS)} file") from None
    except Image.DecompressionBombError:
        raise InvalidArgument.of(field, f"has more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # of damaged files Pillow raises nearly everything
        raise InvalidArgument.of(field, f"is damaged: {error}") from None


def _check_size(picture: Image.Image, field: str) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise InvalidArgument.of(field, f"has more than {MAX_PIXELS} pixels")


def _middle(picture: Image.Image) -> Image.Image:
    """Of a long picture the middle: a model sees a square of it, and a line would be resized to a plane."""
    width, height = (min(side, LONGEST * min(picture.size)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    same = (width, height) == picture.size
    return picture if same else picture.crop((left, top, left + width, top + height))


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF says, of which nothing else is read: cameras write the oddest."""
    turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return picture if turn is None else picture.transpose(turn)


def _reduced(picture: Image.Image, target: int) -> Image.Image:
    """The same by a whole factor smaller, as a JPEG comes already (libjpeg's scaled decoding)."""
    factor = min(picture.size) // (2 * target)
    return picture.reduce(factor) if factor > 1 else picture


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.new("RGBA", layer.size, "white")
        picture.alpha_composite(layer)
    return picture.convert("RGB")
