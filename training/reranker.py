"""The reranker's fit: a choice model, and LambdaMART by LightGBM boosted from its scores."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import lightgbm
import numpy as np

from services.ranking.reranker import ConditionalLogit, RerankerModel
from training.ascent import DEPTH, ascend
from training.choice import fit_choice
from training.lists import Lists
from training.queries import DAY

_HELD = 0.2
_PATIENCE = 50
_TRIED = 40
# So many lists at least say something of chance.
_TELLING = 2
_ASKED_SHARE = 0.1
_LEAVES = (7, 63)
_ROWS_A_LEAF = 1000
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
    asked: Lists, columns: Sequence[str], trees: int, *, shown: Lists | None = None
) -> RerankerModel:
    """A model that puts lists in order: of past questions, or of pages that were `shown` if there are any.

    The choice model is fitted by likelihood, then moved to where the first places are better (`ascent`).

    With pages the questions only help the choice model, a tenth of their grades: what a shop showed decides
    what could be chosen of everything, but not what was chosen of a page. Trees learn what
    a sum cannot say. The last fifth of the lists, cut between days, tells after how many of at most
    `trees` trees more do not help to those who know earlier days alone, and whether they help at all.
    Where most lists are of the first day, a fifth of all is drawn for that.
    """
    lists = asked if shown is None else shown
    if trees and (cut := _cut(asked, shown)):
        early, asked_before, late = cut
        choice = _choice(asked_before, early, columns)
        held = [late]
        if shown is not None:  # what pages taught must not spoil what is asked of everything
            held.append(asked.take(asked.when >= late.when[0] // DAY * DAY))
        trees = _enough(choice, early, held, trees)
    else:  # none asked for, or nothing to tell whether they help
        trees = 0
    choice = _choice(asked if shown is not None else None, lists, columns)
    if not trees:
        return RerankerModel(choice, None)
    data, gain = _dataset(choice, lists)
    return RerankerModel(choice, lightgbm.train(_parameters(lists, gain), data, trees))


def earns(asked: Lists, columns: Sequence[str], doubted: np.ndarray, *, shown: Lists | None = None) -> bool:
    """Whether some columns, `doubted` bool (K,), gain a choice model more than chance may give.

    Which is one standard error of the gain in nDCG@20 on the lists that are held out, as of trees. True
    when nothing can tell.
    """
    cut = _cut(asked, shown)
    if not cut or len(cut[2].size) < _TELLING:
        return True
    early, asked_before, late = cut
    found = []
    for kept in (np.ones(len(columns), bool), ~doubted):
        names = [name for name, keep in zip(columns, kept, strict=True) if keep]
        before = None if asked_before is None else asked_before.only(kept)
        choice = _choice(before, early.only(kept), names)
        found.append(late.ndcg(choice.terms(late.matrix[:, kept]).sum(1, dtype=np.float64), DEPTH))
    if len(found[0]) < _TELLING:
        return True
    mean, error = _mean(found[0] - found[1])
    doubts = [name for name, doubt in zip(columns, doubted, strict=True) if doubt]
    _log.info("%s gain %.4f of nDCG, give or take %.4f", ", ".join(doubts), mean, error)
    return mean > error


def _cut(asked: Lists, shown: Lists | None) -> tuple[Lists, Lists | None, Lists] | None:
    """The lists that are learned from, the questions that help them, and the lists held out."""
    lists = asked if shown is None else shown
    late = _late(lists)
    if not late.any():
        return None
    early = lists.take(~late)
    if shown is None:
        return early, None, lists.take(late)
    if early.when[-1] < lists.when[late][0]:
        asked = asked.take(asked.when < lists.when[late][0] // DAY * DAY)
    return early, asked, lists.take(late)


def _late(lists: Lists) -> np.ndarray:
    """The lists that are held out, bool (Q,); none of a single list."""
    count = len(lists.size)
    start = int(count * (1 - _HELD))
    if not start:
        return np.zeros(count, bool)
    edge = lists.when[start] // DAY * DAY
    if lists.when[0] < edge:
        return np.asarray(lists.when >= edge)
    return np.random.default_rng(0).permutation(count) >= start


def _choice(asked: Lists | None, lists: Lists, columns: Sequence[str]) -> ConditionalLogit:
    learned = lists
    if asked is not None:
        learned = Lists.joined([replace(asked, grade=_ASKED_SHARE * asked.grade), lists])
    return ascend(fit_choice(learned, columns), lists)


def _enough(choice: ConditionalLogit, early: Lists, held: Sequence[Lists], most: int) -> int:
    """How many trees are best for the first lists of `held`; 0 when they gain less than chance may give.

    Which is one standard error of the gain in nDCG@20: as in pruning (Breiman et al., 1984), of what is
    as good the simpler is taken. Forty numbers are tried, up to where early stopping ended. The gain is
    that of half of the lists by the number that is best for the others, since the best of many numbers
    gains something of noise as well. 0 too when other lists of `held` lose more than theirs; a single list
    says nothing of chance.
    """
    late = held[0]
    grades = np.unique(np.concatenate([early.grade, late.grade]))
    learned, gain = _dataset(choice, early, grades)
    watched, _ = _dataset(choice, late, grades, learned)
    stop = lightgbm.early_stopping(_PATIENCE, verbose=False)
    tried = lightgbm.train(_parameters(early, gain), learned, most, valid_sets=[watched], callbacks=[stop])
    counts = np.unique(np.linspace(1, tried.current_iteration(), _TRIED).astype(int))
    gained = _gains(choice, tried, late, counts)
    if gained.shape[1] < _TELLING:
        return 0
    enough = int(counts[gained.mean(1).argmax()])
    half = np.random.default_rng(0).permutation(gained.shape[1]) % 2 == 0
    told = [gained[gained[:, ~mine].mean(1).argmax(), mine] for mine in (half, ~half)]
    mean, error = _mean(np.concatenate(told))
    _log.info("trees gain %.4f of nDCG, give or take %.4f; %d would be best", mean, error, enough)
    if mean <= error:
        return 0
    for lists in held[1:]:
        (gain_there,) = _gains(choice, tried, lists, np.array([enough]))
        if len(gain_there) < _TELLING:
            continue
        mean, error = _mean(gain_there)
        _log.info("on other lists %.4f, give or take %.4f", mean, error)
        if mean < -error:
            return 0
    return enough


def _gains(choice: ConditionalLogit, trees: lightgbm.Booster, lists: Lists, counts: np.ndarray) -> np.ndarray:
    """What the first so many trees, rising (K,), gain of each list's nDCG@20 over none: float64 (K, Q)."""
    score = choice.terms(lists.matrix).sum(1, dtype=np.float64)
    plain, found, done = lists.ndcg(score, DEPTH), [], 0
    for count in counts.tolist():
        score = score + trees.predict(lists.matrix, start_iteration=done, num_iteration=count - done)
        found.append(lists.ndcg(score, DEPTH) - plain)
        done = count
    return np.stack(found)


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


def _parameters(lists: Lists, gain: Sequence[float]) -> dict[str, object]:
    """LightGBM's settings: few rows grow small trees."""
    leaves = int(np.clip(len(lists.grade) // _ROWS_A_LEAF, *_LEAVES))
    return _PARAMETERS | {"num_leaves": leaves, "label_gain": list(gain)}


def _dataset(
    choice: ConditionalLogit,
    lists: Lists,
    grades: np.ndarray | None = None,
    like: lightgbm.Dataset | None = None,
) -> tuple[lightgbm.Dataset, list[float]]:
    """Rows as LightGBM reads them, and the gain of each grade: its share of the highest."""
    grades = np.unique(lists.grade) if grades is None else grades
    # LightGBM breaks ties by place: answers that come first would look well ranked before anything is
    # learned, and no tree would seem to help.
    drawn = np.random.default_rng(0).random(len(lists.grade))
    order = np.lexsort((drawn, lists.group()))
    matrix = lists.matrix[order]
    data = lightgbm.Dataset(
        matrix,
        np.searchsorted(grades, lists.grade[order]),
        weight=lists.weight[order],
        group=lists.size,
        init_score=choice.terms(matrix).sum(1, dtype=np.float64),
        reference=like,
    )
    return data, (grades / max(float(grades.max()), 1e-9)).tolist()
