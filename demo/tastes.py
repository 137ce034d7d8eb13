"""The true preferences of the simulated users, and the utility of each product for each user.

Utility is a dot product of user and product factors plus the appeal of the product. Independent of pages and
clicks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.catalog import Product
from demo.world import COLORS, KINDS, PATTERNS, STYLES

_GROUPS = sorted({kind.group for kind in KINDS})
_HUES = sorted({colour.group for colour in COLORS})
_PRICE_WEIGHT = 0.5
_APPEAL = 0.55


@dataclass(frozen=True)
class Truth:
    """The ground truth, which a shop does not have.

    `users` float32 (U, K) and `products` float32 (N, K) are factors, `appeal` float32 (N,) is the appeal of a
    product to every user. `new_users` bool (U,) marks users without any event.
    """

    user_ids: list[str]
    item_ids: list[str]
    users: np.ndarray
    products: np.ndarray
    appeal: np.ndarray
    new_users: np.ndarray

    def utility(self, users: np.ndarray) -> np.ndarray:
        """Utility float32 (B, N) of every product for the users at some rows."""
        return np.asarray(self.users[users] @ self.products.T + self.appeal)

    def save(self, path: Path) -> None:
        """Write as npz without pickles; the array names are part of the file format."""
        np.savez_compressed(
            path,
            user_ids=np.array(self.user_ids),
            item_ids=np.array(self.item_ids),
            people=self.users,
            products=self.products,
            appeal=self.appeal,
            new_people=self.new_users,
        )

    @staticmethod
    def load(path: Path) -> "Truth":
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            ids = (arrays["user_ids"].tolist(), arrays["item_ids"].tolist())
            return Truth(*ids, *(arrays[name] for name in ("people", "products", "appeal", "new_people")))


def make_truth(rng: np.random.Generator, products: Sequence[Product], users: int, new_users: int) -> Truth:
    """Users and their preferences for the products; the last `new_users` of `users` are new."""
    return Truth(
        user_ids=[f"user-{n:05}" for n in range(users)],
        item_ids=[product.id for product in products],
        users=_user_factors(rng, users),
        products=_product_factors(products),
        appeal=(_APPEAL * rng.standard_normal(len(products))).astype(np.float32),
        new_users=np.arange(users) >= users - new_users,
    )


def _user_factors(rng: np.random.Generator, users: int) -> np.ndarray:
    """Preferences for kinds, colors, styles, patterns and a price level, float32 (U, K)."""
    group = np.array([_GROUPS.index(kind.group) for kind in KINDS])
    hue = np.array([_HUES.index(color.group) for color in COLORS])
    kinds = 0.7 * rng.standard_normal((users, len(_GROUPS)))[:, group]
    kinds += 0.5 * rng.standard_normal((users, len(KINDS))) + 1.3 * _favorites(rng, users, len(KINDS), 4)
    colors = 0.5 * rng.standard_normal((users, len(_HUES)))[:, hue]
    colors += 0.3 * rng.standard_normal((users, len(COLORS))) + 0.9 * _favorites(rng, users, len(COLORS), 2)
    styles = 0.35 * rng.standard_normal((users, len(STYLES))) + 1.2 * _favorites(rng, users, len(STYLES), 1)
    patterns = 0.4 * rng.standard_normal((users, len(PATTERNS)))
    level = rng.standard_normal((users, 1))
    factors = [kinds, colors, styles, patterns, 2 * _PRICE_WEIGHT * level, -_PRICE_WEIGHT * level**2]
    return np.concatenate([*factors, np.full((users, 1), -_PRICE_WEIGHT)], 1).astype(np.float32)


def _favorites(rng: np.random.Generator, users: int, options: int, count: int) -> np.ndarray:
    indices = np.argpartition(rng.random((users, options)), count, axis=1)[:, :count]
    mask = np.zeros((users, options))
    np.put_along_axis(mask, indices, 1, axis=1)
    return mask


def _product_factors(products: Sequence[Product]) -> np.ndarray:
    """Product features in the order of user factors: one-hot columns, then price level p, 1 and p squared.

    With a user's (2l, -l squared, -1) the last three give -(p - l) squared.
    """
    kinds = [kind.name for kind in KINDS]
    colors = [color.name for color in COLORS]
    columns = (
        np.eye(len(kinds))[[kinds.index(p.kind) for p in products]],
        np.eye(len(colors))[[colors.index(p.color) for p in products]],
        np.eye(len(STYLES))[[STYLES.index(p.style) for p in products]],
        np.eye(len(PATTERNS))[[PATTERNS.index(p.pattern) for p in products]],
    )
    typical_price = np.array([next(kind.price for kind in KINDS if kind.name == p.kind) for p in products])
    level = np.log(np.array([p.price for p in products]) / typical_price) / 0.35
    return np.column_stack([*columns, level, np.ones(len(products)), level**2]).astype(np.float32)
