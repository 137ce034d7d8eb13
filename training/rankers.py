"""CTR head and reranker together: the reranker reads the head's scores, foretold ones when it learns."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from services.ranking.ctr import CtrModel
from services.ranking.reranker import RerankerModel
from services.ranking.scoring import ctr_column
from training import ctr
from training.lesson import Lesson
from training.lists import Lists
from training.reranker import fit_reranker
from training.rows import Rows
from training.shop_settings import ShopSettings

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


def fit_models(
    lesson: Lesson,
    settings: ShopSettings,
    vectors: Mapping[str, np.ndarray],
    without: Collection[str] = (),
) -> Fitted:
    """Both models; `without` names parts that they must not know, as in `belongs`, or "trees"."""
    spaces = {space: values for space, values in vectors.items() if space not in without}
    # Pages that were shown tell what was passed over from what was never on offer.
    sources = [lesson.rows, lesson.seen] if lesson.shown else [lesson.rows]
    matrices = [rows.matrix for rows in sources]
    names, head = tuple(lesson.rows.names), None
    if "ctr" not in without and spaces:  # without vectors there is nothing for the head to read
        epochs = settings.ranking.ctr_epochs
        shape = ctr.ctr_settings(lesson.seen, spaces, lesson.types, shown=lesson.shown)
        logits = ctr.foretold(shape, lesson.seen, lesson.labels, sources, spaces, epochs)
        if lesson.shown:
            shape = ctr.calibrated(shape, lesson.seen, logits[1], lesson.labels)
        head = ctr.fit_ctr(shape, lesson.seen, lesson.labels, spaces, epochs)
        names = (*names, *(ctr_column(t) for t in lesson.types))
        matrices = [np.concatenate(both, axis=1) for both in zip(matrices, logits, strict=True)]
    columns = np.array([at for at, name in enumerate(names) if not belongs(name, *without)], np.int64)
    lists = [_lists(rows, matrix[:, columns]) for rows, matrix in zip(sources, matrices, strict=True)]
    read = [names[at] for at in columns]
    shown = lists[1] if lesson.shown else None
    trees = 0 if "trees" in without else settings.ranking.trees
    model = fit_reranker(lists[0], read, trees, shown=shown)
    return Fitted(head, model, columns)


def _lists(rows: Rows, matrix: np.ndarray) -> Lists:
    when = np.array([q.as_of for q in rows.questions], np.int64)
    return Lists(matrix, rows.label, rows.weight, rows.size, when)
