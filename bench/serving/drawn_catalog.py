"""A catalog of any size, drawn as arrays: the items of a cluster share values and directions.

The shapes are those of H&M's catalog: ten text attributes with its numbers of values, 2.2 articles a product,
short titles, and a description. Items become objects one at a time, because that is how a bundle is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import overload

import numpy as np

from services.catalog.items import Attribute, Item

UNTIL = datetime(2026, 3, 1, tzinfo=UTC)
"""The end of the events."""
ATTRIBUTES: Mapping[str, int] = {
    "type": 131,
    "group": 19,
    "pattern": 30,
    "color": 50,
    "color_family": 20,
    "department": 299,
    "index": 10,
    "index_group": 5,
    "section": 57,
    "garment_group": 21,
}
SPACES: Mapping[str, int] = {"text": 384, "image": 192}
_FACTORS, _SPREAD, _NOISE = 32, 0.5, 0.02
_WORDS, _TITLE_WORDS, _DESCRIPTION_WORDS = 4000, 2, 14
_ITEMS_PER_PRODUCT, _ITEMS_PER_CLUSTER, _MIN_CLUSTERS = 2.2, 50, 50
_OWN_VALUE_SHARE = 0.9
_DAYS = 700.0
_PAGE = 50_000
_IMAGE_HASH_BYTES = 32


class DrawnItems(Sequence[Item]):
    """`count` items, which are made from arrays whenever they are read.

    `cluster` int64 (N,); `weights` float64 (N,) is how popular an item is.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        random = np.random.default_rng([seed, count])
        self._count = count
        products = max(1, int(count / _ITEMS_PER_PRODUCT))
        clusters = max(_MIN_CLUSTERS, count // _ITEMS_PER_CLUSTER)
        self.product = np.sort(random.integers(0, products, count))
        self.cluster = random.integers(0, clusters, products)[self.product]
        self._values = np.stack(
            [_values(random, self.cluster, clusters, size) for size in ATTRIBUTES.values()], axis=1
        )
        self._words = _skewed(random, _WORDS, (count, _TITLE_WORDS + _DESCRIPTION_WORDS))
        self._noun = random.integers(0, _WORDS, clusters)[self.cluster]
        self._price = np.round(np.exp(random.normal(3.2, 0.7, products)), 2)[self.product]
        self._age = np.sort(random.uniform(0, _DAYS, products))[::-1][self.product]
        self.weights = (1.0 + random.permutation(count)) ** -0.8

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """One item, or a list of them."""
        if isinstance(index, slice):
            return list(self._made(range(*index.indices(self._count))))
        return next(self._made([range(self._count)[index]]))

    def __iter__(self) -> Iterator[Item]:
        return self._made(range(self._count))

    @property
    def ids(self) -> list[str]:
        """The ids of all items."""
        return [_id(row) for row in range(self._count)]

    def _made(self, rows: Sequence[int]) -> Iterator[Item]:
        for row in rows:
            title, text = np.split(self._words[row], [_TITLE_WORDS])
            codes = self._values[row].tolist()
            yield Item(
                id=_id(row),
                title=" ".join(_VOCABULARY[word] for word in [*title.tolist(), self._noun[row]]),
                description=" ".join(_VOCABULARY[word] for word in text.tolist()),
                attributes=tuple(
                    Attribute(name, (texts[code],))
                    for name, texts, code in zip(ATTRIBUTES, _TEXTS, codes, strict=True)
                ),
                family_id=f"p{self.product[row]:07}",
                price=float(self._price[row]),
                image_hash=row.to_bytes(_IMAGE_HASH_BYTES, "big"),  # unique, as for an image of its own
                available_from=UNTIL - timedelta(days=float(self._age[row])),
            )


_TEXTS = [[f"{name} {code}" for code in range(size)] for name, size in ATTRIBUTES.items()]
_STEMS = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
_ENDS = [stem + end for stem in _STEMS for end in ("n", "r")]
_VOCABULARY = [stem + end for end in _ENDS for stem in _STEMS][:_WORDS]


def draw_vectors(items: DrawnItems, seed: int = 0) -> dict[str, np.ndarray]:
    """The vectors of items, unit length, float16 (N, D) by space; those of a cluster are near each other."""
    random = np.random.default_rng([seed, len(items), 1])
    clusters = int(items.cluster.max()) + 1
    centers = random.standard_normal((clusters, _FACTORS), np.float32)
    return {space: _vectors(random, centers, items.cluster, size) for space, size in SPACES.items()}


def _vectors(
    random: np.random.Generator, centers: np.ndarray, cluster: np.ndarray, dimension: int
) -> np.ndarray:
    """Unit vectors float16 (N, D) around the centers of clusters, in few directions, plus noise."""
    mixing = random.standard_normal((_FACTORS, dimension), np.float32) / np.float32(_FACTORS**0.5)
    vectors = np.empty((len(cluster), dimension), np.float16)
    for start in range(0, len(cluster), _PAGE):
        factors = centers[cluster[start : start + _PAGE]]
        factors += _SPREAD * random.standard_normal(factors.shape, np.float32)
        page = factors @ mixing
        page += _NOISE * random.standard_normal(page.shape, np.float32)
        vectors[start : start + _PAGE] = page / np.linalg.norm(page, axis=1, keepdims=True)
    return vectors


def _values(random: np.random.Generator, cluster: np.ndarray, clusters: int, size: int) -> np.ndarray:
    """Codes of one attribute (N,): mostly the value of the cluster, else a common value."""
    own = _skewed(random, size, clusters)[cluster]
    return np.where(random.random(len(cluster)) < _OWN_VALUE_SHARE, own, _skewed(random, size, len(cluster)))


def _skewed(random: np.random.Generator, size: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Codes below `size`, low ones more often."""
    return (size * random.random(shape) ** 2).astype(np.int64)


def _id(row: int) -> str:
    return f"i{row:07}"
