"""How clothes, shoes and accessories look: a function per kind, from a seeded generator to parts."""

import numpy as np

from demo.sampling import chance
from demo.strokes import Part, box, curve, detail, ellipse, mirrored, shape, stroke

Rng = np.random.Generator


def t_shirt(rng: Rng) -> list[Part]:
    """Spread out flat, with short sleeves."""
    hem, sleeve = rng.uniform(80, 86), rng.uniform(46, 54)
    body = mirrored(
        [
            (41, 19),
            (33, 21),
            (24, 26),
            (11, 42),
            (22, sleeve),
            (31, 43),
            (31, hem - 2),
            (32, hem),
            (50, hem + 1),
        ]
    )
    return [
        shape("body", body),
        shape("shade", ellipse(50, 19, 9, 6)),
        stroke("trim", ellipse(50, 19, 9.5, 7, 0, 180), 2.4),
        detail("shade", [(31, 43), (32, 33)]),
        detail("shade", [(69, 43), (68, 33)]),
        detail("trim", [(12.5, 43), (22, sleeve - 2)], 1.8),
        detail("trim", [(87.5, 43), (78, sleeve - 2)], 1.8),
    ]


def jumper(rng: Rng) -> list[Part]:
    """Spread out flat, with long sleeves, ribbed at cuffs, neck and hem."""
    hem, cuff = rng.uniform(78, 83), rng.uniform(70, 76)
    body = mirrored(
        [(41, 19), (32, 22), (24, 30), (11, cuff), (22, cuff + 3), (32, 46), (31, hem), (50, hem)]
    )
    high = rng.uniform(9, 16)
    cuffs = mirrored([(11.5, cuff - 2), (10.5, cuff + 4), (21.5, cuff + 7), (23, cuff + 1)])
    parts = [
        shape("body", body),
        shape("trim", cuffs[:4]),
        shape("trim", cuffs[4:]),
        shape("trim", box(30.5, hem - 2, 69.5, hem + 5, 2)),
        shape("shade", ellipse(50, 19, 9, 4)),
        shape("trim", curve([(40, high), (50, high + 2), (60, high), (60, 21), (50, 25), (40, 21)], steps=5)),
    ]
    ribs = [detail("outline", [(x, hem - 0.5), (x, hem + 4)], 0.8) for x in range(34, 68, 4)]
    return parts + ribs + [detail("shade", [(32, 46), (33, 34)]), detail("shade", [(68, 46), (67, 34)])]


def dress(rng: Rng) -> list[Part]:
    """On straps or with small sleeves, narrow at the waist."""
    wide, hem = rng.uniform(16, 24), rng.uniform(84, 90)
    skirt = curve(
        [(39, 45), (33, 58), (wide, hem - 3), (50, hem + 3), (100 - wide, hem - 3), (67, 58), (61, 45)]
    )
    top = mirrored([(39, 19), (36, 29), (39, 46), (50, 47)])
    parts = [shape("body", skirt), shape("body", np.insert(top, 0, [(50, 25)], 0))]
    if chance(rng, 0.5):
        parts += [stroke("body", [(39.5, 21), (42, 8)], 2.4), stroke("body", [(60.5, 21), (58, 8)], 2.4)]
    else:
        parts.insert(0, shape("body", [(41, 11), (27, 18), (30, 29), (38, 26)]))
        parts.insert(0, shape("body", [(59, 11), (73, 18), (70, 29), (62, 26)]))
        parts.append(shape("body", np.array([(40, 11), (50, 22), (60, 11), (62, 26), (50, 30), (38, 26)])))
    folds = [detail("shade", [(50 + d, 50), (50 + d * 3.2, hem - 5)]) for d in (-5, 0, 5)]
    return [*parts, *folds, shape("trim", box(38.5, 43, 61.5, 48, 1.5))]


def skirt(rng: Rng) -> list[Part]:
    """Flared, with a waistband and pleats."""
    wide, hem = rng.uniform(10, 18), rng.uniform(74, 84)
    body = [(34, 27), *curve([(wide, hem), (50, hem + 6), (100 - wide, hem)], closed=False), (66, 27)]
    pleats = [detail("shade", [(50 + d * 0.36, 30), (50 + d, hem - 2)], 1.4) for d in (-24, -12, 0, 12, 24)]
    return [shape("body", np.array(body)), *pleats, shape("trim", box(33, 20, 67, 28, 2))]


def trousers(rng: Rng) -> list[Part]:
    """From the front, two legs."""
    hem, flare = rng.uniform(88, 92), rng.uniform(-2, 3)
    left = [(33, 12), (30, 30), (27 - flare, hem), (43 + flare / 2, hem), (49, 40)]
    body = np.concatenate([mirrored(left)])
    return [
        shape("body", body),
        shape("trim", box(32.5, 9, 67.5, 16, 1.5)),
        detail("shade", [(50, 16), (50, 38)], 1.4),
        detail("shade", [(33, 20), (38, 28), (38, 17)]),
        detail("shade", [(67, 20), (62, 28), (62, 17)]),
        detail("shade", [(37, 40), (35, hem - 3)]),
        detail("shade", [(63, 40), (65, hem - 3)]),
        shape("metal", ellipse(50, 12.5, 1.8, 1.8)),
    ]


def sneakers(rng: Rng) -> list[Part]:
    """One shoe from the side."""
    top, thick = rng.uniform(30, 36), rng.uniform(8, 11)
    upper = [(11, 70), (11, 50), (14, top), (22, top + 5), (34, top + 2), (42, top)]
    upper += [(52, 49), (68, 56), (84, 60), (91, 66), (91, 72)]
    lower = curve(
        [(9, 70), (50, 70), (92, 70), (93, 75), (88, 70 + thick), (14, 70 + thick), (8, 76)], steps=6
    )
    laces = [
        detail("light", [(40 + i * 5, 41 + i * 4.4), (49 + i * 4.4, 37 + i * 5.4)], 2.2) for i in range(4)
    ]
    return [
        shape("shade", ellipse(28, top + 3, 15, 5)),
        shape("body", np.concatenate([curve(upper, closed=False), [(11, 72)]])),
        shape("tint", curve([(70, 71), (74, 58), (86, 61), (92, 67), (91, 71)])),
        shape("trim", curve([(11, 54), (19, 56), (22, 70), (11, 70)])),
        stroke("trim", curve([(30, 66), (44, 62), (56, 52)], closed=False), 3.4),
        *laces,
        shape("light", lower),
        detail("trim", [(12, 75), (89, 75)], 1.4),
    ]


def boots(rng: Rng) -> list[Part]:
    """One boot from the side."""
    high = rng.uniform(12, 28)
    front = curve([(57, 46), (62, 54), (76, 58), (86, 66), (87, 77)], closed=False)
    upper = np.concatenate([[(28, high), (57, high)], front, [(27, 77), (30, 60)]])
    laces = [detail("light", [(46, y), (57, y - 2)], 2) for y in np.arange(high + 9, 52, 6)]
    return [
        shape("body", upper),
        shape("trim", box(26.5, high - 3, 58.5, high + 3, 2)),
        *laces,
        detail("shade", curve([(29, 64), (44, 61), (56, 67), (58, 76)], closed=False), 1.4),
        shape("dark", curve([(26, 76), (56, 76), (88, 75), (88, 82), (50, 83), (47, 88), (27, 88)], steps=5)),
    ]


def hat(rng: Rng) -> list[Part]:
    """With a crown, a ribbon and a wide brim."""
    top, wide = rng.uniform(24, 32), rng.uniform(38, 42)
    crown = [(27, 66), (30, 44), (34, top + 2), (50, top + 3), (66, top + 2), (70, 44), (73, 66), (50, 70)]
    band = [(28, 53), (50, 57), (72, 53), (73.4, 63), (50, 68), (26.6, 63)]
    return [
        shape("body", ellipse(50, 66, wide, 12)),
        shape("shade", ellipse(50, 66, 26, 7)),
        shape("body", curve(crown)),
        shape("trim", curve(band, steps=5)),
    ]


def scarf(rng: Rng) -> list[Part]:
    """Laid once around a neck that is not there, with fringed ends."""
    a, b = rng.uniform(80, 86), rng.uniform(72, 82)
    parts = [
        shape("body", np.array([(52, 42), (69, 38), (76, b), (59, b + 3)])),
        shape("body", np.array([(33, 40), (53, 44), (43, a + 1), (24, a - 2)])),
    ]
    for i in range(6):
        parts.append(stroke("body", [(60 + i * 3, b + 3 - i * 0.5), (61 + i * 3, b + 9 - i * 0.5)], 1.4))
        parts.append(stroke("body", [(25 + i * 3.4, a - 1 + i * 0.5), (23 + i * 3.4, a + 5 + i * 0.5)], 1.4))
    loop = np.concatenate([ellipse(50, 32, 31, 20), ellipse(50, 27, 16, 8)[::-1]])
    folds = [detail("shade", ellipse(50, 30, 24 - d, 14 - d, 30, 150), 1.2) for d in (0, 4)]
    return [*parts, shape("shade", ellipse(50, 26, 18, 9)), shape("body", loop), *folds]


def handbag(rng: Rng) -> list[Part]:
    """With a handle, a flap and a clasp."""
    wide, flap = rng.uniform(12, 20), rng.uniform(56, 64)
    body = curve([(wide + 7, 42), (50, 41), (93 - wide, 42), (100 - wide, 82), (50, 84), (wide, 82)], steps=6)
    cover = [(wide + 6, 42), (94 - wide, 42), (95 - wide, flap - 8), (50, flap), (wide + 5, flap - 8)]
    return [
        stroke("trim", ellipse(50, 44, 19, rng.uniform(20, 30), 180, 360), 4.4),
        shape("body", body),
        shape("tint", np.array(cover)),
        shape("metal", box(45.5, flap - 5, 54.5, flap + 3, 2)),
        shape("metal", ellipse(31, 44, 2.4, 2.4)),
        shape("metal", ellipse(69, 44, 2.4, 2.4)),
    ]


def backpack(rng: Rng) -> list[Part]:
    """From the front, with a pocket."""
    top, pocket = rng.uniform(18, 24), rng.uniform(54, 60)
    return [
        stroke("trim", ellipse(50, top + 2, 8, 10, 180, 360), 3.4),
        stroke("shade", curve([(29, 34), (19, 52), (23, 82)], closed=False), 5),
        stroke("shade", curve([(71, 34), (81, 52), (77, 82)], closed=False), 5),
        shape("body", box(25, top, 75, 88, 16)),
        detail("outline", ellipse(50, 46, 21, 16, 190, 350), 1.6),
        shape("tint", box(32, pocket, 68, 83, 6)),
        detail("dark", [(35, pocket + 6), (65, pocket + 6)], 1.8),
        stroke("trim", [(62, pocket + 6), (62, pocket + 12)], 2),
        shape("trim", box(44, 40, 56, 46, 1.5)),
    ]


def watch(rng: Rng) -> list[Part]:
    """Face and strap from above."""
    radius, hour = rng.uniform(19, 23), rng.uniform(0, 6.28)
    ticks = []
    for at in np.radians(np.arange(0, 360, 30)):
        way = np.array([np.cos(at), np.sin(at)])
        ticks.append(detail("dark", np.array([50, 50]) + np.outer([radius - 7, radius - 5], way), 1.2))
    return [
        shape("body", np.array([(39, 4), (61, 4), (62, 50), (61, 96), (39, 96), (38, 50)])),
        detail("shade", [(50, 84), (50, 92)], 1.6),
        shape("metal", box(50 + radius - 1, 47, 50 + radius + 4, 53, 1)),
        shape("metal", ellipse(50, 50, radius, radius)),
        shape("light", ellipse(50, 50, radius - 4, radius - 4)),
        *ticks,
        detail("dark", [(50, 50), (50 + 8 * np.cos(hour), 50 + 8 * np.sin(hour))], 2.2),
        detail("dark", [(50, 50), (50 + 12 * np.cos(hour * 3), 50 + 12 * np.sin(hour * 3))], 1.4),
        shape("trim", ellipse(50, 50, 1.8, 1.8)),
    ]


def sunglasses(rng: Rng) -> list[Part]:
    """From the front, arms going back."""
    tall, round_ = rng.uniform(13, 18), chance(rng, 0.5)
    parts = [
        stroke("body", [(12, 44), (9, 36), (20, 30)], 4),
        stroke("body", [(88, 44), (91, 36), (80, 30)], 4),
        stroke("body", curve([(44, 48), (50, 44), (56, 48)], closed=False), 5),
    ]
    for x in (29, 71):
        rim = ellipse(x, 53, 21, tall + 4) if round_ else box(x - 21, 40, x + 21, 48 + tall + 4, 11)
        lens = ellipse(x, 53, 14.5, tall - 2) if round_ else box(x - 15, 46, x + 15, 48 + tall - 2, 8)
        parts += [shape("body", rim), shape("lens", lens)]
        parts.append(detail("gleam", [(x - 7, 58), (x + 1, 48)], 2.6))
    return parts


def umbrella(rng: Rng) -> list[Part]:
    """Open, from the side."""
    lean, low = rng.uniform(10, 16), 54
    edge = [np.linspace(92, 8, 6)[i : i + 2] for i in range(5)]
    scallops = [ellipse((a + b) / 2, low, (a - b) / 2, 6, 0, -180, 12) for a, b in edge]
    canopy = np.concatenate([ellipse(50, low, 42, 54 - lean, 180, 360, 30), *scallops])
    ribs = [
        detail("outline", curve([(50, lean), ((50 + x * 2) / 3, 26), (x, low)], closed=False), 1.4)
        for x in np.linspace(8, 92, 6)[1:-1]
    ]
    hook = ellipse(56, 84, 6, 7, 180, 0, 16)
    return [
        stroke("metal", [(50, lean + 2), (50, lean - 5)], 2),
        stroke("metal", [(50, 40), (50, 78)], 2),
        stroke("trim", np.concatenate([[(50, 70), (50, 75)], hook - [0, 4]]), 4),
        shape("body", canopy),
        *ribs,
    ]
