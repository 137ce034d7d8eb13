"""Models of one recipe that score queries which they were not fitted on.

With enough queries on the last days, one set of models is fitted on the earlier days. With few, the users are
cut into five parts, and the queries of a part are scored by models fitted on the other parts (cross-fitting).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.core.decisions import MIN_QUERIES
from training.data.config import ShopConfig
from training.examples.feature_rows import FeatureRows
from training.examples.queries import EvalQuery, user_part
from training.examples.training_set import TrainingSet
from training.examples.windows import Windows
from training.ranking import ctr
from training.ranking.fit_models import USER_PARTS, CtrHeads, FittedModels, fit_models

# A dozen models are fitted. On H&M, trees help significantly with 12,000 baskets, but not with 3,000.
TRAINING_QUERIES = 6000


@dataclass(frozen=True)
class Fold:
    """Training data, and which of the Q evaluated queries it leaves out, int64 rising."""

    training: TrainingSet
    queries: np.ndarray


@dataclass(frozen=True)
class Split:
    """The evaluated queries, the time from which on they are, and the folds; empty without a query."""

    queries: Sequence[EvalQuery]
    since: int
    folds: Sequence[Fold]

    @property
    def is_crossed(self) -> bool:
        """Whether the queries of each part of the users are scored by models of the other parts."""
        return len(self.folds) > 1


def split_of(
    data: TrainingSet, eval_queries: Sequence[EvalQuery], windows: Windows, max_queries: int
) -> Split:
    """The split of a training set and of the queries of the ranking window, at most `max_queries` of them."""
    late = [q for q in eval_queries if q.as_of >= windows.evaluated_from]
    training = data.before(windows.evaluated_from).sample(TRAINING_QUERIES)
    can_learn = len(training.rows.size) and len(training.ctr_rows.size)
    if (len(late) >= MIN_QUERIES and can_learn) or data.has_impressions or not max_queries:
        late = _sample(late, max_queries)
        is_usable = late and can_learn
        folds = [Fold(training, np.arange(len(late)))] if is_usable else []
        return Split(late, windows.evaluated_from, folds)
    queries = _sample(eval_queries, max_queries)
    part_of = np.array([_part(q) for q in queries], np.int64)

    def fold_of(part: int) -> Fold:
        others = data.where(lambda query: _part(query) != part).sample(TRAINING_QUERIES)
        return Fold(others, np.flatnonzero(part_of == part))

    folds = [fold_of(part) for part in np.unique(part_of).tolist()]
    is_usable = len(folds) > 1 and all(len(fold.training.rows.size) for fold in folds)
    return Split(queries, windows.since, folds if is_usable else [])


class HeldOutModels:
    """The models of each fold, of the recipe of the models `like`."""

    def __init__(
        self,
        split: Split,
        settings: ShopConfig,
        vectors: Mapping[str, np.ndarray],
        like: FittedModels,
        without: Collection[str] = (),
        heads: Sequence[CtrHeads] = (),
    ) -> None:
        self._split, self._settings, self._vectors = split, settings, vectors
        attributes = settings.items.text_attributes
        self.heads = heads or [
            CtrHeads(fold.training, settings.ranking.ctr_epochs, attributes) for fold in split.folds
        ]
        self.models = [
            fit_models(fold.training, settings, vectors, without, of_fold, like=like)
            for fold, of_fold in zip(split.folds, self.heads, strict=True)
        ]

    @property
    def first(self) -> FittedModels:
        """The models of the first fold: the only ones without cross-fitting."""
        return self.models[0]

    def without(self, parts: Collection[str]) -> "HeldOutModels":
        """Models of the same recipe and heads without some parts."""
        return HeldOutModels(self._split, self._settings, self._vectors, self.first, parts, self.heads)

    def scores(self, rows: FeatureRows) -> np.ndarray:
        """Scores float64 (N,) of the rows of the evaluated queries, each by the models of its fold."""
        pairs = zip(self.models, self._parts(rows), strict=True)
        return self._joined(rows, [models.score(part, self._vectors) for models, part in pairs])

    def linear_scores(self, rows: FeatureRows) -> np.ndarray:
        """The same without trees."""
        pairs = zip(self.models, self._parts(rows), strict=True)
        values = [models.model.linear_score(models.matrix(part, self._vectors)) for models, part in pairs]
        return self._joined(rows, values)

    def head_scores(self, rows: FeatureRows) -> np.ndarray | None:
        """The logit of the strongest type by the CTR heads, float64 (N,); None without heads."""
        heads = [models.head for models in self.models if models.head is not None]
        if len(heads) < len(self.models):
            return None
        pairs = zip(heads, self._parts(rows), strict=True)
        return self._joined(rows, [ctr.score(head, part, self._vectors)[:, -1] for head, part in pairs])

    def _parts(self, rows: FeatureRows) -> list[FeatureRows]:
        """The rows of the queries of each fold."""
        return [rows.take(fold.queries) for fold in self._split.folds]

    def _joined(self, rows: FeatureRows, values: Sequence[np.ndarray]) -> np.ndarray:
        """The values of each fold's rows, in the order of the rows."""
        result, group = np.empty(len(rows.items)), rows.group()
        for fold, part in zip(self._split.folds, values, strict=True):
            result[np.isin(group, fold.queries)] = part
        return result


def _part(query: EvalQuery) -> int:
    return user_part(query.user_id, USER_PARTS)


def _sample(queries: Sequence[EvalQuery], limit: int) -> list[EvalQuery]:
    selected = np.sort(np.random.default_rng(1).permutation(len(queries))[:limit])
    return [queries[index] for index in selected]
