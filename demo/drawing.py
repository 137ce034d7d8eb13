"""Draw a product as a small image.

A sketch says what to draw; equal sketches give equal pictures. Knows nothing of shops,
texts or people.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from demo import shapes_home, shapes_worn
from demo.sampling import chance
from demo.strokes import Part, ribbon, turned
from demo.surfaces import (
    BACKDROPS,
    PATTERN_VARIANTS,
    SCALE,
    SIDE,
    UNIT,
    backdrop,
    pattern,
    pixels,
    shading,
    shift,
)
from demo.world import COLORS, PATTERNS, Rgb

_BLACK: Rgb = (18, 14, 20)
_WHITE: Rgb = (255, 255, 255)
_OUTLINE = 1.1
_SMOOTH = 8
"""Paths of more points are curves; ImageDraw's wide lines would fray on their short pieces."""
_JPEG_QUALITY = 88

_SHAPES: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "mug": shapes_home.mug,
    "teapot": shapes_home.teapot,
    "bottle": shapes_home.bottle,
    "T-shirt": shapes_worn.t_shirt,
    "jumper": shapes_worn.jumper,
    "dress": shapes_worn.dress,
    "skirt": shapes_worn.skirt,
    "trousers": shapes_worn.trousers,
    "sneakers": shapes_worn.sneakers,
    "boots": shapes_worn.boots,
    "hat": shapes_worn.hat,
    "scarf": shapes_worn.scarf,
    "handbag": shapes_worn.handbag,
    "backpack": shapes_worn.backpack,
    "watch": shapes_worn.watch,
    "sunglasses": shapes_worn.sunglasses,
    "umbrella": shapes_worn.umbrella,
    "lamp": shapes_home.lamp,
    "armchair": shapes_home.armchair,
    "sofa": shapes_home.sofa,
    "vase": shapes_home.vase,
    "potted plant": shapes_home.potted_plant,
    "cushion": shapes_home.cushion,
    "clock": shapes_home.clock,
    "bicycle": shapes_home.bicycle,
}
_ROUND = frozenset(("mug", "teapot", "bottle", "vase", "lamp", "boots", "potted plant"))
_STANDING = _ROUND | {"sneakers", "handbag", "backpack", "armchair", "sofa", "bicycle"}

_TRIMS: dict[str, tuple[Rgb, ...]] = {
    "minimalist": (),
    "vintage": ((176, 128, 74), (150, 92, 62)),
    "sporty": ((250, 250, 250), (206, 240, 70), (255, 112, 60)),
    "bohemian": ((198, 92, 52), (44, 160, 150), (226, 170, 60)),
    "elegant": ((214, 178, 84), (226, 200, 140)),
    "playful": ((255, 200, 50), (255, 110, 160), (90, 200, 230)),
    "rustic": ((146, 102, 62), (108, 82, 60)),
}
_INKS: tuple[Rgb, ...] = (
    (252, 250, 244),
    (252, 250, 244),
    (30, 40, 80),
    (250, 214, 90),
    (214, 60, 60),
    (60, 60, 64),
    (40, 140, 140),
    (250, 176, 196),
)
_FIXED: dict[str, Rgb] = {
    "metal": (186, 190, 196),
    "wood": (150, 106, 66),
    "dark": (48, 46, 50),
    "light": (250, 249, 246),
    "coffee": (74, 46, 30),
    "leaf": (74, 142, 82),
    "stalk": (50, 104, 62),
    "glow": (255, 240, 190),
    "lens": (54, 58, 68),
    "gleam": (150, 158, 172),
    "heart": (250, 206, 80),
}
_FLOWERS: tuple[Rgb, ...] = (
    (250, 246, 240),
    (248, 160, 176),
    (250, 204, 96),
    (170, 140, 214),
    (240, 110, 90),
)


@dataclass(frozen=True)
class Sketch:
    """What to draw: names as in `demo.world`, the seed of the form and the seed of the image."""

    kind: str
    color: str
    pattern: str
    style: str
    form: tuple[int, ...]
    image_seed: int


def draw(sketch: Sketch) -> Image.Image:
    """The picture, "RGB", OUTPUT pixels square."""
    form, view = np.random.default_rng(sketch.form), np.random.default_rng(sketch.image_seed)
    stands = sketch.kind in _STANDING
    parts = _place(_SHAPES[sketch.kind](form), view, stands)
    paints = _paints(sketch, form)
    canvas = backdrop(sketch.style, int(view.integers(BACKDROPS)), stands).copy()
    silhouette = _mask(parts)
    _cast_shadow(canvas, silhouette, stands)
    variant = int(form.integers(PATTERN_VARIANTS))
    for part in parts:
        _paint(canvas, part, paints, sketch.pattern, variant)
    _light(canvas, silhouette, sketch.kind in _ROUND)
    return canvas.reduce(SCALE)


def render_jpeg(sketch: Sketch) -> bytes:
    """The picture as a JPEG file."""
    out = io.BytesIO()
    draw(sketch).save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue()


def _paints(sketch: Sketch, form: np.random.Generator) -> dict[str, Rgb]:
    body = next(c.rgb for c in COLORS if c.name == sketch.color)
    r, g, b = (int(np.clip(v + d, 0, 255)) for v, d in zip(body, form.integers(-8, 9, 3), strict=True))
    body = (r, g, b)
    trims = [t for t in _TRIMS[sketch.style] if _contrast(t, body) > 40]  # noqa: PLR2004 - levels of 255
    dark = shift(body, _BLACK, 0.3) if _luma(body) > 70 else shift(body, _WHITE, 0.24)  # noqa: PLR2004 - as above
    inks = [ink for ink in _INKS if abs(_luma(ink) - _luma(body)) > 62]  # noqa: PLR2004 - as above
    ink = inks[int(form.integers(len(inks)))]
    return _FIXED | {
        "body": body,
        "shade": shift(body, _BLACK, 0.28) if _luma(body) > 60 else shift(body, _WHITE, 0.16),  # noqa: PLR2004 - as above
        "tint": shift(body, _WHITE, 0.2),
        "outline": shift(body, _BLACK, 0.5),
        "trim": trims[int(form.integers(len(trims)))] if trims else dark,
        "ink": ink,
        "centre": (248, 200, 70) if _luma(ink) > 150 else (250, 240, 220),  # noqa: PLR2004 - as above
        "flower": _FLOWERS[int(form.integers(len(_FLOWERS)))],
    }


def _luma(color: Rgb) -> float:
    return 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]


def _contrast(a: Rgb, b: Rgb) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2


def _place(parts: list[Part], view: np.random.Generator, stands: bool) -> list[Part]:
    """The parts in the view of this image: scaled, turned, mirrored."""
    scale, flip = view.uniform(0.86, 0.99), stands and chance(view, 0.5)
    turn = view.uniform(-2, 2) if stands else view.uniform(-9, 9)
    dx, dy = view.uniform(-2.5, 2.5, 2) if not stands else (view.uniform(-3, 3), 0)
    placed = []
    for part in parts:
        path = part.path.copy()
        if flip:
            path[:, 0] = 100 - path[:, 0]
        path = turned(path, turn)
        path = (path - [50, 90 if stands else 50]) * scale + [50 + dx, (90 if stands else 50) + dy]
        placed.append(Part(part.paint, path, part.width * scale, part.outlined))
    return placed


def _mask(parts: list[Part], widen: float = 0.0) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    for part in parts:
        _trace(ImageDraw.Draw(mask), part, widen)
    return mask


def _trace(draw: ImageDraw.ImageDraw, part: Part, widen: float = 0.0, fill: int | Rgb = 255) -> None:
    path = pixels(part.path)
    if not part.width:
        draw.polygon(path, fill=fill)
        return
    width = max(1, round((part.width + widen) * UNIT))
    if len(path) > _SMOOTH:
        draw.polygon(pixels(ribbon(part.path, width / UNIT)), fill=fill)
    else:
        draw.line(path, fill=fill, width=width, joint="curve")
    r = width / 2 - 0.5
    for x, y in (path[0], path[-1]):
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)


def _cast_shadow(canvas: Image.Image, silhouette: Image.Image, stands: bool) -> None:
    small = silhouette.reduce(6)
    soft = Image.new("L", small.size)
    soft.paste(small, (1, 2))
    if stands:
        box = silhouette.getbbox() or (0, 0, SIDE, SIDE)
        x, wide = (box[0] + box[2]) / 12, (box[2] - box[0]) / 12
        foot = box[3] / 6
        ground = Image.new("L", small.size)
        ImageDraw.Draw(ground).ellipse([x - wide, foot - 3, x + wide * 1.15, foot + 3], fill=255)
        soft = ImageChops.lighter(soft.point([v // 2 for v in range(256)]), ground)
    soft = soft.filter(ImageFilter.GaussianBlur(2.6)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    canvas.paste(_BLACK, (0, 0), soft.point([v * 5 // 12 for v in range(256)]))


def _paint(canvas: Image.Image, part: Part, paints: dict[str, Rgb], name: str, variant: int) -> None:
    draw = ImageDraw.Draw(canvas)
    color = paints[part.paint]
    edge = shift(color, _BLACK, 0.42)
    if part.outlined and part.width:
        _trace(draw, part, 2 * _OUTLINE * 0.8, edge)
    _trace(draw, part, fill=color)
    if part.paint == "body" and name != PATTERNS[0]:
        mask = _mask([part])
        box = mask.getbbox() or (0, 0, SIDE, SIDE)  # most parts are a small piece of the canvas
        mask = mask.crop(box)
        for ink, layer in zip(("ink", "centre"), pattern(name, variant), strict=True):
            if layer.getbbox():
                canvas.paste(paints[ink], box, ImageChops.multiply(mask, layer.crop(box)))
    if part.outlined and not part.width:
        path = pixels(part.path)
        draw.line([*path, *path[:2]], fill=edge, width=round(_OUTLINE * UNIT), joint="curve")


def _light(canvas: Image.Image, silhouette: Image.Image, round_: bool) -> None:
    left, top, right, bottom = silhouette.getbbox() or (0, 0, SIDE, SIDE)
    size = (right - left, bottom - top)
    part = silhouette.crop((left, top, right, bottom))
    for color, layer in zip((_BLACK, _WHITE), shading(round_), strict=True):
        mask = ImageChops.multiply(part, layer.resize(size, Image.Resampling.BILINEAR))
        canvas.paste(color, (left, top), mask)
