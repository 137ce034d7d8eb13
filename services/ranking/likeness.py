"""How alike items are by the values of their attributes.

Cosine of TF-IDF vectors (Salton and Buckley, 1988) over the catalogue; an attribute may have several values.
"""

from collections.abc import Sequence

import numpy as np

from services.item_table import ItemTable
from services.ranking.moment import Moment

_NOTHING = 1e-6


class Likeness:
    """Likeness over the rows of one item table by its text attributes."""

    def __init__(self, table: ItemTable, attributes: Sequence[str]) -> None:
        self._table, self._attributes = table, tuple(attributes)
        self._kept: tuple[Moment, list[tuple[np.ndarray, np.ndarray]]] | None = None

    def to(self, seeds: np.ndarray, weights: np.ndarray, rows: np.ndarray, moment: Moment) -> np.ndarray:
        """How alike rows (C,) are to weighted seeds (S,): the weighted mean of cosines, float32 (C,).

        NaN without seeds, and for a row without attributes.
        """
        columns = self._columns(moment)
        if not len(seeds) or not columns:
            return np.full(len(rows), np.nan, np.float32)
        worth = weights / _length(columns, seeds)
        shared = np.zeros(len(rows))
        for codes, rarity in columns:
            mine = codes[seeds]
            held = np.bincount(mine.ravel(), np.repeat(worth, mine.shape[1]), len(rarity))
            shared += (held * rarity)[codes[rows]].sum(1)
        cosine = shared / _length(columns, rows) / max(float(weights.sum()), 1e-9)
        return np.asarray(np.where(_length(columns, rows) > _NOTHING, cosine, np.nan), np.float32)

    def _columns(self, moment: Moment) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each attribute codes (N, W) and the squared inverse document frequency of each: once per moment.

        What is missing has the last code, which weighs nothing.
        """
        kept = self._kept
        if kept is None or kept[0] is not moment:
            texts = [self._table.texts(name) for name in self._attributes]
            self._kept = kept = (
                moment,
                [_weighed(column[0][: len(moment.age)]) for column in texts if column],
            )
        return kept[1]


def _weighed(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    used, count = np.unique(codes[codes >= 0], return_counts=True)
    rarity = np.zeros(int(used.max(initial=-1)) + 2)
    rarity[used] = np.log(max(len(codes), 1) / count) ** 2
    return np.where(codes < 0, len(rarity) - 1, codes), rarity


def _length(columns: list[tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> np.ndarray:
    total = np.zeros(len(rows))
    for codes, rarity in columns:
        total += rarity[codes[rows]].sum(1)
    return np.asarray(np.maximum(np.sqrt(total), _NOTHING))
