"""Fits the reranker: a choice model, and LambdaMART by LightGBM boosted from the choice model's scores.

`page_reranker` fits that of a shop that logs pages.
"""

import logging
from collections.abc import Sequence

import lightgbm
import numpy as np

from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import RerankerModel
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import fit_choice
from training.ranking.coordinate_ascent import DEPTH, ascend
from training.ranking.trees import PATIENCE, SETTINGS, tree_counts
from training.ranking.validation import MIN_GROUPS, best_count, mean_and_error, validation_mask

_LEAVES = (7, 63)
_ROWS_PER_LEAF = 1000
_PARAMETERS = SETTINGS | {
    "metric": "ndcg",
    "eval_at": [DEPTH],
    "objective": "lambdarank",
    "min_data_in_leaf": 50,
    "lambdarank_truncation_level": 40,
}
_log = logging.getLogger(__name__)


def fit_reranker(
    groups: RankingGroups, columns: Sequence[str], trees: int, *, exact: bool = False
) -> RerankerModel:
    """Fit a model that ranks the candidates of past queries, with at most `trees` trees; so many if `exact`.

    The choice model is fitted by likelihood, then improved at the first ranks (`coordinate_ascent`). Trees
    learn interactions of columns. The last fifth of the groups, cut between days, decides how many of them to
    use, and whether they help at all. If most groups are of the first day, a random fifth decides.
    """
    is_late = validation_mask(groups)
    count = trees if exact else 0
    if trees and not exact and is_late.any():
        early = groups.take(~is_late)
        count = _tree_count(_fit_choice(early, columns), early, groups.take(is_late), trees)
    choice = _fit_choice(groups, columns)
    if not count:
        return RerankerModel(choice, None)
    data, gain = _dataset(choice, groups)
    return RerankerModel(choice, lightgbm.train(_parameters(groups, gain), data, count))


def improves_ndcg(groups: RankingGroups, columns: Sequence[str], tested: np.ndarray) -> bool:
    """Whether the columns `tested`, bool (K,), improve a choice model by more than one standard error.

    The gain is that of nDCG@20 on the validation groups, as for trees. True if there is too little data to
    decide.
    """
    is_late = validation_mask(groups)
    if np.count_nonzero(is_late) < MIN_GROUPS:
        return True
    early, late, ndcg = groups.take(~is_late), groups.take(is_late), []
    for mask in (np.ones(len(columns), bool), ~tested):
        names = [name for name, selected in zip(columns, mask, strict=True) if selected]
        choice = _fit_choice(early.select_columns(mask), names)
        ndcg.append(late.ndcg(choice.terms(late.matrix[:, mask]).sum(1, dtype=np.float64), DEPTH))
    if len(ndcg[0]) < MIN_GROUPS:
        return True
    mean, error = mean_and_error(ndcg[0] - ndcg[1])
    tested_names = [name for name, is_tested in zip(columns, tested, strict=True) if is_tested]
    _log.info("%s gain %.4f of nDCG, ± %.4f", ", ".join(tested_names), mean, error)
    return mean > error


def _fit_choice(groups: RankingGroups, columns: Sequence[str]) -> ConditionalLogit:
    return ascend(fit_choice(groups, columns), groups)


def _tree_count(
    choice: ConditionalLogit, training: RankingGroups, validation: RankingGroups, limit: int
) -> int:
    """The best number of trees for the validation groups; 0 if the gain is not significant.

    Significant means more than one standard error of the gain in nDCG@20; of equally good models the simpler
    one is used, as in pruning (Breiman et al., 1984). Forty numbers are compared, up to the end of early
    stopping.
    """
    grades = np.unique(np.concatenate([training.grade, validation.grade]))
    training_data, gain = _dataset(choice, training, grades)
    validation_data, _ = _dataset(choice, validation, grades, training_data)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    booster = lightgbm.train(
        _parameters(training, gain), training_data, limit, valid_sets=[validation_data], callbacks=[stop]
    )
    counts = tree_counts(booster.current_iteration())
    best, mean, error = best_count(counts, _gains(choice, booster, validation, counts))
    _log.info("trees gain %.4f of nDCG, ± %.4f; %d is the best number", mean, error, best)
    return best if mean > error else 0


def _gains(
    choice: ConditionalLogit, trees: lightgbm.Booster, groups: RankingGroups, counts: np.ndarray
) -> np.ndarray:
    """The gain in each group's nDCG@20 of the first `counts` trees, rising (K,): float64 (K, Q)."""
    score = choice.terms(groups.matrix).sum(1, dtype=np.float64)
    base_ndcg, gains, used = groups.ndcg(score, DEPTH), [], 0
    for count in counts.tolist():
        score = score + trees.predict(groups.matrix, start_iteration=used, num_iteration=count - used)
        gains.append(groups.ndcg(score, DEPTH) - base_ndcg)
        used = count
    return np.stack(gains)


def _parameters(groups: RankingGroups, gain: Sequence[float]) -> dict[str, object]:
    """LightGBM's settings; with few rows, trees are small."""
    leaves = int(np.clip(len(groups.grade) // _ROWS_PER_LEAF, *_LEAVES))
    return _PARAMETERS | {"num_leaves": leaves, "label_gain": list(gain)}


def _dataset(
    choice: ConditionalLogit,
    groups: RankingGroups,
    grades: np.ndarray | None = None,
    reference: lightgbm.Dataset | None = None,
) -> tuple[lightgbm.Dataset, list[float]]:
    """The rows as a LightGBM dataset, and the gain of each grade as a share of the highest."""
    grades = np.unique(groups.grade) if grades is None else grades
    # LightGBM breaks ties by position. Targets come first, so they would look well ranked before training
    # and no tree would seem to help.
    tie_breaker = np.random.default_rng(0).random(len(groups.grade))
    order = np.lexsort((tie_breaker, groups.group()))
    matrix = groups.matrix[order]
    data = lightgbm.Dataset(
        matrix,
        np.searchsorted(grades, groups.grade[order]),
        weight=groups.weight[order],
        group=groups.size,
        init_score=choice.terms(matrix).sum(1, dtype=np.float64),
        reference=reference,
    )
    return data, (grades / max(float(grades.max()), 1e-9)).tolist()
