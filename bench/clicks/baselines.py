"""The simple scores of the data sets' READMEs: random, newest, click rates, category share of the history."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import numpy as np

from bench.clicks.logs import ClickLog, Page, Period

_RECENT = timedelta(hours=6)
_PRIOR = 10.0  # pages at the mean click rate, added to those of an item

Scores = list[np.ndarray]


def baseline_scores(name: str, log: ClickLog, period: Period, pages: Sequence[Page]) -> dict[str, Scores]:
    """Scores float64 (S,) of the items of each page by method."""
    training = [page for page in log.pages if page.time < period.start]
    generator = np.random.default_rng(0)
    rate = click_rates(training)
    scores = {
        "random": [generator.random(len(page.shown)) for page in pages],
        "click rate of the training days": [_each(page, rate) for page in pages],
        "click rate of the last six hours": _recent_rates(log.pages, pages),
    }
    if name == "ebnerd":
        return scores | {"newest id": [_each(page, float) for page in pages]}
    return scores | {"category share of the history": _category_shares(log, pages)}


def click_rates(pages: Sequence[Page]) -> Callable[[str], float]:
    """The smoothed click rate of an item on some pages."""
    shown = Counter(item for page in pages for item in page.shown)
    clicked = Counter(item for page in pages for item in page.clicked)
    mean = clicked.total() / max(shown.total(), 1)
    return lambda item: (clicked[item] + _PRIOR * mean) / (shown[item] + _PRIOR)


def _recent_rates(every: Sequence[Page], pages: Sequence[Page]) -> Scores:
    """Smoothed click rates of the six hours before each page, of strictly earlier pages."""
    window, shown, clicked = deque[Page](), Counter[str](), Counter[str]()
    scores, start = [], 0
    for page in pages:
        while every[start].time < page.time:
            window.append(every[start])
            shown.update(every[start].shown)
            clicked.update(every[start].clicked)
            start += 1
        while window and window[0].time < page.time - _RECENT:
            old = window.popleft()
            shown.subtract(old.shown)
            clicked.subtract(old.clicked)
        mean = clicked.total() / max(shown.total(), 1)
        scores.append(np.array([(clicked[i] + _PRIOR * mean) / (shown[i] + _PRIOR) for i in page.shown]))
    return scores


def _category_shares(log: ClickLog, pages: Sequence[Page]) -> Scores:
    """The share of the read items of a user that have the category of an item."""
    shares: dict[str, Counter[str]] = defaultdict(Counter)
    for read in log.reads:
        shares[read.user][str(log.items[read.item]["category"])] += 1

    def of(user: Mapping[str, int], item: str) -> float:
        return user.get(str(log.items[item]["category"]), 0) / max(sum(user.values()), 1)

    return [np.array([of(shares[page.user], item) for item in page.shown]) for page in pages]


def _each(page: Page, score: Callable[[str], float]) -> np.ndarray:
    return np.array([score(item) for item in page.shown])
