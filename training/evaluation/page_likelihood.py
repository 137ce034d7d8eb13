"""How well scores predict what users engage with on logged pages, next to the position of the items."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import log_expit

from training.core import metrics
from training.ranking.logistic import fit_logistic
from training.ranking.page_reranker import LoggedPages, center_on_pages, position_columns

POSITION, BUNDLE = "position alone", "whole bundle"
_MIN_PAGES = 4


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
    by_method = {POSITION: _by_page(None, pages)}
    by_method |= {name: _by_page(score, pages) for name, score in scores.items()}
    return {
        name: {
            "log_likelihood": metrics.interval(values).to_dict(),
            "gained": metrics.paired_interval(values, by_method[POSITION]).to_dict(),
            "lost": metrics.paired_interval(by_method[BUNDLE], values).to_dict(),
        }
        for name, values in by_method.items()
    }


def _by_page(score: np.ndarray | None, pages: LoggedPages) -> np.ndarray:
    """The mean log-likelihood of the rows of each page, float64 (Q,)."""
    design = position_columns(pages.position).astype(np.float64)
    if score is not None:
        design = np.column_stack([score, design])
    half = np.random.default_rng(0).permutation(len(pages.groups.size)) % 2 == 0
    in_half, logit = np.repeat(half, pages.groups.size), np.empty(len(design))
    for fitted in (in_half, ~in_half):
        logit[~fitted] = design[~fitted] @ fit_logistic(design[fitted], pages.engaged[fitted])
    logit = center_on_pages(pages, logit)
    return pages.by_page(log_expit(np.where(pages.engaged, logit, -logit)))
