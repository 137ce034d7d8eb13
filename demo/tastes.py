"""Who the people are: tastes over what products are, and how much a product pleases a person.

Utility is a product of factors, so that whoever holds them knows every utility. Knows
nothing of pages and clicks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.catalogue import Product
from demo.world import COLOURS, KINDS, PATTERNS, STYLES

_GROUPS = sorted({kind.group for kind in KINDS})
_HUES = sorted({colour.group for colour in COLOURS})
_PRICE_WEIGHT = 0.5
_APPEAL = 0.55


@dataclass(frozen=True)
class Truth:
    """What no shop knows.

    `people` float32 (U, K) and `products` float32 (N, K) are factors, `appeal` float32 (N,) is
    what everybody sees in a product. `new_people` bool (U,) never came to the shop yet.
    """

    user_ids: list[str]
    item_ids: list[str]
    people: np.ndarray
    products: np.ndarray
    appeal: np.ndarray
    new_people: np.ndarray

    def utility(self, users: np.ndarray) -> np.ndarray:
        """Utility float32 (B, N) of every product to some people, given by their rows."""
        return np.asarray(self.people[users] @ self.products.T + self.appeal)

    def save(self, path: Path) -> None:
        """Write as npz without pickles."""
        np.savez_compressed(
            path,
            user_ids=np.array(self.user_ids),
            item_ids=np.array(self.item_ids),
            people=self.people,
            products=self.products,
            appeal=self.appeal,
            new_people=self.new_people,
        )

    @staticmethod
    def load(path: Path) -> "Truth":
        """Read what `save` wrote."""
        with np.load(path) as kept:
            ids = (kept["user_ids"].tolist(), kept["item_ids"].tolist())
            return Truth(*ids, *(kept[name] for name in ("people", "products", "appeal", "new_people")))


def make_truth(rng: np.random.Generator, products: Sequence[Product], users: int, new_users: int) -> Truth:
    """People and what they think of the products; the last `new_users` of `users` are new."""
    return Truth(
        user_ids=[f"user-{n:05}" for n in range(users)],
        item_ids=[product.id for product in products],
        people=_people(rng, users),
        products=_products(products),
        appeal=(_APPEAL * rng.standard_normal(len(products))).astype(np.float32),
        new_people=np.arange(users) >= users - new_users,
    )


def _people(rng: np.random.Generator, users: int) -> np.ndarray:
    """Tastes for kinds, colours, styles, patterns and a price level, float32 (U, K)."""
    group = np.array([_GROUPS.index(kind.group) for kind in KINDS])
    hue = np.array([_HUES.index(colour.group) for colour in COLOURS])
    kinds = 0.7 * rng.standard_normal((users, len(_GROUPS)))[:, group]
    kinds += 0.5 * rng.standard_normal((users, len(KINDS))) + 1.3 * _favourites(rng, users, len(KINDS), 4)
    colours = 0.5 * rng.standard_normal((users, len(_HUES)))[:, hue]
    colours += 0.3 * rng.standard_normal((users, len(COLOURS))) + 0.9 * _favourites(
        rng, users, len(COLOURS), 2
    )
    styles = 0.35 * rng.standard_normal((users, len(STYLES))) + 1.2 * _favourites(rng, users, len(STYLES), 1)
    patterns = 0.4 * rng.standard_normal((users, len(PATTERNS)))
    level = rng.standard_normal((users, 1))
    factors = [kinds, colours, styles, patterns, 2 * _PRICE_WEIGHT * level, -_PRICE_WEIGHT * level**2]
    return np.concatenate([*factors, np.full((users, 1), -_PRICE_WEIGHT)], 1).astype(np.float32)


def _favourites(rng: np.random.Generator, users: int, options: int, count: int) -> np.ndarray:
    chosen = np.argpartition(rng.random((users, options)), count, axis=1)[:, :count]
    marked = np.zeros((users, options))
    np.put_along_axis(marked, chosen, 1, axis=1)
    return marked


def _products(products: Sequence[Product]) -> np.ndarray:
    """What products are, in the order of tastes: one-hot columns, then price level p, 1 and p squared.

    With a person's (2l, -l squared, -1) the last three make -(p - l) squared.
    """
    kinds = [kind.name for kind in KINDS]
    colours = [colour.name for colour in COLOURS]
    columns = (
        np.eye(len(kinds))[[kinds.index(p.kind) for p in products]],
        np.eye(len(colours))[[colours.index(p.colour) for p in products]],
        np.eye(len(STYLES))[[STYLES.index(p.style) for p in products]],
        np.eye(len(PATTERNS))[[PATTERNS.index(p.pattern) for p in products]],
    )
    usual = np.array([next(kind.price for kind in KINDS if kind.name == p.kind) for p in products])
    level = np.log(np.array([p.price for p in products]) / usual) / 0.35
    return np.column_stack([*columns, level, np.ones(len(products)), level**2]).astype(np.float32)
