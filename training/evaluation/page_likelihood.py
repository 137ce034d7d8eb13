"""How well scores predict what users engage with on logged pages, next to the position of the items."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import log_expit

from training.core import metrics
from training.ranking.logistic import fit_logistic
from training.ranking.page_reranker import LoggedPages, center_on_pages, position_columns

POSITION, BUNDLE = "position alone", "whole bundle"
_MIN_PAGES = 4
_FIRST_POSITION = {"1": 1, "2": 2, "3": 3, "4-5": 4, "6-10": 6, "11+": 11}


def page_likelihood(scores: Mapping[str, np.ndarray], pages: LoggedPages) -> dict[str, dict[str, Any]]:
    """The log-likelihood of the engagements with the items of pages, given how many a page has, by method.

    `scores` float64 (N,) are of the rows and finite, one of them that of the whole bundle. A method is a
    logistic regression of its scores and of positions, fitted on one half of the pages and measured on the
    other.
    Each has "log_likelihood", the mean for an item; "gained" over positions alone; and "lost" against the
    whole bundle. Pages of which nothing or everything was engaged with are left out; empty with fewer than
    four others.
    """
    shows_choice = pages.shows_choice
    if np.count_nonzero(shows_choice) < _MIN_PAGES:
        return {}
    rows, pages = np.repeat(shows_choice, pages.groups.size), pages.take(shows_choice)
    scores = {name: score[rows] for name, score in scores.items()}
    by_method = {POSITION: pages.by_page(_by_row(None, pages))}
    by_method |= {name: pages.by_page(_by_row(score, pages)) for name, score in scores.items()}
    return {
        name: {
            "log_likelihood": metrics.interval(values).to_dict(),
            "gained": metrics.paired_interval(values, by_method[POSITION]).to_dict(),
            "lost": metrics.paired_interval(by_method[BUNDLE], values).to_dict(),
        }
        for name, values in by_method.items()
    }


def page_slices(
    score: np.ndarray, pages: LoggedPages, is_returning: np.ndarray, bands: np.ndarray
) -> dict[str, dict[str, dict[str, Any]]]:
    """The gain of scores over positions alone, as in `page_likelihood`, by slice of the rows.

    `score` float64 (N,) is finite. `is_returning` bool (Q,) marks pages of users with a history; `bands`
    str (N,) are the popularity bands of the items. The slices are by "position", "user" and "item"; those
    without rows are left out. Each has the number of its "rows", and "gained": the mean for a row, averaged
    over pages, or None with fewer than four pages. What is known about one row also says a little about the
    others, because the number of engagements on the page is given.
    """
    shows_choice = pages.shows_choice
    if np.count_nonzero(shows_choice) < _MIN_PAGES:
        return {}
    rows, pages = np.repeat(shows_choice, pages.groups.size), pages.take(shows_choice)
    gained = _by_row(score[rows], pages) - _by_row(None, pages)
    page = pages.groups.group()
    names = np.array([*_FIRST_POSITION, "unknown"])
    # Position 0 is before all of them: index -1, the last name.
    positions = names[np.searchsorted(list(_FIRST_POSITION.values()), pages.position, side="right") - 1]
    users = np.where(is_returning[shows_choice], "returning", "new")[page]
    slices: dict[str, tuple[Sequence[str], np.ndarray]] = {
        "position": (names.tolist(), positions),
        "user": (("returning", "new"), users),
        "item": (metrics.BANDS, bands[rows]),
    }
    return {
        kind: {name: _slice(gained[of == name], page[of == name]) for name in order if np.any(of == name)}
        for kind, (order, of) in slices.items()
    }


def _slice(gained: np.ndarray, page: np.ndarray) -> dict[str, Any]:
    """The mean gain of a slice, whose rows have gains float64 (S,) and pages int64 (S,)."""
    _, place, count = np.unique(page, return_inverse=True, return_counts=True)
    mean = np.bincount(place, gained) / count
    # Few pages that happen to agree would look certain.
    interval = metrics.interval(mean).to_dict() if len(mean) >= _MIN_PAGES else None
    return {"gained": interval, "rows": len(page)}


def _by_row(score: np.ndarray | None, pages: LoggedPages) -> np.ndarray:
    """The log-likelihood of each row, float64 (N,), by a model of the half that its page is not in."""
    design = position_columns(pages.position).astype(np.float64)
    if score is not None:
        design = np.column_stack([score, design])
    half = np.random.default_rng(0).permutation(len(pages.groups.size)) % 2 == 0
    in_half, logit = np.repeat(half, pages.groups.size), np.empty(len(design))
    for fitted in (in_half, ~in_half):
        logit[~fitted] = design[~fitted] @ fit_logistic(design[fitted], pages.engaged[fitted])
    logit = center_on_pages(pages, logit)
    return np.asarray(log_expit(np.where(pages.engaged, logit, -logit)))
