"""CTR head and reranker together: the reranker reads the head's scores, foretold ones when it learns."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from services.ranking.ctr import CtrModel
from services.ranking.reranker import RerankerModel
from services.ranking.scoring import ctr_column
from training import ctr
from training.lesson import Lesson
from training.lists import Lists
from training.reranker import earns, fit_reranker
from training.rows import Rows
from training.shop_settings import ShopSettings

_log = logging.getLogger(__name__)
# Of each part, what its feature columns begin with.
_COLUMNS = {
    "text": ("text_",),
    "image": ("image_",),
    "graph": ("baskets_", "people_"),
    "sequence": ("sequence_",),
    "words": ("words_",),
    "ctr": ("ctr_",),
}


def belongs(column: str, *parts: str) -> bool:
    """Whether a feature column is made of one of some parts: text, image, words, graph, sequence or ctr."""
    return any(column.startswith(_COLUMNS.get(part, ())) for part in parts)


@dataclass(frozen=True)
class Fitted:
    """Fitted models, and which columns the reranker reads: of the features, the head's scores after them."""

    head: CtrModel | None
    model: RerankerModel
    columns: np.ndarray

    def score(self, rows: Rows, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Scores float64 (N,) of rows."""
        return self.model.score(self.matrix(rows, vectors))

    def matrix(self, rows: Rows, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the reranker reads of rows, float32 (N, K)."""
        matrix = rows.matrix
        if self.head is not None:
            matrix = np.concatenate([matrix, ctr.score(self.head, rows, vectors)], axis=1)
        return matrix[:, self.columns]


class Heads:
    """The CTR heads that a lesson teaches, each fitted once: by the spaces it reads."""

    def __init__(self, lesson: Lesson, epochs: int) -> None:
        # Pages that were shown tell what was passed over from what was never on offer.
        self.sources = [lesson.rows, lesson.seen] if lesson.shown else [lesson.rows]
        self._lesson, self._epochs = lesson, epochs
        self._kept: dict[frozenset[str], tuple[CtrModel, list[np.ndarray]]] = {}

    def reading(self, spaces: Mapping[str, np.ndarray]) -> tuple[CtrModel, list[np.ndarray]]:
        """A head that reads vectors (N, D) of these spaces, and what is foretold of each source: (N, T)."""
        if (key := frozenset(spaces)) not in self._kept:
            lesson = self._lesson
            shape = ctr.ctr_settings(lesson.seen, spaces, lesson.types, shown=lesson.shown)
            logits = ctr.foretold(shape, lesson.seen, lesson.labels, self.sources, spaces, self._epochs)
            if lesson.shown:
                shape = ctr.calibrated(shape, lesson.seen, logits[1], lesson.labels)
            head = ctr.fit_ctr(shape, lesson.seen, lesson.labels, spaces, self._epochs)
            self._kept[key] = head, logits
        return self._kept[key]


def fit_models(
    lesson: Lesson,
    settings: ShopSettings,
    vectors: Mapping[str, np.ndarray],
    without: Collection[str] = (),
    heads: Heads | None = None,
    *,
    doubt: bool = True,
) -> Fitted:
    """Both models; `without` names parts that they must not know, as in `belongs`, or "trees".

    A head whose scores do not help the reranker is left out, or serves probabilities alone; without `doubt`
    that is not asked.

    `heads` are those of the same lesson, if other models of it are fitted too.
    """
    heads = heads or Heads(lesson, settings.ranking.ctr_epochs)
    spaces = {space: values for space, values in vectors.items() if space not in without}
    matrices = [rows.matrix for rows in heads.sources]
    names, head = tuple(lesson.rows.names), None
    if "ctr" not in without and spaces:  # without vectors there is nothing for the head to read
        head, logits = heads.reading(spaces)
        names = (*names, *(ctr_column(t) for t in lesson.types))
        matrices = [np.concatenate(both, axis=1) for both in zip(matrices, logits, strict=True)]
    columns = np.array([at for at, name in enumerate(names) if not belongs(name, *without)], np.int64)
    both = zip(heads.sources, matrices, strict=True)
    lists = [_lists(rows, matrix[:, columns]) for rows, matrix in both]
    read = [names[at] for at in columns]
    shown = lists[1] if lesson.shown else None
    doubted = np.array([belongs(name, "ctr") for name in read], bool)
    if doubt and doubted.any() and not earns(lists[0], read, doubted, shown=shown):
        _log.info("the CTR head does not help to order")
        columns, read = columns[~doubted], [name for name in read if not belongs(name, "ctr")]
        lists = [some.only(~doubted) for some in lists]
        shown = lists[1] if lesson.shown else None
        head = head if lesson.shown else None  # of what was shown it tells probabilities as well
    trees = 0 if "trees" in without else settings.ranking.trees
    model = fit_reranker(lists[0], read, trees, shown=shown)
    return Fitted(head, model, columns)


def _lists(rows: Rows, matrix: np.ndarray) -> Lists:
    when = np.array([q.as_of for q in rows.questions], np.int64)
    return Lists(matrix, rows.label, rows.weight, rows.size, when)
