"""What exists in the made-up shop: kinds of product, colors, patterns, styles, brands.

Only data and how it is grouped; knows nothing of prose, pictures or people.
"""

from dataclasses import dataclass

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """A type of product: what it is called, made of and costs in the middle of its range."""

    name: str
    nouns: tuple[str, ...]
    group: str
    price: float
    materials: tuple[str, ...]
    plain: float = 0.3
    """The share of it that has no pattern; 1 where none fits."""
    plural: bool = False


@dataclass(frozen=True)
class Color:
    """A color by its plain name, with shades that prose may call it and a group of taste."""

    name: str
    rgb: Rgb
    shades: tuple[str, ...]
    group: str


_CLAY = ("stoneware", "porcelain", "earthenware")
_KNIT = ("merino wool", "cashmere", "cotton")
_LEATHER = ("leather", "suede", "canvas")

KINDS = (
    Kind("mug", ("mug", "coffee mug", "tea mug"), "kitchen", 14, (*_CLAY, "enamel")),
    Kind("teapot", ("teapot", "tea pot"), "kitchen", 38, (*_CLAY, "cast iron"), 0.4),
    Kind("bottle", ("water bottle", "drinking bottle", "flask"), "kitchen", 22, ("steel", "glass")),
    Kind("T-shirt", ("T-shirt", "tee", "short-sleeved top"), "clothes", 24, ("cotton", "linen", "jersey")),
    Kind("jumper", ("jumper", "sweater", "pullover"), "clothes", 58, _KNIT),
    Kind("dress", ("dress", "frock", "summer dress"), "clothes", 72, ("viscose", "linen", "silk", "cotton")),
    Kind("skirt", ("skirt", "A-line skirt", "flared skirt"), "clothes", 44, ("viscose", "linen", "cotton")),
    Kind(
        "trousers",
        ("trousers", "chinos", "pants"),
        "clothes",
        56,
        ("cotton", "linen", "corduroy"),
        0.55,
        True,
    ),
    Kind(
        "sneakers",
        ("sneakers", "trainers", "running shoes"),
        "shoes",
        84,
        ("canvas", "mesh", "suede"),
        0.5,
        True,
    ),
    Kind(
        "boots",
        ("boots", "ankle boots", "walking boots"),
        "shoes",
        128,
        ("leather", "suede", "rubber"),
        0.65,
        True,
    ),
    Kind("hat", ("hat", "sun hat", "brimmed hat"), "accessories", 32, ("felt", "straw", "cotton"), 0.45),
    Kind("scarf", ("scarf", "shawl", "neck scarf"), "accessories", 30, (*_KNIT, "silk"), 0.2),
    Kind("handbag", ("handbag", "shoulder bag", "tote"), "accessories", 92, _LEATHER, 0.45),
    Kind(
        "backpack",
        ("backpack", "rucksack", "daypack"),
        "accessories",
        76,
        ("canvas", "nylon", "leather"),
        0.4,
    ),
    Kind("watch", ("watch", "wristwatch"), "accessories", 140, ("steel", "leather", "resin"), 0.6),
    Kind(
        "sunglasses", ("sunglasses", "shades"), "accessories", 48, ("acetate", "steel", "bamboo"), 1.0, True
    ),
    Kind(
        "umbrella", ("umbrella", "stick umbrella"), "accessories", 34, ("polyester", "nylon", "cotton"), 0.2
    ),
    Kind("lamp", ("table lamp", "lamp", "bedside lamp"), "home", 64, ("linen", "ceramic", "brass"), 0.4),
    Kind(
        "armchair",
        ("armchair", "reading chair", "easy chair"),
        "home",
        320,
        ("velvet", "linen", "leather"),
        0.4,
    ),
    Kind("sofa", ("sofa", "couch", "two-seater"), "home", 760, ("velvet", "linen", "leather"), 0.45),
    Kind("vase", ("vase", "flower vase", "bud vase"), "home", 36, (*_CLAY, "glass")),
    Kind("potted plant", ("potted plant", "house plant", "plant in a pot"), "home", 28, _CLAY, 0.35),
    Kind(
        "cushion",
        ("cushion", "throw pillow", "scatter cushion"),
        "home",
        26,
        ("velvet", "linen", "cotton"),
        0.15,
    ),
    Kind("clock", ("wall clock", "clock"), "home", 46, ("oak", "steel", "bamboo"), 0.5),
    Kind("bicycle", ("bicycle", "city bike", "bike"), "outdoors", 540, ("steel", "aluminium"), 1.0),
)

COLORS = (
    Color("red", (205, 42, 46), ("crimson", "cherry", "poppy red", "scarlet"), "warm"),
    Color("orange", (238, 126, 36), ("tangerine", "apricot", "pumpkin", "burnt orange"), "warm"),
    Color("yellow", (246, 205, 58), ("mustard", "lemon", "sunflower", "saffron"), "warm"),
    Color("green", (58, 152, 78), ("emerald", "leaf green", "grass green", "jade"), "cool"),
    Color("olive", (124, 128, 62), ("olive", "moss", "khaki", "fern"), "earth"),
    Color("teal", (24, 136, 140), ("teal", "petrol", "lagoon", "sea green"), "cool"),
    Color("light blue", (126, 190, 232), ("sky blue", "powder blue", "ice blue", "pale blue"), "cool"),
    Color("blue", (38, 92, 200), ("cobalt", "royal blue", "azure", "ultramarine"), "cool"),
    Color("navy", (28, 40, 84), ("navy", "midnight blue", "ink blue", "dark blue"), "dark"),
    Color("purple", (122, 66, 158), ("violet", "plum", "aubergine", "amethyst"), "bright"),
    Color("pink", (242, 142, 178), ("rose", "blush", "bubblegum", "candy pink"), "bright"),
    Color("brown", (122, 78, 46), ("chestnut", "walnut", "chocolate", "cognac"), "earth"),
    Color("beige", (220, 196, 158), ("sand", "camel", "oatmeal", "biscuit"), "earth"),
    Color("white", (246, 245, 240), ("ivory", "snow", "chalk", "off-white"), "light"),
    Color("grey", (142, 146, 152), ("stone", "ash", "slate", "silver grey"), "light"),
    Color("black", (38, 37, 40), ("charcoal", "jet black", "onyx", "coal"), "dark"),
)

PATTERNS = ("plain", "striped", "dotted", "checked", "floral", "zigzag", "wavy", "starry")
"""The first is no pattern."""

STYLES = ("minimalist", "vintage", "sporty", "bohemian", "elegant", "playful", "rustic")

STYLE_WEIGHTS: dict[str, tuple[float, ...]] = {
    "kitchen": (3, 2, 1, 2, 2, 3, 3),
    "clothes": (3, 2, 3, 3, 3, 2, 1),
    "shoes": (2, 2, 5, 1, 3, 1, 2),
    "accessories": (3, 2, 3, 2, 3, 2, 1),
    "home": (3, 3, 0.5, 3, 2, 2, 3),
    "outdoors": (2, 3, 5, 0.5, 1, 1, 1),
}
"""How often a group of kinds comes in each style, in the order of STYLES."""

BRANDS: dict[str, tuple[tuple[str, float], ...]] = {
    "minimalist": (("Nord & Line", 1.15), ("Kessel", 1.0), ("Plainsong", 0.9), ("Ovo Works", 1.3)),
    "vintage": (("Halden & Rye", 1.2), ("Old Mill Trading", 0.9), ("Perrault", 1.35), ("Tin Lantern", 0.8)),
    "sporty": (("Velo Nine", 1.1), ("Stride", 0.85), ("Apex Trail", 1.3), ("Quickstep", 1.0)),
    "bohemian": (("Marrakesh Lane", 1.0), ("Luna Weft", 0.9), ("Wild Fig", 1.15), ("Soleá", 1.3)),
    "elegant": (("Maison Aurel", 1.8), ("Bellingham", 1.5), ("Cerise & Co", 1.3), ("Vantini", 2.1)),
    "playful": (("Hop Skip", 0.8), ("Gumdrop", 0.75), ("Tilly Tally", 0.9), ("Zig & Zag", 1.0)),
    "rustic": (("Fern Hollow", 0.95), ("Barnaby's", 0.9), ("Heath & Hearth", 1.1), ("Oakapple", 1.25)),
}
"""Of each style the brands that make it, with how their prices compare."""

KIND_NAMES = tuple(kind.name for kind in KINDS)
COLOR_NAMES = tuple(colour.name for colour in COLORS)
