"""How alike items are by what is written of them: values of attributes, words of titles.

Cosine of TF-IDF vectors (Salton and Buckley, 1988) over the catalogue.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from services.item_table import ItemTable
from services.ranking.moment import Moment

_NOTHING = 1e-6


@dataclass(frozen=True)
class _Terms:
    """What is written of N items, at one moment.

    `columns` are pairs: codes (N, W), where what is missing has the last one, and the squared inverse
    document frequency of each code, 0 for the last; `length` float64 (N,) of the vectors.
    """

    columns: Sequence[tuple[np.ndarray, np.ndarray]]
    length: np.ndarray


class Likeness:
    """Likeness over the rows of one item table; `read` gives columns of codes, int (N, W), -1 for none."""

    def __init__(self, read: Callable[[], Sequence[np.ndarray]]) -> None:
        self._read = read
        self._kept: tuple[Moment, _Terms] | None = None

    @classmethod
    def of_attributes(cls, table: ItemTable, names: Sequence[str]) -> "Likeness":
        """By the values of text attributes; one may have several."""
        return cls(lambda: [column[0] for name in names if (column := table.texts(name)) is not None])

    @classmethod
    def of_titles(cls, table: ItemTable) -> "Likeness":
        """By the words of titles: names of ranges and models, of which a vector of meaning knows little."""
        return cls(lambda: [table.words])

    def to(self, seeds: np.ndarray, weights: np.ndarray, rows: np.ndarray, moment: Moment) -> np.ndarray:
        """How alike rows (C,) are to weighted seeds (S,): the weighted mean of cosines, float32 (C,).

        NaN without seeds, and for a row of which nothing is written.
        """
        terms = self._terms(moment)
        if not len(seeds) or not terms.columns:
            return np.full(len(rows), np.nan, np.float32)
        worth = weights / terms.length[seeds]
        shared = np.zeros(len(rows))
        for codes, rarity in terms.columns:
            mine = codes[seeds]
            held = np.bincount(mine.ravel(), np.repeat(worth, mine.shape[1]), len(rarity))
            shared += (held * rarity)[codes[rows]].sum(1)
        length = terms.length[rows]
        cosine = shared / length / max(float(weights.sum()), 1e-9)
        return np.asarray(np.where(length > _NOTHING, cosine, np.nan), np.float32)

    def each(self, seeds: np.ndarray, rows: np.ndarray, moment: Moment) -> np.ndarray:
        """The cosine of each of rows (C,) and each of seeds (S,): float32 (C, S), NaN as in `to`."""
        terms = self._terms(moment)
        if not terms.columns:
            return np.full((len(rows), len(seeds)), np.nan, np.float32)
        shared = np.zeros((len(rows), len(seeds)))
        for codes, rarity in terms.columns:
            said, place = np.unique(codes[seeds], return_inverse=True)
            seed = np.repeat(np.arange(len(seeds)), codes.shape[1])
            held = np.zeros((len(said), len(seeds)))
            held[place.ravel(), seed] = rarity[codes[seeds].ravel()]
            column = np.full(len(rarity), -1)
            column[said[rarity[said] > 0]] = np.flatnonzero(rarity[said] > 0)
            row, at = np.nonzero(column[codes[rows]] >= 0)
            np.add.at(shared, row, held[column[codes[rows[row], at]]])
        length = terms.length[rows]
        cosine = shared / length[:, None] / terms.length[seeds]
        return np.asarray(np.where(length[:, None] > _NOTHING, cosine, np.nan), np.float32)

    def _terms(self, moment: Moment) -> _Terms:
        """Once per moment: what came later is not of it."""
        kept = self._kept
        if kept is None or kept[0] is not moment:
            columns = [_weighed(codes[: len(moment.age)]) for codes in self._read()]
            length = np.zeros(len(moment.age))
            for codes, rarity in columns:
                length += rarity[codes].sum(1)
            terms = _Terms(columns, np.maximum(np.sqrt(length), _NOTHING))
            self._kept = kept = (moment, terms)
        return kept[1]


def _weighed(live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = live.copy()  # the feed may write new ones meanwhile
    used, count = np.unique(codes[codes >= 0], return_counts=True)
    rarity = np.zeros(int(used.max(initial=-1)) + 2)
    rarity[used] = np.log(max(len(codes), 1) / count) ** 2
    return np.where(codes < 0, len(rarity) - 1, codes), rarity
