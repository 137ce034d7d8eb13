"""Which part of the past fits and judges the models of a run, chosen by the number of baskets.

The last baskets are the ranking window: rankers are fitted on them, and models of earlier events describe
them. Its last part is the evaluation window. A shop with thousands of baskets a day needs two days, a small
or slow one months or years. In a shop that logs pages, their number counts instead. A window starts with a
day, and settings may fix its number of days.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from training.core.plural import plural
from training.data.config import MIN_RANKING_DAYS, ShopConfig
from training.data.events import Events
from training.examples.queries import DAY, baskets

ENOUGH = 4000
"""More baskets, or logged pages, than this make rankers hardly better."""
ENOUGH_TO_EVALUATE = 1000
_MAX_SHARE = 0.5  # of the baskets: the earlier ones are what features describe
_FEW, _MAX_SHARE_OF_FEW = 500, 0.75
_EVALUATION_SHARE = 0.25
_MAX_PARTS = 10
_MIN_PAGES = 200  # fewer do not say how far back to look


@dataclass(frozen=True)
class Windows:
    """The windows of a run; times are microseconds since 1970, each the start of a day.

    `since` starts the ranking window and `evaluated_from` the evaluation window; both end with the events.
    `tuned_from` starts the baskets before the ranking window that tune the item graph. `parts` int64 (P,),
    rising, cut the ranking window into parts of about equally many baskets: the features of a part come from
    an item graph of the events before it. `baskets`, `evaluated` and `earlier` count the baskets of the
    ranking window, of the evaluation window, and before both.
    """

    since: int
    evaluated_from: int
    tuned_from: int
    parts: np.ndarray
    baskets: int
    evaluated: int
    earlier: int
    end: int

    @property
    def days(self) -> int:
        """The length of the ranking window."""
        return (self.end - self.since) // DAY

    def to_dict(self) -> dict[str, Any]:
        """The form used in reports."""
        return {
            "since": _iso(self.since),
            "evaluated_from": _iso(self.evaluated_from),
            "days": self.days,
            "evaluated_days": (self.end - self.evaluated_from) // DAY,
            "baskets": self.baskets,
            "evaluated_baskets": self.evaluated,
            "earlier_baskets": self.earlier,
            "parts": len(self.parts),
        }

    def __str__(self) -> str:
        evaluated_days = (self.end - self.evaluated_from) // DAY
        return (
            f"rankers learn from the last {plural(self.days, 'day')}, from {_date(self.since)}, with "
            f"{plural(self.baskets, 'basket')}; the last {plural(evaluated_days, 'day')} of them, with "
            f"{plural(self.evaluated, 'basket')}, evaluate them; {plural(self.earlier, 'basket')} came before"
        )


def choose_windows(events: Events, settings: ShopConfig) -> Windows:
    """The windows of these events, in the order of time."""
    if not len(events):
        return Windows(0, 0, 0, np.zeros(1, np.int64), 0, 0, 0, 0)
    weights = dict(settings.event_types)
    engagements = [name for name, weight in weights.items() if weight > 0]
    # Rankers are fitted on baskets of every type, and evaluated on those that hold a target.
    day, count = _baskets_by_day(events, weights, engagements)
    target_day, target_count = _baskets_by_day(events, weights, settings.targets)
    end, first = int(events.time[-1] // DAY) + 1, int(events.time[0] // DAY)
    if fixed := settings.ranking.ranking_days:
        since = end - fixed
    else:
        pages = _pages_by_day(events, settings)
        since = min(_window_start(day, count, pages, end), end - MIN_RANKING_DAYS)
    in_window = target_day >= since
    if fixed := settings.split.test_days:
        evaluated_from = end - fixed
    else:
        start = _evaluation_start(target_day[in_window], target_count[in_window], end)
        evaluated_from = min(start, end - 1)
    early = _evaluation_start(target_day[~in_window], target_count[~in_window], since)
    tuned_from = min(early, since - (settings.split.test_days or 1))
    return Windows(
        since=since * DAY,
        evaluated_from=evaluated_from * DAY,
        tuned_from=max(tuned_from, min(first, since)) * DAY,
        parts=_parts(day[day >= since], count[day >= since], since) * DAY,
        baskets=int(count[day >= since].sum()),
        evaluated=int(target_count[target_day >= evaluated_from].sum()),
        earlier=int(count[day < since].sum()),
        end=end * DAY,
    )


def _window_start(
    day: np.ndarray, count: np.ndarray, pages: tuple[np.ndarray, np.ndarray] | None, end: int
) -> int:
    """The first day of the ranking window, by the pages of a shop that logs them, else by its baskets.

    If it would hold every basket, it starts a day later.
    """
    if pages is not None:
        page_day, page_count = pages
        return _start(page_day, page_count, min(ENOUGH, _MAX_SHARE * int(page_count.sum())), end)
    total = int(count.sum())
    wanted = min(ENOUGH, max(_MAX_SHARE * total, min(_FEW, _MAX_SHARE_OF_FEW * total)))
    start = _start(day, count, wanted, end)
    return int(day[1]) if len(day) > 1 and start <= day[0] else start


def _evaluation_start(day: np.ndarray, count: np.ndarray, end: int) -> int:
    """The first day of the last part of some baskets; a day later if it would hold all of them."""
    start = _start(day, count, min(ENOUGH_TO_EVALUATE, _EVALUATION_SHARE * int(count.sum())), end)
    return int(day[1]) if len(day) > 1 and start <= day[0] else start


def _pages_by_day(events: Events, settings: ShopConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """The days with logged pages, int64 (D,), rising, and the number of pages, (D,); None with few pages."""
    is_shown = np.array(list(settings.event_types.values()))[events.kind] == 0
    rows = np.flatnonzero(is_shown & (events.session >= 0))
    pages = np.unique(np.stack([events.time[rows], events.session[rows].astype(np.int64)]), axis=1)
    return np.unique(pages[0] // DAY, return_counts=True) if pages.shape[1] >= _MIN_PAGES else None


def _baskets_by_day(
    events: Events, weights: Mapping[str, float], targets: Collection[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The days with a basket that can make a query, int64 (D,), rising, and the number of them, (D,).

    Such a basket holds an event of a type in `targets`, and several items, or its user has engaged before.
    """
    kinds = list(weights)
    is_target = np.array([name in targets and weights[name] > 0 for name in kinds])
    rows = np.flatnonzero(np.array(list(weights.values()))[events.kind] > 0)
    if not len(rows):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    user, time = events.user[rows], events.time[rows]
    first_of_user = np.full(len(events.user_ids), np.iinfo(np.int64).max)
    np.minimum.at(first_of_user, user, time)
    _, place, basket = np.unique(baskets(events)[rows], return_index=True, return_inverse=True)
    start = np.full(len(place), np.iinfo(np.int64).max)
    np.minimum.at(start, basket, time)
    has_target = np.zeros(len(place), bool)
    has_target[basket[is_target[events.kind[rows]]]] = True
    items = np.unique(basket.astype(np.int64) * (len(events.item_ids) + 1) + events.item[rows])
    several = np.bincount(items // (len(events.item_ids) + 1), minlength=len(place)) > 1
    usable = has_target & (several | (first_of_user[user[place]] < start))
    return np.unique(start[usable] // DAY, return_counts=True)


def _start(day: np.ndarray, count: np.ndarray, wanted: float, end: int) -> int:
    """The latest day from which on there are so many baskets; the day before `end` if there is none."""
    remaining = np.cumsum(count[::-1])[::-1]
    sufficient = np.flatnonzero(remaining >= max(wanted, 1))
    return int(day[sufficient[-1]]) if len(sufficient) else end - 1


def _parts(day: np.ndarray, count: np.ndarray, since: int) -> np.ndarray:
    """The first days of at most ten parts of about as many baskets each, int64 (P,), rising from `since`."""
    if not len(day):
        return np.array([since], np.int64)
    if len(day) <= _MAX_PARTS:
        return np.unique([since, *day[1:]])
    before = np.cumsum(count) - count
    part = before * _MAX_PARTS // max(int(count.sum()), 1)
    starts = day[np.unique(part, return_index=True)[1]]
    starts[0] = since
    return np.asarray(starts, np.int64)


def _date(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).date().isoformat()


def _iso(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).isoformat()
