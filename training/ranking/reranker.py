"""Fits the reranker: a choice model, and LambdaMART by LightGBM boosted from the choice model's scores."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import lightgbm
import numpy as np

from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import RerankerModel
from training.examples.queries import DAY
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import fit_choice
from training.ranking.coordinate_ascent import DEPTH, ascend

_VALIDATION_SHARE = 0.2
_PATIENCE = 50
_TREE_COUNTS = 40
# The least number of groups for a standard error.
_MIN_GROUPS = 2
_QUERY_GRADE_SHARE = 0.1
_LEAVES = (7, 63)
_ROWS_PER_LEAF = 1000
_PARAMETERS = {
    "metric": "ndcg",
    "eval_at": [DEPTH],
    "objective": "lambdarank",
    "learning_rate": 0.05,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.6,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "lambdarank_truncation_level": 40,
    "max_bin": 127,
    "verbosity": -1,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 0,
    "num_threads": 0,
}
_log = logging.getLogger(__name__)


def fit_reranker(
    query_groups: RankingGroups,
    columns: Sequence[str],
    trees: int,
    *,
    page_groups: RankingGroups | None = None,
) -> RerankerModel:
    """Fit a model that ranks groups: of past queries, or of logged pages (`page_groups`) if there are any.

    The choice model is fitted by likelihood, then improved at the first ranks (`coordinate_ascent`).

    With pages, the queries help the choice model only, at a tenth of their grades: a page limits what a user
    can choose, so queries over all items answer another question. Trees learn interactions of columns. The
    last fifth of the groups, cut between days, decides how many of at most `trees` trees to use, and whether
    trees help at all. If most groups are of the first day, a random fifth decides.
    """
    groups = query_groups if page_groups is None else page_groups
    if trees and (split := _split(query_groups, page_groups)):
        training, early_queries, validation = split
        choice = _fit_choice(early_queries, training, columns)
        validation_sets = [validation]
        if page_groups is not None:  # training on pages must not degrade queries over all items
            validation_sets.append(query_groups.take(query_groups.time >= validation.time[0] // DAY * DAY))
        trees = _tree_count(choice, training, validation_sets, trees)
    else:  # no trees are requested, or there is no validation data
        trees = 0
    choice = _fit_choice(query_groups if page_groups is not None else None, groups, columns)
    if not trees:
        return RerankerModel(choice, None)
    data, gain = _dataset(choice, groups)
    return RerankerModel(choice, lightgbm.train(_parameters(groups, gain), data, trees))


def improves_ndcg(
    query_groups: RankingGroups,
    columns: Sequence[str],
    tested: np.ndarray,
    *,
    page_groups: RankingGroups | None = None,
) -> bool:
    """Whether the columns `tested`, bool (K,), improve a choice model by more than one standard error.

    The gain is that of nDCG@20 on the validation groups, as for trees. True if there is too little data to
    decide.
    """
    split = _split(query_groups, page_groups)
    if not split or len(split[2].size) < _MIN_GROUPS:
        return True
    training, early_queries, validation = split
    ndcg = []
    for mask in (np.ones(len(columns), bool), ~tested):
        names = [name for name, selected in zip(columns, mask, strict=True) if selected]
        queries = None if early_queries is None else early_queries.select_columns(mask)
        choice = _fit_choice(queries, training.select_columns(mask), names)
        ndcg.append(validation.ndcg(choice.terms(validation.matrix[:, mask]).sum(1, dtype=np.float64), DEPTH))
    if len(ndcg[0]) < _MIN_GROUPS:
        return True
    mean, error = _mean_and_error(ndcg[0] - ndcg[1])
    tested_names = [name for name, is_tested in zip(columns, tested, strict=True) if is_tested]
    _log.info("%s gain %.4f of nDCG, ± %.4f", ", ".join(tested_names), mean, error)
    return mean > error


def _split(
    query_groups: RankingGroups, page_groups: RankingGroups | None
) -> tuple[RankingGroups, RankingGroups | None, RankingGroups] | None:
    """The training groups, the queries that are used with them, and the validation groups."""
    groups = query_groups if page_groups is None else page_groups
    validation = validation_mask(groups)
    if not validation.any():
        return None
    training = groups.take(~validation)
    if page_groups is None:
        return training, None, groups.take(validation)
    if training.time[-1] < groups.time[validation][0]:
        query_groups = query_groups.take(query_groups.time < groups.time[validation][0] // DAY * DAY)
    return training, query_groups, groups.take(validation)


def validation_mask(groups: RankingGroups) -> np.ndarray:
    """The validation groups, bool (Q,); none of a single group."""
    count = len(groups.size)
    start = int(count * (1 - _VALIDATION_SHARE))
    if not start:
        return np.zeros(count, bool)
    edge = groups.time[start] // DAY * DAY
    if groups.time[0] < edge:
        return np.asarray(groups.time >= edge)
    return np.random.default_rng(0).permutation(count) >= start


def _fit_choice(
    query_groups: RankingGroups | None, groups: RankingGroups, columns: Sequence[str]
) -> ConditionalLogit:
    training = groups
    if query_groups is not None:
        training = RankingGroups.concatenate(
            [replace(query_groups, grade=_QUERY_GRADE_SHARE * query_groups.grade), groups]
        )
    return ascend(fit_choice(training, columns), groups)


def _tree_count(
    choice: ConditionalLogit, training: RankingGroups, validation_sets: Sequence[RankingGroups], limit: int
) -> int:
    """The best number of trees for the first of `validation_sets`; 0 if the gain is not significant.

    Significant means more than one standard error of the gain in nDCG@20; of equally good models the simpler
    one is used, as in pruning (Breiman et al., 1984). Forty numbers are compared, up to the end of early
    stopping. The best of many numbers gains by chance as well, so each half of the groups is measured with
    the number that is best for the other half. Also 0 if another validation set loses more than one standard
    error. A single group decides nothing.
    """
    validation = validation_sets[0]
    grades = np.unique(np.concatenate([training.grade, validation.grade]))
    training_data, gain = _dataset(choice, training, grades)
    validation_data, _ = _dataset(choice, validation, grades, training_data)
    stop = lightgbm.early_stopping(_PATIENCE, verbose=False)
    booster = lightgbm.train(
        _parameters(training, gain), training_data, limit, valid_sets=[validation_data], callbacks=[stop]
    )
    counts = np.unique(np.linspace(1, booster.current_iteration(), _TREE_COUNTS).astype(int))
    gains = _gains(choice, booster, validation, counts)
    if gains.shape[1] < _MIN_GROUPS:
        return 0
    best = int(counts[gains.mean(1).argmax()])
    half = np.random.default_rng(0).permutation(gains.shape[1]) % 2 == 0
    cross_gains = [gains[gains[:, ~in_half].mean(1).argmax(), in_half] for in_half in (half, ~half)]
    mean, error = _mean_and_error(np.concatenate(cross_gains))
    _log.info("trees gain %.4f of nDCG, ± %.4f; %d is the best number", mean, error, best)
    if mean <= error:
        return 0
    for groups in validation_sets[1:]:
        (other_gains,) = _gains(choice, booster, groups, np.array([best]))
        if len(other_gains) < _MIN_GROUPS:
            continue
        mean, error = _mean_and_error(other_gains)
        _log.info("on the queries %.4f, ± %.4f", mean, error)
        if mean < -error:
            return 0
    return best


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


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


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
