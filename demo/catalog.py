"""The simulated catalog: families of products in several colors, with titles, descriptions and prices.

The catalog is a function of a seed and a count. Independent of users and files.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from demo.drawing import Sketch
from demo.phrases import (
    CLOSINGS,
    DETAILS,
    MODELS,
    OPENINGS,
    PATTERN_LINES,
    PATTERN_WORDS,
    PLURAL_OPENINGS,
    STYLE_LINES,
)
from demo.sampling import chance, pick
from demo.world import BRANDS, COLORS, KINDS, PATTERNS, STYLE_WEIGHTS, STYLES, Color, Kind

FRESH_DAYS = 2.5
"""How young an item is that the old shop's listing has not shown yet."""
_FAMILY_SIZES = (1, 2, 3, 4)
_SIZE_SHARES = (0.3, 0.3, 0.25, 0.15)
_ARRIVALS = ((0.022, 0.0, FRESH_DAYS), (0.25, FRESH_DAYS, 60.0), (0.728, 60.0, 500.0))
"""Shares of families by age in days at the end; single colors of old families are new as well."""
_FRESH_COLOR_SHARE = 0.04


@dataclass(frozen=True)
class Product:
    """An item of the shop with what it is drawn from; `price` in the shop's currency."""

    id: str
    title: str
    description: str
    kind: str
    color: str
    pattern: str
    style: str
    material: str
    brand: str
    family_id: str
    price: float
    available_from: datetime
    sketch: Sketch

    def document(self) -> dict[str, str | float]:
        """The product as a line of items.jsonl."""
        return {
            "id": self.id,
            "title": self.title,
            "description": self.description,
            "family_id": self.family_id,
            "price": self.price,
            "available_from": f"{self.available_from:%Y-%m-%dT%H:%M:%SZ}",
            "type": self.kind,
            "colour": self.color,
            "pattern": self.pattern,
            "style": self.style,
            "material": self.material,
            "brand": self.brand,
        }


def make_catalog(seed: int, count: int, end: datetime, prefix: str = "") -> list[Product]:
    """`count` products as they are known at `end`, in the order of their families.

    Another `prefix`, which begins every id, gives another catalog with the same distributions.
    """
    products: list[Product] = []
    stream = [seed, *prefix.encode()]
    family = 0
    while len(products) < count:
        products += _family(np.random.default_rng([*stream, family]), (*stream, family), prefix, end)
        family += 1
    return products[:count]


@dataclass(frozen=True)
class _Design:
    """The common properties of a family."""

    kind: Kind
    pattern: str
    style: str
    material: str
    brand: str
    model: str
    noun: str


def _family(rng: np.random.Generator, form: tuple[int, ...], prefix: str, end: datetime) -> list[Product]:
    kind = pick(rng, KINDS)
    style = pick(rng, STYLES, STYLE_WEIGHTS[kind.group])
    brand, level = pick(rng, BRANDS[style])
    pattern = PATTERNS[0] if chance(rng, kind.plain) else pick(rng, PATTERNS[1:])
    material = pick(rng, kind.materials)
    design = _Design(kind, pattern, style, material, brand, pick(rng, MODELS), pick(rng, kind.nouns))
    price = _rounded(kind.price * level * float(np.exp(0.22 * rng.standard_normal())))
    _, youngest, oldest = pick(rng, _ARRIVALS, [share for share, _, _ in _ARRIVALS])
    arrival = end - timedelta(seconds=round(86_400 * rng.uniform(youngest, oldest)))
    size = pick(rng, _FAMILY_SIZES, _SIZE_SHARES)
    name = f"{prefix}{kind.name.lower().replace(' ', '-')}-{form[-1]:04}"
    products: list[Product] = []
    for index in rng.permutation(len(COLORS))[:size]:
        color = COLORS[int(index)]
        start = arrival
        if products and chance(rng, _FRESH_COLOR_SHARE):
            start = max(arrival, end - timedelta(seconds=round(86_400 * rng.uniform(0.1, FRESH_DAYS))))
        products.append(
            Product(
                id=f"{name}-{color.name.replace(' ', '-')}",
                title=_title(rng, design, color),
                description=_description(rng, design, color),
                kind=kind.name,
                color=color.name,
                pattern=pattern,
                style=style,
                material=material,
                brand=brand,
                family_id=name,
                price=price,
                available_from=start,
                sketch=Sketch(kind.name, color.name, pattern, style, form, int(rng.integers(1 << 31))),
            )
        )
    return products


def _rounded(price: float) -> float:
    return round(price) - 0.1 if price < 100 else float(5 * round(price / 5) - 1)  # noqa: PLR2004 - as shops do


def _title(rng: np.random.Generator, design: _Design, color: Color) -> str:
    noun, model, brand = design.noun, design.model, design.brand
    word = pick(rng, PATTERN_WORDS[design.pattern])
    shade = color.name if chance(rng, 0.65) else pick(rng, color.shades)  # most titles are plain
    forms = (
        f"{model} {word} {noun}, {shade}",
        f"{shade} {word} {noun} {model}",
        f"{brand} {word} {noun} {model} in {shade}",
        f"{word} {design.material} {noun} {model} in {shade}",
        f"{brand} {model} {noun} {word} {shade}",
        f"{design.style} {noun} in {word} {shade}",
    )
    title = " ".join(pick(rng, forms).replace(" ,", ",").split())
    return title[0].upper() + title[1:]


def _description(rng: np.random.Generator, design: _Design, color: Color) -> str:
    openings = PLURAL_OPENINGS if design.kind.plural else OPENINGS
    facts = DETAILS[design.kind.name]
    middle = [facts[int(i)] for i in rng.permutation(len(facts))[: int(rng.integers(1, 4))]]
    if chance(rng, 0.85):  # not every text speaks of style
        middle.append(pick(rng, STYLE_LINES[design.style]))
    if chance(rng, 0.9):  # nor of color
        middle.append(pick(rng, PATTERN_LINES[design.pattern]))
    order = [middle[int(i)] for i in rng.permutation(len(middle))]
    shade = color.name if chance(rng, 0.4) else pick(rng, color.shades)  # prose likes shades
    words = {"m": design.material, "n": design.noun, "c": shade, "b": design.brand}
    words |= {name.upper(): word[0].upper() + word[1:] for name, word in words.items()}
    text = " ".join([pick(rng, openings), *order, pick(rng, CLOSINGS)]).format(**words).strip()
    return re.sub(r"\b([Aa]) (?=[aeiouAEIO])", r"\1n ", text)
