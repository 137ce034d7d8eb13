"""Fits the reranker of a shop that logs pages: what is clicked among what was shown, wherever it stood.

A choice model orders the items of pages, and of past queries over the whole catalog at a tenth of their
grades: a page limits what a user can choose. Trees by LightGBM raise the likelihood of each item's engagement
from there, given how many its page has. Users look at the first places of a page more often. So both are
fitted next to effects of the position, as in the position-based click model (Craswell et al., 2008), which
are left out when ranking.

Models and columns are judged by the likelihood of what happened on later pages, with those effects and given
how many items of each page were engaged with.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightgbm
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import RerankerModel
from services.ranking.models.scaler import FeatureScaler
from training.examples.queries import DAY
from training.examples.ranking_groups import RankingGroups
from training.ranking.conditional_logit import fit_choice
from training.ranking.ctr import POSITIONS
from training.ranking.logistic import fit_logistic
from training.ranking.trees import PATIENCE, SETTINGS, tree_counts
from training.ranking.validation import MIN_GROUPS, best_count, mean_and_error, validation_mask

_QUERY_GRADE_SHARE = 0.1
# Of the log-likelihood of a row. Less is not worth the time that a model takes for a page.
_LEAST_GAIN = 0.0005
_ERRORS = 2  # of a gain, at least; by chance one in forty is as large
_MOST_LOGIT, _HALVINGS = 30.0, 40
_PARAMETERS = SETTINGS | {
    "objective": "binary",
    "num_leaves": 7,
    "min_data_in_leaf": 300,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedPages:
    """Pages as groups of rows; `position` int64 (N,) is the place of a row on its page, from 1; 0 unknown."""

    groups: RankingGroups
    position: np.ndarray

    def take(self, selected: np.ndarray) -> "LoggedPages":
        """Some of the pages, `selected` bool (Q,)."""
        return LoggedPages(self.groups.take(selected), self.position[np.repeat(selected, self.groups.size)])

    def select_columns(self, columns: np.ndarray) -> "LoggedPages":
        """The same pages with some columns, bool (K,)."""
        return replace(self, groups=self.groups.select_columns(columns))

    @property
    def engaged(self) -> np.ndarray:
        """Which rows have a grade, bool (N,)."""
        return np.asarray(self.groups.grade > 0)

    @property
    def shows_choice(self) -> np.ndarray:
        """Of which pages some rows were engaged with and others were not, bool (Q,)."""
        share = self.by_page(self.engaged)
        return np.asarray((share > 0) & (share < 1))

    def by_page(self, values: np.ndarray) -> np.ndarray:
        """The mean over the rows of each page, float64 (Q,)."""
        sums = np.bincount(self.groups.group(), values, len(self.groups.size))
        return np.asarray(sums / self.groups.size)


def fit_page_reranker(
    queries: RankingGroups, pages: LoggedPages, columns: Sequence[str], trees: int, *, exact: bool = False
) -> RerankerModel:
    """Fit a model with at most `trees` trees, or with so many if `exact`.

    With too few rows for a leaf LightGBM makes one tree, which changes no order.

    The last fifth of the pages, cut between days, decides how many trees to use, and whether trees help at
    all. If most pages are of the first day, a random fifth decides.
    """
    is_late = validation_mask(pages.groups)
    count = trees if exact and pages.shows_choice.any() else 0
    if trees and not exact and np.count_nonzero(is_late & pages.shows_choice) >= MIN_GROUPS:
        early, late = pages.take(~is_late), pages.take(is_late & pages.shows_choice)
        choice = _fit_choice(_before(queries, late), early, columns)
        count = _tree_count(choice, early, late, trees)
    choice = _fit_choice(queries, pages, columns)
    logit = _Logit.of(choice, pages)
    # On the scale of a logit: trees add to it.
    choice = replace(choice, weight=[weight * logit.scale for weight in choice.weight])
    if not count:
        return RerankerModel(choice, None)
    data = _dataset(pages, logit)
    return RerankerModel(choice, lightgbm.train(_PARAMETERS, data, count))


def improves_likelihood(
    queries: RankingGroups, pages: LoggedPages, columns: Sequence[str], tested: np.ndarray
) -> bool:
    """Whether the columns `tested`, bool (K,), raise the likelihood of later pages enough.

    Enough is more than two standard errors, and at least .0005 for the logarithm of a row's. True if there is
    too little data to decide.
    """
    is_late = validation_mask(pages.groups)
    if np.count_nonzero(is_late & pages.shows_choice) < MIN_GROUPS:
        return True
    early, late = pages.take(~is_late), pages.take(is_late & pages.shows_choice)
    queries, likelihoods = _before(queries, late), []
    for mask in (np.ones(len(columns), bool), ~tested):
        names = [name for name, selected in zip(columns, mask, strict=True) if selected]
        training = early.select_columns(mask)
        choice = _fit_choice(queries.select_columns(mask), training, names)
        logit = _Logit.of(choice, training)
        likelihoods.append(_likelihood(late, logit.of_pages(late.select_columns(mask))))
    mean, error = mean_and_error(likelihoods[0] - likelihoods[1])
    tested_names = [name for name, is_tested in zip(columns, tested, strict=True) if is_tested]
    _log.info("%s gain %.4f of log-likelihood, ± %.4f", ", ".join(tested_names), mean, error)
    return mean > max(_ERRORS * error, _LEAST_GAIN)


def _before(queries: RankingGroups, late: LoggedPages) -> RankingGroups:
    """The queries before the day of the first of some pages: later ones may be of the same visits."""
    return queries.take(queries.time < late.groups.time[0] // DAY * DAY)


def _fit_choice(queries: RankingGroups, pages: LoggedPages, columns: Sequence[str]) -> ConditionalLogit:
    """A choice model of pages and queries, without its effects of positions."""
    positions = np.delete(position_columns(pages.position), 1, axis=1)  # others are relative to the first
    nowhere = np.zeros((len(queries.grade), positions.shape[1]), np.float32)
    groups = RankingGroups.concatenate(
        [
            replace(
                queries,
                grade=_QUERY_GRADE_SHARE * queries.grade,
                matrix=np.concatenate([queries.matrix, nowhere], axis=1),
            ),
            replace(pages.groups, matrix=np.concatenate([pages.groups.matrix, positions], axis=1)),
        ]
    )
    names = [*columns, *(f"position {place}" for place in (0, *range(2, POSITIONS + 1)))]
    fitted, count = fit_choice(groups, names), len(columns)
    scales = fitted.scales
    return ConditionalLogit(
        list(columns),
        FeatureScaler(scales.unit[:count], scales.mean[:count], scales.scale[:count]),
        fitted.weight[:count],
    )


def position_columns(position: np.ndarray) -> np.ndarray:
    """A column for each position, float32 (N, 21): first for unknown ones, last for all later ones."""
    places = np.clip(position, 0, POSITIONS)
    return np.asarray(np.eye(POSITIONS + 1, dtype=np.float32)[places])


@dataclass(frozen=True)
class _Logit:
    """The logit of an engagement: a choice model's score times `scale`, and the effect of each position.

    Both are stretched so that they fit best after `center_on_pages`. Ten rows that share a constant which is
    fitted to them look a tenth more different than they are (Neyman and Scott, 1948), and trees would spend
    themselves on that.
    """

    choice: ConditionalLogit
    scale: float
    effects: np.ndarray

    @classmethod
    def of(cls, choice: ConditionalLogit, pages: LoggedPages) -> "_Logit":
        score = _score(choice, pages.groups)
        scale, *effects = fit_logistic(
            np.column_stack([score, position_columns(pages.position)]), pages.engaged
        ).tolist()
        # Where the choice model knows nothing, its order still counts.
        logit = cls(choice, scale if scale > 0 else 1e-3, np.array(effects))
        pages = pages.take(pages.shows_choice)
        if not len(pages.groups.size):
            return logit
        values = logit.of_pages(pages)
        stretch = minimize_scalar(
            lambda factor: -_likelihood(pages, factor * values).mean(),
            bounds=(0.5, 2),
            options={"xatol": 0.01},
        ).x
        return cls(choice, float(stretch * logit.scale), stretch * logit.effects)

    def of_pages(self, pages: LoggedPages) -> np.ndarray:
        """The logit of each row, float64 (N,)."""
        effects = position_columns(pages.position) @ self.effects
        return np.asarray(self.scale * _score(self.choice, pages.groups) + effects)


def _score(choice: ConditionalLogit, groups: RankingGroups) -> np.ndarray:
    return np.asarray(choice.terms(groups.matrix).sum(1, dtype=np.float64))


def _likelihood(pages: LoggedPages, logit: np.ndarray) -> np.ndarray:
    """The mean log-likelihood of the rows of each page, given how many were engaged with, float64 (Q,)."""
    logit = center_on_pages(pages, logit)
    return pages.by_page(log_expit(np.where(pages.engaged, logit, -logit)))


def center_on_pages(pages: LoggedPages, logit: np.ndarray) -> np.ndarray:
    """The logits (N,) shifted so that the probabilities of a page add up to its number of engagements.

    So a model gains by which rows of a page were engaged with, and not by how many, which orders nothing.
    Nothing is gained on a page that does not show a choice: those are left out where gains are averaged.
    """
    group, count = pages.groups.group(), len(pages.groups.size)
    engaged, first = (
        np.bincount(group, pages.engaged, count),
        np.cumsum(pages.groups.size) - pages.groups.size,
    )
    low = -np.maximum.reduceat(logit, first) - _MOST_LOGIT
    high = -np.minimum.reduceat(logit, first) + _MOST_LOGIT
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_high = np.bincount(group, expit(logit + middle[group]), count) > engaged
        low, high = np.where(is_high, low, middle), np.where(is_high, middle, high)
    return np.asarray(logit + low[group])


def _tree_count(choice: ConditionalLogit, early: LoggedPages, late: LoggedPages, limit: int) -> int:
    """The best number of trees for later pages; 0 if the gain is not significant or less than .0005."""
    logit = _Logit.of(choice, early)
    training, start = _dataset(early, logit), logit.of_pages(late)
    validation = _dataset(late, logit, training)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    booster = lightgbm.train(_PARAMETERS, training, limit, valid_sets=[validation], callbacks=[stop])
    counts = tree_counts(booster.current_iteration())
    base, gains, used = _likelihood(late, start), [], 0
    for count in counts.tolist():
        more = booster.predict(
            late.groups.matrix, start_iteration=used, num_iteration=count - used, raw_score=True
        )
        start, used = start + more, count
        gains.append(_likelihood(late, start) - base)
    best, crossed = best_count(counts, np.stack(gains))
    if len(crossed) < MIN_GROUPS:
        return 0
    mean, error = mean_and_error(crossed)
    _log.info("trees gain %.4f of log-likelihood, ± %.4f; %d is the best number", mean, error, best)
    return best if mean > max(_ERRORS * error, _LEAST_GAIN) else 0


def _dataset(
    pages: LoggedPages, logit: _Logit, reference: lightgbm.Dataset | None = None
) -> lightgbm.Dataset:
    """The rows of the pages that show a choice, which trees start on from the logit of `center_on_pages`."""
    pages = pages.take(pages.shows_choice)
    return lightgbm.Dataset(
        pages.groups.matrix,
        pages.engaged.astype(np.float32),
        weight=pages.groups.weight,
        init_score=center_on_pages(pages, logit.of_pages(pages)),
        reference=reference,
    )
