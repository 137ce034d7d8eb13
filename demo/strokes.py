"""The geometry that drawings are made of: closed shapes and strokes on a canvas of 100 by 100 units.

x grows to the right, y downwards; a path is float64 (P, 2). Knows nothing of colors or pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Points = Sequence[tuple[float, float]] | np.ndarray


@dataclass(frozen=True)
class Part:
    """One piece of a drawing: what it is painted with, its path, and its width where it is a stroke."""

    paint: str
    path: np.ndarray
    width: float = 0.0
    outlined: bool = True


def shape(paint: str, path: Points, *, outlined: bool = True) -> Part:
    """A filled closed shape."""
    return Part(paint, np.asarray(path, float), outlined=outlined)


def stroke(paint: str, path: Points, width: float, *, outlined: bool = True) -> Part:
    """A line with round ends."""
    return Part(paint, np.asarray(path, float), width, outlined)


def detail(paint: str, path: Points, width: float = 1.2) -> Part:
    """A fine line without an outline: a seam, a tick, a zip."""
    return stroke(paint, path, width, outlined=False)


def ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, steps: int = 40
) -> np.ndarray:
    """An ellipse or an arc of one, in degrees clockwise from the right."""
    angles = np.radians(np.linspace(start, end, steps))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def box(x0: float, y0: float, x1: float, y1: float, radius: float = 0) -> np.ndarray:
    """A rectangle with rounded corners."""
    if not radius:
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)
    r = min(radius, (x1 - x0) / 2, (y1 - y0) / 2)
    corners = ((x1 - r, y1 - r, 0), (x0 + r, y1 - r, 90), (x0 + r, y0 + r, 180), (x1 - r, y0 + r, 270))
    return np.concatenate([ellipse(x, y, r, r, a, a + 90, 9) for x, y, a in corners])


def mirrored(left: Points) -> np.ndarray:
    """A shape symmetric about x = 50 from its left side, top to bottom."""
    half = np.asarray(left, float)
    mirror = half[::-1].copy()
    mirror[:, 0] = 100 - mirror[:, 0]
    return np.concatenate([half, mirror])


def curve(points: Points, *, closed: bool = True, steps: int = 8) -> np.ndarray:
    """A smooth line through points (Catmull and Rom, 1974)."""
    p = np.asarray(points, float)
    around = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(around, around[1:], around[2:], around[3:], strict=False):
        pieces.append(
            0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        )
    return np.concatenate(pieces if closed else [*pieces, p[-1:]])


def turned(path: np.ndarray, degrees: float, x: float = 50, y: float = 50) -> np.ndarray:
    """The path turned clockwise about a point."""
    a = np.radians(degrees)
    centre = np.array([x, y])
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    return np.asarray((path - centre) @ turn + centre)


def leaf(x: float, y: float, length: float, breadth: float, degrees: float) -> np.ndarray:
    """A leaf that grows from (x, y), straight up at 0 degrees."""
    path = curve(
        [(x, y), (x - breadth, y - length * 0.45), (x, y - length), (x + breadth, y - length * 0.45)]
    )
    return turned(path, degrees, x, y)


def star(x: float, y: float, radius: float, points: int = 5, inner: float = 0.42) -> np.ndarray:
    """A star, or with `inner` near 1 a flower of so many petals."""
    angles = np.radians(np.arange(2 * points) * 180 / points - 90)
    reach = np.where(np.arange(2 * points) % 2, inner, 1.0) * radius
    return np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], 1)


def ribbon(path: np.ndarray, width: float) -> np.ndarray:
    """The outline of a smooth path drawn with a width."""
    apart = np.append(True, np.abs(np.diff(path, axis=0)).sum(1) > 1e-9)  # noqa: PLR2004 - rounding
    path = path[apart]
    along = np.gradient(path, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
    return np.concatenate([path + normal * width / 2, (path - normal * width / 2)[::-1]])
