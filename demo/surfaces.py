"""What drawings are laid on and filled with: patterns, backdrops and light.

Everything is at the size drawings are made at, SIDE by SIDE pixels, and kept once made.
Knows nothing of products.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.sampling import chance
from demo.strokes import curve, ellipse, star
from demo.world import STYLES, Rgb

OUTPUT = 128
SCALE = 3
SIDE = OUTPUT * SCALE
UNIT = SIDE / 100
PATTERN_VARIANTS = 3
BACKDROPS = 5
FLOOR = 74
"""Where wall and floor meet, in units."""

_WALLS: dict[str, tuple[Rgb, ...]] = {
    "minimalist": ((238, 239, 241), (232, 235, 238), (243, 241, 238), (229, 232, 232), (236, 234, 240)),
    "vintage": ((236, 222, 196), (226, 219, 198), (233, 214, 196), (221, 222, 204), (238, 228, 206)),
    "sporty": ((222, 232, 240), (228, 236, 232), (234, 234, 238), (220, 236, 238), (236, 232, 226)),
    "bohemian": ((242, 214, 192), (238, 222, 200), (232, 210, 204), (226, 220, 206), (244, 220, 184)),
    "elegant": ((206, 200, 196), (196, 198, 204), (208, 198, 204), (200, 204, 198), (212, 206, 196)),
    "playful": ((214, 240, 232), (252, 224, 232), (230, 224, 248), (254, 240, 206), (216, 234, 252)),
    "rustic": ((230, 222, 212), (222, 218, 210), (234, 226, 214), (216, 212, 202), (228, 216, 202)),
}
_FLOORS: dict[str, Rgb] = {
    "minimalist": (222, 223, 225),
    "vintage": (196, 158, 116),
    "sporty": (198, 206, 212),
    "bohemian": (214, 160, 126),
    "elegant": (160, 150, 146),
    "playful": (246, 206, 150),
    "rustic": (178, 142, 106),
}
_CONFETTI: tuple[Rgb, ...] = (
    (255, 140, 150),
    (255, 205, 90),
    (120, 200, 190),
    (150, 160, 240),
    (255, 255, 255),
)


def pixels(path: np.ndarray) -> list[tuple[float, float]]:
    """Units as pixel pairs, the way ImageDraw takes them."""
    return [(x, y) for x, y in (path * UNIT).tolist()]


def shift(color: Rgb, other: Rgb, share: float) -> Rgb:
    """A color moved towards another by a share of the way."""
    r, g, b = (round(a + (o - a) * share) for a, o in zip(color, other, strict=True))
    return r, g, b


@lru_cache
def pattern(name: str, variant: int) -> tuple[Image.Image, Image.Image]:
    """Masks "L" of a pattern's two inks; a variant differs in size."""
    first, second = Image.new("L", (SIDE, SIDE)), Image.new("L", (SIDE, SIDE))
    step = (8.0, 10.5, 13.0)[variant]
    _PATTERNS[name](ImageDraw.Draw(first), ImageDraw.Draw(second), step, np.random.default_rng(variant))
    return first, second


def _grid(step: float) -> list[tuple[float, float]]:
    rows = np.arange(-step, 100 + step, step)
    return [(x + (step / 2 if i % 2 else 0), y) for i, y in enumerate(rows) for x in rows]


def _plain(
    first: ImageDraw.ImageDraw, second: ImageDraw.ImageDraw, step: float, rng: np.random.Generator
) -> None:
    pass


def _striped(
    first: ImageDraw.ImageDraw, second: ImageDraw.ImageDraw, step: float, rng: np.random.Generator
) -> None:
    for y in np.arange(0, 101, step):
        first.rectangle([0, y * UNIT, SIDE, (y + step * 0.45) * UNIT], fill=255)


def _dotted(
    first: ImageDraw.ImageDraw, second: ImageDraw.ImageDraw, step: float, rng: np.random.Generator
) -> None:
    for x, y in _grid(step):
        first.polygon(pixels(ellipse(x, y, step * 0.27, step * 0.27, steps=20)), fill=255)


def _checked(
    first: ImageDraw.ImageDraw, second: ImageDraw.ImageDraw, step: float, rng: np.random.Generator
) -> None:
    lines = np.arange(0, 101, step)
    for at in lines:
        first.rectangle([0, at * UNIT, SIDE, (at + step / 2) * UNIT], fill=130)
    for at in lines:
        first.rectangle([at * UNIT, 0, (at + step / 2) * UNIT, SIDE], fill=130)
        for y in lines:
            first.rectangle([at * UNIT, y * UNIT, (at + step / 2) * UNIT, (y + step / 2) * UNIT], fill=255)


def _floral(
    first: ImageDraw.ImageDraw, second: ImageDraw.ImageDraw, step: float, rng: np.random.Generator
) -> None:
    for x, y in _grid(step * 1.55):
        radius = step * rng.uniform(0.5, 0.62)
        for petal in np.radians(np.arange(0, 360, 72) + rng.uniform(0, 72)):
            at = (x + radius * 0.62 * np.cos(petal), y + radius * 0.62 * np.sin(petal))
            first.polygon(pixels(ellipse(*at, radius * 0.46, radius * 0.46, steps=16)), fill=255)
        second.polygon(pixels(ellipse(x, y, radius * 0.36, radius * 0.36, steps=14)), fill=255)


def _zigzag(
    first: ImageDraw.ImageDraw, second: ImageDraw.ImageDraw, step: float, rng: np.random.Generator
) -> None:
    xs = np.arange(-step, 101 + step, step / 2)
    for y in np.arange(-step, 101, step * 1.1):
        line = np.stack([xs, y + np.where(np.arange(len(xs)) % 2, step * 0.55, 0)], 1)
        first.line(pixels(line), fill=255, width=round(step * 0.32 * UNIT), joint="curve")


def _wavy(
    first: ImageDraw.ImageDraw, second: ImageDraw.ImageDraw, step: float, rng: np.random.Generator
) -> None:
    xs = np.arange(0, 101, 1.0)
    for y in np.arange(-step, 101, step * 0.95):
        line = np.stack([xs, y + step * 0.28 * np.sin(xs * 2 * np.pi / (step * 2.2))], 1)
        first.line(pixels(line), fill=255, width=round(step * 0.3 * UNIT), joint="curve")


def _starry(
    first: ImageDraw.ImageDraw, second: ImageDraw.ImageDraw, step: float, rng: np.random.Generator
) -> None:
    for x, y in _grid(step * 1.25):
        first.polygon(pixels(star(x, y, step * rng.uniform(0.38, 0.52))), fill=255)


_PATTERNS = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
    "floral": _floral,
    "zigzag": _zigzag,
    "wavy": _wavy,
    "starry": _starry,
}


@lru_cache
def backdrop(style: str, variant: int, item_status: bool) -> Image.Image:
    """A wall, "RGB", and where things stand a floor, in the manner of a style."""
    wall = _WALLS[style][variant]
    picture = Image.new("RGB", (SIDE, SIDE), wall)
    draw = ImageDraw.Draw(picture)
    rng = np.random.default_rng([STYLES.index(style), variant])
    _MOTIFS[style](draw, wall, rng)
    if item_status:
        floor = shift(_FLOORS[style], wall, rng.uniform(0, 0.4))
        draw.rectangle([0, FLOOR * UNIT, SIDE, SIDE], fill=floor)
        if style in ("rustic", "vintage"):
            for y in (81, 90):
                draw.line([(0, y * UNIT), (SIDE, y * UNIT)], fill=shift(floor, (60, 40, 20), 0.18), width=3)
        picture = Image.blend(picture, picture.filter(ImageFilter.GaussianBlur(2)), 0.8)
    light = radial().point([round(60 * (1 - v / 255)) for v in range(256)])
    picture.paste((40, 30, 30), (0, 0), light)
    return picture


def _nothing(draw: ImageDraw.ImageDraw, wall: Rgb, rng: np.random.Generator) -> None:
    pass


def _wallpaper(draw: ImageDraw.ImageDraw, wall: Rgb, rng: np.random.Generator) -> None:
    for x in range(0, 100, 10):
        draw.rectangle([x * UNIT, 0, (x + 5) * UNIT, SIDE], fill=shift(wall, (150, 120, 80), 0.1))


def _bands(draw: ImageDraw.ImageDraw, wall: Rgb, rng: np.random.Generator) -> None:
    at = rng.uniform(20, 60)
    for start, share in ((at, 0.16), (at + 22, 0.3)):
        band = [(start, 0), (start + 14, 0), (start - 46, 100), (start - 60, 100)]
        draw.polygon(pixels(np.array(band)), fill=shift(wall, (90, 140, 190), share))


def _sun(draw: ImageDraw.ImageDraw, wall: Rgb, rng: np.random.Generator) -> None:
    x = rng.uniform(38, 62)
    for radius, share in ((44, 0.14), (36, 0.24), (28, 0.36)):
        draw.polygon(pixels(ellipse(x, 62, radius, radius)), fill=shift(wall, (214, 120, 70), share))


def _curtain(draw: ImageDraw.ImageDraw, wall: Rgb, rng: np.random.Generator) -> None:
    for i in range(0, SIDE, 4):
        wave = 0.5 + 0.5 * np.sin(i / rng.uniform(13.5, 14.5))
        draw.rectangle([i, 0, i + 4, SIDE], fill=shift(wall, (120, 108, 112), 0.22 * wave))


def _party(draw: ImageDraw.ImageDraw, wall: Rgb, rng: np.random.Generator) -> None:
    for _ in range(34):
        x, y, r = rng.uniform(0, 100), rng.uniform(0, 100), rng.uniform(1, 2.2)
        blob = ellipse(x, y, r, r, steps=14) if chance(rng, 0.6) else curve(star(x, y, r * 1.4), steps=2)
        draw.polygon(pixels(blob), fill=shift(wall, _CONFETTI[int(rng.integers(5))], 0.75))


def _planks(draw: ImageDraw.ImageDraw, wall: Rgb, rng: np.random.Generator) -> None:
    for x in np.arange(rng.uniform(0, 14), 101, 15):
        draw.line([(x * UNIT, 0), (x * UNIT, SIDE)], fill=shift(wall, (110, 90, 70), 0.45), width=5)
        for _ in range(3):
            y, at = rng.uniform(0, 100), x + rng.uniform(3, 12)
            grain = [(at * UNIT, y * UNIT), (at * UNIT, (y + 18) * UNIT)]
            draw.line(grain, fill=shift(wall, (130, 110, 90), 0.2), width=2)


_MOTIFS = {
    "minimalist": _nothing,
    "vintage": _wallpaper,
    "sporty": _bands,
    "bohemian": _sun,
    "elegant": _curtain,
    "playful": _party,
    "rustic": _planks,
}


@lru_cache
def radial() -> Image.Image:
    """Light "L" that is brightest left above the middle and falls off towards the corners."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    fall = np.hypot(x - 0.42, y - 0.4) / 0.95
    return Image.fromarray((255 * np.clip(1 - fall**2, 0, 1)).astype(np.uint8))


@lru_cache
def shading(round_: bool) -> tuple[Image.Image, Image.Image]:
    """Masks "L" of shadow and of light on a body: round ones darken towards both sides, flat ones to one."""
    y, x = np.mgrid[0:96, 0:96] / 95
    if round_:
        dark = 0.5 * np.clip((np.abs(x - 0.42) - 0.2) / 0.5, 0, 1) ** 1.5 + 0.1 * y
        light = 0.42 * np.exp(-(((x - 0.3) / 0.09) ** 2)) * np.clip(1.15 - y, 0, 1)
    else:
        dark = 0.3 * np.clip((x + y - 0.9) / 1.1, 0, 1)
        light = 0.24 * np.clip((0.75 - x - y) / 0.75, 0, 1)
    dark_mask, light_mask = (Image.fromarray((255 * a).astype(np.uint8)) for a in (dark, light))
    return dark_mask, light_mask
