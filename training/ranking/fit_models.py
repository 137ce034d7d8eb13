"""Fits CTR head and reranker together; the reranker is trained on the head's out-of-fold scores."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.ranking.features.user_impressions import IMPRESSION_COLUMNS
from services.ranking.models.ctr import CtrModel
from services.ranking.models.reranker import RerankerModel
from services.ranking.models.taste import TASTE_COLUMNS
from services.ranking.scoring.scorer import ctr_column
from services.ranking.state.item_stats import RECENT_COLUMNS
from training.core.decisions import Decision
from training.data.config import ShopConfig
from training.examples.feature_rows import FeatureRows
from training.examples.queries import user_part
from training.examples.ranking_groups import RankingGroups
from training.examples.training_set import TrainingSet
from training.ranking import ctr
from training.ranking.page_reranker import LoggedPages, fit_page_reranker, improves_likelihood
from training.ranking.reranker import fit_reranker, head_decision, thin_head
from training.ranking.shrinkage import ChoiceRecipe, CrossValidation

USER_PARTS = 5
"""Of users, in cross-validation and cross-fitting."""
_log = logging.getLogger(__name__)
# What the names of the feature columns of each part begin with.
_COLUMNS = {
    "recent": RECENT_COLUMNS,
    "impressions": IMPRESSION_COLUMNS,
    "text": ("text_",),
    "image": ("image_",),
    "graph": ("baskets_", "people_"),
    "sequence": ("sequence_",),
    "taste": TASTE_COLUMNS,
    "words": ("words_",),
    "ctr": ("ctr_",),
}


def is_column_of(column: str, *parts: str) -> bool:
    """Whether a feature column belongs to one of the parts, which are the keys of `_COLUMNS`."""
    return any(column.startswith(_COLUMNS.get(part, ())) for part in parts)


@dataclass(frozen=True)
class FittedModels:
    """Fitted models, and the reranker's columns: indices into the features followed by the head's scores.

    `recipe` is that of the choice model, None in a shop that logs pages; `decisions` are those of this fit.
    """

    head: CtrModel | None
    model: RerankerModel
    columns: np.ndarray
    recipe: ChoiceRecipe | None = None
    decisions: Sequence[Decision] = ()

    @property
    def reads_head(self) -> bool:
        """Whether the head's scores are among the reranker's columns."""
        return any(is_column_of(name, "ctr") for name in self.model.choice.columns)

    def score(self, rows: FeatureRows, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Scores float64 (N,) of rows."""
        return self.model.score(self.matrix(rows, vectors))

    def matrix(self, rows: FeatureRows, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The reranker's input for rows, float32 (N, K)."""
        matrix = rows.matrix
        if self.head is not None:
            matrix = np.concatenate([matrix, ctr.score(self.head, rows, vectors)], axis=1)
        return matrix[:, self.columns]


class CtrHeads:
    """The CTR heads of a training set, each fitted once per set of vector spaces.

    `attributes` are the text attributes whose values the space `ATTRIBUTES` has; a head of logged pages reads
    them.
    """

    def __init__(self, data: TrainingSet, epochs: int, attributes: Sequence[str] = ()) -> None:
        # Logged pages distinguish items that a user ignored from items that the user never saw.
        self.sources = [data.rows, data.ctr_rows] if data.has_impressions else [data.rows]
        self._data, self._epochs, self._attributes = data, epochs, attributes
        self._models: dict[frozenset[str], tuple[CtrModel, list[np.ndarray]]] = {}

    def fit(self, spaces: Mapping[str, np.ndarray]) -> tuple[CtrModel, list[np.ndarray]]:
        """A head over the vectors (N, D) of these spaces, and out-of-fold logits (N, T) of each source."""
        if (key := frozenset(spaces)) not in self._models:
            data = self._data
            shown, places = data.has_impressions, data.positions
            shape = ctr.ctr_settings(
                data.ctr_rows, spaces, data.types, shown=shown, attributes=self._attributes
            )
            logits = ctr.out_of_fold_logits(
                shape, data.ctr_rows, data.labels, self.sources, spaces, self._epochs, places
            )
            if data.has_impressions:
                shape = ctr.calibrate(shape, data.ctr_rows, logits[1], data.labels)
            head = ctr.fit_ctr(shape, data.ctr_rows, data.labels, spaces, self._epochs, positions=places)
            self._models[key] = head, logits
        return self._models[key]


def fit_models(
    data: TrainingSet,
    settings: ShopConfig,
    vectors: Mapping[str, np.ndarray],
    without: Collection[str] = (),
    heads: CtrHeads | None = None,
    *,
    like: FittedModels | None = None,
) -> FittedModels:
    """Fit both models without the parts in `without`, as in `is_column_of`, or "trees".

    If the head's scores do not improve the reranker, the reranker does not read them; the head then serves
    probabilities only, or is dropped. With the models `like`, that decision, the recipe of the choice model
    and the number of trees are taken from there.

    `heads` are the heads of the same training set, if more models are fitted on it.
    """
    heads = heads or CtrHeads(data, settings.ranking.ctr_epochs, settings.items.text_attributes)
    spaces = {space: values for space, values in vectors.items() if space not in without}
    matrices = [rows.matrix for rows in heads.sources]
    names, head = tuple(data.rows.names), None
    # Trained on pages, a head that is no column still serves probabilities.
    needs_head = like is None or like.reads_head or data.has_impressions
    decisions: list[Decision] = []
    if like is None and not data.has_impressions and "ctr" not in without and spaces:
        decision = thin_head(groups_of(data.rows, data.rows.matrix))
        decisions += [decision] if decision else []
        needs_head = decision is None
    if "ctr" not in without and spaces and needs_head:  # the head reads vectors only
        head, logits = heads.fit(spaces)
        names = (*names, *(ctr_column(t) for t in data.types))
        matrices = [np.concatenate(pair, axis=1) for pair in zip(matrices, logits, strict=True)]
    columns = np.array(
        [index for index, name in enumerate(names) if not is_column_of(name, *without)], np.int64
    )
    sources = zip(heads.sources, matrices, strict=True)
    groups = [groups_of(rows, matrix[:, columns]) for rows, matrix in sources]
    columns_read = [names[index] for index in columns]
    pages = LoggedPages(groups[1], data.positions) if data.has_impressions else None
    from_head = np.array([is_column_of(name, "ctr") for name in columns_read], bool)
    reads_head = like.reads_head if like is not None else bool(from_head.any())
    if like is None and reads_head:
        if pages is None:
            decisions.append(head_decision(groups[0], columns_read, from_head))
            reads_head = decisions[-1].accepted
        elif not (reads_head := improves_likelihood(groups[0], pages, columns_read, from_head)):
            _log.info("the CTR head does not improve the ranking")
    if from_head.any() and not reads_head:
        columns = columns[~from_head]
        columns_read = [name for name in columns_read if not is_column_of(name, "ctr")]
        groups = [part.select_columns(~from_head) for part in groups]
        pages = pages.select_columns(~from_head) if pages else None
        head = head if data.has_impressions else None
    limit = settings.ranking.trees if like is None else like.model.tree_count
    trees, exact = 0 if "trees" in without else limit, like is not None
    if pages is not None:
        model = fit_page_reranker(groups[0], pages, columns_read, trees, exact=exact)
        return FittedModels(head, model, columns)
    recipe = like.recipe if like is not None else None
    fitted = fit_reranker(
        groups[0],
        columns_read,
        trees,
        recipe=recipe,
        exact=exact,
        validation=_validation(data, columns) if recipe is None and head is None else None,
    )
    return FittedModels(head, fitted.model, columns, fitted.recipe, [*decisions, *fitted.decisions])


def _validation(data: TrainingSet, columns: np.ndarray) -> CrossValidation | None:
    rows = data.validation
    if rows is None:
        return None
    part, training_part = (
        np.array([user_part(q.user_id, USER_PARTS) for q in of], np.int64)
        for of in (rows.eval_queries, data.rows.eval_queries)
    )
    return CrossValidation(groups_of(rows, rows.matrix[:, columns]), part, training_part)


def groups_of(rows: FeatureRows, matrix: np.ndarray) -> RankingGroups:
    """The queries of rows as groups, with the columns `matrix`, float32 (N, K)."""
    time = np.array([q.as_of for q in rows.eval_queries], np.int64)
    return RankingGroups(matrix, rows.label, rows.weight, rows.size, time)
