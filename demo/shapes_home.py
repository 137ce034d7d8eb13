"""How things for kitchen, home and street look: a function per kind, from a seeded generator to parts."""

import numpy as np

from demo.sampling import chance
from demo.strokes import Part, box, curve, detail, ellipse, leaf, mirrored, shape, star, stroke, turned

Rng = np.random.Generator


def mug(rng: Rng) -> list[Part]:
    """With its handle to the right, full of coffee."""
    top, foot = rng.uniform(26, 34), rng.uniform(0, 4)
    sides = np.concatenate([[(22, top)], ellipse(44, 78, 22 - foot, 6, 180, 0, 24), [(66, top)]])
    return [
        stroke("body", ellipse(66, (top + 78) / 2, 15, 15, -80, 80), 6.5),
        shape("body", sides),
        shape("tint", ellipse(44, top, 22, 6)),
        shape("coffee", ellipse(44, top + 1, 18.5, 4)),
    ]


def teapot(rng: Rng) -> list[Part]:
    """Spout to the left, handle to the right."""
    wide, tall = rng.uniform(24, 28), rng.uniform(19, 23)
    spout = curve([(32, 66), (20, 56), (16, 40), (9, 37), (14, 34), (23, 36), (28, 47), (38, 52)], steps=6)
    return [
        stroke("body", ellipse(50 + wide - 1, 54, 14, 14, -85, 85), 5),
        shape("body", spout),
        shape("shade", box(36, 74, 64, 82, 3)),
        shape("body", ellipse(50, 58, wide, tall)),
        shape("tint", np.concatenate([ellipse(50, 41, 15, 8, 180, 360), [(65, 42), (35, 42)]])),
        shape("trim", ellipse(50, 31, 4, 4)),
        detail("shade", ellipse(50, 44, wide - 9, 5, 10, 170), 1.2),
    ]


def bottle(rng: Rng) -> list[Part]:
    """Upright, with a screw cap."""
    wide, shoulder = rng.uniform(13, 17), rng.uniform(32, 38)
    left = [(43, 22), (43, 27), (50 - wide, shoulder), (50 - wide, 84), (50 - wide + 4, 89), (50, 89)]
    return [
        shape("body", mirrored(left)),
        shape("trim", box(41, 10, 59, 23, 2)),
        detail("outline", [(41.5, 19), (58.5, 19)]),
        stroke("trim", ellipse(50, 9, 5, 4.5, 180, 360), 2.2),
        detail("shade", [(50 - wide + 1, shoulder + 3), (50 + wide - 1, shoulder + 3)]),
        detail("shade", [(50 - wide + 1, 82), (50 + wide - 1, 82)]),
    ]


def lamp(rng: Rng) -> list[Part]:
    """Of a shade, a stem and a foot, lit."""
    top, wide = rng.uniform(30, 38), rng.uniform(28, 33)
    stem = curve([(47, 54), (44, 66), (47, 72), (45, 82), (55, 82), (53, 72), (56, 66), (53, 54)], steps=5)
    plain = box(48, 52, 52, 84, 1)
    shade = [(top, 14), (100 - top, 14), *ellipse(50, 52, wide, 4.5, 0, 180, 20)]
    return [
        shape("trim", stem if chance(rng, 0.6) else plain),
        shape("trim", np.concatenate([ellipse(50, 85, 17, 4.5)])),
        stroke("metal", [(63, 54), (63, 64)], 1),
        shape("glow", ellipse(50, 53, wide - 2, 4)),
        shape("body", np.array(shade)),
        shape("tint", ellipse(50, 14, 50 - top, 2.2)),
    ]


def armchair(rng: Rng) -> list[Part]:
    """From the front, for one."""
    top, curl = rng.uniform(14, 24), rng.uniform(6, 16)
    legs = [stroke("wood", [(x, 78), (x + d, 91)], 4) for x, d in ((24, -2), (76, 2))]
    return [
        *legs,
        shape("body", box(25, top, 75, 70, curl)),
        shape("body", box(22, 62, 78, 81, 4)),
        shape("tint", box(25, 54, 75, 66, 5)),
        shape("body", box(12, 44, 28, 81, 8)),
        shape("body", box(72, 44, 88, 81, 8)),
        shape("metal", ellipse(50, top + 14, 1.6, 1.6), outlined=False),
        shape("metal", ellipse(38, top + 14, 1.6, 1.6), outlined=False),
        shape("metal", ellipse(62, top + 14, 1.6, 1.6), outlined=False),
    ]


def sofa(rng: Rng) -> list[Part]:
    """From the front, for two, wider than tall."""
    top, curl = rng.uniform(30, 37), rng.uniform(4, 11)
    pillow = turned(box(20, 44, 36, 59, 3), rng.uniform(-14, 14), 28, 51)
    return [
        *[stroke("wood", [(x, 76), (x + d, 86)], 3.4) for x, d in ((14, -2), (86, 2))],
        shape("body", box(11, top, 50, 66, curl)),
        shape("body", box(50, top, 89, 66, curl)),
        shape("body", box(8, 64, 92, 79, 3)),
        shape("tint", box(15, 57, 50, 68, 4)),
        shape("tint", box(50, 57, 85, 68, 4)),
        shape("trim", pillow),
        shape("body", box(3, 47, 17, 79, 6)),
        shape("body", box(83, 47, 97, 79, 6)),
    ]


def vase(rng: Rng) -> list[Part]:
    """With one to three cut flowers."""
    neck, belly, at = rng.uniform(6, 10), rng.uniform(17, 24), rng.uniform(58, 70)
    left = [
        (50 - neck - 2, 40),
        (50 - neck, 46),
        (50 - belly, at),
        (50 - belly + 5, 82),
        (50 - belly + 10, 89),
    ]
    profile = curve(left, closed=False)
    parts = []
    for lean in (-13, 12, 0)[: int(rng.integers(1, 4))]:
        x, y = 50 + lean, 14 + abs(lean) * 0.6
        parts.append(
            detail("leaf", curve([(50 + lean / 4, 42), (50 + lean * 0.7, 28), (x, y)], closed=False), 1.8)
        )
        parts.append(shape("leaf", leaf(50 + lean * 0.6, 32, 10, 2.5, 40 if lean < 0 else -40)))
        parts.append(shape("flower", curve(star(x, y, 7.5, 6, 0.6), steps=3)))
        parts.append(shape("heart", ellipse(x, y, 2.4, 2.4), outlined=False))
    return [*parts, shape("shade", ellipse(50, 40, neck + 2, 2.4)), shape("body", mirrored(profile))]


def potted_plant(rng: Rng) -> list[Part]:
    """A leafy plant, a cactus or grasses in a pot."""
    wide, foot = rng.uniform(19, 24), rng.uniform(4, 8)
    pot = [(50 - wide, 58), (50 + wide, 58), (50 + wide - foot, 89), (50 - wide + foot, 89)]
    rim = box(50 - wide - 2, 54, 50 + wide + 2, 63, 2)
    grown = (_leaves, _cactus, _grass)[int(rng.integers(3))](rng)
    return [*grown, shape("body", np.array(pot)), shape("body", rim)]


def _leaves(rng: Rng) -> list[Part]:
    parts = []
    for angle in (-62, 62, -38, 38, -14, 14):
        length = rng.uniform(32, 42)
        turn = angle + rng.uniform(-6, 6)
        parts.append(shape("leaf", leaf(50, 57, length, rng.uniform(7, 9.5), -turn)))
        parts.append(
            detail("stalk", turned(np.array([(50.0, 55), (50, 57 - length * 0.85)]), -turn, 50, 57), 1)
        )
    return parts


def _cactus(rng: Rng) -> list[Part]:
    top = rng.uniform(14, 22)
    arm = rng.uniform(32, 38)
    return [
        stroke("leaf", [(50, 48), (34, 46), (32, arm)], 8),
        stroke("leaf", [(50, 42), (66, 40), (67, arm - 8)], 7),
        shape("leaf", box(42, top, 58, 60, 8)),
        *[detail("stalk", [(x, top + 5), (x, 54)], 0.9) for x in (46, 50, 54)],
        shape("flower", curve(star(50, top, 5, 5, 0.6), steps=3)),
    ]


def _grass(rng: Rng) -> list[Part]:
    turns = rng.uniform(-50, 50, 11)
    return [shape("leaf", leaf(50 + t / 8, 58, rng.uniform(34, 48), 2.6, -t)) for t in turns]


def cushion(rng: Rng) -> list[Part]:
    """Square, with drawn-out corners and piping."""
    a, puff = rng.uniform(13, 17), rng.uniform(17, 21)
    b = 100 - a
    path = curve([(a, a), (50, puff), (b, a), (100 - puff, 50), (b, b), (50, 100 - puff), (a, b), (puff, 50)])
    corners = [ellipse(x, y, 3, 3) for x in (a, b) for y in (a, b)]
    return [
        shape("body", path),
        stroke("trim", np.concatenate([path, path[:1]]), 1.8, outlined=False),
        *[shape("trim", c) for c in corners],
    ]


def clock(rng: Rng) -> list[Part]:
    """Round, on the wall, showing some hour."""
    face, hour = rng.uniform(22, 26), rng.uniform(0, 6.28)
    ticks = []
    for at in np.radians(np.arange(0, 360, 30)):
        way = np.array([np.cos(at), np.sin(at)])
        ticks.append(detail("dark", 50 + np.outer([face - 5, face - 2], way), 1.6))
    return [
        shape("body", ellipse(50, 50, 38, 38)),
        shape("light", ellipse(50, 50, face, face)),
        *ticks,
        stroke("dark", [(50, 50), (50 + 11 * np.cos(hour), 50 + 11 * np.sin(hour))], 2.6, outlined=False),
        stroke(
            "dark", [(50, 50), (50 + 17 * np.cos(hour * 3), 50 + 17 * np.sin(hour * 3))], 1.8, outlined=False
        ),
        shape("trim", ellipse(50, 50, 2.6, 2.6)),
    ]


def bicycle(rng: Rng) -> list[Part]:
    """From the right side, with or without a basket."""
    size, sporty = rng.uniform(18, 20), chance(rng, 0.4)
    parts = []
    for x in (24, 76):
        spokes = [turned(np.array([(x - size, 66.0), (x + size, 66)]), a, x, 66) for a in range(0, 180, 30)]
        parts += [detail("metal", spoke, 0.7) for spoke in spokes]
        parts.append(stroke("dark", ellipse(x, 66, size, size), 3.6, outlined=False))
        parts.append(detail("metal", ellipse(x, 66, size - 2.6, size - 2.6), 0.8))
    top = (70, 36) if sporty else (69, 40)
    seat = (40, 36) if sporty else (39, 42)
    frame = [
        [(24, 66), (47, 66)],
        [(24, 66), seat],
        [(47, 66), seat],
        [(47, 66), top],
        [seat, top],
        [(76, 66), top],
    ]
    parts += [stroke("body", line, 4.6) for line in frame]
    parts += [
        stroke("metal", [seat, (38, 31)], 2),
        shape("dark", curve([(28, 28), (40, 27), (47, 30), (38, 32), (30, 32)], steps=5)),
        stroke("metal", [top, (67, 27)], 2.4),
        stroke("trim", [(67, 27), (75, 31), (76, 37)] if sporty else [(70, 27), (59, 25), (56, 28)], 3),
        shape("metal", ellipse(47, 66, 4.6, 4.6)),
        stroke("dark", [(47, 66), (52, 75)], 1.8, outlined=False),
    ]
    if not sporty:
        parts.append(shape("wood", np.array([(74, 30), (91, 30), (88, 43), (76, 43)])))
    return parts
